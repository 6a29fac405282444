"""Why an ordinary layer cannot become a DANN layer, and what would have to change."""

from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple

from torch import nn

from lightning_danns.analysis.usage import Usage

Change = Literal["activations", "norms", "inputs"]
Start = Literal["random", "pretrained"]

NO_COUNTERPART = (
    *(nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.Bilinear),
)
ACTIVATIONS = (nn.GELU, nn.SiLU, nn.Hardswish, nn.Mish, nn.ELU, nn.CELU, nn.SELU, nn.LeakyReLU, nn.PReLU)
"""Modules like ReLU, but for some negative values that they let pass."""
OF_ACTIVATIONS = {"gelu", "silu", "hardswish", "mish", "elu", "celu", "selu", "leaky_relu", "_prelu_kernel"}
"""ATen operations of those."""


def reason_of_kind(
    layer: nn.Linear | nn.Conv2d, owners: Mapping[Any, int], parents: Mapping[Any, Any], start: Start
) -> str | None:
    """Why a layer cannot be replaced, whatever its inputs; None if it can."""
    if type(layer) not in (nn.Linear, nn.Conv2d):
        return f"it is a {type(layer).__name__}, whose owner may use its weights directly"
    if isinstance(parents.get(layer), nn.TransformerEncoderLayer):
        return "its owner, a TransformerEncoderLayer, reads its weights directly"
    if "weight" not in dict(layer.named_parameters(recurse=False)):
        return "its weight is computed from others (spectral_norm and pruning do so), which would be lost"
    if any(owners[p] > 1 for p in layer.parameters()):
        return "its weights are shared with another layer"
    if start == "random" and not layer.weight.requires_grad:
        return "it is frozen, and new weights could not learn"
    if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
        return f"padding_mode={layer.padding_mode!r} is not supported"
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    if start == "random" and len(layer.weight) // groups < 2:
        one = "one unit" if groups == 1 else "one unit per group (depthwise)"
        return f"it has {one}, which its own inhibition would cancel; start='pretrained' allows it"
    return None


def reason_of_use(used: Usage) -> str | None:
    """Why a layer cannot be replaced, judging by what the model does with it; None if it can."""
    if not used.inputs:
        return "the example does not pass through it"
    return "its weights are also read outside of it" if used.shared else None


class Obstacle(NamedTuple):
    """What is wrong with a layer's inputs, and whether a ReLU in front of the layer would mend it."""

    reason: str
    mendable: bool


def obstacle(used: Usage, change: Collection[Change]) -> Obstacle | None:
    """What makes a layer's inputs negative; None if they cannot be."""
    obstacles = []
    for origin, lowest in used.inputs:
        if origin is None and lowest >= 0:
            continue
        if origin is None or origin == "the input":  # NaN, or what the user gives
            reason = f"its inputs can be negative ({lowest:.4g} in the example): give the model inputs >= 0"
            return Obstacle(reason, mendable=False)
        seen = f" ({lowest:.4g} in the example)" if lowest < 0 else ""
        if origin in OF_ACTIVATIONS and "activations" not in change:  # if it is, the activation is no module
            mend = "a ReLU instead would mend that: change 'activations'"
        else:
            mend = "a ReLU in front would mend that: change 'inputs'"
        obstacles.append(Obstacle(f"its inputs come from {origin} and can be negative{seen}; {mend}", mendable=True))
    return obstacles[0] if obstacles else None
