"""What torch does with layers: other orders of operations, transforms, compilers and precisions give the same z."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, stack_module_state, vmap

from lightning_danns import DANNConv2d, DANNLinear

LAYERS = {
    "linear": lambda **options: DANNLinear(6, 5, 2, **options),
    "conv": lambda **options: DANNConv2d(4, 6, 2, 3, padding=1, **options),
    "groups": lambda **options: DANNConv2d(4, 6, 2, 3, padding=1, groups=2, **options),
    "balanced linear": lambda **options: DANNLinear(6, 5, 2, balanced=True, **options),
    "balanced conv": lambda **options: DANNConv2d(4, 6, 2, 3, padding=1, balanced=True, **options),
}


def case(kind, dtype=torch.float64, **options):
    """A layer whose parameters are off their special start values, and an input."""
    torch.manual_seed(0)
    layer = LAYERS[kind](dtype=dtype, **options)
    for parameter in layer.parameters():
        parameter.data += 0.1 * torch.rand_like(parameter)
    return layer, torch.rand((3, 6) if kind.endswith("linear") else (3, 4, 5, 5), dtype=dtype) + 0.1


def out_of_balance(layer):
    """The layer without balance: gradients along the balance are differences of gradients of its size."""
    twin = copy.copy(layer)  # with the same parameters
    twin.balanced = False
    return twin


@pytest.fixture(params=LAYERS)
def kind(request):
    return request.param


@pytest.mark.parametrize("divisive", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_its_gradients_equal_the_equations(kind, divisive, bias):
    layer, x = case(kind, divisive=divisive, bias=bias)
    inputs = [x.requires_grad_(), *layer.parameters()]
    weight = torch.rand_like(layer(x))
    torch.testing.assert_close(layer(x), layer.components(x).z, rtol=1e-12, atol=1e-12)
    by_hand = torch.autograd.grad((weight * layer(x)).sum(), inputs)
    by_autograd = torch.autograd.grad((weight * layer.components(x).z).sum(), inputs)
    torch.testing.assert_close(by_hand, by_autograd, rtol=1e-10, atol=1e-10)


def test_frozen_parameters_get_no_gradient_and_change_no_other(kind):
    layer, x = case(kind)
    full = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    for frozen in ("Wex", "Wix", "Wei", "alpha", "g", "b"):
        twin = copy.deepcopy(layer)
        getattr(twin, frozen).requires_grad_(False)
        twin(x).square().sum().backward()
        for (name, parameter), gradient in zip(twin.named_parameters(), full, strict=True):
            assert parameter.grad is None if name == frozen else torch.equal(parameter.grad, gradient), (frozen, name)


def test_gradients_can_be_differentiated_again(kind):
    layer, x = case(kind)
    names, values = zip(*layer.named_parameters(), strict=True)

    def f(x, *values):
        return functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradgradcheck(f, (x.requires_grad_(), *values), atol=1e-4, fast_mode=True)


def test_per_sample_gradients_and_stacked_parameters_under_vmap(kind):
    layer, x = case(kind)
    values = {name: p.detach() for name, p in layer.named_parameters()}
    per_sample = vmap(grad(lambda values, x: functional_call(layer, values, (x[None],)).sum()), (None, 0))(values, x)
    for k, sample in enumerate(x):
        alone = torch.autograd.grad(layer(sample[None]).sum(), list(layer.parameters()))
        for (name, _), gradient in zip(layer.named_parameters(), alone, strict=True):
            torch.testing.assert_close(per_sample[name][k], gradient)
    layers = [case(kind)[0], LAYERS[kind](dtype=torch.float64)]
    stacked, _ = stack_module_state(layers)
    both = vmap(lambda values: functional_call(layer, values, (x,)))(stacked)
    torch.testing.assert_close(both, torch.stack([one(x) for one in layers]))


def test_forward_mode_equals_finite_differences(kind):
    layer, x = case(kind)
    direction = torch.rand_like(x)
    _, derivative = jvp(layer, (x,), (direction,))
    difference = (layer(x + 1e-6 * direction) - layer(x - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close(derivative, difference, rtol=1e-6, atol=1e-6)
    with forward_ad.dual_level():  # without torch.func
        z = layer(forward_ad.make_dual(x, direction))
        torch.testing.assert_close(forward_ad.unpack_dual(z).tangent, derivative)


def test_backward_under_autocast_of_a_forward_pass_without_it(kind):
    layer, x = case(kind, torch.float32)
    expected = torch.autograd.grad(layer(x).sum(), list(layer.parameters()))
    z = layer(x).sum()
    with torch.autocast("cpu", torch.bfloat16):
        gradients = torch.autograd.grad(z, list(layer.parameters()))
    minuends = torch.autograd.grad(out_of_balance(layer)(x).sum(), list(layer.parameters()))
    for value, wanted, minuend in zip(gradients, expected, minuends, strict=True):
        largest = max(float(values.abs().max()) for values in (wanted, minuend))
        torch.testing.assert_close(value, wanted, rtol=0, atol=0.03 * largest)


def test_a_division_keeps_its_precision_in_a_backward_under_autocast():
    torch.manual_seed(0)
    layer = DANNConv2d(3, 6, 2, kernel_size=3, padding=1)
    x = torch.rand(4, 3, 8, 8, requires_grad=True)
    inputs = [x, layer.Wex, layer.alpha, layer.g, layer.b]  # gradients of Wix and Wei are those of a product of torch's
    dz = torch.randn(4, 6, 8, 8)
    expected, z = torch.autograd.grad(layer(x), inputs, dz), layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        gradients = torch.autograd.grad(z, inputs, dz)
    for value, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize(
    "geometry", [{"stride": 2, "padding": (2, 0)}, {"dilation": (1, 2)}, {"kernel_size": 1}], ids=str
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_gradients_of_a_convolution_equal_autograds_for_any_geometry_and_memory(geometry, memory_format):
    torch.manual_seed(0)
    layer = DANNConv2d(
        **{"in_channels": 3, "ne": 7, "ni": 2, "kernel_size": (3, 2), "dtype": torch.float64, **geometry}
    )
    layer = layer.to(memory_format=memory_format)
    x = torch.rand(2, 3, 9, 8, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    inputs = [x, *layer.parameters()]
    z, expected = layer(x), layer.components(x).z
    assert z.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(z, expected, rtol=1e-12, atol=1e-12)
    weight = torch.rand_like(z)
    by_hand, by_autograd = (torch.autograd.grad((weight * out).sum(), inputs) for out in (z, expected))
    torch.testing.assert_close(by_hand, by_autograd, rtol=1e-10, atol=1e-10)
    single = torch.autograd.grad(layer(x[0]).sum(), list(layer.parameters()))
    torch.testing.assert_close(single, torch.autograd.grad(layer(x[:1]).sum(), list(layer.parameters())))


def test_a_nonlinearity_in_place_after_a_layer_leaves_the_gradients_as_they_are(kind):
    for bias in (True, False):
        layer, x = case(kind, bias=bias)
        gradients = [
            torch.autograd.grad(nn.ReLU(inplace)(layer(x)).square().sum(), list(layer.parameters()))
            for inplace in (False, True)
        ]
        torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled_whole_and_exported_layers_equal_eager_ones(kind):
    layer, x = case(kind)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    inputs = [x.requires_grad_(), *layer.parameters()]
    torch.testing.assert_close(compiled(x), layer(x))
    torch.testing.assert_close(
        torch.autograd.grad(compiled(x).square().sum(), inputs), torch.autograd.grad(layer(x).square().sum(), inputs)
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        single, inputs = copy.deepcopy(layer).float(), x.detach().float()
        torch.testing.assert_close(torch.compile(single, backend="aot_eager", fullgraph=True)(inputs), single(inputs))
    net = nn.Sequential(layer, nn.ReLU()).eval()
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(net, (x.detach(),), dynamic_shapes=({0: batch},)).module()
    more = torch.cat([x, x]).detach()
    torch.testing.assert_close(exported(more), net(more))
    torch.jit.save(torch.jit.trace(net, x.detach()), traced := io.BytesIO())  # which it could not with Python functions
    traced.seek(0)
    torch.testing.assert_close(torch.jit.load(traced)(x), net(x))


@pytest.mark.parametrize(("half", "tolerance"), [(torch.bfloat16, 0.01), (torch.float16, 0.002)])
def test_half_precision_stays_close_to_float64(kind, half, tolerance):
    torch.manual_seed(0)
    layer = DANNLinear(784, 50, 5) if kind == "linear" else DANNConv2d(16, 20, 4, 3)
    x = torch.rand(8, 784) if kind == "linear" else torch.rand(2, 16, 8, 8)
    exact = copy.deepcopy(layer).double()(x.double())
    with torch.autocast("cpu", dtype=half):
        mixed = layer(x)
    rounded = copy.deepcopy(layer).to(half)  # these weights have lost more than the computation loses
    whole, of_rounded = rounded(x.to(half)), copy.deepcopy(rounded).double()(x.to(half).double())
    assert (mixed.dtype, whole.dtype) == (torch.float32, half)
    for z, expected in ((mixed, exact), (whole, of_rounded)):
        assert (z.double() - expected).square().mean().sqrt() < tolerance * exact.std()


EXTREMES = {
    "black images": lambda layer, x: x.zero_(),
    "one black image": lambda layer, x: x[0].zero_(),
    "tiny inputs": lambda layer, x: x.mul_(1e-30),
    "huge inputs": lambda layer, x: x.mul_(1e30),
    "a silent interneuron": lambda layer, x: layer.Wix.data[0].zero_(),
    "all interneurons silent": lambda layer, x: layer.Wix.data.zero_(),
    "a unit without inhibition": lambda layer, x: layer.Wei.data[1].zero_(),
    "a unit without gain": lambda layer, x: layer.g.data[1].zero_(),
}


@pytest.mark.parametrize("drives", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("extreme", EXTREMES)
def test_extremes_are_finite_and_equal_float64(kind, extreme, drives):
    layer, x = case(kind, torch.float32)
    EXTREMES[extreme](layer, x)
    x.clamp_(max=torch.finfo(drives).max / 1000)
    exact = copy.deepcopy(layer).double()
    results = []
    for version, dtype in ((layer, torch.float32), (exact, torch.float64), (out_of_balance(exact), torch.float64)):
        leaf = x.to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype=drives, enabled=version is layer and drives != torch.float32):
            z = version(leaf)
        # z without inhibition is huge: scaled, as a loss of it would be, so that its gradients fit the format
        gradients = torch.autograd.grad((z / (1 + z.detach().abs().max())).mean(), [leaf, *version.parameters()])
        results.append([z, *gradients])
    own_eps = drives == torch.float16 and float(exact.components(x.double()).gamma.min()) < 1e-3
    for value, expected, minuend in zip(*results, strict=True):
        assert torch.isfinite(value).all()
        if not own_eps:  # eps is 6e-5 there, 1e-8 here
            info = torch.finfo(drives)
            largest = max(float(values.abs().max()) for values in (expected, minuend))
            roundings = 32 if layer.balanced else 8
            atol = info.eps * (roundings * largest + 16 * info.tiny)  # tiny eps: the smallest number; sums over pixels
            torch.testing.assert_close(value.double(), expected, rtol=0, atol=atol)
