"""Each quantity against a loop over samples and units; the callback against steps by hand, and training left alone."""

import copy
import csv
import functools
import math

import pytest
import pytorch_lightning as pl
import torch
from conftest import QUIET, SMALL
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_lightning.loggers import CSVLogger
from test_layers import perturbed
from torch import nn
from torch.optim import optimizer as torch_optimizer
from torch.utils.data import DataLoader, TensorDataset

from lightning_danns import (
    DANNMLP,
    MLP,
    ColumnEILinear,
    DaleDiagnostics,
    DaleModule,
    DaleProjection,
    DANNConv2d,
    DANNLinear,
    DiagonalNGD,
    MNISTDataModule,
    ReplicatedClassifier,
    UsageError,
    project_,
)
from lightning_danns.analysis.diagnostics import (
    LayerActivity,
    effective_rank,
    inspectable_layers,
    layer_diagnostics,
    projection_cosine,
    singular_value_entropy,
    weight_diagnostics,
)
from lightning_danns.networks import StandardFamily


def by_loops(layer, xs):
    """The quantities of activity, sample by sample and unit by unit in Python floats."""
    z_es, subtractions, zs, z_is, ms, ds = [], [], [], [], [], []
    w = {name: p.tolist() for name, p in layer.named_parameters()}
    for x in xs.tolist():
        if isinstance(layer, ColumnEILinear):
            ne = layer.in_features - layer.ni
            z_i = x[ne:]
            z_e = [sum(a * b for a, b in zip(row[:ne], x[:ne], strict=True)) for row in w["W"]]
            inhibition = [sum(a * b for a, b in zip(row[ne:], z_i, strict=True)) for row in w["W"]]
        else:
            z_i = [sum(a * b for a, b in zip(row, x, strict=True)) for row in w["Wix"]]
            z_e = [sum(a * b for a, b in zip(row, x, strict=True)) for row in w["Wex"]]
            inhibition = [sum(a * b for a, b in zip(row, z_i, strict=True)) for row in w["Wei"]]
        z_hat = [e - i for e, i in zip(z_e, inhibition, strict=True)]
        if "alpha" in w:
            gains = [math.exp(a) * i for a, i in zip(w["alpha"], z_i, strict=True)]
            z_hat = [
                v / (sum(a * b for a, b in zip(row, gains, strict=True)) + 1e-8)
                for v, row in zip(z_hat, w["Wei"], strict=True)
            ]
        m = sum(z_hat) / len(z_hat)
        ms.append(m)
        ds.append(math.sqrt(sum((v - m) ** 2 for v in z_hat) / len(z_hat)))
        z_es += z_e
        subtractions += inhibition
        z_is.append(z_i)
        g = w.get("g", [1] * len(z_hat))
        zs.append([gain * v + b for gain, v, b in zip(g, z_hat, w["b"], strict=True)])
    units = [sum(column) / len(zs) for column in zip(*zs, strict=True)]
    c = sum(units) / len(units)
    varying = sum((z - c) ** 2 for row in zs for z in row) / len(zs)
    silent = [all(z[k] <= 0 for z in zs) for k in range(len(zs[0]))]
    mute = [all(z_i[k] == 0 for z_i in z_is) for k in range(len(z_is[0]))]
    n = len(ms)
    return {
        "ei_ratio": sum(z_es) / sum(subtractions),
        "z_mean": sum(ms) / n,
        "z_std": sum(ds) / n,
        "centring_error": math.sqrt(sum(m * m for m in ms) / n),
        "scaling_error": math.sqrt(sum((d - 1) ** 2 for d in ds) / n),
        "constant_share": sum((unit - c) ** 2 for unit in units) / varying,
        "dead_units": sum(silent) / len(silent),
        "dead_interneurons": sum(mute) / len(mute),
    }


