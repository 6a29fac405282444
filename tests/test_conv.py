"""The convolutional layer against the reference arrays, the dense layer and a per-pixel loop."""

import pytest
import torch
import torch.nn.functional as F
from test_layers import perturbed

from lightning_danns import DANNConv2d, DANNLinear, UsageError, fisher_param_groups, project_

NAMES = {"Wex": "W_ex", "Wix": "W_ix", "Wei": "W_ei", "alpha": "alpha", "g": "g", "b": "b"}
float64 = {"dtype": torch.float64}


@pytest.mark.parametrize(("case", "geometry"), [("conv_stride1", (1, 1)), ("conv_stride2", (2, 0))])
def test_forward_gradients_and_update_equal_the_reference(reference, case, geometry):
    layer = DANNConv2d(3, 10, 2, 3, *geometry, **float64)
    for name, parameter in layer.named_parameters():
        parameter.data.copy_(reference[f"{case}/params0/{NAMES[name]}"])
    z = layer(reference[f"{case}/x"])
    torch.testing.assert_close(z.detach(), reference[f"{case}/z"], rtol=1e-10, atol=1e-10)
    loss = F.mse_loss(z, reference[f"{case}/target"])
    torch.testing.assert_close(loss.detach(), reference[f"{case}/mse"], rtol=1e-10, atol=1e-10)
    loss.backward()
    torch.optim.SGD(fisher_param_groups(layer, lr=float(reference[f"{case}/lr"]))).step()
    project_(layer)
    for name, parameter in layer.named_parameters():
        for value, stage in ((parameter.grad, "grads"), (parameter.detach(), "params1")):
            expected = reference[f"{case}/{stage}/{NAMES[name]}"]
            torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"divisive": False}, {"eps": 0.3}], ids=str)
def test_one_pixel_is_the_dense_layer(options):
    conv = perturbed(DANNConv2d(7, 6, 2, 1, **options, **float64))
    dense = DANNLinear(7, 6, 2, **options, **float64)
    for name, parameter in dense.named_parameters():
        parameter.data.copy_(getattr(conv, name).reshape(parameter.shape))
    x = torch.rand(5, 7, **float64)
    torch.testing.assert_close(conv(x[:, :, None, None])[:, :, 0, 0], dense(x), rtol=1e-12, atol=1e-12)
    assert dense.lr_factors() == conv.lr_factors()


@pytest.mark.parametrize(
    "geometry",
    [{"padding": 1}, {"stride": 2, "padding": (2, 0)}, {"dilation": (1, 2)}, {"padding": "same"}, {"padding": "valid"}],
    ids=str,
)
def test_every_pixel_is_a_dense_layer_of_its_patch(geometry):
    conv = perturbed(DANNConv2d(3, 5, 2, (3, 2), **geometry, **float64))
    dense = DANNLinear(3 * 3 * 2, 5, 2, **float64)
    for name, parameter in dense.named_parameters():
        parameter.data.copy_(getattr(conv, name).reshape(parameter.shape))
    x = torch.rand(2, 3, 8, 7, **float64) + 0.1
    z = conv(x)
    padding = geometry.get("padding", 0)
    if padding == "same":
        x, padding = F.pad(x, (0, 1, 1, 1)), 0
    patches = F.unfold(
        x, (3, 2), geometry.get("dilation", 1), 0 if padding == "valid" else padding, geometry.get("stride", 1)
    )
    expected = dense(patches.transpose(1, 2)).transpose(1, 2).reshape(z.shape)
    torch.testing.assert_close(z, expected, rtol=1e-9, atol=1e-9)


def test_groups_are_independent_layers_side_by_side():
    torch.manual_seed(0)
    conv = perturbed(DANNConv2d(6, 9, 3, 3, padding=1, groups=3, **float64))
    x = torch.rand(2, 6, 5, 5, **float64)
    z = []
    for k in range(3):
        single = DANNConv2d(2, 3, 1, 3, padding=1, **float64)
        for name, parameter in single.named_parameters():
            parameter.data.copy_(getattr(conv, name).chunk(3)[k])
        z.append(single(x[:, 2 * k : 2 * k + 2]))
        assert single.lr_factors() == conv.lr_factors()
    torch.testing.assert_close(conv(x), torch.cat(z, 1), rtol=1e-10, atol=1e-10)
    # one interneuron a group subtracts the mean of its group
    fresh = DANNConv2d(6, 9, 3, 3, groups=3, **float64)
    for Wex, Wix in zip(fresh.Wex.chunk(3), fresh.Wix, strict=True):
        torch.testing.assert_close(Wix, Wex.mean(0))


