"""Balanced inhibition: each unit's total inhibition equals its total excitation, whatever the optimizer does."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import start, wait
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_danns import ColumnEILinear, DaleModule, DANNConv2d, DANNLinear, UsageError, project_
from lightning_danns.initialization import inhibition_groups_
from lightning_danns.layers import Balance, imbalance, imbalances, sign_violations

float64 = {"dtype": torch.float64}
LAYERS = {
    "dense": lambda **options: DANNLinear(6, 5, 2, **options),
    "one interneuron": lambda **options: DANNLinear(6, 5, 1, **options),
    "subtractive": lambda **options: DANNLinear(6, 5, 3, divisive=False, bias=False, **options),
    "published start": lambda **options: DANNLinear(6, 5, 2, inhibition="mean", **options),
    "iid start": lambda **options: DANNLinear(6, 5, 2, inhibition="iid", **options),
    "convolution": lambda **options: DANNConv2d(4, 7, 3, (3, 2), **options),
    "groups": lambda **options: DANNConv2d(4, 6, 4, 3, groups=2, **options),
    "depthwise": lambda **options: DANNConv2d(4, 8, 4, 3, groups=4, **options),
    "columns": lambda **options: ColumnEILinear(6, 5, 2, **options),
}
OPTIMIZERS = {
    "SGD": lambda parameters, lr: torch.optim.SGD(parameters, lr),
    "momentum": lambda parameters, lr: torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=0.01),
    "Adam": lambda parameters, lr: torch.optim.Adam(parameters, lr),
}


def make(kind, seed=0, **options):
    torch.manual_seed(seed)
    return LAYERS[kind](**{"balanced": True, **options})


def uniform_input(layer, value=1.0, dtype=torch.float64):
    return torch.full((1, 4, 6, 6) if isinstance(layer, DANNConv2d) else (1, 6), value, dtype=dtype)


def rows_of_the_net_weight(layer):
    """Sum of each row of Wex - Wei Wix (or of W D), unit by unit, beside the row's total excitation; in float64."""
    if isinstance(layer, ColumnEILinear):
        net = (layer.W * layer.sign).double()
        return net.sum(1), (layer.W * (layer.sign > 0)).double().sum(1)
    Wex, Wix, Wei = (weight.detach().double() for weight in (layer.Wex, layer.Wix, layer.Wei))
    of_group = layer.ni // layer.groups
    sums = []
    for unit in range(layer.ne):
        first = unit * layer.groups // layer.ne * of_group  # this unit's group has these interneurons
        inhibition = sum(Wei[unit, k] * Wix[first + k].sum() for k in range(of_group))
        sums.append(Wex[unit].sum() - inhibition)
    return torch.stack(sums), Wex.flatten(1).sum(1)


def assert_balanced(layer, tolerance):
    net, excitation = rows_of_the_net_weight(layer)
    assert bool((net.abs() <= tolerance * excitation)[excitation > 0].all()), (net, excitation)


@pytest.fixture(params=LAYERS)
def kind(request):
    return request.param


@settings(deadline=None, max_examples=150)
@given(
    kind=st.sampled_from(sorted(LAYERS)), optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    exponent=st.floats(-3, 6), dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 10**6),
)  # fmt: skip
def test_signs_and_balance_hold_after_any_step(kind, optimizer, exponent, dtype, seed):
    layer = make(kind, seed, dtype=dtype)
    stepper = OPTIMIZERS[optimizer](layer.parameters(), 10**exponent)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(4):
        for parameter in layer.parameters():  # of any size, unlike those of a loss, which diverges first
            size = 10 ** torch.empty(()).uniform_(-4, 2, generator=generator)
            parameter.grad = (size * torch.randn(parameter.shape, generator=generator)).to(dtype)
        stepper.step()
        project_(layer)
        assert sign_violations(layer) == {}
        assert imbalances(layer) == {}
        assert_balanced(layer, {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.01}[dtype])


def test_training_moves_balance_and_the_projection_restores_it(kind):
    layer = make(kind, **float64)
    x = torch.rand_like(uniform_input(layer))
    stepper = torch.optim.SGD(layer.parameters(), 0.1)
    layer(x).square().sum().backward()
    stepper.step()
    assert float(imbalance(layer).max()) > 1e-6
    project_(layer)
    assert_balanced(layer, 1e-14)


