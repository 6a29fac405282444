"""Residual networks: torchvision's shapes, He et al.'s sizes, non-negative inputs everywhere, a naive block."""

import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from lightning_danns import DANNConv2d, DANNLinear, DANNResNet, ResNet, UsageError, fisher_param_groups, project_
from lightning_danns.networks import DANNFamily, ResidualBlock, StandardFamily, resnet

CIFAR = (3, 32, 32)


def control(norm="batch"):
    return StandardFamily(norm, conv_bias=norm in ("none", "centred"))


@pytest.mark.parametrize(("depth", "size"), [(18, 224), (34, 224), (50, 224)])
def test_the_control_has_torchvisions_weights_and_feature_maps(depth, size):
    with torch.device("meta"):
        theirs = getattr(torchvision.models, f"resnet{depth}")(weights=None, num_classes=7)
        ours = ResNet(depth=depth, input_shape=(3, size, size), num_classes=7).network
        assert [p.shape for p in ours.parameters()] == [p.shape for p in theirs.parameters()]
        assert [b.shape for b in ours.buffers()] == [b.shape for b in theirs.buffers()]

        def maps(net):
            shapes, kinds = [], (nn.Conv2d, nn.Linear)
            for layer in (m for m in net.modules() if isinstance(m, kinds)):
                layer.register_forward_hook(lambda layer, x, z: shapes.append((tuple(x[0].shape), tuple(z.shape))))
            net(torch.rand(2, 3, size, size))
            return sorted(shapes)

        assert maps(ours) == maps(theirs)


@pytest.mark.parametrize("depth", [18, 50])
def test_torchvisions_weights_give_torchvisions_outputs(depth):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, f"resnet{depth}")(weights=None, num_classes=7).double().eval()
    ours = resnet(depth, (3, 96, 96), 7, control(), "before").double().eval()
    with torch.no_grad():
        for mine, yours in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.copy_(yours)
    x = torch.rand(2, 3, 96, 96, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (56, 0.85)])
def test_small_depths_have_the_size_of_he_et_al(depth, millions):
    """Their shortcuts have no weights; ours are 1x1 convolutions where the width changes."""
    with torch.device("meta"):
        net = ResNet(depth=depth, input_shape=CIFAR).network
    blocks = [module for module in net if isinstance(module, ResidualBlock)]
    shortcuts = sum(p.numel() for block in blocks for p in block.shortcut.parameters())
    assert shortcuts == 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    assert (sum(p.numel() for p in net.parameters()) - shortcuts) / 1e6 == pytest.approx(millions, abs=0.01)
    layers = [m for name, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and "shortcut" not in name]
    assert len(layers) == depth


@pytest.mark.parametrize(("depth", "balanced"), [(20, False), (20, True), (50, True)])
@pytest.mark.parametrize("shortcut", ["after", "before"])
def test_every_layer_sees_non_negative_inputs(depth, shortcut, balanced):
    torch.manual_seed(0)
    net = resnet(depth, (3, 8, 8), 5, DANNFamily(balanced=balanced), shortcut)
    optimizer = torch.optim.SGD(fisher_param_groups(net, lr=0.1))
    lowest = {}

    def look(layer, x, z):
        lowest[layer] = min(lowest.get(layer, math.inf), float(x[0].detach().min()))
        assert z.min() < 0 < z.max()  # the ReLU after it has something to do

    layers = [m for m in net.modules() if isinstance(m, DANNConv2d | DANNLinear)]
    for layer in layers:
        layer.register_forward_hook(look)
    for _ in range(2):  # at the start, and after a step
        F.cross_entropy(net(torch.rand(4, 3, 8, 8)), torch.arange(4)).backward()
        optimizer.step()
        project_(net)
    assert len(lowest) == len(layers) == (depth + 2 if depth == 20 else depth + 4)
    assert min(lowest.values()) >= 0


@pytest.mark.parametrize("family", [DANNFamily(), DANNFamily(balanced=True), control("group")], ids=str)
def test_an_output_does_not_depend_on_the_batch_around_it(family):
    torch.manual_seed(0)
    net, x = resnet(20, (3, 16, 16), 5, family).double(), torch.rand(5, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(net(x), torch.cat([net(one[None]) for one in x]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 33, 47), (1, 7, 5), (2, 97, 65)])
@pytest.mark.parametrize("depth", [20, 18, 50])
def test_odd_sizes_and_other_channels_fit(depth, shape):
    with torch.device("meta"):
        model = DANNResNet(depth=depth, input_shape=shape, num_classes=4)
        assert model(torch.rand(2, *shape)).shape == (2, 4)


