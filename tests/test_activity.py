"""Activity over a loader, against each layer asked by hand; and what torchvision's feature extractor traces."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.feature_extraction import create_feature_extractor

from lightning_danns import ColumnEILinear, DANNConv2d, DANNLinear, UsageError
from lightning_danns.analysis import activity
from lightning_danns.networks import DANNFamily, StandardFamily, cnn, mlp, resnet

X = torch.rand(11, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LOADERS = {
    "tensors": lambda: DataLoader(X, batch_size=4),
    "pairs": lambda: DataLoader(TensorDataset(X, torch.arange(11)), batch_size=4),
    "a generator": lambda: (X[k : k + 4] for k in range(0, 11, 4)),
}


class Net(nn.Module):
    """One layer of each kind, whose ReLUs write in place."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.plain = DANNConv2d(3, 6, 2, 3), nn.Conv2d(6, 4, 6)
        self.dense, self.columns, self.out = DANNLinear(4, 8, 2), ColumnEILinear(8, 7, 2), nn.Linear(7, 2)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        h = self.plain(self.drop(self.conv(x).relu_())).relu_().flatten(1)
        return self.out(input=self.columns(self.dense(h).relu_()).relu_())


@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize("memmap", [False, True])
def test_activity_is_what_each_layer_computes_in_the_order_of_the_loader(loader, memmap, tmp_path):
    net = Net()
    seen = activity(net, loader(), quantities=("z", "h", "z_i"), memmap=tmp_path if memmap else None)
    x = X
    with torch.no_grad():
        for name in ("conv", "plain", "dense", "columns", "out"):
            layer = net.get_submodule(name)
            z = layer(x)
            expected = {"z": z, "h": z.clamp(min=0)}
            if name in ("conv", "dense", "columns"):
                expected["z_i"] = layer.components(x).z_i
            assert set(seen[name]) == set(expected)
            for quantity, values in expected.items():
                found = seen[name][quantity]
                assert isinstance(found, np.memmap if memmap else torch.Tensor)
                found = torch.from_numpy(found.copy()) if memmap else found
                torch.testing.assert_close(found, values, rtol=1e-5, atol=1e-6)
            x = z.relu()
            if name == "plain":
                x = x.flatten(1)
    assert list(seen) == ["conv", "plain", "dense", "columns", "out"]


def test_files_are_ordinary_npy_files_by_layer_and_quantity(tmp_path):
    activity(Net(), LOADERS["tensors"](), ["conv"], memmap=tmp_path / "new")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"conv.z.npy", "conv.z_i.npy"}
    assert np.load(tmp_path / "new" / "conv.z_i.npy").shape == (11, 2, 6, 6)


def test_modes_hooks_and_gradients_are_left_as_they_were():
    net = Net()
    net.drop.eval()
    seen = activity(net, LOADERS["tensors"](), ["out"])
    assert (net.training, net.conv.training, net.drop.training) == (True, True, False)
    assert not seen["out"]["z"].requires_grad
    assert not any(module._forward_hooks for module in net.modules())


def test_half_precision_is_given_in_float32():
    seen = activity(Net().bfloat16(), [X.bfloat16()], ["conv"])
    assert {values.dtype for values in seen["conv"].values()} == {torch.float32}


def test_what_cannot_be_given_is_refused_by_name():
    def refused(message, *args, **kwargs):
        with pytest.raises(UsageError, match=message):
            activity(*args, **kwargs)

    twice, unused = nn.Linear(4, 4), Net()
    unused.more = nn.Linear(3, 3)
    refused("'drop' is no layer with activity; these are: conv, plain", Net(), [X], ["drop"])
    refused("quantity 'v'", Net(), [X], quantities=("v",))
    refused("'0' is called 2 times in 1 batches", nn.Sequential(twice, twice), [torch.rand(2, 4)])
    refused("'more' is called 0 times in 2 batches", unused, [X, X], ["more"])
    refused("'conv' is called 0 times in 0 batches", Net(), [])
    refused("Sequential has no layers with activity", nn.Sequential(nn.ReLU()), [X])
    refused("'0' gives", nn.Sequential(nn.Conv2d(3, 2, 3)), [X, X[:, :, :5]])
    assert "more" not in activity(unused, [X])


def test_a_layer_that_is_passed_by_some_of_the_samples_is_refused():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.b(self.a(x)) if len(x) > 1 else self.a(x)

    with pytest.raises(UsageError, match="'b' is called 1 times in 2 batches"):
        activity(Sometimes(), [torch.rand(2, 4), torch.rand(1, 4)])
    assert activity(Sometimes(), [torch.rand(2, 4), torch.rand(1, 4)], ["a"])["a"]["z"].shape == (3, 4)


@pytest.mark.parametrize("family", [DANNFamily(), DANNFamily(balanced=True), StandardFamily("batch")], ids=str)
@pytest.mark.parametrize("build", ["mlp", "cnn", "resnet"])
def test_torchvisions_feature_extractor_traces_our_networks(family, build):
    torch.manual_seed(0)
    net = {
        "mlp": lambda: mlp((3, 8, 8), [12, 9], 4, family),
        "cnn": lambda: cnn((3, 8, 8), [[6], [8]], [12], 4, family),
        "resnet": lambda: resnet(20, (3, 8, 8), 4, family),
    }[build]()
    net.eval()
    names = [name for name, module in net.named_modules() if isinstance(module, DANNLinear | DANNConv2d)]
    extractor = create_feature_extractor(
        net, [*names, str(len(net) - 1)], tracer_kwargs={"leaf_modules": [DANNLinear, DANNConv2d]}
    )
    features, seen = extractor(X), activity(net, [X], quantities=("z",))
    assert len(names) == (0 if isinstance(family, StandardFamily) else {"mlp": 3, "cnn": 4, "resnet": 22}[build])
    for name, z in features.items():
        torch.testing.assert_close(z, seen[name]["z"])
