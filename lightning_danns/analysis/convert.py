"""Dale's ANN layers in any architecture: replace the layers of a torch model whose inputs are non-negative."""

import copy
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_danns.errors import UsageError
from lightning_danns.initialization import Inputs
from lightning_danns.layers import DANNConv2d, DANNLinear
from lightning_danns.analysis.nonnegativity import NonNegativity, address

NO_COUNTERPART = (
    nn.modules.conv._ConvNd,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
    nn.Bilinear,
)


class Daleified(NamedTuple):
    """What `daleify` made of a model.

    Attributes:
        model: the new model; the given one is unchanged.
        converted: names of the layers that are DANN layers now.
        kept: names of the layers with connections that are not, each with its reason.
    """

    model: nn.Module
    converted: list[str]
    kept: dict[str, str]


def daleify(
    model: nn.Module,
    example: Tensor | tuple[Any, ...],
    *,
    fraction: float = 0.1,
    ni: Mapping[str, int] | None = None,
    pixels: Collection[str] = (),
    divisive: bool = True,
) -> Daleified:
    """Replace the `nn.Linear` and `nn.Conv2d` layers of ``model`` by newly initialised DANN layers where that is sound.

    A DANN layer needs inputs >= 0. ``example`` passes through the model once, in evaluation mode, and a layer is
    replaced if the operations before it guarantee that (`NonNegativity`): pixels in [0, 1], ReLU and sigmoid, then
    pooling, flattening, dropout, sums and products of such. It is kept if its inputs are negative, or happen to be
    >= 0 but could be negative for other weights, as after SiLU. The guarantee holds for the path the example takes, and
    for inputs that are >= 0 like the example; `DaleProjection` checks the first real inputs again.

    A layer that appears under several names stays one layer. Weights are drawn anew: those of an ordinary layer have
    both signs.

    All else stays: a batch normalisation after a converted convolution goes on normalising, and learns as before.

    Args:
        model: any torch model.
        example: a batch of valid inputs, e.g. ``torch.rand(8, 3, 64, 64)``; a tuple for several arguments.
        fraction: interneurons of each layer over its units.
        ni: interneurons of single layers by name, instead; an output layer usually has one.
        pixels: names of dense layers that see pixels and not rectified activity (see `DANNLinear`).
        divisive: whether inhibition also divides.

    Raises:
        UsageError: names in ``ni`` or ``pixels`` that are not such layers, or a fraction outside (0, 1].

    Example:
        >>> net = nn.Sequential(nn.Linear(9, 20), nn.ReLU(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 2))
        >>> made = daleify(net, torch.rand(16, 9))
        >>> made.converted
        ['0', '2']
        >>> list(made.kept)
        ['4']
    """
    if not 0 < fraction <= 1:
        raise UsageError(f"fraction={fraction}: interneurons over units must be above 0 and at most 1")
    ni = dict(ni or {})
    model = copy.deepcopy(model)
    names: dict[nn.Module, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        names[module].append(name)
    layers = {same[0]: module for module, same in names.items() if isinstance(module, nn.Linear | nn.Conv2d)}
    kept = {
        same[0]: f"a {type(module).__name__} has no DANN counterpart"
        for module, same in names.items()
        if isinstance(module, NO_COUNTERPART) and not isinstance(module, nn.Conv2d)
    }
    dense = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Linear)}
    for given, kind, known in ((ni, "Linear or Conv2d", layers), (pixels, "Linear", dense)):
        for name in given:
            if name not in known:
                raise UsageError(f"{name!r} is no {kind} of the model; these are: {', '.join(known)}")
    owners = Counter(p for module in model.modules() for p in module.parameters(recurse=False))
    parents = {child: module for module in model.modules() for child in module.children()}
    unfit = {name: _reason_of_kind(layer, owners, parents) for name, layer in layers.items()}
    misused = _reasons_of_use(model, layers, example if isinstance(example, tuple) else (example,))

    converted = []
    for name, layer in layers.items():
        reason = unfit[name] or misused[name]
        if reason is not None:
            kept[name] = reason
            continue
        if isinstance(layer, nn.Conv2d):
            replacement: nn.Module = _conv(layer, ni.get(name), fraction, divisive)
        else:
            count = ni.get(name, max(1, round(fraction * layer.out_features)))
            sees: Inputs = "pixels" if name in pixels else "rectified"
            replacement = DANNLinear(
                layer.in_features, layer.out_features, count, divisive=divisive, inputs=sees, **_like(layer)
            )
        replacement.train(layer.training)
        if name == "":
            return Daleified(replacement, [name], {})
        for same in names[layer]:
            model.set_submodule(same, replacement)
        converted.append(name)
    return Daleified(model, converted, kept)