@pytest.mark.parametrize(
    ("depth", "size", "large"), [(18, 64, False), (18, 65, True), (50, 224, True), (56, 224, False)]
)
def test_large_images_of_deep_nets_alone_have_a_large_stem(depth, size, large):
    with torch.device("meta"):
        net = resnet(depth, (3, size, size), 4, DANNFamily())
        assert (net[0].kernel_size, net[0].stride) == (((7, 7), (2, 2)) if large else ((3, 3), (1, 1)))
        assert isinstance(net[2], nn.MaxPool2d) == large


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DANNResNet(depth=19), "depth=19: .* 20, 32, 56, 18, 34, 50"),
        (lambda: ResNet(shortcut="around"), "shortcut='around': choose 'after' or 'before'"),
        (lambda: resnet(20, CIFAR, 4, DANNFamily(), stem="huge"), "stem='huge'"),
        (lambda: DANNResNet(input_shape=(784,)), r"input_shape=\[784\]"),
        (lambda: ResNet(norm="layer"), "norm='layer'"),
        (lambda: ResNet(norm="instance"), "norm='instance'"),
    ],
)
def test_wrong_options_are_refused_by_value(build, message):
    with pytest.raises(UsageError, match=message), torch.device("meta"):
        build()


def naive_conv(x, layer):
    """One output at a time, with the layer's own W = Wex - Wei Wix or weight, zeros around the image."""
    n, _, height, width = x.shape
    k, step = layer.kernel_size[0], layer.stride[0]
    x = F.pad(x, [k // 2] * 4)
    rows, columns = math.ceil(height / step), math.ceil(width / step)
    patches = torch.stack([
        x[:, :, i * step : i * step + k, j * step : j * step + k].reshape(n, -1)
        for i in range(rows)
        for j in range(columns)
    ])  # fmt: skip
    if isinstance(layer, nn.Conv2d):
        z = patches @ layer.weight.flatten(1).T
    else:
        Wex, Wix, Wei = layer.Wex.flatten(1), layer.Wix.flatten(1), layer.Wei.flatten(1)
        z_i = patches @ Wix.T
        gamma = (z_i * layer.alpha.flatten().exp()) @ Wei.T
        z = layer.g.flatten() * (patches @ Wex.T - z_i @ Wei.T) / (gamma + 1e-8) + layer.b.flatten()
    return z.permute(1, 2, 0).unflatten(2, (rows, columns))


@pytest.mark.parametrize("family", [DANNFamily(), StandardFamily(conv_bias=False)], ids=["dann", "ordinary"])
@pytest.mark.parametrize("shortcut", ["after", "before"])
@pytest.mark.parametrize(("c", "n", "stride", "bottleneck"), [(6, 6, 1, False), (4, 6, 2, False), (4, 3, 2, True)])
def test_a_block_is_what_a_naive_computation_gives(family, shortcut, c, n, stride, bottleneck):
    torch.manual_seed(0)
    block = ResidualBlock(c, n, stride, family, bottleneck, shortcut).double()
    x = torch.rand(2, c, 5, 4, dtype=torch.float64)
    layers = [m for m in block.body if isinstance(m, DANNConv2d | nn.Conv2d)]
    f = x
    for k, layer in enumerate(layers):
        f = naive_conv(f, layer)
        f = f if k == len(layers) - 1 else f.clamp(min=0)
    s = naive_conv(x, block.shortcut[0]) if len(block.shortcut) else x
    h = (s + f).clamp(min=0) if shortcut == "before" else (s.clamp(min=0) + f.clamp(min=0))
    torch.testing.assert_close(block(x), h, rtol=1e-10, atol=1e-10)
    assert bool(len(block.shortcut)) == (stride != 1 or c != block.out_channels)


@pytest.mark.parametrize("shortcut", ["after", "before"])
@pytest.mark.parametrize("norm", ["none", "batch", "group", "centred", "centred_batch"])
def test_every_norm_of_the_control_learns(norm, shortcut):
    torch.manual_seed(0)
    net = ResNet(input_shape=(3, 8, 8), num_classes=3, norm=norm, shortcut=shortcut).network
    norms = {"batch": nn.BatchNorm2d, "group": nn.GroupNorm, "centred_batch": nn.BatchNorm2d}
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    for kind in set(norms.values()):
        assert sum(isinstance(m, kind) for m in net.modules()) == (21 if norms.get(norm) is kind else 0)
    assert all((conv.bias is None) == (norm in norms) for conv in convolutions)
    sums = max(float(conv.weight.detach().sum((1, 2, 3)).abs().max()) for conv in convolutions)
    assert (sums < 1e-4) == norm.startswith("centred")
    x, y, losses = torch.rand(12, 3, 8, 8), torch.arange(12) % 3, []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for _ in range(8):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
