"""How a model uses its layers while an example passes through: what comes in, and what alone reads what comes out."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_danns.analysis.activity import evaluating
from lightning_danns.analysis.nonnegativity import NonNegativity, address


@dataclass
class Usage:
    """One layer's part in a pass of the model.

    Attributes:
        inputs: of each call, what makes the input possibly negative (None if nothing does), and its lowest value.
        dim: dimensions of its output.
        reads: how many operations within the layer have read its parameters.
        shared: whether operations elsewhere have, too.
        norm: name of the normalisation that alone reads the layer's only output, if there is one.
    """

    inputs: list[tuple[str | None, float]] = field(default_factory=list)
    dim: int = 0
    reads: int = 0
    shared: bool = False
    norm: str | None = None


def first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A module's first input, by position or by keyword."""
    return next(iter((*args, *kwargs.values())))


def usage(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    norms: Mapping[str, nn.Module],
    example: tuple[Any, ...],
) -> dict[str, Usage]:
    """The part of each of ``layers`` in one pass, in evaluation mode; ``norms`` are what may follow them directly."""
    known = NonNegativity(*(x for x in example if isinstance(x, Tensor)))
    found = {name: Usage() for name in layers}
    made: dict[int, tuple[str, int, torch.Size]] = {}  # by address of an output: its layer, reads so far, shape
    # calls of each norm: the layer whose output it is the first to read, that output's address, and its reads so far
    followed: dict[str, list[tuple[str, int, int]]] = {name: [] for name in norms}

    def reads_of_parameters(layer: nn.Module) -> int:
        return sum(known.reads[address(parameter)] for parameter in layer.parameters())

    def watch(name: str, layer: nn.Module) -> Any:
        def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = first(args, kwargs)
            found[name].inputs.append((known.origin(x), float(x.min())))
            found[name].reads -= reads_of_parameters(layer)

        def after(layer: nn.Module, args: Any, output: Tensor) -> None:
            found[name].reads += reads_of_parameters(layer)
            found[name].dim = output.dim()
            made[address(output)] = name, known.reads[address(output)], output.shape

        return layer.register_forward_pre_hook(before, with_kwargs=True), layer.register_forward_hook(after)

    def watch_norm(name: str, norm: nn.Module) -> Any:
        source: list[str] = []

        def before(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = first(args, kwargs)
            layer, reads, shape = made.get(address(x), ("", 0, None))
            source[:] = [layer if known.reads[address(x)] == reads and x.shape == shape else ""]

        def after(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            place = address(first(args, kwargs))
            followed[name].append((source[0], place, known.reads[place]))

        pre = norm.register_forward_pre_hook(before, with_kwargs=True)
        return pre, norm.register_forward_hook(after, with_kwargs=True)

    handles = [handle for name, layer in layers.items() for handle in watch(name, layer)]
    handles += [handle for name, norm in norms.items() for handle in watch_norm(name, norm)]
    try:
        with evaluating(model), torch.no_grad(), known:
            model(*example)
    finally:
        for handle in handles:
            handle.remove()

    for name, layer in layers.items():
        found[name].shared = reads_of_parameters(layer) > found[name].reads
    for norm, calls in followed.items():
        for layer_name, place, reads in calls if len(calls) == 1 else ():
            # the norm is the first to read the layer's output, and nothing reads it afterwards
            if layer_name in found and len(found[layer_name].inputs) == 1 and known.reads[place] == reads:
                found[layer_name].norm = norm
    return found
