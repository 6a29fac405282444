"""A start from data: every unit's z centred and standardised over a first batch."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_danns.errors import UsageError
from lightning_danns.layers.batch_norm import DaleBatchNorm1d
from lightning_danns.layers.dale import DaleModule, dale_layers
from lightning_danns.layers.dann import at_least_float32


def _here(values: Tensor) -> Tensor:
    return values


@torch.no_grad()
def standardise_(model: nn.Module, x: Tensor, reduce: Callable[[Tensor], Tensor] = _here) -> dict[str, Tensor]:
    """Make z of each unit of a new network have mean 0 and standard deviation 1 over the batch ``x``, layer by layer.

        g <- g / std(z),  b <- (b - mean(z)) / std(z)

    Each layer sees what the standardised layers below it make of ``x``; all but the last that runs, the output, are
    changed. Weights keep their signs and their balance, as what changes is the gain and the bias of each unit (of a
    layer without gains, both weights of a unit: Wex and Wei). A unit whose z does not vary keeps its gain.

    Balance takes away what the units of a network answer alike, and with it most of the variance that the published
    initialisation counts on: on images z then has a standard deviation of 0.1 to 0.2 at the start, not of 1.

    Sources: data-dependent initialisation as in Salimans and Kingma (2016) and in Mishkin and Matas (2016).

    Args:
        model: whose layers run once each for an input. It runs in evaluation mode.
        x: a batch as the model takes it, of some hundred samples.
        reduce: the mean over processes of a tensor that each has, where each has a part of the batch.

    Returns:
        By layer's qualified name, the standard deviation of each unit's z before, (units,).

    Raises:
        UsageError: fewer than two signed layers run; one runs more than once or is sharded; z is not finite; the
            network is standardised over each batch already.

    Example:
        >>> from lightning_danns import DANNLinear
        >>> net = nn.Sequential(DANNLinear(9, 20, 2, balanced=True), nn.ReLU(), DANNLinear(20, 5, 1, balanced=True))
        >>> x = torch.rand(100, 9)
        >>> _ = standardise_(net, x)
        >>> z = net[0](x)
        >>> bool((z.mean(0).abs() < 1e-5).all()), bool(((z.std(0, correction=0) - 1).abs() < 1e-5).all())
        (True, True)
    """
    names = {layer: name for name, layer in dale_layers(model)}
    for layer, name in names.items():
        if isinstance(layer, DaleBatchNorm1d):
            raise UsageError(f"layer {name!r} standardises each batch (norm='batch'): leave this start out")
        if any(type(parameter) is not nn.Parameter for parameter in layer.parameters(recurse=False)):
            raise UsageError(f"layer {name!r} is sharded: standardise the network before it is")
    order: list[DaleModule] = []
    with _hooked(model, {layer: lambda layer, *_: order.append(layer) for layer in names}):
        model(x)
    if len(order) < 2:
        raise UsageError(f"{len(order)} signed layers run: the last is not standardised, so it takes two or more")
    for layer in order:
        if order.count(layer) > 1:
            raise UsageError(f"layer {names[layer]!r} runs {order.count(layer)} times for an input: it must run once")
    before: dict[str, Tensor] = {}

    def standardise(layer: DaleModule, args: Any, kwargs: Any, z: Tensor) -> Tensor:
        name = names[layer]
        units = at_least_float32(z.transpose(layer.unit_dim, -1).flatten(0, -2))
        mean = reduce(units.mean(0))
        std = reduce((units - mean).square().mean(0)).sqrt()
        if not bool(std.isfinite().all()):
            raise UsageError(f"layer {name!r}: z is not finite for this batch, so it cannot be standardised")
        before[name] = std.to(z.dtype)
        varies = std > 1e-6 * (1 + mean.abs())
        layer.standardise_(mean.to(z.dtype), torch.where(varies, std, 1).to(z.dtype))
        return layer.forward(*args, **kwargs)

    with _hooked(model, {layer: standardise for layer in order[:-1]}):
        model(x)
    return before


@contextmanager
def _hooked(model: nn.Module, hooks: Mapping[DaleModule, Callable[..., Any]]) -> Iterator[None]:
    """In evaluation mode and not compiled, with a forward hook on each of these layers."""
    modes = {module: module.training for module in model.modules()}
    handles = [layer.register_forward_hook(hook, with_kwargs=True) for layer, hook in hooks.items()]
    try:
        with torch.compiler.set_stance("force_eager"):
            model.eval()
            yield
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
