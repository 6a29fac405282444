"""Dale's principle as a contract: layers declare which weights have a sign and how fast each learns; others ask.

The projection and the group builder walk ``model.modules()`` and ask every `DaleModule`. They match neither
parameter names nor concrete types, so a new layer joins by declaring itself.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_danns.errors import UsageError


class DANNComponents(NamedTuple):
    """The parts of one layer's computation. With subtraction alone, ``gamma`` is None."""

    z_e: Tensor
    z_i: Tensor
    subtraction: Tensor
    gamma: Tensor | None
    z: Tensor


VANISHING = 1e-12
"""Lowest value, in place of 0, of a weight that inhibition is made of in a balanced layer.

So there is always some inhibition to scale, and no scaled weight is infinite, even where the product of two such
weights meets huge excitation. It is less than what float32 rounds off from a weight of usual size.
"""


class Balance(NamedTuple):
    """Total excitation and inhibition onto each unit of a layer, and the weights that bring them into balance.

    Attributes:
        excitation: (units,), S_i, the sum of the excitatory weights onto each unit.
        inhibition: (units,), I_i, what inhibition removes from each unit when every input is 1; linear in ``scaled``.
        scaled: (units, ...), a parameter or a view of one, whose rows are scaled by S_i / I_i; the forward pass takes
            them from `DaleModule.in_balance`.
    """

    excitation: Tensor
    inhibition: Tensor
    scaled: Tensor


