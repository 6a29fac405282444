"""The diagonal of the Fisher information, measured: how much each kind of parameter changes the output distribution.

For parameters theta of p(y | x) it is F = E[(d log p / d theta)^2], over inputs x and over y drawn from the network's
own distribution, which a `Likelihood` reads from its outputs: that of a softmax over classes, unless another is given.
The published learning-rate factors assume how the means of F over the entries of each kind of parameter compare: those
of Wix, Wei and alpha are taken to be sqrt(ne), d and d sqrt(ne) times that of Wex.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution
from torch.func import functional_call, grad, vmap

from lightning_danns.errors import UsageError
from lightning_danns.layers.dale import dale_layers
from lightning_danns.layers.dann import at_least_float32

CHUNK = 32
"""Samples whose gradients are held at once: their memory is that many times the network's."""

OVER_THE_BATCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

Likelihood = Callable[[Tensor], Distribution]
"""From a network's outputs for a batch, (1, ...), to the distribution of what it predicts."""


def categorical(outputs: Tensor) -> Distribution:
    """Classes, by the softmax of their logits, (N, classes)."""
    return Categorical(logits=at_least_float32(outputs), validate_args=False)


def mean_squared_gradients(
    network: nn.Module,
    inputs: Tensor,
    generator: torch.Generator | None = None,
    likelihood: Likelihood = categorical,
) -> dict[nn.Parameter, Tensor]:
    """Mean over samples of the squared gradient of -log p(y | x), with y drawn from the network's own distribution.

    A sample's y is drawn in the same forward pass that is differentiated, so under dropout it comes from the
    distribution of the same thinned network. Autocast is off meanwhile: gradients of single samples would vanish in
    half precision, which scales only the loss of training.

    Args:
        network: maps inputs (N, ...) to outputs (N, ...); its samples must not interact.
        inputs: a batch.
        generator: draws y, and units to drop; torch's own, which training draws from, if not given.
        likelihood: p(y | x) by the outputs; classes by their logits if not given. A regression has, for example,
            ``lambda outputs: torch.distributions.Normal(outputs, 1.0)``.

    Returns:
        By trainable parameter, the estimated diagonal of its Fisher information in the parameter's shape.

    Raises:
        UsageError: the network normalises over the batch, so that a sample has no gradient of its own.
    """
    for name, module in network.named_modules():
        if isinstance(module, OVER_THE_BATCH) and (module.training or module.running_mean is None):
            raise UsageError(
                f"layer {name!r} normalises over the batch: its samples have no gradients of their own. Use another "
                "norm (of DANNs 'none', of others 'layer' too), or running statistics (eval())"
            )
    parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
    values = {name: p.detach() for name, p in parameters.items()}

    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        outputs = functional_call(network, values, (x[None],))
        y = likelihood(outputs.detach().nan_to_num()).sample()  # a network that has diverged is told by its weights
        return -likelihood(outputs).log_prob(y).sum()

    gradients = vmap(grad(loss), in_dims=(None, 0), randomness="different")
    total = {name: torch.zeros_like(value) for name, value in values.items()}
    with _drawing_from(generator), torch.autocast(inputs.device.type, enabled=False):
        for chunk in inputs.split(CHUNK):
            for name, gradient in gradients(values, chunk).items():
                total[name] += gradient.square().sum(0)
    return {parameters[name]: square / len(inputs) for name, square in total.items()}


@contextmanager
def _drawing_from(generator: torch.Generator | None) -> Iterator[None]:
    """Random numbers come from ``generator``, also where PyTorch takes none (`Distribution.sample`, dropout)."""
    if generator is None:
        yield
        return
    random = torch.random if generator.device.type == "cpu" else torch.get_device_module(generator.device)
    own = random.get_rng_state()
    random.set_rng_state(generator.get_state())
    try:
        yield
    finally:
        generator.set_state(random.get_rng_state())
        random.set_rng_state(own)