@pytest.mark.parametrize("divisive", [True, False])
def test_memory_formats_and_single_images_give_the_same_values_and_gradients(divisive):
    conv = perturbed(DANNConv2d(3, 8, 2, 3, padding=1, divisive=divisive, **float64))
    x = torch.rand(2, 3, 6, 6, **float64)
    last = x.to(memory_format=torch.channels_last)
    z, z_last = conv(x), conv(last)
    assert z_last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(z, z_last)
    torch.testing.assert_close(conv(x[0]), z[0])
    weight = torch.rand_like(z)
    gradients = [torch.autograd.grad((out * weight).sum(), list(conv.parameters())) for out in (z, z_last)]
    torch.testing.assert_close(*gradients)
    moved = conv.to(memory_format=torch.channels_last)
    torch.testing.assert_close(moved(last), z)


def test_factors_count_the_whole_kernel():
    factors = DANNConv2d(3, 16, 2, 5).lr_factors()
    assert factors == {"Wix": 1 / 4, "Wei": 1 / 75, "alpha": 1 / 300}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ni": 0}, "ni=0"),
        ({"ni": 9}, "ni=9.*ne=8"),
        ({"groups": 3}, "groups=3 must divide in_channels=4, ne=8 and ni=2"),
        ({"kernel_size": 0}, "kernel_size=0"),
        ({"kernel_size": (3,)}, r"\(3,\): give a whole number or a pair"),
        ({"kernel_size": 3.0}, r"3\.0: give a whole number or a pair"),
        ({"stride": (1, 0)}, r"stride=\(1, 0\)"),
        ({"padding": -1}, "padding=-1"),
        ({"padding": "full"}, "padding='full'"),
        ({"padding": "same", "stride": 2}, "padding='same' needs stride 1, not 2"),
    ],
)
def test_wrong_geometry_is_refused_by_value(arguments, message):
    with pytest.raises(UsageError, match=message):
        DANNConv2d(**{"in_channels": 4, "ne": 8, "ni": 2, "kernel_size": 3, **arguments})


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 8, 8), r"\(2, 3, 8, 8\).*\(N, 4, H, W\)"),
        ((4, 8), r"\(4, 8\)"),
        ((2, 4, 8, 4), "over 5 pixels, the padded image over 4"),
    ],
)
def test_images_that_do_not_fit_are_refused_by_shape(shape, message):
    with pytest.raises(UsageError, match=message):
        DANNConv2d(4, 8, 2, 3, dilation=2)(torch.rand(shape))


@pytest.mark.parametrize(("images", "folds"), [(1, False), (8, True)])
@pytest.mark.parametrize("divisive", [True, False])
def test_few_pixels_and_many_take_two_ways_to_the_same_values_and_gradients(divisive, images, folds, monkeypatch):
    """Fewer pixels than a unit has inputs (27): drives first; more: Wei Wix first."""
    layer = DANNConv2d(3, 6, 2, kernel_size=3, padding=1, divisive=divisive).double()
    x = torch.rand(images, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    folded = []
    fold = DANNConv2d._folded
    monkeypatch.setattr(DANNConv2d, "_folded", lambda self, x: folded.append(True) or fold(self, x))
    ways = [layer(x), layer.components(x).z, fold(layer, x)]
    assert bool(folded) == folds
    for z in ways[1:]:
        torch.testing.assert_close(ways[0], z)
    dz = torch.rand_like(ways[0])
    gradients = [torch.autograd.grad(z, [x, *layer.parameters()], dz) for z in ways]
    for others in gradients[1:]:
        torch.testing.assert_close(gradients[0], others)


@pytest.mark.parametrize("balanced", [False, True])
def test_without_division_half_precision_is_that_of_an_ordinary_layer(balanced):
    """Bit by bit: so activations take no more memory than those of the control."""
    torch.manual_seed(0)
    options = {"balanced": balanced, "divisive": False}
    conv, dense, divisive = DANNConv2d(4, 8, 2, 3, **options), DANNLinear(36, 8, 2, **options), DANNConv2d(4, 8, 2, 3)
    x = torch.rand(5, 4, 6, 6)
    of_conv, of_dense = conv.net_weight(), dense.net_weight()
    for half in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", half):
            z = conv(x)
            assert z.dtype == half
            assert torch.equal(z, F.conv2d(x, of_conv, conv.b))
            z = dense(x[:, :, :3, :3].flatten(1))
            assert z.dtype == half
            assert torch.equal(z, F.linear(x[:, :, :3, :3].flatten(1), of_dense, dense.b))
            assert divisive(x).dtype == torch.float32  # what is divided is not rounded