class DaleModule(nn.Module):
    """A layer with signed weights. Subclasses declare about themselves:

    Attributes:
        nonnegative: names of the layer's own parameters that must stay >= 0. Names whose parameter is None
            (a switched-off option) are passed over.
        nonnegative_inputs: whether the layer is only defined for inputs >= 0.
        unit_dim: the dimension of its output that counts units; -1, or -3 for a convolution over images.
        relative_to: the own parameter whose rate and Fisher information the factors are relative to; None, the first.
        balanced: whether each unit's total inhibition is kept equal to its total excitation.
        balancing: names of the own parameters that make up inhibition; `project_` then clamps them to `VANISHING`
            instead of 0.

    Methods:
        lr_factors: the learning-rate factor of each own parameter; 1 for those not named.
        constants: what changes its computation, but no weight.
        balance: both totals of each unit, of a layer that can be balanced.
        in_balance: the weights that balance scales, for the forward pass of a balanced layer.
        decays_to: what weight decay leads own parameters to, if not to 0.
        standardise_: changes z of each unit to (z - mean) / std, of a layer that can (`standardise_`).
        strengthen_: makes excitation and inhibition stronger by as much, of a layer that can (`strengthen_`).
        components, net_weight: for analysis (`lightning_danns.analysis`), if the layer has such parts.

    Example:
        >>> class Excitatory(DaleModule):
        ...     nonnegative = ("W",)
        ...
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.W = nn.Parameter(torch.rand(3, 4))
        ...
        ...     def lr_factors(self):
        ...         return {"W": 0.5}
        ...
        ...     def forward(self, x):
        ...         return x @ self.W.T
        >>> layer = Excitatory()
        >>> _ = layer.W.data.sub_(1)
        >>> project_(layer)
        >>> bool((layer.W >= 0).all())
        True
    """

    nonnegative: ClassVar[tuple[str, ...]] = ()
    nonnegative_inputs: ClassVar[bool] = True
    unit_dim: ClassVar[int] = -1
    relative_to: ClassVar[str | None] = None
    balanced: bool = False
    balancing: ClassVar[tuple[str, ...]] = ()

    def lr_factors(self) -> dict[str, float]:
        """Learning-rate factor by name of own parameter; a name left out has factor 1."""
        return {}

    def constants(self) -> dict[str, Any]:
        """Settings that change what the layer computes, but neither names nor shapes of its weights.

        A checkpoint keeps them, and is refused where others are set.
        """
        return {"balanced": self.balanced}

    def balance(self) -> Balance | None:
        """Total excitation and inhibition of each unit, and the weights that balance them; None if it has not both."""
        if self.balanced:
            raise UsageError(f"{type(self).__name__} is balanced, but has no balance() that says by what")
        return None

    def in_balance(self) -> Tensor:
        """`Balance.scaled`, each row times S_i / I_i, which a balanced layer computes with; as precise as `balance`.

        After `project_` the ratio is 1 but for rounding (0 of a unit without excitation). Its gradient is not 0: with
        it, gradients are those of the loss after the next `project_`, as far as nothing is clamped. Without it they
        point where that undoes them, and can shrink all of a unit's excitation to nothing.

        Raises:
            UsageError: the layer has no `balance`.
        """
        part = totals(self)
        if part is None:
            raise UsageError(f"{type(self).__name__} has no balance(): nothing to bring into balance")
        return scale_rows(part.scaled, part.excitation / scalable(part.inhibition))

    def decays_to(self) -> dict[str, Tensor]:
        """What weight decay leads own excitatory parameters to, in their shape, where it is asked not to lead to 0."""
        return {}

    def standardise_(self, mean: Tensor, std: Tensor) -> None:
        """Change own parameters so that z of each unit becomes (z - mean) / std; a layer that cannot leaves them."""

    def strengthen_(self, factor: float) -> None:
        """Make inhibition ``factor`` times as strong and excitation by as much stronger, so that they cancel; a layer
        that cannot leaves them."""

    def components(self, x: Tensor) -> DANNComponents | None:
        """Every part of the computation for input ``x``, for analysis; None if the layer does not tell."""
        return None

    def net_weight(self) -> Tensor | None:
        """Excitation less inhibition, as it acts on the input: (units, ...); None if the layer does not tell."""
        return None

    def nonnegative_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that must stay >= 0."""
        if isinstance(self.nonnegative, str):
            raise UsageError(
                f"{type(self).__name__}.nonnegative={self.nonnegative!r} is a string: give a tuple of names, with a "
                "comma after a single one"
            )
        for name in self.nonnegative:
            try:
                parameter = getattr(self, name)
            except AttributeError as error:
                raise UsageError(
                    f"{type(self).__name__}.nonnegative names {name!r}, which the layer has not"
                ) from error
            if parameter is None:
                continue
            if not isinstance(parameter, nn.Parameter):
                raise UsageError(
                    f"{type(self).__name__}.{name} must be non-negative but is no parameter of its own (pruning and "
                    "weight normalisation replace it by a function of others): clamping it would have no effect"
                )
            yield name, parameter


def dale_layers(model: nn.Module) -> Iterator[tuple[str, DaleModule]]:
    """Qualified names and layers of all `DaleModule`s in ``model``, itself included."""
    for name, module in model.named_modules():
        if isinstance(module, DaleModule):
            yield name, module


@torch.no_grad()
def project_(model: nn.Module) -> None:
    """Bring the weights of ``model`` back under Dale's principle. Call it after each optimizer step:

        W       <- max(W, 0)            every parameter that must be non-negative
        Wei_ik  <- Wei_ik S_i / I_i     balanced layers: S_i total excitation, I_i total inhibition onto unit i

    `DaleProjection` does this for Lightning; this function is for your own training loop.
    """
    layers: dict[DaleModule, None] = {}  # a shared layer once: it would be balanced twice
    modules: list[nn.Module | None] = [model]
    while modules:  # model.modules() hashes each module, which torchmetrics makes slow
        module = modules.pop()
        if isinstance(module, DaleModule):
            layers[module] = None
        if module is not None:
            modules += module._modules.values()
    parts: list[Balance | None] = []
    for layer in layers:
        signed: list[Tensor] = []
        lowest: list[float] = []
        for name, parameter in layer.nonnegative_parameters():
            signed.append(parameter)
            vanishing = layer.balanced and name in layer.balancing
            lowest.append(max(VANISHING, torch.finfo(parameter.dtype).tiny) if vanishing else 0.0)
        if signed and all(type(parameter) is nn.Parameter for parameter in signed):
            torch._foreach_clamp_min_(signed, lowest)  # all of a layer at once, as torch's optimizers step
        else:  # shards, which do not mix with whole tensors or those of other meshes
            for weight, low in zip(signed, lowest, strict=True):
                weight.clamp_(min=low)
        if layer.balanced:
            parts.append(totals(layer))  # now, while a processor has its weights in the cache
    _scale_([part for part in parts if part is not None])


@torch.no_grad()
def balance_(layer: DaleModule) -> None:
    """Scale inhibition onto each unit of ``layer`` until its total equals the unit's total excitation.

    A unit without excitation, and one whose totals are not finite, keeps its weights.
    """
    part = totals(layer)
    _scale_([] if part is None else [part])


def _scale_(parts: Sequence[Balance]) -> None:
    if not parts:
        return
    together = len({(type(part.excitation), part.excitation.device, part.excitation.dtype) for part in parts}) == 1
    if together and type(parts[0].excitation) is Tensor:  # one small vector of all units instead of one a layer
        ratio = _ratio(torch.cat([part.excitation for part in parts]), torch.cat([part.inhibition for part in parts]))
        ratios = ratio.split([len(part.excitation) for part in parts])
    else:
        ratios = tuple(_ratio(part.excitation, part.inhibition) for part in parts)
    for part, ratio in zip(parts, ratios, strict=True):
        part.scaled.mul_(ratio.view(-1, *[1] * (part.scaled.dim() - 1)))


def totals(layer: DaleModule) -> Balance | None:
    """`DaleModule.balance`, also under autocast as exact as without."""
    parameter = next(layer.parameters(recurse=False), None)
    if parameter is None or not autocasts(parameter):
        return layer.balance()
    with without_autocast(parameter):  # which would round their products
        return layer.balance()


def autocasts(x: Tensor) -> bool:
    """Whether operations on ``x`` are under autocast, which the meta device does not know."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Whatever autocast does on the device of ``x``, not here."""
    # by name, because torch.compile of torch 2.6 cannot ask torch.amp.is_autocast_available
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def _ratio(excitation: Tensor, inhibition: Tensor) -> Tensor:
    ratio = excitation / inhibition
    return torch.where(ratio > 0, ratio, 1).nan_to_num_(posinf=1)