def _reason_of_kind(layer: nn.Linear | nn.Conv2d, owners: Mapping[Any, int], parents: Mapping[Any, Any]) -> str | None:
    """Why a layer cannot be replaced, whatever its inputs; None if it can."""
    if type(layer) not in (nn.Linear, nn.Conv2d):
        return f"it is a {type(layer).__name__}, whose owner may use its weights directly"
    if isinstance(parents.get(layer), nn.TransformerEncoderLayer):
        return "its owner, a TransformerEncoderLayer, reads its weights directly"
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return "it carries hooks (of spectral_norm, for example), which would be lost"
    if any(owners[p] > 1 for p in layer.parameters()):
        return "its weights are shared with another layer"
    if not layer.weight.requires_grad:
        return "it is frozen, and new weights could not learn"
    if isinstance(layer, nn.Conv2d):
        if layer.padding_mode != "zeros":
            return f"padding_mode={layer.padding_mode!r} is not supported"
        if layer.out_channels // layer.groups < 2:
            return "it has one unit per group, which its own inhibition would cancel"
    elif layer.out_features < 2:
        return "it has one unit, which its own inhibition would cancel"
    return None


def _reasons_of_use(
    model: nn.Module, layers: Mapping[str, nn.Linear | nn.Conv2d], example: tuple[Any, ...]
) -> dict[str, str | None]:
    """Why each layer cannot be replaced, judging by its part when ``example`` passes through; None if it can."""
    known = NonNegativity(*(x for x in example if isinstance(x, Tensor)))
    passes: dict[str, list[str | None]] = {name: [] for name in layers}
    read_outside: set[int] = set()  # addresses of what is read while none of the layers is running

    def before(name: str) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            origin, lowest = known.origin(x), float(x.min())
            reason = None
            if not lowest >= 0:
                reason = f"its inputs can be negative ({lowest:.4g} in the example)"
            elif origin is not None:
                reason = f"its inputs come from {origin}, which does not guarantee that they are >= 0"
            passes[name].append(reason)
            read_outside.update(known.read)

        return hook

    def after(layer: nn.Module, args: Any, output: Any) -> None:
        known.read.clear()

    training = {module: module.training for module in model.modules()}
    handles = [layer.register_forward_pre_hook(before(name), with_kwargs=True) for name, layer in layers.items()]
    handles += [layer.register_forward_hook(after) for layer in layers.values()]
    try:
        with torch.no_grad(), known:
            model.eval()(*example)
    finally:
        for handle in handles:
            handle.remove()
        for module, was_training in training.items():
            module.training = was_training
    read_outside |= known.read

    reasons: dict[str, str | None] = {}
    for name, layer in layers.items():
        if not passes[name]:
            reasons[name] = "the example does not pass through it"
        elif any(address(p) in read_outside for p in layer.parameters()):
            reasons[name] = "its weights are also read outside of it"
        else:
            reasons[name] = next((reason for reason in passes[name] if reason is not None), None)
    return reasons


def _conv(layer: nn.Conv2d, ni: int | None, fraction: float, divisive: bool) -> DANNConv2d:
    if ni is None:
        ni = layer.groups * max(1, round(fraction * layer.out_channels / layer.groups))
    geometry: dict[str, Any] = {
        "kernel_size": layer.kernel_size,
        "stride": layer.stride,
        "padding": layer.padding,
        "dilation": layer.dilation,
        "groups": layer.groups,
    }
    return DANNConv2d(layer.in_channels, layer.out_channels, ni, divisive=divisive, **geometry, **_like(layer))


def _like(layer: nn.Linear | nn.Conv2d) -> dict[str, Any]:
    return {"bias": layer.bias is not None, "device": layer.weight.device, "dtype": layer.weight.dtype}
