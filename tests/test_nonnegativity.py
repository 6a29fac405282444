"""What the operations of a forward pass guarantee about signs, against what they do to numbers."""

import pytest
import torch
import torch.nn.functional as F

from lightning_danns.analysis.nonnegativity import NonNegativity

X = 3 * torch.rand(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
W = torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(1))


def lowered(x):
    """Any sign, for the operations that make it non-negative again."""
    return x - 1.5


def squeeze_and_excite(x):
    return x * torch.sigmoid(F.conv2d(x.mean((2, 3), keepdim=True), W[:, :, :1, :1]))


def relu_in_place_of_a_part(x):
    y = lowered(x)
    y[:, :1].relu_()
    return y


def lowered_through_a_view(x):
    y = F.relu(x)
    y.flatten(1)[:, :5].sub_(2)
    return y


GUARANTEED = {
    "relu": lambda x: F.relu(lowered(x)),
    "relu in place": lambda x: F.relu(lowered(x), inplace=True),
    "relu6": lambda x: F.relu6(lowered(x)),
    "sigmoid": lambda x: torch.sigmoid(lowered(x)),
    "softmax": lambda x: lowered(x).softmax(-1),
    "softplus": lambda x: F.softplus(lowered(x)),
    "square": lambda x: lowered(x) ** 2,
    "clamp": lambda x: lowered(x).clamp(min=0),
    "max_pool": lambda x: F.max_pool2d(x, 3, 2, 1),
    "avg_pool": lambda x: F.avg_pool2d(x, 2),
    "adaptive pool to 1": lambda x: F.adaptive_avg_pool2d(x, 1),
    "adaptive pool to 3": lambda x: F.adaptive_avg_pool2d(x, 3),
    "flatten": lambda x: x.permute(0, 2, 3, 1).flatten(1),
    "contiguous": lambda x: x.permute(0, 2, 3, 1).contiguous(),
    "chunk": lambda x: x.chunk(2, 1)[1],
    "dropout": lambda x: F.dropout(x, 0.5, training=True),
    "residual": lambda x: x + F.relu(F.conv2d(x, W, padding=1)),
    "scale": lambda x: x * 0.5 / 255,
    "concatenate": lambda x: torch.cat([x, F.relu(lowered(x))], -1),
    "pad": lambda x: F.pad(x, (1, 1)),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "squeeze and excite": squeeze_and_excite,
}
NOT_GUARANTEED = {
    "convolution": lambda x: F.conv2d(x, W),
    "shift": lowered,
    "subtract": lambda x: torch.add(x, x, alpha=-2),
    "negate": lambda x: x * -1,
    "tanh": lambda x: torch.tanh(lowered(x)),
    "silu": lambda x: F.silu(lowered(x)),
    "gelu": lambda x: F.gelu(lowered(x)),
    "leaky relu": lambda x: F.leaky_relu(lowered(x)),
    "layer norm": lambda x: F.layer_norm(x, [8]),
    "cube": lambda x: lowered(x) ** 3,
    "clamp from above": lambda x: lowered(x).clamp(max=0),
    "pad with -1": lambda x: F.pad(x, (1, 1), value=-1.0),
    "concatenate with any": lambda x: torch.cat([x, lowered(x)], -1),
    "bicubic": lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"),
    "relu in place of a part": relu_in_place_of_a_part,
    "lowered through a view": lowered_through_a_view,
    "conjugate": lambda x: torch.complex(x, x).conj().imag,
}


@pytest.mark.parametrize("make", GUARANTEED.values(), ids=GUARANTEED)
def test_what_is_guaranteed_is_true(make):
    with torch.no_grad(), NonNegativity(X) as known:
        y = make(X)
    assert known.origin(y) is None
    assert y.min() >= 0


@pytest.mark.parametrize("make", NOT_GUARANTEED.values(), ids=NOT_GUARANTEED)
def test_what_can_be_negative_is_not_guaranteed(make):
    with torch.no_grad(), NonNegativity(X) as known:
        y = make(X)
    assert known.origin(y) is not None
    assert y.min() < 0


def test_an_input_with_a_negative_value_guarantees_nothing():
    with NonNegativity(-X, torch.tensor([0.0, float("nan")])) as known:
        views = (-X).flatten(), torch.tensor([0.0, float("nan")]).flatten()
    assert all(known.origin(view) is not None for view in views)


def test_a_parameter_guarantees_nothing_however_positive():
    scale = torch.nn.Parameter(torch.ones(4, 1, 1))
    with torch.no_grad(), NonNegativity(X) as known:
        y = X * scale
    assert known.origin(y) == "a parameter or constant"


def test_the_origin_is_the_operation_at_fault_however_much_is_done_afterwards():
    with torch.no_grad(), NonNegativity(X) as known:
        y = F.max_pool2d(2 * F.silu(lowered(X)) + X, 2).flatten(1).mean(1)
    assert known.origin(y) == "silu"
