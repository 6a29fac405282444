"""Dale's principle and one learning-rate factor a parameter, under everything that can happen to a network."""

import functools
import itertools
import math

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_lightning.callbacks.weight_averaging import EMAWeightAveraging, WeightAveraging
from pytorch_lightning.tuner import Tuner
from test_groups import KEPT
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_danns import (
    DANNMLP,
    MLP,
    ColumnEILinear,
    ColumnEIMLP,
    DaleModule,
    DaleProjection,
    DANNConv2d,
    DANNLinear,
    DiagonalNGD,
    LayerGradientClipping,
    UsageError,
    fisher_param_groups,
    project_,
)
from lightning_danns.layers import imbalances, sign_violations
from lightning_danns.optim import clip_layers_, fisher_optimizer


class Shifted(DaleModule):
    """A researcher's own layer: one signed parameter with a factor, one free one."""

    nonnegative = ("W",)

    def __init__(self, d, n):
        super().__init__()
        self.W, self.shift = nn.Parameter(torch.rand(n, d)), nn.Parameter(torch.zeros(n))

    def lr_factors(self):
        return {"W": 0.5}

    def forward(self, x):
        return x @ self.W.T + self.shift


LAYERS = {
    "dense": lambda d, n, ni: DANNLinear(d, n, min(ni, n)),
    "subtractive": lambda d, n, ni: DANNLinear(d, n, min(ni, n), divisive=False, bias=False),
    "iid": lambda d, n, ni: DANNLinear(d, n, min(ni, n), inputs="pixels", inhibition="iid"),
    "channels": lambda d, n, ni: nn.Sequential(nn.Unflatten(-1, (d, 1, 1)), DANNConv2d(d, n, min(ni, n), 1), FLAT),
    "pixels": lambda d, n, ni: nn.Sequential(nn.Unflatten(-1, (1, d, 1)), DANNConv2d(1, n, min(ni, n), (d, 1)), FLAT),
    "columns": lambda d, n, ni: ColumnEILinear(d, n, min(ni, d - 1)),
    "own": lambda d, n, ni: Shifted(d, n),
}
FLAT = nn.Flatten()
SGD, ADAM = torch.optim.SGD, torch.optim.Adam
OPTIMIZERS = {
    "SGD": SGD,
    "momentum and decay": functools.partial(SGD, momentum=0.9, weight_decay=0.1),
    "Nesterov": functools.partial(SGD, momentum=0.9, nesterov=True, foreach=True),
    "fused SGD": functools.partial(SGD, momentum=0.9, fused=True),
    "Adam": functools.partial(ADAM, foreach=False),
    "foreach Adam": functools.partial(ADAM, foreach=True, amsgrad=True),
    "fused Adam": functools.partial(ADAM, fused=True),
    "AdamW": functools.partial(torch.optim.AdamW, weight_decay=0.5),
    "RMSprop": functools.partial(torch.optim.RMSprop, momentum=0.5, centered=True),
    "Adagrad": torch.optim.Adagrad,
    "NAdam": torch.optim.NAdam,
    "DiagonalNGD": DiagonalNGD,
}


@settings(deadline=None, max_examples=100)
@given(
    layer=st.sampled_from(sorted(LAYERS)), optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    lr=st.sampled_from([1e-3, 1.0, 1e4, 1e30]), d=st.integers(2, 6), n=st.integers(1, 6), ni=st.integers(1, 3),
    accumulate=st.integers(1, 2), clip=st.sampled_from(["no", "norm", "layers"]), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_projection_is_max_of_0_for_signed_parameters_and_nothing_for_others(
    layer, optimizer, lr, d, n, ni, accumulate, clip, seed
):
    torch.manual_seed(seed)
    model = nn.Sequential(LAYERS[layer](d, n, ni), nn.ReLU(), DANNLinear(n, 3, 1))
    signed = {p for m in model.modules() if isinstance(m, DaleModule) for _, p in m.nonnegative_parameters()}
    ngd = optimizer == "DiagonalNGD"
    optimizer = OPTIMIZERS[optimizer](fisher_param_groups(model, "none" if ngd else "fisher", lr=lr))
    for _ in range(3):
        optimizer.zero_grad()
        for _ in range(accumulate):
            x = torch.rand(4, d)
            nn.functional.cross_entropy(model(x), torch.randint(3, (4,))).backward()
            if ngd:
                optimizer.update_fisher(model, x)
        if clip == "norm":
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        elif clip == "layers":
            clip_layers_(model, optimizer, 0.1)
        optimizer.step()
        stepped = {p: p.detach().clone() for p in model.parameters()}
        project_(model)
        for parameter, before in stepped.items():
            expected = torch.where(before < 0, 0, before) if parameter in signed else before  # a NaN stays, to show
            torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=0, equal_nan=True)
        assert not any(low < 0 for low in sign_violations(model).values())