LAYERS = {
    "dann": lambda d, n, ni: DANNLinear(d, n, ni),
    "subtractive": lambda d, n, ni: DANNLinear(d, n, ni, divisive=False),
    "column_ei": lambda d, n, ni: ColumnEILinear(d, n, ni),
}


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([*LAYERS]), st.integers(3, 6), st.integers(2, 5), st.integers(1, 2), st.integers(1, 4),
    st.integers(0, 999),
)  # fmt: skip
def test_quantities_of_activity_equal_loops_also_over_several_batches(kind, d, n, ni, samples, seed):
    torch.manual_seed(seed)
    layer = perturbed(LAYERS[kind](d, n, ni)).double()
    layer.b.data -= 0.5  # some units die
    if kind != "column_ei":
        layer.Wix.data[0] = 0  # and one interneuron
        layer.Wix.data[-1] += 0.1 * (ni > 1)
    x = torch.rand(samples, d, dtype=torch.float64) * (torch.rand(samples, d) < 0.7)
    x[:, 0] += 0.1
    x[0, -1] += 0.1
    if kind != "column_ei" and ni == 1:
        layer.Wix.data += 0.1
    expected = by_loops(layer, x)
    activity = LayerActivity()
    for part in x.split(2):
        activity.update(layer, part)
    assert activity.compute() == pytest.approx(expected, rel=1e-7)
    assert {name: layer_diagnostics(layer, x)[name] for name in expected} == pytest.approx(expected, rel=1e-7)


def test_a_convolution_of_one_pixel_has_the_quantities_of_the_dense_layer():
    torch.manual_seed(0)
    dense, conv = DANNLinear(5, 6, 2).double(), DANNConv2d(5, 6, 2, kernel_size=1).double()
    for name, parameter in conv.named_parameters():
        parameter.data = getattr(dense, name).data.view(parameter.shape)
    x = torch.rand(7, 5, dtype=torch.float64)
    expected = layer_diagnostics(dense, x)
    assert layer_diagnostics(conv, x[:, :, None, None]) == pytest.approx(expected, rel=1e-12)
    assert layer_diagnostics(conv, x.T.reshape(1, 5, 7, 1)) == pytest.approx(expected, rel=1e-12)  # samples as pixels


def test_an_ordinary_layer_has_what_layernorm_would_remove():
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 4).double(), torch.randn(9, 6, dtype=torch.float64)
    z = layer(x).detach()
    normalised = nn.functional.layer_norm(z, (4,), eps=0)
    values = layer_diagnostics(layer, x)
    assert set(values) == {
        *("z_mean", "z_std", "centring_error", "scaling_error", "effective_rank", "spectral_entropy"),
        *("constant_share", "imbalance"),
    }
    m, d = z.mean(1), ((z - z.mean(1, keepdim=True)) / normalised).mean(1)
    assert values["z_mean"] == pytest.approx(m.mean().item())
    assert values["z_std"] == pytest.approx(d.mean().item())


def test_balance_removes_the_constant_that_is_the_same_for_every_image():
    torch.manual_seed(0)
    images = torch.rand(64, 3, 9, 9) + torch.rand(64, 1, 1, 1)  # of a large mean
    values = {
        balanced: layer_diagnostics(DANNConv2d(3, 20, 4, 3, balanced=balanced), images) for balanced in (False, True)
    }
    assert values[False]["constant_share"] > 0.5 > 10 * values[True]["constant_share"]
    assert values[False]["imbalance"] > 0.1 > 1e5 * values[True]["imbalance"]


def test_the_constant_share_is_1_of_a_constant_and_0_where_units_differ_only_by_image():
    layer = nn.Linear(2, 2).double()
    layer.weight.data, layer.bias.data = torch.eye(2).double(), torch.zeros(2).double()
    constant, x = torch.tensor([[1.0, 2.0]]).expand(5, 2).double(), torch.tensor([[0.0, 1.0], [1.0, 0.0]]).double()
    assert layer_diagnostics(layer, constant)["constant_share"] == pytest.approx(1)
    assert layer_diagnostics(layer, x)["constant_share"] == pytest.approx(0)
    assert math.isnan(layer_diagnostics(layer, torch.zeros(3, 2).double())["constant_share"])


def test_imbalance_is_the_mean_over_units_of_excitation_less_inhibition_over_excitation():
    layer = perturbed(DANNConv2d(4, 6, 4, 3, groups=2))
    net, excitation = layer.net_weight().flatten(1).sum(1).tolist(), layer.Wex.flatten(1).sum(1).tolist()
    expected = sum(abs(n) / e for n, e in zip(net, excitation, strict=True)) / 6
    assert weight_diagnostics(layer)["imbalance"] == pytest.approx(expected, rel=1e-5)
    ordinary = nn.Linear(3, 2)
    ordinary.weight.data = torch.tensor([[3.0, -1.0, -1.0], [-1.0, 1.0, 0.0]])
    assert weight_diagnostics(ordinary)["imbalance"] == pytest.approx((1 / 3 + 0) / 2)


