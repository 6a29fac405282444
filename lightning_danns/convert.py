"""Dale's ANN layers in any architecture: replace the layers of a torch model whose inputs are non-negative."""

import copy
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_danns.errors import UsageError
from lightning_danns.initialization import Inputs
from lightning_danns.layers import DANNConv2d, DANNLinear


class Daleified(NamedTuple):
    """What `daleify` made of a model.

    Attributes:
        model: the new model; the given one is unchanged.
        converted: names of the layers that are DANN layers now.
        kept: names of the `nn.Linear` and `nn.Conv2d` layers that are not, with the reason.
    """

    model: nn.Module
    converted: list[str]
    kept: dict[str, str]


def daleify(
    model: nn.Module,
    example: Tensor,
    *,
    fraction: float = 0.1,
    ni: Mapping[str, int] | None = None,
    pixels: Collection[str] = (),
    divisive: bool = True,
) -> Daleified:
    """Replace the `nn.Linear` and `nn.Conv2d` layers of ``model`` by newly initialised DANN layers where that is sound.

    A DANN layer needs inputs >= 0. Whether a layer has them is observed: ``example`` passes through the model once, in
    evaluation mode, and a layer is kept if any of its inputs is negative. A batch of real or random images shows this
    reliably after the usual nonlinearities (ReLU and pooling never make a negative value, tanh and normalisation soon
    do), but it is an observation and no proof: `DaleProjection` checks the first real inputs again.

    All else stays: a batch normalisation after a converted convolution goes on normalising, and learns as before.

    Args:
        model: any torch model.
        example: a batch of valid inputs, e.g. ``torch.rand(8, 3, 64, 64)``.
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
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    for name in [*ni, *pixels]:
        if name not in layers:
            raise UsageError(f"{name!r} is no Linear or Conv2d of the model; these are: {', '.join(layers)}")
    lowest = _lowest_inputs(model, layers, example)
    owners = Counter(p for module in model.modules() for p in module.parameters(recurse=False))

    converted, kept = [], {}
    for name, layer in layers.items():
        reason = _reason_to_keep(layer, lowest.get(name), owners)
        if reason is not None:
            kept[name] = reason
            continue
        if isinstance(layer, nn.Conv2d):
            replacement: nn.Module = _conv(layer, ni.get(name), fraction, divisive)
        else:
            count = ni.get(name, max(1, round(fraction * layer.out_features)))
            kind: Inputs = "pixels" if name in pixels else "rectified"
            replacement = DANNLinear(
                layer.in_features, layer.out_features, count, divisive=divisive, inputs=kind, **_like(layer)
            )
        replacement.train(layer.training)
        if name == "":
            return Daleified(replacement, [name], {})
        model.set_submodule(name, replacement)
        converted.append(name)
    return Daleified(model, converted, kept)


def _lowest_inputs(model: nn.Module, layers: Mapping[str, nn.Module], example: Tensor) -> dict[str, float]:
    """The lowest input of each layer when ``example`` passes through; layers that are not called are absent."""
    lowest: dict[str, float] = {}

    def watch(name: str) -> Any:
        def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            lowest[name] = min(lowest.get(name, float("inf")), float(args[0].min()))

        return hook

    training = {module: module.training for module in model.modules()}
    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            model.eval()(example)
    finally:
        for handle in handles:
            handle.remove()
        for module, was_training in training.items():
            module.training = was_training
    return lowest


def _reason_to_keep(layer: nn.Linear | nn.Conv2d, lowest: float | None, owners: Mapping[Any, int]) -> str | None:
    if type(layer) not in (nn.Linear, nn.Conv2d):
        return f"it is a {type(layer).__name__}, whose owner may use its weights directly"
    if lowest is None:
        return "the example does not pass through it"
    if lowest < 0:
        return f"its inputs can be negative ({lowest:.4g} in the example)"
    if any(owners[p] > 1 for p in layer.parameters()):
        return "its weights are shared with another layer"
    if isinstance(layer, nn.Conv2d):
        if layer.padding_mode != "zeros":
            return f"padding_mode={layer.padding_mode!r} is not supported"
        if layer.out_channels // layer.groups < 2:
            return "it has one unit per group, which its own inhibition would cancel"
    elif layer.out_features < 2:
        return "it has one unit, which its own inhibition would cancel"
    return None


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