def reference_parameter(layer: nn.Module) -> nn.Parameter | None:
    """The parameter that the layer's Fisher ratios are relative to: what ``layer.relative_to`` names, or its first.

    Raises:
        UsageError: it names no parameter of the layer's own.
    """
    own = dict(layer.named_parameters(recurse=False))
    name = getattr(layer, "relative_to", None)
    if name is None:
        return next(iter(own.values()), None)
    if name not in own:
        raise UsageError(
            f"{type(layer).__name__}.relative_to={name!r} is no parameter of its own; these are: {', '.join(own)}"
        )
    return own[name]


def fisher_ratios(
    network: nn.Module,
    inputs: Tensor,
    generator: torch.Generator | None = None,
    likelihood: Likelihood = categorical,
) -> dict[str, dict[str, float]]:
    """Mean diagonal Fisher information of the parameters of each signed layer, over that of one of them.

    That one is ``layer.relative_to``, or the layer's first parameter: ``Wex`` of a DANN layer. For the others, the
    published factors assume the ratios 1 / ``layer.lr_factors()``.

    Args:
        network: maps inputs (N, ...) to outputs (N, ...).
        inputs: a batch. Ratios of 32 MNIST images scatter by 1 to 4 % (Wei, b) and 20 to 40 % (Wix, alpha), those of
            128 by half as much.
        generator, likelihood: see `mean_squared_gradients`.

    Returns:
        By layer and by parameter, F / F_reference >= 0; not finite where F_reference is 0. Frozen parameters are left
        out, and so are layers whose reference is frozen.

    Example:
        >>> from lightning_danns import DANNLinear
        >>> ratios = fisher_ratios(nn.Sequential(DANNLinear(784, 10, 1, inputs="pixels")), torch.rand(32, 784))
        >>> list(ratios["0"]), all(ratio > 0 for ratio in ratios["0"].values())
        (['Wix', 'Wei', 'alpha', 'g', 'b'], True)
    """
    squares = mean_squared_gradients(network, inputs, generator, likelihood)
    ratios: dict[str, dict[str, float]] = {}
    for layer_name, layer in dale_layers(network):
        reference = reference_parameter(layer)
        if reference is not None and reference in squares:
            unit = squares[reference].mean()
            ratios[layer_name] = {
                name: float(squares[p].mean() / unit)
                for name, p in layer.named_parameters(recurse=False)
                if p in squares and p is not reference
            }
    return ratios


def measured_factors(network: nn.Module, ratios: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Learning-rate factors 1 / ratio, at most 1, for the parameters that the layers declare factors of.

    A factor c scales a step of plain SGD, lr c gradient, so that its second-order effect on the output distribution,
    half F step^2, goes with c^2 F^2: equal effects of entries ask for c = F_reference / F. It is kept from exceeding 1,
    because F of ``alpha`` starts near 0 in hidden layers, where the next layer divides the scale of its input away.

    Args:
        network: what `fisher_ratios` measured.
        ratios: what it returned.

    Returns:
        By qualified name of a parameter in ``network``, a factor in (0, 1].

    Raises:
        UsageError: a ratio is not finite: the gradients of the reference vanish, or some are NaN.
    """
    factors = {}
    for layer_name, layer in dale_layers(network):
        for name in layer.lr_factors():
            ratio = ratios.get(layer_name, {}).get(name)
            if ratio is None:
                continue  # frozen, or the reference itself
            qualified = f"{layer_name}.{name}" if layer_name else name
            if not ratio < float("inf"):
                reference = next(n for n, p in layer.named_parameters() if p is reference_parameter(layer))
                raise UsageError(
                    f"the Fisher information of {qualified} is {ratio} times that of the layer's {reference}: no "
                    "factor follows from it. Use correction='fisher'"
                )
            factors[qualified] = 1 / max(ratio, 1.0)
    return factors