@pytest.mark.parametrize("balanced", [False, True])
def test_units_that_lost_their_excitation_are_counted(balanced):
    layer = DANNConv2d(4, 8, 2, 3, balanced=balanced)
    assert weight_diagnostics(layer)["lost_units"] == 0
    layer.Wex.data[1] = 0
    layer.Wex.data[2] *= 1e-6
    layer.Wex.data[3] *= 0.01
    assert weight_diagnostics(layer)["lost_units"] == 2 / 8
    layer.Wex.data.zero_()
    assert weight_diagnostics(layer)["lost_units"] == 1


def test_an_ordinary_layer_with_centred_rows_is_looked_at_and_balanced():
    layer = StandardFamily("centred").dense(6, 4, 1, first=False, last=False)[0]
    ((name, found),) = inspectable_layers(nn.Sequential(layer))
    assert (name, found) == ("0", layer)
    assert layer_diagnostics(layer, torch.rand(3, 6))["imbalance"] < 1e-6


def test_net_weights_act_as_their_layers_without_division_and_bias():
    torch.manual_seed(0)
    x = torch.rand(3, 6, dtype=torch.float64)
    for layer in (DANNLinear(6, 4, 2, divisive=False, bias=False), ColumnEILinear(6, 4, 2, bias=False)):
        torch.testing.assert_close(x @ layer.double().net_weight().T, layer(x))
    conv = DANNConv2d(6, 4, 2, 1, groups=2, divisive=False, bias=False).double()
    by_group = torch.cat([part @ w.flatten(1).T for part, w in zip(x.chunk(2, 1), conv.net_weight().chunk(2))], 1)  # noqa: B905
    torch.testing.assert_close(by_group, conv(x[:, :, None, None])[..., 0, 0])


@settings(deadline=None, max_examples=30)
@given(st.lists(st.just(0.0) | st.floats(1e-3, 9), min_size=1, max_size=6).filter(any), st.integers(0, 999))
def test_effective_rank_equals_its_definition_for_known_singular_values(sigma, seed):
    torch.manual_seed(seed)
    n = len(sigma)
    u, v = (torch.linalg.qr(torch.randn(n + k, n, dtype=torch.float64)).Q for k in (0, 2))
    p = [value / sum(sigma) for value in sigma if value > 0]
    entropy = -sum(share * math.log(share) for share in p)
    W = u @ torch.diag(torch.tensor(sigma, dtype=torch.float64)) @ v.T
    assert effective_rank(W) == pytest.approx(math.exp(entropy), rel=1e-6)
    layer = nn.Linear(n + 2, n, bias=False).double()
    layer.weight.data = W
    expected = entropy / math.log(n) if n > 1 else 1.0
    assert weight_diagnostics(layer)["spectral_entropy"] == pytest.approx(expected, abs=1e-6)


def test_weights_that_have_diverged_have_no_rank_but_do_not_stop_a_fit():
    assert math.isnan(effective_rank(torch.full((3, 4), math.nan)))
    assert math.isnan(effective_rank(torch.full((3, 4), math.inf)))
    assert math.isnan(singular_value_entropy(torch.zeros(3, 4)))


def test_zeros_are_counted_in_every_signed_parameter():
    layer = DANNLinear(4, 5, 2)
    layer.Wex.data[:2] = 0
    layer.Wei.data[0, 0] = 0
    layer.b.data.zero_()
    values = weight_diagnostics(layer)
    zeros = {name: value for name, value in values.items() if name.startswith("zeros")}
    assert zeros == pytest.approx({"zeros_Wex": 0.4, "zeros_Wix": 0.0, "zeros_Wei": 0.1, "zeros_g": 0.0})


def test_the_cosine_is_of_the_steps_and_has_its_limits():
    start = [torch.tensor([1.0, 0.0]), torch.tensor([0.5])]
    stepped = [torch.tensor([1.0, -3.0]), torch.tensor([-3.5])]
    projected = [t.clamp(min=0) for t in stepped]
    # steps (0, -3, -4) and (0, 0, -0.5)
    assert projection_cosine(start, stepped, projected) == pytest.approx(4 / 5)
    assert projection_cosine(start, stepped, stepped) == pytest.approx(1)
    assert projection_cosine(start[:1], stepped[:1], projected[:1]) == 0  # nothing is left
    assert math.isnan(projection_cosine(start, start, start))


