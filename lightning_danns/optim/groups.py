"""Fisher corrections as parameter groups: each group's learning rate is the base rate times its ``lr_scale``.

The factors ask that a step in each kind of parameter changes the output distribution about equally.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_danns.errors import UsageError
from lightning_danns.layers.dale import dale_layers

Correction = Literal["fisher", "none"]
Groups = list[dict[str, Any]]

KEEPS_RATIOS = (
    "StepLR, MultiStepLR, ExponentialLR, LinearLR, ConstantLR, PolynomialLR, LambdaLR with one function, "
    "CosineAnnealingLR with eta_min=0, ReduceLROnPlateau with eps=0, or a SequentialLR of these"
)


def fisher_param_groups(
    model: nn.Module, correction: Correction | Mapping[str, float] = "fisher", *, lr: float | None = None
) -> Groups:
    """Parameter groups that carry the learning-rate factors which the layers of ``model`` declare.

    All parameters of factor 1, and all of layers outside the contract (`DaleModule`), form the group ``"base"``;
    every other parameter, and each that you name, is a group of its own, named like the parameter. Frozen parameters
    are in none.

    Args:
        model: any module.
        correction: ``"fisher"``, the factors of the layers; ``"none"``, factor 1 for all; or your own factors
            by qualified parameter name (`measured_factors` gives some), 1 for those not named.
        lr: base learning rate. With it each group's ``lr`` is ``lr * lr_scale`` and the groups are ready for any
            torch optimizer. Without it they carry no ``lr``: use `scale_learning_rates_` on the optimizer.

    Returns:
        Groups with the keys ``name``, ``params``, ``lr_scale`` (and ``lr``).

    Raises:
        UsageError: unknown correction or parameter name, a factor that is not positive, or a parameter shared by
            layers that declare different factors for it.

    Example:
        >>> from lightning_danns import DANNLinear
        >>> groups = fisher_param_groups(DANNLinear(784, 500, 50), lr=0.1)
        >>> [(group["name"], len(group["params"])) for group in groups]
        [('base', 3), ('Wix', 1), ('Wei', 1), ('alpha', 1)]
        >>> round(groups[2]["lr"] * 784, 6)
        0.1
    """
    factors = _factors(model, correction)
    named = correction if isinstance(correction, Mapping) else {}
    base: dict[str, Any] = {"name": "base", "params": [], "lr_scale": 1.0}
    groups: Groups = [base]
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        factor = factors.get(parameter, 1.0)
        if factor == 1 and name not in named:
            base["params"].append(parameter)
        else:
            groups.append({"name": name, "params": [parameter], "lr_scale": factor})
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise UsageError(f"{type(model).__name__} has no trainable parameter")
    if lr is not None:
        for group in groups:
            group["lr"] = lr * group["lr_scale"]
    return groups


def _factors(model: nn.Module, correction: Correction | Mapping[str, float]) -> dict[nn.Parameter, float]:
    """The factor of each parameter that has one."""
    named: list[tuple[str, nn.Parameter, float]] = []
    if isinstance(correction, Mapping):
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, factor in correction.items():
            if name not in parameters:
                raise UsageError(f"correction names {name!r}, which is not a parameter of the model")
            named.append((name, parameters[name], factor))
    elif correction == "fisher":
        for layer_name, layer in dale_layers(model):
            own = dict(layer.named_parameters(recurse=False))
            for name, factor in layer.lr_factors().items():
                if name not in own:
                    raise UsageError(
                        f"{type(layer).__name__}.lr_factors() names {name!r}; the layer's own parameters are "
                        f"{', '.join(own)}"
                    )
                named.append((f"{layer_name}.{name}", own[name], factor))
            # a factor left out is 1, which a layer sharing the parameter may contradict
            named += [(f"{layer_name}.{n}", p, 1.0) for n, p in own.items() if n not in layer.lr_factors()]
    elif correction != "none":
        raise UsageError(f"correction={correction!r}: choose 'fisher', 'none', or factors by parameter name")

    factors: dict[nn.Parameter, float] = {}
    for name, parameter, factor in named:
        if not factor > 0 or factor == float("inf"):
            raise UsageError(f"learning-rate factor of {name} is {factor}; it must be positive and finite")
        if factors.setdefault(parameter, factor) != factor:
            raise UsageError(
                f"{name} is shared by layers that want different learning-rate factors for it: "
                f"{factors[parameter]:.4g} and {factor:.4g}"
            )
    return factors


def group_of_parameters(optimizer: Optimizer) -> dict[nn.Parameter, dict[str, Any]]:
    """The group that each parameter is in."""
    return {parameter: group for group in optimizer.param_groups for parameter in group["params"]}


def _of_one_base(optimizer: Optimizer) -> Iterator[Groups]:
    """The groups that share a base rate: all, unless replicas have some of their own (``base_lr``)."""
    bases: dict[float | None, Groups] = {}
    for group in optimizer.param_groups:
        bases.setdefault(group.get("base_lr"), []).append(group)
    yield from bases.values()


def scale_learning_rates_(optimizer: Optimizer) -> None:
    """Multiply each group's learning rate by its ``lr_scale``. Call it once, before a scheduler is built.

    Raises:
        UsageError: the groups have no learning rate, one that is not finite, or different ones, as after a first call.
    """
    name = type(optimizer).__name__
    if not all("lr" in group for group in optimizer.param_groups):
        raise UsageError(f"{name} has no learning rate lr, which the learning-rate factors could scale")
    for groups in _of_one_base(optimizer):
        rates = {float(group["lr"]) for group in groups}
        if not all(0 <= rate < math.inf for rate in rates):
            raise UsageError(f"learning rate lr={max(rates)} of {name}: it must be finite and at least 0")
        if len(rates) > 1:
            raise UsageError(
                f"learning rates of {name} from {min(rates):.4g} to {max(rates):.4g}: the groups must have one base "
                "rate, to which the factors are applied once (by fisher_param_groups(lr=...), scale_learning_rates_ or "
                "fisher_optimizer)"
            )
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * group["lr_scale"]  # not in place: groups may share one tensor


def change_factors_(optimizer: Optimizer, factors: Mapping[str, float], schedulers: Sequence[Any] = ()) -> None:
    """Give the groups named in ``factors`` other factors while training goes on: rates move, and what ``schedulers``
    remember of their start moves with them."""
    groups = {group["name"]: group for group in optimizer.param_groups}
    for name, factor in factors.items():
        if name not in groups:  # a shared parameter's second name
            continue
        change = factor / groups[name]["lr_scale"]
        groups[name]["lr_scale"] = factor
        for rate in ("lr", "initial_lr"):
            if rate in groups[name]:
                groups[name][rate] = groups[name][rate] * change
    remembering = list(schedulers)
    while remembering:
        scheduler = remembering.pop()
        remembering += getattr(scheduler, "_schedulers", [])  # of SequentialLR and ChainedScheduler
        if hasattr(scheduler, "base_lrs"):
            scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]


def fisher_optimizer(factory: Callable[[Groups], Optimizer], groups: Groups) -> Optimizer:
    """The optimizer that ``factory`` makes of ``groups``, its base learning rate scaled group by group.

    Raises:
        UsageError: the optimizer does not take parameter groups (LBFGS), refuses its settings, or was not built of the
            groups.
    """
    try:
        optimizer = factory(groups)
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"the optimizer refuses its settings: {error}. (The learning-rate factors need one that takes parameter "
            "groups, such as SGD or Adam, or correction='none'.)"
        ) from error
    if not isinstance(optimizer, Optimizer):
        raise UsageError(f"optimizer made a {type(optimizer).__name__}: give a torch optimizer such as SGD or Adam")
    if not all("lr_scale" in group for group in optimizer.param_groups):
        raise UsageError("the optimizer must be built of the parameter groups it is given, which hold the factors")
    scale_learning_rates_(optimizer)
    return optimizer


def require_factors(optimizer: Optimizer, culprit: str) -> None:
    """Refuse learning rates that are no longer one base rate times each group's ``lr_scale``.

    An optimizer without any ``lr_scale`` is somebody's own and passes. Groups of replicas with another ``base_lr`` of
    their own are compared among themselves.

    Raises:
        UsageError: names ``culprit``, the two groups that differ most, and what to use instead.
    """
    groups = optimizer.param_groups
    if not any("lr_scale" in group for group in groups):
        return
    if not all("lr_scale" in group for group in groups):
        raise UsageError(
            f"{culprit} added a parameter group without learning-rate factors: make it with "
            "fisher_param_groups(layer, lr=...)"
        )
    for ours in _of_one_base(optimizer):
        rates = [(float(group["lr"]) / group["lr_scale"], str(group.get("name"))) for group in ours]
        high, high_name = max(rates)
        for low, low_name in sorted(rates):
            # below 1e-30 rates have decayed to nothing, and lose digits; a NaN is equal to none
            if not high - low <= max(1e-6 * abs(high), 1e-30):
                raise UsageError(
                    f"{culprit} set learning rates that destroy the learning-rate factors: base rate {low:.4g} in "
                    f"group {low_name!r} but {high:.4g} in {high_name!r}. Use a scheduler that multiplies rates "
                    f"({KEEPS_RATIOS}), or correction='none'"
                )


def rehearse_scheduler(factory: Callable[[Optimizer], Any], optimizer: Optimizer, steps: int = 1000) -> None:
    """Run the scheduler on a stand-in for ``optimizer`` and refuse it if the learning-rate factors do not survive.

    A scheduler that sets absolute rates (OneCycleLR, CyclicLR, a positive eta_min or min_lr) would otherwise undo
    the factors without a word, perhaps hours into a run.

    Args:
        factory: makes the scheduler of an optimizer.
        optimizer: as `fisher_optimizer` returns it; only its type, defaults and rates are read.
        steps: how many scheduler steps to look ahead.

    Raises:
        UsageError: see `require_factors`.
    """
    if len(optimizer.param_groups) == 1:
        return
    stand_in = _StandIn(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = factory(stand_in)
        name = type(scheduler).__name__
        require_factors(stand_in, name)
        plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
        for _ in range(steps):
            stand_in.step()
            try:
                scheduler.step(1.0) if plateau else scheduler.step()
            except ValueError:  # schedulers of a fixed length refuse further steps
                return
            require_factors(stand_in, name)


class _StandIn(Optimizer):
    """An optimizer with another's groups and options, over parameters of one number each."""

    def __init__(self, optimizer: Optimizer) -> None:
        groups = [
            {**{k: v for k, v in group.items() if k != "params"}, "params": [nn.Parameter(torch.zeros(()))]}
            for group in optimizer.param_groups
        ]
        super().__init__(groups, dict(optimizer.defaults))

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Schedulers expect a step between theirs."""