@pytest.mark.parametrize("value", [1e-3, 1.0, 50.0])
def test_a_uniform_input_is_cancelled_exactly_in_every_unit(kind, value):
    layer = make(kind, **float64)
    stepper = torch.optim.SGD(layer.parameters(), 0.1)
    layer(torch.rand_like(uniform_input(layer))).square().sum().backward()
    stepper.step()
    project_(layer)
    parts = layer.components(uniform_input(layer, value))
    torch.testing.assert_close(parts.subtraction, parts.z_e, rtol=1e-13, atol=0)
    b = torch.zeros(()) if layer.b is None else layer.b.view(-1, *[1] * (-1 - layer.unit_dim))
    z = layer(uniform_input(layer, value))
    torch.testing.assert_close(z, b.expand_as(z).double(), rtol=0, atol=1e-10 * max(1, value))


def loss_in_balance(layer, x, name, change):
    """Loss of a copy of ``layer`` whose parameter ``name`` is changed, after a projection."""
    moved = copy.deepcopy(layer)
    with torch.no_grad():
        getattr(moved, name).add_(change)
    project_(moved)
    return moved(x).square().mean().item()


def test_gradients_are_those_of_the_loss_after_the_next_projection(kind):
    layer = make(kind, **float64)
    x = torch.rand_like(uniform_input(layer).expand(3, *uniform_input(layer).shape[1:]))
    layer(x).square().mean().backward()
    for name, parameter in layer.named_parameters():
        change = 1e-6 * torch.randn_like(parameter) * parameter.abs().clamp(max=1)  # too little to clamp
        ends = [loss_in_balance(layer, x, name, sign * change) for sign in (1, -1)]
        assert (ends[0] - ends[1]) / 2 == pytest.approx(float((parameter.grad * change).sum()), rel=1e-5, abs=1e-15)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_what_is_computed_is_in_balance_whatever_the_weights_are(kind, half):
    layer = make(kind, **float64)
    with torch.no_grad():
        for name in layer.balancing:
            getattr(layer, name).mul_(1.5)
    x = torch.rand_like(uniform_input(layer))
    moved = copy.deepcopy(layer)
    project_(moved)
    torch.testing.assert_close(layer(x), moved(x))
    rounded = copy.deepcopy(layer).to(half)  # its rounded weights are not in balance, what it computes is
    assert float(rounded(torch.ones_like(x, dtype=half)).detach().abs().max()) < 0.05
    with pytest.raises(UsageError, match="Silent has no balance"):
        Silent().in_balance()


class Silent(DaleModule):
    pass


@pytest.mark.parametrize("inputs", ["pixels", "rectified"])
def test_standardised_units_never_lose_their_excitation_to_a_gradient(inputs):
    """Behind a standardisation a unit does not depend on the size of its rows: no gradient may point along them."""
    torch.manual_seed(0)
    layer = DANNLinear(12, 7, 2, divisive=False, bias=False, balanced=True, inputs=inputs, **float64)
    x = torch.rand(50, 12, dtype=torch.float64)
    u = layer(x)
    ((u / u.std(0) - torch.randn(7, dtype=torch.float64)) * torch.randn_like(u)).mean().backward()
    along = (layer.Wex.grad * layer.Wex).sum(1)
    size = layer.Wex.grad.norm(dim=1) * layer.Wex.norm(dim=1)
    assert float((along / size).abs().max()) < 1e-12


def test_a_unit_that_lost_all_its_excitation_is_silent_and_comes_back(kind):
    layer = make(kind, **float64)
    excitation = layer.W if kind == "columns" else layer.Wex
    with torch.no_grad():
        excitation[0] *= 0 if kind != "columns" else (layer.sign < 0)
    project_(layer)
    x = torch.rand_like(uniform_input(layer))
    z = layer(x).movedim(layer.unit_dim, 0)[0]
    torch.testing.assert_close(z, torch.zeros_like(z), rtol=0, atol=1e-10)
    z.sum().backward()
    assert bool((excitation.grad[0] != 0).any())