class Witness(pl.Callback):
    """Looks at the weights wherever a callback can, and remembers the hooks that saw one which is not >= 0."""

    def __init__(self):
        self.hooks, self.saw = set(), {}


AVERAGED = ("on_validation_epoch_start", "on_validation_end", "on_save_checkpoint", "on_train_end")
"""Hooks between the moment that averages are put in place and the moment that they are balanced."""


def _witness(hook):
    def look(self, trainer, pl_module, *args):
        self.hooks.add(hook)
        violations = sign_violations(pl_module) or (hook not in AVERAGED and imbalances(pl_module))
        if violations:
            self.saw.setdefault(hook, violations)

    return look


for _hook in [name for name in dir(pl.Callback) if name.startswith("on_") and name != "on_exception"]:
    setattr(Witness, _hook, _witness(_hook))

IMAGES = torch.rand(24, 1, 4, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(4, (24,), generator=torch.Generator().manual_seed(1))


class InMemory(pl.LightningDataModule):
    batch_size, pixel_mean = 4, 0.5

    def train_dataloader(self):
        return DataLoader(TensorDataset(IMAGES, LABELS), self.batch_size)

    val_dataloader = train_dataloader


def make(cls=DANNMLP, lr=1.0, **kwargs):
    torch.manual_seed(0)
    sizes = {"input_shape": (1, 4, 4), "num_classes": 4, "hidden_sizes": [8, 8]}
    return cls(**{**sizes, "optimizer": functools.partial(SGD, lr=lr), **kwargs})


class Toggled(DANNMLP):
    automatic_optimization = False

    def configure_optimizers(self):
        return [SGD(layer.parameters(), lr=1.0) for layer in (self.network[1], self.network[-1])]

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            with optimizer.toggle_model():
                optimizer.zero_grad()
                self.manual_backward(self.step(batch)[2])
                optimizer.step()


class OwnStep(DANNMLP):
    def optimizer_step(self, epoch, batch_idx, optimizer, closure):
        optimizer.optimizer.step(closure=closure)  # past Lightning's wrapper


class SaveAlways(pl.Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.save_checkpoint(self.folder / f"{trainer.current_epoch}-{batch_idx}.ckpt")


class Replace(pl.Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        trainer.optimizers = [SGD(pl_module.parameters(), lr=1.0)]


SIGNED = {"Wex", "Wix", "Wei", "g", "W"}
EVERYWHERE = {
    *("on_train_batch_start", "on_train_batch_end", "on_train_epoch_end", "on_save_checkpoint", "on_fit_end"),
    *("on_validation_start", "on_validation_batch_end", "on_validation_epoch_end", "on_validation_end"),
}
FITS = {  # module, Trainer
    "plain": (make, {}),
    "as published": (functools.partial(make, balanced=False), {}),
    "EMA of balanced": (functools.partial(make, balanced=True), {"callbacks": lambda: [EMAWeightAveraging(decay=0.5)]}),
    "balanced columns": (functools.partial(make, ColumnEIMLP, pixel_mean=0.5, balanced=True), {}),
    "accumulation": (make, {"accumulate_grad_batches": 2}),
    "clipping by the Trainer": (functools.partial(make, lr=100.0), {"gradient_clip_val": 0.1}),
    "clipping by layer": (functools.partial(make, lr=100.0), {"callbacks": lambda: [LayerGradientClipping(0.1)]}),
    "columns": (functools.partial(make, ColumnEIMLP, pixel_mean=0.5), {}),
    "bf16-mixed": (make, {"precision": "bf16-mixed"}),
    "bf16-true": (make, {"precision": "bf16-true"}),
    "Adam": (functools.partial(make, optimizer=functools.partial(ADAM, lr=0.1)), {}),
    "EMA": (make, {"callbacks": lambda: [EMAWeightAveraging(decay=0.5)]}),
    "EMA of columns": (functools.partial(make, ColumnEIMLP), {"callbacks": lambda: [EMAWeightAveraging(decay=0.5)]}),
    "averaging of columns": (functools.partial(make, ColumnEIMLP), {"callbacks": lambda: [WeightAveraging()]}),
    "two optimizers": (functools.partial(make, Toggled), {}),
    "replaced optimizers": (make, {"callbacks": lambda: [Replace()]}),
    "own optimizer_step": (functools.partial(make, OwnStep), {}),
    "anomaly detection": (make, {"detect_anomaly": True}),
}


def fit(make_trainer, module, options, folder, *extra):
    first, last = Witness(), Witness()
    between = options.get("callbacks", list)()
    options = {"max_epochs": 2, "val_check_interval": 3, **options}
    trainer = make_trainer(**{**options, "callbacks": [first, *extra, *between, SaveAlways(folder), last]})
    trainer.fit(module, datamodule=InMemory())
    return first, last


def nonnegative_checkpoints(folder):
    """How many checkpoints there are; asserts that their signed weights are, averaged ones too."""
    paths = list(folder.glob("*.ckpt"))
    for path in paths:
        checkpoint = torch.load(path, weights_only=True)
        for weights in (checkpoint["state_dict"], checkpoint.get("current_model_state", {})):
            signed = {key: value for key, value in weights.items() if key.rsplit(".", 1)[-1] in SIGNED}
            assert all(bool((value >= 0).all()) for value in signed.values()), path
    return len(paths)


@pytest.mark.parametrize("name", FITS)
def test_no_hook_and_no_checkpoint_of_a_fit_sees_a_negative_weight(name, make_trainer, tmp_path):
    module, options = FITS[name]
    for witness in fit(make_trainer, module(), options, tmp_path):
        assert witness.saw == {}
        assert witness.hooks >= EVERYWHERE
    assert nonnegative_checkpoints(tmp_path) >= 12

    class Idle(DaleProjection):
        def project(self, pl_module):
            """Nothing: so the steps of this fit are large enough to need the projection."""

    with pytest.raises(UsageError, match=r"weights that must be >= 0 are not: network\.\d\.W"):
        fit(make_trainer, module(), options, tmp_path / "idle", Idle())
    assert nonnegative_checkpoints(tmp_path / "idle") <= 1  # before the first step


@pytest.mark.parametrize("how", ["module", "network"])
def test_compiled_modules_obey_dale_too(how, make_trainer, tmp_path):
    module = make()
    if how == "network":
        module.network.compile(backend="aot_eager")
    else:
        module = torch.compile(module, backend="eager")
    witness, _ = fit(make_trainer, module, {"max_epochs": 1, "limit_train_batches": 3}, tmp_path)
    assert witness.saw == sign_violations(module) == {}
    assert witness.hooks >= EVERYWHERE


def test_weights_that_are_not_numbers_end_the_fit_and_reach_no_checkpoint(make_trainer, tmp_path):
    for lr in (math.inf, math.nan):
        with pytest.raises(UsageError, match=rf"SGD has learning rate lr={lr}: .* finite"):
            make_trainer().fit(make(lr=lr), datamodule=InMemory())
    with pytest.raises(UsageError, match=r"network\.1\.Wex \(lowest value nan\).*lower the learning rate"):
        fit(make_trainer, make(lr=1e30), {}, tmp_path)
    with pytest.raises(UsageError, match=r"lowest value nan"):
        make_trainer().fit(make(lr=1e30), datamodule=InMemory())  # no checkpoint to stop at
    nonnegative_checkpoints(tmp_path)


def test_a_loss_that_is_not_a_number_shows_in_the_mean(make_trainer):
    class Diverging(MLP):
        def step(self, batch):
            batch[0][0, 0, 0, 0] = math.nan if self.global_step == 3 else 0.5
            return super().step(batch)

    trainer = make_trainer()
    trainer.fit(make(Diverging, lr=0.0), train_dataloaders=InMemory().train_dataloader())
    assert trainer.callback_metrics["train_loss"].isnan()


def test_weights_written_from_outside_reach_no_checkpoint(make_trainer, tmp_path):
    class Meddle(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            pl_module.network[1].Wex.data[0, 0] = -0.5

    with pytest.raises(UsageError, match=r"network\.1\.Wex \(lowest value -0\.5\).*project_"):
        fit(make_trainer, make(lr=0.1), {"callbacks": lambda: [Meddle()]}, tmp_path)
    assert not list(tmp_path.glob("*.ckpt"))


def rates(optimizer):
    return {group["name"]: (float(group["lr"]), group["lr_scale"]) for group in optimizer.param_groups}


@settings(deadline=None, max_examples=60)
@given(
    scheduler=st.sampled_from(sorted(KEPT)), optimizer=st.sampled_from(["SGD", "fused Adam", "RMSprop", "Adagrad"]),
    lr=st.floats(1e-4, 10), steps=st.integers(1, 12), reload_at=st.integers(0, 12),
)  # fmt: skip
def test_each_rate_is_the_base_rate_times_its_factor_at_every_step(scheduler, optimizer, lr, steps, reload_at):
    """Against the same scheduler over one plain parameter; the state is saved and loaded anew on the way."""
    factory = functools.partial(OPTIMIZERS[optimizer], lr=lr)
    model = nn.Sequential(DANNLinear(9, 6, 2), nn.ReLU(), DANNLinear(6, 3, 1))

    def start():
        scaled = fisher_optimizer(factory, fisher_param_groups(model))
        return scaled, KEPT[scheduler](scaled)

    (ours, schedule), plain = start(), factory([nn.Parameter(torch.zeros(1))])
    plain_schedule = KEPT[scheduler](plain)
    factors = {name: factor for name, (_, factor) in rates(ours).items()}
    assert len(factors) == 7
    for step in range(steps):
        if step == reload_at:
            states = ours.state_dict(), schedule.state_dict()
            ours, schedule = start()
            ours.load_state_dict(states[0])
            schedule.load_state_dict(states[1])
        for stepped in (ours, plain, schedule, plain_schedule):
            stepped.step()
        base = plain.param_groups[0]["lr"]
        for name, (rate, factor) in rates(ours).items():
            assert factor == factors[name]
            assert rate == pytest.approx(base * factor, rel=1e-9, abs=1e-15)


class Rates(pl.Callback):
    """The rates of every group at every step."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append(rates(optimizer))


def test_a_factor_is_applied_once_in_any_sequence_of_fits_and_resumptions(make_trainer, tmp_path):
    halving = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    make_halving = functools.partial(make, lr=0.1, lr_scheduler=halving)

    def steps(module, epochs, **options):
        spy = Rates()
        trainer = make_trainer(callbacks=[spy], max_epochs=epochs)
        trainer.fit(module, datamodule=InMemory(), **options)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return spy.seen

    module = make_halving()
    straight = steps(module, 4)
    assert len(straight) == 24
    for step, groups in enumerate(straight):
        for rate, factor in groups.values():
            assert rate == pytest.approx(0.1 * 0.5 ** (step // 6) * factor, rel=1e-12)
    assert steps(module, 2) == straight[:12]  # a second fit with the same module
    assert steps(make_halving(), 4, ckpt_path=tmp_path / "2.ckpt") == straight[12:]
    loaded = DANNMLP.load_from_checkpoint(tmp_path / "2.ckpt", optimizer=functools.partial(SGD, lr=0.1))
    assert steps(loaded, 1)[0] == straight[0]


def test_factors_are_applied_once():
    model = DANNLinear(9, 6, 2)
    ready = fisher_param_groups(model, lr=0.1)
    for factory in (SGD, functools.partial(SGD, lr=0.7)):  # groups with a rate of their own keep it
        for group, wanted in zip(fisher_optimizer(factory, ready).param_groups, ready, strict=True):
            assert group["lr"] == wanted["lr"] == pytest.approx(0.1 * group["lr_scale"])


def test_the_tuner_cannot_search_rates_without_projection(make_trainer):
    class Searchable(DANNMLP):
        lr = 1.0

    with pytest.raises(UsageError, match=r"other callbacks aside: use python -m lightning_danns\.sweep"):
        Tuner(make_trainer()).lr_find(make(Searchable), datamodule=InMemory(), num_training=10)


def test_the_batch_size_search_keeps_rates_and_signs(make_trainer):
    model, trainer = make(), make_trainer(callbacks=[spy := Rates()])
    data = InMemory()
    Tuner(trainer).scale_batch_size(model, datamodule=data, max_trials=2, steps_per_trial=2)
    trainer.fit(model, datamodule=data)
    assert sign_violations(model) == {}
    assert all(rate == pytest.approx(factor) for rate, factor in itertools.chain(*(s.values() for s in spy.seen)))
