"""DANN layers in architectures from elsewhere: what is replaced, what is kept and why."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from lightning_danns import DANNConv2d, DANNLinear, UsageError, daleify, fisher_param_groups, project_
from lightning_danns.layers import refuse_negative_inputs
from lightning_danns.testing import assert_dale


def test_a_resnet_becomes_a_dann_and_learns():
    torch.manual_seed(0)
    resnet = torchvision.models.resnet18(weights=None, num_classes=10)
    images, labels = torch.rand(8, 3, 64, 64), torch.arange(8)
    made = daleify(resnet, images, ni={"fc": 1})
    before = [name for name, m in resnet.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert made.converted == before
    assert len(before) == 21
    assert made.kept == {}
    for name in before:
        old, new = resnet.get_submodule(name), made.model.get_submodule(name)
        assert isinstance(old, nn.Conv2d | nn.Linear)  # the given model is unchanged
        assert isinstance(new, DANNConv2d if isinstance(old, nn.Conv2d) else DANNLinear)
        assert new.Wex.shape == old.weight.shape
        assert (new.b is None) == (old.bias is None)
    assert (made.model.conv1.ni, made.model.fc.ni) == (6, 1)
    assert made.model.training

    refuse_negative_inputs(made.model)
    optimizer = torch.optim.SGD(fisher_param_groups(made.model, lr=0.05))
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        logits = made.model(images)
        assert torch.isfinite(logits).all()
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        project_(made.model)
        assert_dale(made.model)
        losses.append(loss.item())
    assert losses[-1] < losses[0]


class Odd(nn.Module):
    """One layer for every reason to keep it, and one that is converted."""

    def __init__(self):
        super().__init__()
        self.good = nn.Conv2d(4, 8, 3, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 1, groups=8)
        self.reflecting = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.after_tanh = nn.Conv2d(8, 8, 1)
        self.attention = nn.MultiheadAttention(8, 2)
        self.tied, self.twin = nn.Linear(8, 8), nn.Linear(8, 8)
        self.twin.weight = self.tied.weight
        self.single = nn.Linear(8, 1)
        self.unused = nn.Linear(8, 8)

    def forward(self, x):
        x = self.good(x).relu()
        x = self.depthwise(x).relu()
        x = self.after_tanh(torch.tanh(self.reflecting(x))).relu().mean((2, 3))
        x = self.attention(x, x, x)[0].relu()
        return self.single(self.twin(self.tied(x).relu()).relu())


def test_every_kept_layer_has_its_reason():
    torch.manual_seed(0)
    made = daleify(Odd(), torch.rand(5, 4, 9, 9))
    assert made.converted == ["good"]
    reasons = {
        "depthwise": "one unit per group",
        "reflecting": "padding_mode='reflect'",
        "after_tanh": "come from tanh and can be negative (-",
        "attention": "no DANN counterpart",
        "attention.out_proj": "NonDynamicallyQuantizableLinear",
        "tied": "shared",
        "twin": "shared",
        "single": "one unit",
        "unused": "does not pass through",
    }
    assert set(made.kept) == set(reasons)
    for name, reason in reasons.items():
        assert reason in made.kept[name], name
    assert (made.model.good.groups, made.model.good.ni) == (2, 2)
    made.model(torch.rand(5, 4, 9, 9)).sum().backward()


def test_geometry_and_options_are_carried_over():
    conv = nn.Conv2d(3, 20, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 2), bias=False).double()
    x = torch.rand(2, 3, 12, 13, dtype=torch.float64)
    made = daleify(nn.Sequential(conv), x, fraction=0.25, divisive=False)
    layer = made.model[0]
    assert layer(x).shape == conv(x).shape
    assert (layer.ni, layer.divisive, layer.b, layer.Wex.dtype) == (5, False, None, torch.float64)
    dense = daleify(nn.Sequential(nn.Linear(9, 20)), torch.rand(3, 9), pixels=["0"]).model[0]
    assert (dense.inputs, dense.ni) == ("pixels", 2)
    assert isinstance(daleify(nn.Linear(9, 20), torch.rand(3, 9)).model, DANNLinear)
    balanced = daleify(nn.Sequential(conv), x, balanced=True, inhibition="mean").model
    assert (balanced[0].balanced, balanced[0].inhibition) == (True, "mean")
    assert_dale(balanced)


def test_the_example_pass_leaves_no_trace():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    made = daleify(net, torch.rand(2, 3, 8, 8))
    assert made.model[1].num_batches_tracked == 0
    assert made.model.training
    assert not any(module._forward_pre_hooks for module in made.model.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0}, "fraction=0"),
        ({"ni": {"1": 3}}, "'1' is no Linear.*0"),
        ({"ni": {"0": 99}}, "ni=99"),
        ({"change": ["norm"]}, "change=.'norm'.: give a list of 'activations', 'norms', 'inputs'"),
        ({"change": "norms"}, "change='norms': give a list"),
        ({"start": "he"}, "start='he': choose 'random' or 'pretrained'"),
        ({"start": "pretrained"}, "divisive=True.*give divisive=False"),
        ({"start": "pretrained", "divisive": False, "balanced": True}, "balanced=True"),
    ],
)
def test_wrong_options_are_refused_by_value(options, message):
    with pytest.raises(UsageError, match=message):
        daleify(nn.Sequential(nn.Linear(9, 20), nn.ReLU()), torch.rand(3, 9), **options)


def converted(forward, **layers):
    """What becomes of a model with these layers and this forward pass."""

    class Model(nn.Module):
        def forward(self, *inputs):
            return forward(self, *inputs)

    model = Model()
    for name, layer in layers.items():
        setattr(model, name, layer)
    return daleify(model, (torch.rand(6, 4), torch.rand(6, 4)))


def test_inputs_that_happen_to_be_positive_are_not_enough():
    first = nn.Linear(4, 8)
    nn.init.constant_(first.bias, 5.0)
    made = converted(lambda m, x, _: m.second(F.silu(m.first(x))), first=first, second=nn.Linear(8, 3))
    assert made.converted == ["first"]
    assert made.kept["second"].startswith("its inputs come from silu and can be negative; a ReLU instead")


def test_every_pass_through_a_layer_counts():
    made = converted(lambda m, x, _: m.again(torch.tanh(m.again(x.relu()) - 9)), again=nn.Linear(4, 4))
    assert "can be negative (-" in made.kept["again"]


def test_a_layer_under_two_names_stays_one_layer():
    shared = nn.Linear(4, 4)
    made = daleify(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), shared, nn.ReLU(), shared), torch.rand(6, 4))
    assert made.converted == ["0", "2"]
    assert isinstance(made.model[4], DANNLinear)
    assert made.model[2] is made.model[4]


def test_several_inputs_and_keyword_calls_are_followed():
    made = converted(lambda m, x, y: m.layer(input=x + y), layer=nn.Linear(4, 3))
    assert made.converted == ["layer"]


def test_layers_whose_weights_are_used_elsewhere_are_kept():
    made = converted(lambda m, x, _: m.layer(x) + m.layer.weight.sum(), layer=nn.Linear(4, 3))
    assert made.kept == {"layer": "its weights are also read outside of it"}
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    made = daleify(encoder, torch.rand(2, 5, 8))
    assert "TransformerEncoderLayer" in made.kept["linear2"]
    made.model.eval()(torch.rand(2, 5, 8))


def test_layers_that_carry_more_than_weights_are_kept():
    frozen = nn.Linear(4, 4).requires_grad_(False)
    normalised = nn.utils.spectral_norm(nn.Linear(4, 4))
    made = daleify(nn.Sequential(frozen, nn.ReLU(), normalised, nn.ReLU(), nn.LSTM(4, 4)), torch.rand(6, 4))
    assert made.converted == []
    assert "frozen" in made.kept["0"]
    assert "computed from others (spectral_norm" in made.kept["2"]
    assert "LSTM" in made.kept["4"]


def test_an_example_that_is_not_a_number_proves_nothing():
    made = daleify(nn.Sequential(nn.Linear(4, 4)), torch.full((2, 4), float("nan")))
    assert made.converted == []


# changes


def test_activations_that_let_negative_values_pass_become_relus_where_they_are_modules():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.first, self.last = nn.SiLU(inplace=True), nn.Hardswish()

        def forward(self, x):
            return self.last(self.c(F.gelu(self.b(self.first(self.a(x)).sqrt()))))

    made = daleify(Net(), torch.rand(6, 4), change=["activations"])
    assert made.converted == ["a", "b"]
    assert made.changed == {"first": "SiLU is ReLU", "last": "Hardswish is ReLU"}
    assert made.model.first.inplace
    assert "a ReLU in front would mend that: change 'inputs'" in made.kept["c"]
    assert daleify(Net(), torch.rand(6, 4), change=["activations", "inputs"]).converted == ["a", "b", "c.1"]


def test_a_relu_is_put_in_front_of_layers_whose_inputs_can_be_negative():
    net = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 5))
    made = daleify(net, torch.rand(7, 4), change=["inputs"])
    assert made.converted == ["0", "2.1"]
    assert made.changed == {"2.0": "a ReLU in front of '2.1'"}
    refuse_negative_inputs(made.model)
    assert made.model(torch.rand(7, 4)).shape == (7, 5)
    negative = daleify(net, -torch.rand(7, 4), change=["inputs"])
    assert negative.converted == ["2.1"]
    assert "give the model inputs >= 0" in negative.kept["0"]


def test_a_norm_is_removed_only_where_it_alone_reads_a_new_layers_output():
    def result(forward, norm=nn.BatchNorm1d, **options):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer, self.norm = nn.Linear(4, 4, bias=False), norm(4)

            def forward(self, x):
                return forward(self, x)

        made = daleify(Net(), torch.rand(6, 4), change=["norms"], **options)
        assert (made.model.layer.b is not None) == bool(made.changed)
        return isinstance(made.model.norm, nn.Identity)

    assert result(lambda m, x: m.norm(m.layer(x)).relu())
    assert result(lambda m, x: m.norm(input=m.layer(input=x)).relu(), nn.LayerNorm)
    assert not result(lambda m, x: m.norm(m.layer(x)).relu(), nn.LayerNorm, start="pretrained", divisive=False)
    assert not result(lambda m, x: m.norm(m.layer(x).relu_()))
    assert not result(lambda m, x: m.norm(m.layer(x[:, None].expand(6, 4, 4))).relu())  # not over the units
    assert not result(lambda m, x: m.norm(m.layer(x).mul_(2)))
    assert not result(lambda m, x: (z := m.layer(x)) + m.norm(z))
    assert not result(lambda m, x: m.norm(m.norm(m.layer(x))))
    assert not result(lambda m, x: m.norm(m.layer(m.layer(x).relu())))
    assert not result(lambda m, x: m.norm(m.layer(x[None])[0]).relu() + m.layer(x))


# weights of the ordinary layer


def used(net):
    """A network in float64 whose normalisations have seen images."""
    net = net.double()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.normal_()
                module.bias.normal_()
        for _ in range(3):
            net(torch.rand(4, 3, 32, 32, dtype=torch.float64))
    return net.eval()


NETS = {
    "resnet18": lambda: torchvision.models.resnet18(num_classes=10),
    "vgg11_bn": lambda: torchvision.models.vgg11_bn(num_classes=10).features,
    "densenet": lambda: torchvision.models.DenseNet(8, (2, 2), 8, num_classes=10),
    "mobilenet": lambda: torchvision.models.mobilenet_v3_small(num_classes=10),
    "dense": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(3072, 30), nn.BatchNorm1d(30, affine=False), nn.ReLU(), nn.Linear(30, 9)
    ),
}


@pytest.mark.parametrize("change", [(), ("norms",)], ids=["norms kept", "norms folded"])
@pytest.mark.parametrize("name", NETS)
def test_pretrained_networks_compute_the_same_before_training(name, change):
    torch.manual_seed(0)
    net, images = used(NETS[name]()), torch.rand(4, 3, 32, 32, dtype=torch.float64)
    made = daleify(net, images, start="pretrained", divisive=False, change=change)
    assert len(made.converted) > 0
    assert bool(made.changed) == bool(change)
    assert name == "mobilenet" or not made.kept
    assert_dale(made.model)
    with torch.no_grad():
        expected, found = net(images), made.model(images)
    assert float((found - expected).abs().max()) < 1e-10 * float(expected.abs().max())


def test_a_pretrained_layer_has_weights_of_both_kinds_and_single_units_keep_theirs():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Conv2d(4, 10, 1), nn.ReLU(), nn.Conv2d(10, 1, 1))
    made = daleify(net, torch.rand(2, 4, 5, 5), start="pretrained", divisive=False, fraction=0.3)
    assert made.converted == ["0", "2", "4"]
    for k in (0, 2, 4):
        layer = made.model[k]
        torch.testing.assert_close(layer.net_weight(), net[k].weight)
        assert torch.equal(layer.b, net[k].bias)
        assert (layer.Wei.sum(1) == 1).all()  # one interneuron each
        assert all((parameter >= 0).all() for parameter in (layer.Wex, layer.Wix, layer.Wei))
    assert [made.model[k].ni for k in (0, 2, 4)] == [4, 3, 1]


def test_a_frozen_pretrained_layer_stays_frozen():
    net = nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.ReLU(), nn.Linear(4, 3))
    made = daleify(net, torch.rand(6, 4), start="pretrained", divisive=False)
    assert made.converted == ["0", "2"]
    assert {name for name, p in made.model.named_parameters() if not p.requires_grad} == {
        *("0.Wex", "0.Wix", "0.Wei", "0.b")
    }