def test_balanced_layers_are_made_and_projected_without_storage(kind):
    with torch.device("meta"):
        layer = make(kind)
    project_(layer)
    assert layer(uniform_input(layer).float().to("meta")).is_meta


def first_over_second(eps):
    """Relative gradients of two balanced convolutions, on images with a white half."""
    torch.manual_seed(0)
    layers = [DANNConv2d(c, 8, 2, 3, padding=1, balanced=True, eps=eps) for c in (3, 8)]
    images = torch.rand(4, 3, 12, 12)
    images[..., 6:] = 1
    z = layers[1](torch.relu(layers[0](images)))
    (z * torch.randn_like(z)).mean().backward()
    first, second = ((layer.Wex.grad.norm() / layer.Wex.norm()).item() for layer in layers)
    return first / second


@pytest.mark.parametrize("eps", [None, 1e-2, 1e-8])
def test_where_balance_silences_a_layer_the_next_one_does_not_amplify_gradients(eps):
    assert first_over_second(eps) < 3


def test_balanced_layers_saturate_and_published_ones_do_not():
    assert [DANNLinear(6, 5, 2, balanced=balanced).eps for balanced in (False, True)] == [1e-8, 0.3]


@settings(deadline=None, max_examples=60)
@given(
    ne=st.integers(1, 9), ni=st.integers(1, 9), groups=st.integers(1, 3), seed=st.integers(0, 10**6),
    balanced=st.booleans(),
)  # fmt: skip
def test_groups_centre_exactly_for_any_number_of_interneurons(ne, ni, groups, seed, balanced):
    torch.manual_seed(seed)
    ni = min(ni, ne)
    options = {"inhibition": "groups", "balanced": balanced, **float64}
    layer = DANNConv2d(2 * groups, ne * groups, ni * groups, 3, groups=groups, **options)
    if balanced:  # then the rows of Wei are scaled: undo it
        layer.Wei.data.div_(layer.Wei.sum(1, keepdim=True))
    for Wex, Wix, Wei in zip(*(w.chunk(groups) for w in (layer.Wex, layer.Wix, layer.Wei)), strict=True):
        mean = Wex.flatten(1).mean(0).expand(ne, -1)
        torch.testing.assert_close(Wei @ Wix.flatten(1), mean, rtol=1e-12, atol=1e-14)


def test_groups_differ_in_size_by_one_at_most():
    Wex, Wix, Wei = torch.rand(11, 4, **float64), torch.empty(4, 4, **float64), torch.empty(11, 4, **float64)
    inhibition_groups_(Wix, Wei, Wex)
    sizes = (11 * Wei[0]).round().tolist()
    assert sorted(sizes) == [2, 3, 3, 3]
    assert torch.equal(Wei, Wei[:1].expand_as(Wei))


ZEROS = {
    "a unit without excitation": lambda layer: layer.Wex.data[1].zero_(),
    "no excitation": lambda layer: layer.Wex.data.zero_(),
    "a unit without inhibition": lambda layer: layer.Wei.data[1].zero_(),
    "an interneuron without input": lambda layer: layer.Wix.data[0].zero_(),
    "interneurons without input": lambda layer: layer.Wix.data.zero_(),
    "no inhibition": lambda layer: (layer.Wei.data.zero_(), layer.Wix.data.fill_(-1)),
    "nothing": lambda layer: [p.data.zero_() for _, p in layer.nonnegative_parameters()],
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ZEROS)
@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind != "columns"])
def test_totals_of_zero_leave_finite_weights_in_balance(kind, case, dtype):
    layer = make(kind, dtype=dtype)
    ZEROS[case](layer)
    project_(layer)
    assert sign_violations(layer) == {}
    assert all(bool(p.isfinite().all()) for p in layer.parameters())
    assert_balanced(layer, 2 * torch.finfo(dtype).eps + 1e-6 * (dtype == torch.float32))
    assert bool(layer(uniform_input(layer, 0.5, dtype)).isfinite().all())


