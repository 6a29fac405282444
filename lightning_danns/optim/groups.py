"""Parameter groups that carry learning-rate factors: a group's rate is its base rate times its ``lr_scale``.

    lr of a group = lr_scale * rate of its base * lr of the optimizer * what a scheduler makes of it

The factors ask that a step in each kind of parameter changes the output distribution about equally. Groups of one base
must therefore keep the ratios of their rates, whatever the rate of the base is.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, SequentialLR

from lightning_danns.errors import UsageError
from lightning_danns.layers.dale import dale_layers
from lightning_danns.optim.corrections import factors_of

Groups = list[dict[str, Any]]

DecayTo = Literal["zero", "inhibition"]
"""What weight decay leads excitatory weights to: 0, or the inhibition that each of them meets."""

DECAY_TO_INHIBITION = "decay_to_inhibition"
"""The key of a group's decay to inhibition, which `lightning_danns.optim.decay_to_inhibition_` carries out."""


def fisher_param_groups(
    model: nn.Module,
    correction: Any = "fisher",
    *,
    lr: float | None = None,
    rates: Mapping[str, float] | None = None,
    weight_decay: float | None = None,
    decay_to: DecayTo = "zero",
) -> Groups:
    """Parameter groups with the learning-rate factors of ``correction``.

    Every parameter with a factor other than 1, and each that the correction names, is a group of its own, named like
    the parameter. The others form the group ``"base"``, or one for each base rate. Frozen parameters are in none.

    Args:
        model: any module.
        correction: ``"fisher"``, the factors that the layers declare; ``"steady"``; ``"none"``; a function from a model
            to factors by qualified parameter name; or such factors (`lightning_danns.optim.corrections`).
        lr: base learning rate; the groups are then ready for any torch optimizer. Without it they carry no ``lr``, and
            `fisher_optimizer` scales that of the optimizer.
        rates: for parameters whose name starts with a key, the rate of their base relative to ``lr``: a body that
            learns a tenth as fast as its head is ``{"body": 0.1}``. The longest key counts.
        weight_decay: decay of weights alone (parameters with two dimensions or more); 0 for all others. Not given:
            that of the optimizer for all.
        decay_to: ``"inhibition"``: in layers that say so (`DaleModule.decays_to`), ``weight_decay`` leads excitatory
            weights to the inhibition that they meet instead of 0, and inhibitory weights do not decay. Call
            `decay_to_inhibition_` before each step, which carries that out.

    Returns:
        Groups with the keys ``name``, ``params``, ``lr_scale``, ``signed`` (names of those of its parameters that must
        stay non-negative), ``base`` (the key of ``rates``), and ``base_rate``, ``lr``, ``weight_decay``,
        ``decay_to_inhibition`` where given.

    Raises:
        UsageError: unknown correction or name, a factor or rate that is not positive and finite, a parameter shared by
            layers that declare different factors for it, nothing to train, a decay that is negative or not finite, or
            one to an inhibition that is not there.

    Example:
        >>> from lightning_danns import DANNLinear
        >>> groups = fisher_param_groups(DANNLinear(784, 500, 50), lr=0.1)
        >>> [(group["name"], len(group["params"])) for group in groups]
        [('base', 3), ('Wix', 1), ('Wei', 1), ('alpha', 1)]
        >>> round(groups[2]["lr"] * 784, 6)
        0.1
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    named = {parameters[name]: factor for name, factor in factors_of(model, correction).items()}
    signed = {parameter for _, layer in dale_layers(model) for _, parameter in layer.nonnegative_parameters()}
    rates = _checked_rates(rates or {}, parameters)
    if weight_decay is not None and not 0 <= weight_decay < math.inf:
        raise UsageError(f"weight_decay={weight_decay}: it must be at least 0, and finite")
    drawn, spared = _decaying_to_inhibition(model, decay_to, weight_decay)
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        factor, base = named.get(parameter, 1.0), _base_of(name, rates)
        decays = parameter.dim() > 1 and parameter not in spared
        decay = {} if weight_decay is None else {"weight_decay": weight_decay if decays else 0.0}
        if weight_decay is not None and parameter in drawn:
            decay = {"weight_decay": 0.0, DECAY_TO_INHIBITION: weight_decay}
        group = name
        if factor == 1 and parameter not in named:
            suffix = "/no decay" if 0.0 in decay.values() else ""
            suffix = "/decays to inhibition" if DECAY_TO_INHIBITION in decay else suffix
            group = (f"base of {base}" if base else "base") + suffix
            if group in parameters:
                raise UsageError(f"a parameter is called {group!r}, like the group of all others: give it another name")
        rate = {"base_rate": rates[base]} if base else {}
        new = {"name": group, "params": [], "lr_scale": factor, "signed": [], "base": base}
        of_this = groups.setdefault(group, {**new, **rate, **decay})
        of_this["params"].append(parameter)
        if parameter in signed:
            of_this["signed"].append(name)
    if not groups:
        raise UsageError(f"{type(model).__name__} has no trainable parameter")
    if lr is not None:
        for group_ in groups.values():
            group_["lr"] = lr * group_.get("base_rate", 1.0) * group_["lr_scale"]
    return list(groups.values())


def _decaying_to_inhibition(
    model: nn.Module, decay_to: DecayTo, weight_decay: float | None
) -> tuple[set[nn.Parameter], set[nn.Parameter]]:
    """Parameters that decay to inhibition, and those of inhibition, which then do not decay."""
    if decay_to not in get_args(DecayTo):
        raise UsageError(f"decay_to={decay_to!r}: choose 'zero' or 'inhibition'")
    if decay_to == "zero":
        return set(), set()
    if weight_decay is None:
        raise UsageError("decay_to='inhibition' without weight_decay: say how strong it is, such as weight_decay=5e-4")
    layers = [(layer, layer.decays_to()) for _, layer in dale_layers(model)]
    drawn = Counter(getattr(layer, name) for layer, targets in layers for name in targets)
    if not drawn:
        raise UsageError(f"decay_to='inhibition': no layer of {type(model).__name__} has inhibition to decay to")
    if max(drawn.values()) > 1:
        raise UsageError("decay_to='inhibition': two layers share excitatory weights, but not what inhibits them")
    return set(drawn), {getattr(layer, name) for layer, targets in layers if targets for name in layer.balancing}


def _checked_rates(rates: Mapping[str, float], parameters: Mapping[str, Any]) -> Mapping[str, float]:
    for prefix, rate in rates.items():
        if not any(_within(name, prefix) for name in parameters):
            raise UsageError(f"rates names {prefix!r}, with which no parameter's name starts")
        if not 0 < rate < math.inf:
            raise UsageError(f"rates[{prefix!r}]={rate}: a rate relative to lr must be positive and finite")
    return rates


def _base_of(name: str, rates: Mapping[str, float]) -> str:
    return max((prefix for prefix in rates if _within(name, prefix)), key=len, default="")


def _within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def group_of_parameters(optimizer: Optimizer) -> dict[nn.Parameter, dict[str, Any]]:
    """The group that each parameter is in."""
    return {parameter: group for group in optimizer.param_groups for parameter in group["params"]}


def fisher_optimizer(factory: Callable[[Groups], Optimizer], groups: Groups) -> Optimizer:
    """The optimizer that ``factory`` makes of ``groups``; rates of groups that had none are scaled by their factors.

    Raises:
        UsageError: the optimizer does not take parameter groups (LBFGS), refuses its settings, was not built of the
            groups, or has no learning rate that is finite and at least 0.
    """
    unscaled = [group["name"] for group in groups if "lr" not in group]
    try:
        optimizer = factory(groups)
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"the optimizer refuses its settings: {error}. (The learning-rate factors need one that takes parameter "
            "groups, such as SGD or Adam.)"
        ) from error
    if not isinstance(optimizer, Optimizer):
        raise UsageError(f"optimizer made a {type(optimizer).__name__}: give a torch optimizer such as SGD or Adam")
    if not all("lr_scale" in group for group in optimizer.param_groups):
        raise UsageError("the optimizer must be built of the parameter groups it is given, which hold the factors")
    for group in optimizer.param_groups:
        # a checkpoint with NumPy's numbers does not load as weights alone
        group.update({key: value.item() for key, value in group.items() if isinstance(value, np.generic)})
        rate = group.get("lr")
        if rate is None or not 0 <= float(rate) < math.inf:
            raise UsageError(
                f"{type(optimizer).__name__} has learning rate lr={rate}: the factors scale one that is finite and at "
                "least 0"
            )
        if group["name"] in unscaled:
            group["lr"] = rate * group.get("base_rate", 1.0) * group["lr_scale"]  # not in place: groups may share it
    require_factors(optimizer, f"{type(optimizer).__name__} or the function that made it")
    return optimizer


def change_factors_(optimizer: Optimizer, factors: Mapping[str, float], schedulers: Sequence[Any] = ()) -> None:
    """Give the groups named in ``factors`` other factors while training goes on: rates move, and what ``schedulers``
    remember of their start moves with them."""
    for group in optimizer.param_groups:
        if group["name"] in factors:
            change = factors[group["name"]] / group["lr_scale"]
            group["lr_scale"] = factors[group["name"]]
            for rate in ("lr", "initial_lr"):
                if rate in group:
                    group[rate] = group[rate] * change
    remembering = list(schedulers)
    while remembering:
        scheduler = remembering.pop()
        if type(scheduler) in (SequentialLR, ChainedScheduler):
            raise UsageError(
                f"factors cannot change under torch's {type(scheduler).__name__}, which hides its parts: use "
                "lightning_danns.Sequential"
            )
        remembering += getattr(scheduler, "schedulers", [])
        if hasattr(scheduler, "base_lrs"):
            scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]


def require_factors(optimizer: Optimizer, culprit: str) -> None:
    """Refuse learning rates that are no longer the rate of their base times each group's ``lr_scale``.

    Groups without ``lr_scale`` are somebody's own and pass.

    Raises:
        UsageError: names ``culprit``, the two groups that differ most, and what to use instead.
    """
    bases: dict[str, Groups] = {}
    for group in optimizer.param_groups:
        if "lr_scale" in group:
            bases.setdefault(group.get("base", ""), []).append(group)
    for groups in bases.values():
        rates = [(float(group["lr"]) / group["lr_scale"], str(group.get("name"))) for group in groups]
        high, high_name = max(rates)
        for low, low_name in sorted(rates):
            # below 1e-30 rates have decayed to nothing, and lose digits; a NaN is equal to none
            if not high - low <= max(1e-6 * abs(high), 1e-30):
                raise UsageError(
                    f"{culprit} set learning rates that destroy the learning-rate factors: base rate {low:.4g} in "
                    f"group {low_name!r} but {high:.4g} in {high_name!r}. Scale the base rate instead: "
                    "lightning_danns.WarmupCosine (with a floor relative to lr) and most torch schedulers (StepLR, "
                    "ExponentialLR, LinearLR, CosineAnnealingLR with eta_min=0, ReduceLROnPlateau with "
                    "eps=0) do; or use correction='none'"
                )
