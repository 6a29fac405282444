"""A correction is a function from a model to learning-rate factors by parameter name; 1 for those not named.

Write your own, and give it to the module (``correction=mine``), the command line (``--model.correction my_file.mine``)
or `fisher_param_groups`:

    def mine(model):
        return {name: 0.5 for name, parameter in model.named_parameters() if name.endswith("Wei")}
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from lightning_danns.errors import UsageError
from lightning_danns.layers.dale import dale_layers

Correction = Callable[[nn.Module], Mapping[str, float]]


def fisher(model: nn.Module) -> dict[str, float]:
    """The factors that the layers declare: the published Fisher corrections."""
    found: dict[nn.Parameter, float] = {}
    factors: dict[str, float] = {}
    for layer_name, layer in dale_layers(model):
        own, declared = dict(layer.named_parameters(recurse=False)), layer.lr_factors()
        for name in declared:
            if name not in own:
                raise UsageError(
                    f"{type(layer).__name__}.lr_factors() names {name!r}; the layer's own parameters are "
                    f"{', '.join(own)}"
                )
        for name, parameter in own.items():  # one left out has factor 1, which a layer sharing it may contradict
            factor = declared.get(name, 1.0)
            path = f"{layer_name}.{name}" if layer_name else name
            if found.setdefault(parameter, factor) != factor:
                raise UsageError(
                    f"{path} is shared by layers that want different learning-rate factors for it: "
                    f"{found[parameter]:.4g} and {factor:.4g}"
                )
            if name in declared:
                factors[path] = factor
    return factors


def none(model: nn.Module) -> dict[str, float]:
    """No factors: every parameter learns at the base rate."""
    return {}


def measured(model: nn.Module) -> dict[str, float]:
    """The published factors, until `FisherMonitor` replaces them by measured ones on the first batch of a fit."""
    return fisher(model)


def steady(model: nn.Module) -> dict[str, float]:
    """The published factors, of Wix a hundredth: inhibition nearly keeps the pattern over inputs that it starts with.

    A step in Wix moves the net weights of all units at once, the more the stronger inhibition is (`strengthen_`). A
    ResNet-20 with decay to inhibition ends slightly better without it (RESULTS, weight decay).
    """
    return {name: factor / (100 if name.rpartition(".")[2] == "Wix" else 1) for name, factor in fisher(model).items()}


BY_NAME: dict[str, Correction] = {"fisher": fisher, "none": none, "measured": measured, "steady": steady}


def correction_of(given: Any) -> Correction:
    """The correction that ``given`` names or is; a mapping is one that does not depend on the model.

    Raises:
        UsageError: it is neither a known name, nor a function, nor a mapping of numbers.
    """
    if isinstance(given, str) and given in BY_NAME:
        return BY_NAME[given]
    if isinstance(given, Mapping):
        return partial(_as_given, dict(given))
    if not callable(given) or isinstance(given, type):
        raise UsageError(
            f"correction={given!r}: choose 'fisher', 'steady', 'measured' or 'none', or give a function from a model "
            "to factors by parameter name, or a mapping of such"
        )
    return given


def _as_given(factors: dict[str, float], model: nn.Module) -> dict[str, float]:
    return factors


def factors_of(model: nn.Module, correction: Any) -> dict[str, float]:
    """The factors of ``correction`` for ``model``, by qualified name of parameter, checked.

    Raises:
        UsageError: a name that is no parameter of the model, or a factor that is not positive and finite.
    """
    factors = dict(correction_of(correction)(model))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, factor in factors.items():
        if name not in parameters:
            raise UsageError(f"correction names {name!r}, which is not a parameter of the model")
        if not 0 < factor < float("inf"):
            raise UsageError(f"learning-rate factor of {name} is {factor}; it must be positive and finite")
    return factors