@pytest.mark.parametrize("sizes", [(1e20, 1.0), (1.0, 1e20), (1e20, 1e20), (1e-20, 1.0), (1.0, 1e-20), (1e-20, 1e-20)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_huge_and_tiny_weights_stay_finite_and_non_negative(kind, sizes, dtype):
    layer = make(kind, dtype=dtype)
    for name, parameter in layer.nonnegative_parameters():
        parameter.data.mul_(sizes[0] if name in ("Wex", "g") else sizes[1])
    if kind == "columns":
        layer.W.data[:, :4] *= sizes[0] / sizes[1]
    project_(layer)
    assert sign_violations(layer) == {}
    assert all(bool(p.isfinite().all()) for p in layer.parameters())
    if sizes[1] <= 1:  # otherwise inhibition, a product of two weights, is beyond float32
        assert_balanced(layer, 0.02 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_infinite_and_missing_numbers_spread_to_no_other_unit(dtype):
    layer = make("dense", dtype=dtype)
    layer.Wex.data[1, 0], layer.Wex.data[2, 0] = float("inf"), float("nan")
    project_(layer)
    assert bool(layer.Wei.isfinite().all())
    assert not bool(imbalance(layer)[[0, 3, 4]].gt(0.01).any())
    assert imbalances(layer) == {"": pytest.approx(float("nan"), nan_ok=True)}


def test_a_layer_that_a_model_holds_twice_is_balanced_once():
    layer = make("one interneuron", **float64)
    model = nn.ModuleList([layer, nn.Sequential(layer)])
    layer.Wei.data.mul_(3)
    project_(model)
    assert_balanced(layer, 1e-14)


def test_without_balance_the_projection_is_a_plain_clamp_to_the_bit(kind):
    layer = make(kind, balanced=False)
    for parameter in layer.parameters():
        parameter.data.sub_(0.1)
    expected = {name: p.detach().clone() for name, p in layer.named_parameters()}
    for name, _ in layer.nonnegative_parameters():
        expected[name] = expected[name].clamp(min=0)
    project_(layer)
    assert all(torch.equal(p, expected[name]) for name, p in layer.named_parameters())
    assert imbalances(layer) == {}  # it does not claim to be balanced


def test_balance_scales_inhibition_and_nothing_else(kind):
    layer = make(kind)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.rand_like(parameter))
    before = copy.deepcopy(layer)
    project_(layer)
    if kind == "columns":
        assert torch.equal(layer.W[:, :4], before.W[:, :4])
        scale = layer.W[:, 4:] / before.W[:, 4:]
    else:
        assert all(torch.equal(p, before.get_parameter(n)) for n, p in layer.named_parameters() if n != "Wei")
        scale = layer.Wei / before.Wei
    torch.testing.assert_close(scale, scale[:, :1].expand_as(scale))
    assert float((scale - 1).abs().max()) > 0.01


def test_columns_without_inhibitory_inputs_have_nothing_to_balance():
    layer = ColumnEILinear(6, 5, 0, balanced=True)
    before = layer.W.clone()
    project_(layer)
    assert torch.equal(layer.W, before)
    assert imbalance(layer) is None


class Own(DaleModule):
    """A user's layer: excitation E, inhibition J."""

    nonnegative, balancing = ("E", "J"), ("J",)

    def __init__(self, balanced):
        super().__init__()
        self.E, self.J, self.balanced = nn.Parameter(torch.rand(3, 4)), nn.Parameter(torch.rand(3, 2)), balanced

    def balance(self):
        return Balance(self.E.sum(1), self.J.sum(1), self.J)


def test_a_users_own_layer_is_balanced_by_declaring_it():
    torch.manual_seed(0)
    model = nn.ModuleList([Own(True), Own(False), make("groups"), make("dense", **float64)])
    untouched = model[1].J.clone()
    for parameter in model[0].parameters():
        parameter.data.sub_(0.3)
    model[0].J.data[0] = -1.0  # all of it: comes back because J declares to be balancing
    project_(model)
    torch.testing.assert_close(model[0].J.sum(1), model[0].E.sum(1))
    assert torch.equal(model[1].J, untouched)
    assert imbalances(model) == {}
    model[0].J.data.mul_(1.01)
    assert imbalances(model) == {"0": pytest.approx(0.01, rel=1e-3)}


def test_a_layer_that_says_balanced_but_not_by_what_is_refused():
    class Forgot(DaleModule):
        nonnegative = ("W",)
        balanced = True

        def __init__(self):
            super().__init__()
            self.W = nn.Parameter(torch.rand(3, 4))

    for ask in (project_, imbalances, Forgot.in_balance):
        with pytest.raises(UsageError, match=r"Forgot is balanced, but has no balance\(\)"):
            ask(Forgot())


def test_copies_and_loaded_weights_are_balanced_like_the_original(kind):
    layer, other = make(kind), make(kind, seed=1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.rand_like(parameter))
    twin = copy.deepcopy(layer)
    other.load_state_dict(layer.state_dict())
    for model in (layer, twin, other):
        project_(model)
    assert all(
        torch.equal(p, q)
        for model in (twin, other)
        for p, q in zip(layer.parameters(), model.parameters(), strict=True)
    )
    assert twin.balanced


def test_averaged_weights_are_balanced_after_a_projection(kind):
    layer = make(kind)
    averaged = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    with torch.no_grad():
        for _ in range(3):
            for parameter in layer.parameters():
                parameter.add_(torch.rand_like(parameter))
            project_(layer)
            averaged.update_parameters(layer)
    project_(averaged)
    assert_balanced(averaged.module, 1e-5)
    assert sign_violations(averaged) == {}


def test_a_projection_under_autocast_is_as_exact_as_without(kind):
    layer = make(kind)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.rand_like(parameter))
    twin = copy.deepcopy(layer)
    project_(layer)
    with torch.autocast("cpu", torch.bfloat16):  # as in a training_step that steps by itself
        project_(twin)
        assert imbalances(twin) == {}
    assert all(torch.equal(p, q) for p, q in zip(layer.parameters(), twin.parameters(), strict=True))


def test_reset_weights_are_balanced(kind):
    layer = make(kind, **float64)
    for parameter in layer.parameters():
        parameter.data.fill_(7)
    layer.reset_parameters()
    assert_balanced(layer, 1e-14)


def test_compiled_layers_train_to_the_same_balanced_weights(kind):
    results = []
    for compiled in (False, True):
        layer = make(kind, **float64)
        forward = torch.compile(layer, backend="aot_eager") if compiled else layer
        stepper = torch.optim.SGD(layer.parameters(), 0.1)
        forward(
            torch.rand(uniform_input(layer).shape, generator=torch.Generator().manual_seed(0), **float64)
        ).square().sum().backward()
        stepper.step()
        project_(layer)
        assert_balanced(layer, 1e-14)
        results.append(list(layer.parameters()))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="sharding fails within torch 2.6 on CPUs")