def scalable(inhibition: Tensor) -> Tensor:
    """Total inhibition as a divisor: where there is none, nothing can be scaled, nor come back to it as a gradient."""
    return inhibition.masked_fill(inhibition <= 0, math.inf)


def scale_rows(weight: Tensor, by: Tensor) -> Tensor:
    return by.view(-1, *[1] * (weight.dim() - 1)) * weight


@torch.no_grad()
def imbalance(layer: DaleModule) -> Tensor | None:
    """Of each unit, |S - I| / S, total excitation against total inhibition; 0 where S = 0, None without both."""
    part = totals(layer)
    if part is None:
        return None
    excitation, inhibition = whole(part.excitation), whole(part.inhibition)
    return torch.where(excitation == 0, 0, (excitation - inhibition).abs() / excitation)


def imbalances(model: nn.Module) -> dict[str, float]:
    """Highest imbalance of each balanced layer of ``model`` that has lost its balance, by qualified name.

    Balanced is what the precision of the weights allows: up to the root of its machine epsilon (3e-4 in float32).
    """
    lost = {}
    for name, layer in dale_layers(model):
        if layer.balanced and (of_units := imbalance(layer)) is not None:
            precision = max(torch.finfo(p.dtype).eps for p in layer.parameters(recurse=False))
            if not bool((of_units <= math.sqrt(precision)).all()):  # so that NaN counts
                lost[name] = float(of_units.max())
    return lost


def total(weight: Tensor) -> Tensor:
    """Sum of the weights of each unit, (units,); at least in float32."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return weight.sum(tuple(range(1, weight.dim())), dtype=dtype)


def whole(parameter: Tensor) -> Tensor:
    """All of a parameter, of which a sharded strategy keeps a part in each process; every process must ask."""
    return getattr(parameter, "full_tensor", parameter.detach)()


def sign_violations(model: nn.Module) -> dict[str, float]:
    """Lowest value of each parameter that is not >= 0 everywhere (NaN counts), by qualified name."""
    violations = {}
    for layer_name, layer in dale_layers(model):
        for name, parameter in layer.nonnegative_parameters():
            if not bool((parameter.detach() >= 0).all()):
                # a process may have an empty shard of it, which has no minimum
                violations[f"{layer_name}.{name}" if layer_name else name] = float(whole(parameter).min())
    return violations


def unobservable() -> bool:
    """Whether values cannot be looked at: in a graph that torch.compile makes, and under torch.func's transforms."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def refuse_negative_inputs(model: nn.Module) -> Callable[[], None]:
    """Check the next input of every `DaleModule` in ``model``, once each, and return a function that ends it.

    Pixels in [0, 1] and ReLU outputs are valid inputs; pixels normalised by mean and standard deviation are not. What
    torch.compile has compiled is not checked.

    Raises:
        UsageError: from the forward pass, when a layer receives an input below 0; names layer and value.
    """
    handles: dict[nn.Module, tuple[str, RemovableHandle]] = {}

    def check(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if unobservable() or layer not in handles:  # nor in a copy
            return
        name, handle = handles.pop(layer)
        handle.remove()
        x = next(iter((*args, *kwargs.values())), None)
        if isinstance(x, Tensor) and bool((x < 0).any()):  # a NaN has no sign, and comes from weights that diverged
            raise UsageError(
                f"layer {name!r} ({type(layer).__name__}) received an input of {float(x.detach().min()):.4g}, but "
                "its inputs must be >= 0: give it pixels in [0, 1] (not normalised by mean and std) or the "
                "output of a ReLU"
            )

    for name, layer in dale_layers(model):
        if layer.nonnegative_inputs:
            handles[layer] = (name, layer.register_forward_pre_hook(check, with_kwargs=True))

    def end() -> None:
        for _, handle in handles.values():
            handle.remove()
        handles.clear()

    return end
