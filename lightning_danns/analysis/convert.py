"""Dale's ANN layers in any architecture: replace the layers of a torch model whose inputs are non-negative."""

import copy
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_weights

from lightning_danns.analysis.obstacles import (
    ACTIVATIONS,
    NO_COUNTERPART,
    Change,
    Start,
    obstacle,
    reason_of_kind,
    reason_of_use,
)
from lightning_danns.analysis.pretrained import split_
from lightning_danns.analysis.usage import usage
from lightning_danns.errors import UsageError
from lightning_danns.initialization import Inhibition
from lightning_danns.layers import DANNConv2d, DANNLinear

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


class Daleified(NamedTuple):
    """What `daleify` made of a model.

    Attributes:
        model: the new model; the given one is unchanged.
        converted: names of the layers that are DANN layers now.
        kept: names of the layers with connections that are not, each with its reason and the change that would do.
        changed: names of the other modules that were replaced or removed, and of ReLUs put in, each with what was done.
    """

    model: nn.Module
    converted: list[str]
    kept: dict[str, str]
    changed: dict[str, str]


def daleify(
    model: nn.Module,
    example: Tensor | tuple[Any, ...],
    *,
    change: Collection[Change] = (),
    start: Start = "random",
    fraction: float = 0.1,
    ni: Mapping[str, int] | None = None,
    pixels: Collection[str] = (),
    divisive: bool = True,
    balanced: bool = False,
    inhibition: Inhibition | None = None,
    eps: float | None = None,
) -> Daleified:
    """Replace the `nn.Linear` and `nn.Conv2d` layers of ``model`` by DANN layers where that is sound.

    A DANN layer needs inputs >= 0. ``example`` passes through the model once, in evaluation mode, and a layer is
    replaced if the operations before it guarantee that (`NonNegativity`): pixels in [0, 1], ReLU and sigmoid, then
    pooling, flattening, dropout, sums and products of such. It is kept if its inputs are negative, or happen to be
    >= 0 but could be negative for other weights, as after SiLU. The guarantee holds for the path the example takes, and
    for inputs that are >= 0 like the example; `DaleProjection` checks the first real inputs again.

    ``change`` lets more layers be replaced, or leaves less between them:

        "activations"  GELU, SiLU, Hardswish and their like become ReLU, where they are modules
        "norms"        a normalisation that alone reads what a replaced layer gives is removed, because inhibition
                       standardises too (deep nets then learn only if ``balanced``). Under ``start="pretrained"``, batch
                       normalisation is folded into the weights, with its running statistics, and others stay
        "inputs"       a ReLU in front of each layer whose inputs could be negative, as in pre-activation residual nets;
                       the layer ``x`` then is ``x.1``. Not where the model's own input is negative

    All else stays: without "norms", a batch normalisation after a replaced convolution learns on as before.

    ``start="random"`` draws weights anew; ``"pretrained"`` meets the layer's own W = Wex - Wei Wix exactly by
    non-negative parts (`split_`) and keeps its bias. In evaluation mode, the outputs then equal those of ``model``,
    unless "activations" or "inputs" change them. It needs subtraction alone and no balance, which would change W.

    A layer that appears under several names stays one layer. Hooks on a replaced layer are lost.

    Args:
        model: any torch model.
        example: a batch of valid inputs, e.g. ``torch.rand(8, 3, 64, 64)``; a tuple for several arguments.
        change: what else may be changed.
        start: what the weights of new layers start from.
        fraction: interneurons of each layer over its units.
        ni: interneurons of single layers by name, instead; an output layer usually has one.
        pixels: names of dense layers that see pixels and not rectified activity (see `DANNLinear`).
        divisive, balanced, inhibition, eps: of all new layers, see `DANNLinear`.

    Raises:
        UsageError: names in ``ni`` or ``pixels`` that are not such layers, a fraction outside (0, 1], an unknown
            ``change`` or ``start``, or options that pretrained weights exclude.

    Example:
        >>> net = nn.Sequential(nn.Linear(9, 20), nn.ReLU(), nn.Linear(20, 20), nn.GELU(), nn.Linear(20, 2))
        >>> made = daleify(net, torch.rand(16, 9))
        >>> made.converted, list(made.kept)
        (['0', '2'], ['4'])
        >>> daleify(net, torch.rand(16, 9), change=["activations"]).converted
        ['0', '2', '4']
    """
    _check_options(change, start, fraction, divisive, balanced, inhibition)
    ni = dict(ni or {})
    model = copy.deepcopy(model)
    changed: dict[str, str] = {}
    if "activations" in change:
        for same in _names(model, ACTIVATIONS).values():
            old = model.get_submodule(same[0])
            for name in same:
                changed[name] = f"{type(old).__name__} is ReLU"
            _put(model, same, nn.ReLU(inplace=getattr(old, "inplace", False)))
    names = _names(model, nn.Module)
    layers = {same[0]: module for module, same in names.items() if isinstance(module, nn.Linear | nn.Conv2d)}
    kept = {
        same[0]: f"a {type(module).__name__} has no DANN counterpart"
        for module, same in names.items()
        if isinstance(module, NO_COUNTERPART)
    }
    dense = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Linear)}
    for given, kind, of_kind in ((ni, "Linear or Conv2d", layers), (pixels, "Linear", dense)):
        for name in given:
            if name not in of_kind:
                raise UsageError(f"{name!r} is no {kind} of the model; these are: {', '.join(of_kind)}")
    norms = {same[0]: m for m, same in names.items() if isinstance(m, (*BATCH_NORMS, nn.LayerNorm, nn.GroupNorm))}
    owners = Counter(p for module in model.modules() for p in module.parameters(recurse=False))
    parents = {child: module for module in model.modules() for child in module.children()}
    used = usage(model, layers, norms, example if isinstance(example, tuple) else (example,))

    converted = []
    for name, layer in layers.items():
        reason = reason_of_kind(layer, owners, parents, start) or reason_of_use(used[name])
        negative = None if reason else obstacle(used[name], change)
        if negative is not None and not (negative.mendable and "inputs" in change):
            reason = negative.reason
        if reason is not None:
            kept[name] = reason
            continue
        weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
        norm = norms.get(used[name].norm or "") if "norms" in change else None
        if norm is not None and _removable(norm, layer, used[name].dim, start):
            weight, bias = _without(norm, layer, start)
            did = "folded into" if start == "pretrained" else "removed after"
            changed |= {same: f"{type(norm).__name__} is {did} {name!r}" for same in names[norm]}
            _put(model, names[norm], nn.Identity())
        options: dict[str, Any] = dict(divisive=divisive, balanced=balanced, inhibition=inhibition, eps=eps)
        options |= {"bias": bias is not None, "device": weight.device, "dtype": weight.dtype}
        if isinstance(layer, nn.Linear):
            options["inputs"] = "pixels" if name in pixels else "rectified"
        new = _counterpart(layer, ni.get(name), fraction, options)
        if start == "pretrained":
            _start_from(new, weight, bias)
            new.requires_grad_(layer.weight.requires_grad)
        if name == "":
            return Daleified(new.train(layer.training), [name], {}, {})
        if negative is None:
            _put(model, names[layer], new.train(layer.training))
            converted.append(name)
        else:
            _put(model, names[layer], nn.Sequential(nn.ReLU(), new).train(layer.training))
            changed |= {f"{same}.0": f"a ReLU in front of {f'{same}.1'!r}" for same in names[layer]}
            converted.append(f"{name}.1")
    return Daleified(model, converted, kept, changed)


