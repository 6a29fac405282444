"""Architectures of every family: sizes, parameter counts, errors, and that a step lowers the loss."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_danns import (
    DANNMLP,
    DANNVGG,
    VGG,
    ColumnEILinear,
    ColumnEIMLP,
    ConvNet,
    DANNConv2d,
    DANNConvNet,
    DANNLinear,
    MNISTDataModule,
    UsageError,
    fisher_param_groups,
    project_,
)
from lightning_danns.networks import ColumnEIFamily, DANNFamily, StandardFamily, cnn, mlp, vgg
from lightning_danns.testing import assert_dale

CIFAR = (3, 32, 32)


@pytest.mark.parametrize(("depth", "convolutions"), [(16, 13), (19, 16)])
def test_vgg_has_the_stated_layers(depth, convolutions):
    with torch.device("meta"):
        network = vgg(depth, CIFAR, 10, DANNFamily())
    convs = [m for m in network if isinstance(m, DANNConv2d)]
    assert len(convs) == convolutions
    assert sorted({(m.ne, m.ni) for m in convs}) == [(64, 10), (128, 20), (256, 40), (512, 80)]
    dense = [(m.d, m.ne, m.ni) for m in network if isinstance(m, DANNLinear)]
    assert dense == [(512, 4096, 409), (4096, 4096, 409), (4096, 10, 1)]
    assert sum(isinstance(m, nn.MaxPool2d) for m in network) == 5


@pytest.mark.parametrize("depth", [16, 19])
@pytest.mark.parametrize("norm", ["none", "batch"])
def test_convolutions_of_the_control_are_those_of_torchvision(depth, norm):
    import torchvision

    published = getattr(torchvision.models, f"vgg{depth}" + ("_bn" if norm == "batch" else ""))
    with torch.device("meta"):
        theirs = published(weights=None).features
        ours = vgg(depth, CIFAR, 10, StandardFamily(norm))

    def shapes(network):
        return [tuple(p.shape) for m in network if isinstance(m, nn.Conv2d | nn.BatchNorm2d) for p in m.parameters()]

    assert shapes(ours) == shapes(theirs)
    kinds = [type(m) for m in theirs]
    assert [type(m) for m in ours][: len(kinds)] == kinds


def test_larger_images_need_no_larger_layer():
    with torch.device("meta"):
        small, large = (vgg(16, (3, size, size), 10, DANNFamily()) for size in (32, 224))
        assert large(torch.rand(2, 3, 224, 224)).shape == small(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert sum(p.numel() for p in small.parameters()) == sum(p.numel() for p in large.parameters())


@pytest.mark.parametrize("model_class", [DANNConvNet, ConvNet])
@pytest.mark.parametrize("shape", [(1, 28, 28), CIFAR])
def test_small_networks_fit_both_image_sizes(model_class, shape):
    model = model_class(input_shape=shape, channels=[8, 12], hidden_sizes=[20])
    assert model(torch.rand(4, *shape)).shape == (4, 10)


def test_the_control_has_he_normal_weights_and_zero_biases():
    torch.manual_seed(0)
    model = ConvNet(channels=[64, 64], norm="batch")
    conv = [m for m in model.network if isinstance(m, nn.Conv2d)][1]
    assert conv.weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)
    assert not conv.bias.any()
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.network) == 2


FAMILIES = {
    "dann": DANNFamily(),
    "subtractive": DANNFamily(divisive=False),
    "batch": DANNFamily(divisive=False, balanced=True, norm="batch"),
    "column_ei": ColumnEIFamily(),
    "standard": StandardFamily("batch"),
}


@pytest.mark.parametrize(
    ("name", "architecture"), [(n, a) for n in FAMILIES for a in ("mlp", "cnn") if (n, a) != ("column_ei", "cnn")]
)
def test_steps_lower_the_loss_of_every_family(name, architecture):
    torch.manual_seed(0)
    family = FAMILIES[name]
    if architecture == "mlp":
        network = mlp((1, 8, 8), (33, 33), 5, family)
    else:
        network = cnn((1, 8, 8), [[6], [8]], (20,), 5, family)
    x, y = torch.rand(40, 1, 8, 8), torch.arange(40) % 5
    optimizer = torch.optim.SGD(fisher_param_groups(network, lr=0.05))
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.cross_entropy(network(x), y)
        loss.backward()
        optimizer.step()
        project_(network)
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    if name != "standard":
        assert_dale(network)


@pytest.mark.slow
def test_a_dann_vgg16_step_lowers_its_loss():
    torch.manual_seed(0)
    model = DANNVGG(input_shape=CIFAR, dropout=0.0, optimizer=functools.partial(torch.optim.SGD, lr=0.001))
    optimizer = model.configure_optimizers()
    batch = torch.rand(8, *CIFAR), torch.arange(8)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = model.shared_step(batch, "train")
        loss.backward()
        optimizer.step()
        project_(model)
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert_dale(model)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: vgg(16, (1, 28, 28), 10, DANNFamily()), r"\[1, 28, 28\]: 5 blocks.*32 x 32"),
        (lambda: vgg(11, CIFAR, 10, DANNFamily()), "depth=11.*16 or 19"),
        (lambda: DANNConvNet(channels=[8] * 5), "5 blocks"),
        (lambda: DANNConvNet(channels=[]), r"channels=\[\]"),
        (lambda: DANNConvNet(channels=[8, 8], conv_ni=9), "ni=9"),
        (lambda: DANNConvNet(channels=[8, 8], conv_ni=[1]), r"ni=\[1\] has 1 entries"),
        (lambda: DANNConvNet(input_shape=(784,)), r"input_shape=\[784\]"),
        (lambda: cnn(CIFAR, [[8]], (), 10, StandardFamily("layer")), "norm='layer'"),
        (lambda: ColumnEIMLP(ratio=0), "ratio=0"),
        (lambda: DANNVGG(input_shape=CIFAR, depth=17), "depth=17"),
        (lambda: VGG(input_shape=(3, 16, 16)), "32 x 32"),
        (lambda: VGG(input_shape=CIFAR, dropout=1.5), "dropout=1.5"),
    ],
)
def test_wrong_architectures_are_refused_by_value(build, message):
    with pytest.raises(UsageError, match=message), torch.device("meta"):
        build()


def test_columns_are_split_by_the_ratio():
    layers = [m for m in ColumnEIMLP().network if isinstance(m, ColumnEILinear)]
    assert [(m.in_features, m.ni) for m in layers] == [(784, 0), (550, 50), (550, 50), (550, 50)]


def test_column_ei_centres_on_the_data_once(data_dir, make_trainer, tmp_path):
    def first_bias(model):
        return model.network[1].b.detach().clone()

    data = MNISTDataModule(str(data_dir), val_size=50)
    data.setup()
    frozen = functools.partial(torch.optim.SGD, lr=0.0)
    model = ColumnEIMLP(hidden_sizes=[22], optimizer=frozen)
    trainer = make_trainer()
    trainer.fit(model, datamodule=data)
    expected = -28 * data.train_set[:][0].double().mean()
    torch.testing.assert_close(first_bias(model).double(), expected.expand(22), rtol=1e-5, atol=0)

    model.network[1].b.data += 1  # stands for training
    trained = first_bias(model)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    make_trainer().fit(model, datamodule=data)  # a second fit
    again = ColumnEIMLP.load_from_checkpoint(tmp_path / "model.ckpt", optimizer=frozen)
    make_trainer().fit(again, datamodule=data)  # a fit from saved weights
    assert torch.equal(first_bias(model), trained)
    assert torch.equal(first_bias(again), trained)

    with pytest.raises(UsageError, match="give pixel_mean"):
        make_trainer().fit(ColumnEIMLP(hidden_sizes=[22]), data.train_dataloader())
    given = ColumnEIMLP(hidden_sizes=[22], pixel_mean=0.25)
    torch.testing.assert_close(first_bias(given), torch.full((22,), -7.0))


def test_column_ei_does_not_centre_weights_loaded_into_its_network(data_dir, make_trainer):
    data = MNISTDataModule(str(data_dir), val_size=50)
    trained = ColumnEIMLP(hidden_sizes=[22], pixel_mean=0.25)
    trained.network[1].b.data += 1  # stands for training
    model = ColumnEIMLP(hidden_sizes=[22], optimizer=functools.partial(torch.optim.SGD, lr=0.0))
    model.network.load_state_dict(trained.network.state_dict())
    make_trainer().fit(model, datamodule=data)
    assert torch.equal(model.network[1].b, trained.network[1].b)


def test_column_ei_resumes_with_its_trained_bias(data_dir, make_trainer, tmp_path):
    data = MNISTDataModule(str(data_dir), val_size=50)
    frozen = functools.partial(torch.optim.SGD, lr=0.0)
    model, trainer = ColumnEIMLP(hidden_sizes=[22], optimizer=frozen), make_trainer()
    trainer.fit(model, datamodule=data)
    model.network[1].b.data += 1  # stands for training
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    for source in ({"datamodule": data}, {"train_dataloaders": data.train_dataloader()}):  # a loader has no mean pixel
        resumed = ColumnEIMLP(hidden_sizes=[22], optimizer=frozen)
        make_trainer(max_epochs=2).fit(resumed, **source, ckpt_path=tmp_path / "model.ckpt")
        assert torch.equal(resumed.network[1].b, model.network[1].b)


@pytest.mark.parametrize("one", [12, np.int64(12)])
def test_one_size_where_a_list_is_meant_is_refused(one):
    with pytest.raises(UsageError, match="hidden_sizes=12: give a list"):
        DANNMLP(hidden_sizes=one)
    for network in (DANNConvNet, ConvNet):
        with pytest.raises(UsageError, match="channels=12: give a list"):
            network(channels=one)