class Excitatory(DaleModule):
    """Somebody's layer, which says nothing but which weights are signed."""

    nonnegative = ("W",)

    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(torch.tensor([[0.0, 1.0], [0.5, 0.5]]))

    def forward(self, x):
        return x @ self.W.T


def test_a_new_layer_without_components_has_the_quantities_of_its_weights():
    assert layer_diagnostics(Excitatory(), torch.rand(3, 2)) == {"zeros_W": 0.25}


# the callback


def batches(n=24, batch_size=4):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(n, 1, 4, 4, generator=generator), torch.randint(4, (n,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


def small_dann(lr=2.0, **kwargs):
    torch.manual_seed(0)
    optimizer = functools.partial(torch.optim.SGD, lr=lr)
    return DANNMLP(input_shape=(1, 4, 4), num_classes=4, hidden_sizes=[8, 8], ni=2, optimizer=optimizer, **kwargs)


def rows_of(path):
    """Rows of a metrics.csv with a quantity of a layer, their empty cells left out."""
    with open(path) as file:
        rows = [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]
    return [row for row in rows if any("/" in name for name in row)]


def assert_no_hooks_left(model):
    assert not torch_optimizer._global_optimizer_post_hooks
    assert not torch_optimizer._global_optimizer_pre_hooks
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize(("accumulate", "lr"), [(1, 0.1), (3, 0.5)])
def test_logged_cosines_are_those_of_steps_taken_by_hand(accumulate, lr, balanced, make_trainer):
    twin = small_dann(lr, balanced=balanced).double()
    project_(twin)  # as a fit does first: in balance to float32 so far
    optimizer = twin.configure_optimizers()
    cosines = {name: [] for name in ("network.1", "network.3", "network.5")}
    for k, (x, y) in enumerate(batches()):
        (nn.functional.cross_entropy(twin(x.double()), y) / accumulate).backward()
        if (k + 1) % accumulate:
            continue
        old = copy.deepcopy(twin.network)
        optimizer.step()
        for name in cosines:
            layer = twin.network[int(name[-1])]
            steps = {key: (weights.data, weights.detach().clone()) for key, weights in layer.nonnegative_parameters()}
            for projected, _ in steps.values():
                projected.clamp_(min=0)
            if balanced:
                inhibition = (layer.Wei @ layer.Wix).sum(1, keepdim=True).detach()
                layer.Wei.data *= layer.Wex.detach().sum(1, keepdim=True) / inhibition
            free, kept = [], []
            for key, (projected, stepped) in steps.items():
                start = getattr(old[int(name[-1])], key).detach()
                free += (stepped - start).flatten().tolist()
                kept += (projected - start).flatten().tolist()
            dot = sum(a * b for a, b in zip(free, kept, strict=True))
            cosines[name].append(dot / math.sqrt(sum(a * a for a in free) * sum(b * b for b in kept)))
        optimizer.zero_grad()
    callback = DaleDiagnostics(every_n_batches=accumulate)  # batches 0, 3, ...: the step comes two batches later
    trainer = make_trainer(callbacks=[callback], precision="64-true", accumulate_grad_batches=accumulate)
    trainer.fit(small_dann(lr, balanced=balanced), batches())
    assert min(map(min, cosines.values())) < 0.997  # something was clamped
    for name, values in cosines.items():
        assert callback.latest[f"{name}/projection_cosine"] == pytest.approx(sum(values) / len(values), rel=1e-9)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, DiagonalNGD])  # which differentiates the batch once more
def test_logged_activities_are_those_of_the_inspected_batches(optimizer, make_trainer):
    callback = DaleDiagnostics(every_n_batches=2)
    model = small_dann(correction="none")
    model.optimizer_factory = functools.partial(optimizer, lr=0.0)
    make_trainer(callbacks=[callback]).fit(model, batches())
    x = torch.cat([x for k, (x, _) in enumerate(batches()) if k % 2 == 0]).flatten(1)
    for index in (1, 3, 5):
        expected = layer_diagnostics(model.network[index], x)
        logged = {q: callback.latest[f"network.{index}/{q}"] for q in expected}
        assert logged == pytest.approx(expected, rel=1e-4, abs=1e-6)
        x = model.network[index](x).relu()
    assert not any("cosine" in name for name in callback.latest)  # of no step