def _check_options(
    change: Collection[str],
    start: str,
    fraction: float,
    divisive: bool,
    balanced: bool,
    inhibition: Inhibition | None,
) -> None:
    if not 0 < fraction <= 1:
        raise UsageError(f"fraction={fraction}: interneurons over units must be above 0 and at most 1")
    for what in [change] if isinstance(change, str) else change:
        if what not in get_args(Change) or isinstance(change, str):
            raise UsageError(f"change={change!r}: give a list of {', '.join(map(repr, get_args(Change)))}")
    if start not in get_args(Start):
        raise UsageError(f"start={start!r}: choose {' or '.join(map(repr, get_args(Start)))}")
    if start == "pretrained" and (divisive or balanced or inhibition is not None):
        raise UsageError(
            f"start='pretrained' with divisive={divisive}, balanced={balanced}, inhibition={inhibition!r}: weights are "
            "met exactly by subtraction alone, without balance; give divisive=False and leave the others out"
        )


def _names(model: nn.Module, kinds: Any) -> dict[nn.Module, list[str]]:
    """All names of each module of some kinds."""
    names: dict[nn.Module, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, kinds):
            names[module].append(name)
    return names


def _put(model: nn.Module, names: Collection[str], module: nn.Module) -> None:
    for name in names:
        model.set_submodule(name, module)


def _removable(norm: nn.Module, layer: nn.Linear | nn.Conv2d, dim: int, start: Start) -> bool:
    """Whether a norm of what ``layer`` gives can go: it normalises the layer's units, and can be folded into it."""
    if isinstance(norm, BATCH_NORMS):
        by_unit = dim == (4 if isinstance(layer, nn.Conv2d) else 2)  # otherwise dimension 1 is another one
        return by_unit and (start == "random" or norm.running_mean is not None)
    if isinstance(norm, nn.LayerNorm) and tuple(norm.normalized_shape) != (len(layer.weight),):
        return False
    return start == "random"


@torch.no_grad()
def _without(norm: nn.Module, layer: nn.Linear | nn.Conv2d, start: Start) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a layer that does without its norm; to start from them, they do what both do in evaluation."""
    if start == "pretrained" and isinstance(norm, BATCH_NORMS):
        # of a convolution, but it fits any weight of shape (units, ...)
        statistics: Any = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
        weight, bias = fuse_conv_bn_weights(layer.weight, layer.bias, *statistics)
        return weight.detach(), bias.detach()
    has_bias = layer.bias is not None or norm.bias is not None
    return layer.weight, layer.weight.new_zeros(len(layer.weight)) if has_bias else None


def _counterpart(
    layer: nn.Linear | nn.Conv2d, ni: int | None, fraction: float, options: Mapping[str, Any]
) -> DANNLinear | DANNConv2d:
    if isinstance(layer, nn.Linear):
        ni = max(1, round(fraction * layer.out_features)) if ni is None else ni
        return DANNLinear(layer.in_features, layer.out_features, ni, **options)
    if ni is None:
        ni = layer.groups * max(1, round(fraction * layer.out_channels / layer.groups))
    geometry = {name: getattr(layer, name) for name in ("kernel_size", "stride", "padding", "dilation", "groups")}
    return DANNConv2d(layer.in_channels, layer.out_channels, ni, **geometry, **options)


@torch.no_grad()
def _start_from(new: DANNLinear | DANNConv2d, weight: Tensor, bias: Tensor | None) -> None:
    split_(weight, new.Wex, new.Wix, new.Wei, new.groups)
    if new.b is not None and bias is not None:
        new.b.copy_(bias)
