"""The diagonal of the Fisher information, measured: how much each kind of parameter changes the output distribution.

For parameters theta of p(label | image) it is F = E[(d log p / d theta)^2], over images and over labels drawn from the
network's own softmax. The published learning-rate factors assume how its means over the entries of each kind of
parameter compare: those of Wix, Wei and alpha are taken to be sqrt(ne), d and d sqrt(ne) times that of Wex.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from lightning_danns.errors import UsageError
from lightning_danns.layers.dale import dale_layers

CHUNK = 32
"""Samples whose gradients are held at once: their memory is that many times the network's."""


def mean_squared_gradients(
    network: nn.Module, images: Tensor, generator: torch.Generator | None = None
) -> dict[nn.Parameter, Tensor]:
    """Mean over samples of the squared gradient of -log p(label), labels drawn from the network's own softmax.

    A sample's label is drawn in the same forward pass that is differentiated, so under dropout it comes from the
    softmax of the same thinned network. Autocast is off meanwhile: gradients of single samples would vanish in half
    precision, which scales only the loss of training.

    Args:
        network: maps images (N, ...) to logits (N, classes); its samples must not interact.
        images: a batch.
        generator: draws one uniform number u a sample, whose label is the first class k with
            p_0 + ... + p_k > u; torch's default if not given.

    Returns:
        By trainable parameter, the estimated diagonal of its Fisher information in the parameter's shape.

    Raises:
        UsageError: the network normalises over the batch, so that a sample has no gradient of its own.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            raise UsageError(
                f"layer {name!r} normalises over the batch: its samples have no gradients of their own. Use LayerNorm, "
                "or running statistics (eval())"
            )
    parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
    values = {name: p.detach() for name, p in parameters.items()}

    def loss(values: dict[str, Tensor], image: Tensor, u: Tensor) -> Tensor:
        logits = functional_call(network, values, (image[None],))  # (1, classes)
        below = logits.detach().softmax(-1, dtype=torch.float32).cumsum(-1) <= u
        return F.cross_entropy(logits, below[:, :-1].sum(-1))

    gradients = vmap(grad(loss), in_dims=(None, 0, 0), randomness="different")
    uniform = torch.rand(len(images), device=images.device, generator=generator)
    total = {name: torch.zeros_like(value) for name, value in values.items()}
    with torch.autocast(images.device.type, enabled=False):
        for chunk in zip(images.split(CHUNK), uniform.split(CHUNK), strict=True):
            for name, gradient in gradients(values, *chunk).items():
                total[name] += gradient.square().sum(0)
    return {parameters[name]: square / len(images) for name, square in total.items()}


def fisher_ratios(
    network: nn.Module, images: Tensor, generator: torch.Generator | None = None
) -> dict[str, dict[str, float]]:
    """Mean diagonal Fisher information of the parameters of each signed layer, relative to that of the layer's first.

    The first parameter of a DANN layer is ``Wex``. For the others, the published factors assume the ratios
    1 / ``layer.lr_factors()``.

    Args:
        network: maps images (N, ...) to logits (N, classes).
        images: a batch. Ratios of 32 MNIST images scatter by 1 to 4 % (Wei, b) and 20 to 40 % (Wix, alpha), those of
            128 by half as much.
        generator: draws the labels; torch's default if not given.

    Returns:
        By layer and by parameter, F / F_first >= 0; not finite where F_first is 0. Frozen parameters are left out, and
        so are layers whose first parameter is frozen.

    Example:
        >>> from lightning_danns import DANNLinear
        >>> ratios = fisher_ratios(nn.Sequential(DANNLinear(784, 10, 1, inputs="pixels")), torch.rand(32, 784))
        >>> list(ratios["0"]), all(ratio > 0 for ratio in ratios["0"].values())
        (['Wix', 'Wei', 'alpha', 'g', 'b'], True)
    """
    squares = mean_squared_gradients(network, images, generator)
    ratios: dict[str, dict[str, float]] = {}
    for layer_name, layer in dale_layers(network):
        own = list(layer.named_parameters(recurse=False))
        if own and own[0][1] in squares:
            first = squares[own[0][1]].mean()
            ratios[layer_name] = {name: float(squares[p].mean() / first) for name, p in own[1:] if p in squares}
    return ratios


def measured_factors(network: nn.Module, ratios: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Learning-rate factors 1 / ratio, at most 1, for the parameters that the layers declare factors of.

    A factor c scales a step of plain SGD, lr c gradient, so that its second-order effect on the output distribution,
    half F step^2, goes with c^2 F^2: equal effects of entries ask for c = F_first / F. It is kept from exceeding 1,
    because F of ``alpha`` starts near 0 in hidden layers, where the next layer divides the scale of its input away.

    Args:
        network: what `fisher_ratios` measured.
        ratios: what it returned.

    Returns:
        By qualified name of a parameter in ``network``, a factor in (0, 1].

    Raises:
        UsageError: a ratio is not finite: the gradients of the first parameter vanish, or some are NaN.
    """
    factors = {}
    for layer_name, layer in dale_layers(network):
        for name in layer.lr_factors():
            ratio = ratios.get(layer_name, {}).get(name)
            if ratio is None:
                continue  # frozen
            qualified = f"{layer_name}.{name}" if layer_name else name
            if not ratio < float("inf"):
                raise UsageError(
                    f"the Fisher information of {qualified} is {ratio} times that of the layer's first parameter: no "
                    "factor follows from it. Use correction='fisher'"
                )
            factors[qualified] = 1 / max(ratio, 1.0)
    return factors