def test_shards_are_balanced_like_whole_weights():
    def nets():
        torch.manual_seed(0)
        net = nn.Sequential(
            DANNLinear(6, 5, 2, balanced=True), nn.ReLU(), DANNLinear(5, 3, 1, balanced=True),
            nn.ReLU(), ColumnEILinear(3, 3, 1, balanced=True),
        )  # fmt: skip
        conv = DANNConv2d(4, 6, 4, 3, groups=2, balanced=True)
        return nn.ModuleList([net, conv])

    def work(rank):
        torch.distributed.init_process_group("gloo")
        whole, sharded = nets(), nets()
        for module in (sharded[0][0], sharded[0][2], sharded[0][4], sharded[1]):  # one interneuron: rank 1 has none
            fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
        noise = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for own, part in zip(whole.parameters(), sharded.parameters(), strict=True):
                change = torch.rand(own.shape, generator=noise) - 0.3
                own.add_(change)
                part.copy_(
                    torch.distributed.tensor.distribute_tensor(
                        part.full_tensor() + change, part.device_mesh, part.placements
                    )
                )
        project_(whole)
        project_(sharded)
        assert imbalances(whole) == imbalances(sharded) == {}
        for own, part in zip(whole.parameters(), sharded.parameters(), strict=True):
            torch.testing.assert_close(part.full_tensor(), own.detach())

    assert wait(start(work, 2)) == [0, 0]