def test_mixed_precision_does_not_round_what_is_looked_at(make_trainer):
    callback = DaleDiagnostics(every_n_batches=1)
    model = small_dann(0.0)
    make_trainer(callbacks=[callback], precision="bf16-mixed").fit(model, batches())
    expected = layer_diagnostics(model.network[1], torch.cat([x for x, _ in batches()]).flatten(1))
    assert callback.latest["network.1/z_std"] == pytest.approx(expected["z_std"], rel=1e-5)
    assert callback.latest["network.1/ei_ratio"] == pytest.approx(expected["ei_ratio"], rel=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
def test_weights_and_random_numbers_are_the_same_to_the_bit_with_and_without(frozen, make_trainer):
    class Dropping(MLP):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.network.insert(1, nn.Dropout(0.3))
            self.network.append(DANNLinear(4, 4, 1))

        def forward(self, images):
            return super().forward(images).abs()

    ends = []
    for callbacks in ([], [DaleDiagnostics(every_n_batches=1)]):
        torch.manual_seed(0)
        model = Dropping(input_shape=(1, 4, 4), num_classes=4, hidden_sizes=[8], norm="batch")
        model.network[-2].requires_grad_(not frozen)
        model.network[-2].register_forward_hook(lambda module, args, output: output.relu())
        make_trainer(callbacks=callbacks, max_epochs=2).fit(model, batches(), batches())
        ends.append([*model.state_dict().values(), torch.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_each_epoch_has_a_row_in_the_log_that_one_can_turn_on_from_the_command_line(run, data_dir):
    options = ["--trainer.callbacks+=DaleDiagnostics", "--trainer.callbacks.every_n_batches=2"]
    run("fit", *SMALL, *QUIET, "--trainer.max_epochs=2", "--run_dir=run", "--data.val_size=0", *options)
    rows = rows_of(data_dir / "run" / "metrics.csv")
    assert [(row["epoch"], row["step"]) for row in rows] == [("0", "6"), ("1", "13")]
    quantities = {name.partition("/")[2] for name in rows[0] if name.startswith("network.1/")}
    assert quantities == {
        *("ei_ratio", "z_mean", "z_std", "centring_error", "scaling_error", "dead_units", "dead_interneurons"),
        *("constant_share", "imbalance", "lost_units"),
        *("zeros_Wex", "zeros_Wix", "zeros_Wei", "zeros_g", "effective_rank", "spectral_entropy"),
        "projection_cosine",
    }
    assert set(rows[0]) == set(rows[1])
    wrong = [options[0], "--trainer.callbacks.every_n_epochs=0"]
    output = run("fit", *SMALL, *QUIET, "--run_dir=other", *wrong, status=2)
    assert "every_n_epochs=0" in output


def test_a_fit_that_goes_on_within_an_epoch_logs_the_whole_epoch(make_trainer, data_dir):
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 10:
                trainer.save_checkpoint(data_dir / "part.ckpt")

    def fit(name, ckpt_path=None):
        torch.manual_seed(0)
        model = DANNMLP(hidden_sizes=[8], ni=2, optimizer=functools.partial(torch.optim.SGD, lr=1.0))
        callbacks = [DaleDiagnostics(every_n_batches=2), *([] if ckpt_path else [Save()])]
        trainer = make_trainer(callbacks=callbacks, max_epochs=2, logger=CSVLogger(data_dir, name, ""))
        trainer.fit(model, datamodule=MNISTDataModule(str(data_dir), val_size=0), ckpt_path=ckpt_path)
        return rows_of(data_dir / name / "metrics.csv")

    whole = fit("whole")
    (row,) = fit("resumed", data_dir / "part.ckpt")
    assert row == whole[1] != whole[0]


def test_an_epoch_that_ends_early_is_logged_and_others_only_when_they_are_due(make_trainer, tmp_path):
    def epochs(**kwargs):
        name = str(len(list(tmp_path.iterdir())))
        callback = DaleDiagnostics(every_n_epochs=kwargs.pop("every", 1))
        trainer = make_trainer(callbacks=[callback], logger=CSVLogger(tmp_path, name, ""), **kwargs)
        trainer.fit(small_dann(), batches())
        return [row["epoch"] for row in rows_of(tmp_path / name / "metrics.csv")]

    assert epochs(max_epochs=5, every=2) == ["1", "3"]
    assert epochs(max_epochs=-1, max_steps=8) == ["0", "1"]


def test_a_row_is_of_its_epoch_alone(make_trainer):
    each, second = DaleDiagnostics(), DaleDiagnostics(every_n_epochs=2)
    for callback in (each, second):
        make_trainer(callbacks=[callback], max_epochs=2).fit(small_dann(0.1), batches())
    assert each.latest == second.latest


class Odd(pl.LightningModule):
    """A layer called twice, one never, one frozen, one that tells nothing, and optimization by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.twice, self.never = DANNLinear(16, 16, 2), DANNLinear(16, 4, 1)
        self.silent, self.frozen = Excitatory(), DANNLinear(2, 2, 1).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        h = self.twice(self.twice(batch[0].flatten(1)).relu()).relu()[:, 14:]
        self.manual_backward(self.frozen(self.silent(h)).square().sum())
        optimizer.step()
        optimizer.zero_grad()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_layers_used_in_odd_ways_have_the_quantities_that_they_can_have(make_trainer):
    callback = DaleDiagnostics()
    torch.manual_seed(0)
    model = Odd()
    make_trainer(callbacks=[callback, DaleProjection()]).fit(model, batches())
    of = {name: set() for name, _ in model.named_children()}
    for column in callback.latest:
        name, _, quantity = column.partition("/")
        of[name].add(quantity)
    assert {"projection_cosine", "ei_ratio", "effective_rank"} <= of["twice"]
    assert {"zeros_Wex", "effective_rank"} <= of["never"]
    assert not {"projection_cosine", "ei_ratio"} & of["never"]
    assert of["silent"] == {"zeros_W", "projection_cosine"}
    assert "ei_ratio" in of["frozen"]
    assert "projection_cosine" not in of["frozen"]
    assert_no_hooks_left(model)


def test_only_the_trainers_optimizers_are_watched_and_not_after_the_fit(make_trainer):
    other = torch.optim.SGD(nn.Linear(1, 1).parameters())

    class Looking(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            self.hooks = [len(o._optimizer_step_pre_hooks) for o in (*trainer.optimizers, other)]

    looking, model = Looking(), small_dann()
    trainer = make_trainer(callbacks=[DaleDiagnostics(), looking])
    trainer.fit(model, batches())
    assert looking.hooks[0] > 0 == looking.hooks[1]
    (optimizer,) = trainer.optimizers
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_nothing_hangs_on_after_a_fit_that_failed_within_an_inspected_batch(make_trainer):
    class Failing(DANNMLP):
        def on_before_zero_grad(self, optimizer):
            raise RuntimeError("stop")

    model = Failing(input_shape=(1, 4, 4), num_classes=4, hidden_sizes=[8], ni=2)
    with pytest.raises(RuntimeError, match="stop"):
        make_trainer(callbacks=[DaleDiagnostics()]).fit(model, batches())
    assert_no_hooks_left(model)


def test_a_compiled_network_is_not_looked_into_but_its_weights_are(make_trainer):
    callback = DaleDiagnostics(every_n_batches=2)
    model = small_dann()
    model.network.compile(backend="eager")
    make_trainer(callbacks=[callback]).fit(model, batches())
    assert {"network.1/effective_rank", "network.1/projection_cosine"} <= set(callback.latest)
    assert not any("ei_ratio" in name for name in callback.latest)


def test_replicas_and_numbers_below_one_are_refused(make_trainer):
    model = ReplicatedClassifier(functools.partial(DANNMLP, hidden_sizes=[8]), seeds=[0, 1], input_shape=(1, 4, 4))
    with pytest.raises(UsageError, match="one network"):
        make_trainer(callbacks=[DaleDiagnostics()]).fit(model, batches())
    for options in ({"every_n_epochs": 0}, {"every_n_batches": -1}):
        with pytest.raises(UsageError, match="at least 1"):
            DaleDiagnostics(**options)
