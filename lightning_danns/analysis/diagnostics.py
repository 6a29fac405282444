r"""What inhibition does in a layer, in numbers: balance, centring, standardising, silence, sparsity, rank.

Of what a layer computes from its inputs (`LayerActivity`), over samples s (each pixel, in a convolution) and units u,
with z_hat = (z_e - Wei z_i) / gamma, or z_e - Wei z_i without division; so before g and b. m_s and d_s are mean and
standard deviation of z_hat over the units of sample s.

    quantity            definition                                            range     at the start, layer 1 | 2 and 3
    ei_ratio            mean of z_e / mean of Wei z_i                         >= 0      1.00 to 1.01 | 0.98 to 1.00
    z_mean              mean of m_s: 0 where inhibition centres                         -0.01 to 0.14 | -0.17 to 0.02
    z_std               mean of d_s: 1 where it standardises                  >= 0      1.16 to 1.21 | 0.74 to 0.89
    centring_error      root of the mean of m_s^2                             >= 0      0.09 to 0.20 | 0.08 to 0.19
    scaling_error       root of the mean of (d_s - 1)^2                       >= 0      0.32 to 0.36 | 0.12 to 0.27
    dead_units          share of units with z <= 0 in every sample: what a    0 to 1    0 | 0.01 to 0.03
                        ReLU silences (means nothing of logits)
    dead_interneurons   share of interneurons with z_i = 0 in every sample    0 to 1    0 | 0
    constant_share      (mean over u of (mean over s of z_su)^2 - c^2) /      0 to 1    0.36 to 0.39 | 0.52 to 0.64
                        (mean of z_su^2 - c^2), c = mean of z: share of the
                        variance of z that is the same for every image

The last is of z, after g and b: what the ReLU meets. It is NaN if z never varies. At the start of DANNConvNet, on
CIFAR-10, it is 0.80, 0.76 and 0.94 as published (two convolutions, dense layer) and 0.03, 0.07 and 0.42 balanced; of
ConvNet 0.74, 0.72 and 0.85.

LayerNorm, before its gain and bias, has z_mean = 0, z_std = 1 and both errors 0 by definition. Of its weights
(`weight_diagnostics`), with singular values sigma_k of Wex - Wei Wix, p_k = sigma_k / sum sigma, H = -sum p_k log p_k:

    zeros_Wex, ...      share of entries that are exactly 0, of each          0 to 1    0 | 0
                        parameter that must be >= 0
    imbalance           mean over u of |S_u - I_u| / S_u, total excitation    >= 0      0.03 | 0.04
                        and inhibition (`layers.imbalance`); of an ordinary
                        layer, sums of its positive and negative weights
    lost_units          share of units with S_u below 1/1000 of the layer's   0 to 1    0 | 0
                        median: without excitation, whatever the input
    effective_rank      exp(H) (Roy & Vetterli, EUSIPCO 2007)                 1 to q    448 | 400 to 401
    spectral_entropy    H / log q, q = min(units, inputs per unit)            0 to 1    0.98 | 0.96

Of a step (`projection_cosine`): the cosine of the angle by which the projection turns it, from 0 (nothing is left) to 1
(nothing was clamped).

The values at the start are those of DANNMLP 784-500-500-500-10 as published (``balanced=False``), with 50 interneurons
a layer, of 3 seeds, on 608 images of MNIST5k. A sample whose inputs are all 0 (a black patch) counts with z_hat = 0.
ColumnEILinear has its inhibitory inputs for interneurons, and z_hat = (W D) x.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from lightning_danns.layers.dale import DaleModule, DANNComponents, imbalance, total, totals, whole
from lightning_danns.layers.dann import at_least_float32, without_autocast

ORDINARY = (nn.Linear, nn.Conv2d)
"""Layers without signs, which cannot declare themselves; looked at for comparison."""


def inspectable_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Qualified names and layers of ``model`` that have quantities: signed ones, and ordinary ones beside them."""
    for name, module in model.named_modules():
        if isinstance(module, (DaleModule, *ORDINARY)):
            yield name.replace("_orig_mod.", ""), module  # torch.compile's


def layer_diagnostics(layer: nn.Module, x: Tensor) -> dict[str, float]:
    """All quantities of a layer and its input that the module docstring defines, as far as the layer has them.

    Of `torch.nn.Linear` and `torch.nn.Conv2d`, what LayerNorm would meet: z_mean, z_std and their errors of the output,
    its constant share, and the balance and rank of the weight. A `DaleModule` without ``components`` has quantities of
    its weights alone.

    Example:
        >>> from lightning_danns import DANNLinear
        >>> layer = DANNLinear(784, 500, 1, inputs="pixels")
        >>> abs(layer_diagnostics(layer, torch.rand(32, 784))["ei_ratio"] - 1) < 1e-4
        True
    """
    activity = LayerActivity()
    activity.update(layer, x)
    return activity.compute() | weight_diagnostics(layer)


class LayerActivity:
    """Collects what a layer does with several batches of inputs, without a synchronisation of a GPU.

    Attributes:
        sums: everything that it knows, each a sum over samples; empty for layers that do not tell.
    """

    def __init__(self, sums: dict[str, Tensor] | None = None) -> None:
        self.sums = dict(sums or {})

    @torch.no_grad()
    def update(self, layer: nn.Module, x: Tensor) -> None:
        """Add the samples of input ``x``, computed in the precision of the layer's weights."""
        weight = next(layer.parameters(recurse=False), x)
        with without_autocast(x):
            for name, value in _sums(layer, x.detach().to(weight.dtype)).items():
                self.sums[name] = self.sums[name].to(value.device) + value if name in self.sums else value

    def compute(self) -> dict[str, float]:
        """The quantities, by name."""
        if not self.sums:
            return {}
        n = self.sums["samples"]
        of = {name: total / n for name, total in self.sums.items()}
        values = {
            "z_mean": of["mean"],
            "z_std": of["std"],
            "centring_error": of["mean_squared"].sqrt(),
            "scaling_error": of["std_error_squared"].sqrt(),
        }
        varying = of["z_squared"] - of["z"].mean().square()
        constant = of["z"].square().mean() - of["z"].mean().square()
        values["constant_share"] = (constant / varying).clamp(0, 1)
        if "active" in of:
            values["dead_units"] = (of["active"] == 0).float().mean()
        if "subtraction" in of:
            values["ei_ratio"] = of["z_e"] / of["subtraction"]
            values["dead_interneurons"] = (of["active_interneurons"] == 0).float().mean()
        return {name: float(value) for name, value in values.items()}


def _sums(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    parts: DANNComponents | None = None
    if isinstance(layer, DaleModule):
        unit_dim, parts = layer.unit_dim, layer.components(x)
        if parts is None:
            return {}
        z_hat = parts.z_e - parts.subtraction
        if parts.gamma is not None:
            z_hat = z_hat / parts.gamma
    else:
        unit_dim, z_hat = (-3 if isinstance(layer, nn.Conv2d) else -1), at_least_float32(layer.forward(x))

    def rows(values: Tensor) -> Tensor:  # (samples, units)
        return values.movedim(unit_dim, -1).reshape(-1, values.shape[unit_dim])

    mean, std = rows(z_hat).mean(1), rows(z_hat).std(1, correction=0)
    z = rows(z_hat if parts is None else at_least_float32(parts.z))
    sums = {
        "samples": torch.tensor(len(mean), device=x.device),
        "mean": mean.sum(),
        "mean_squared": mean.square().sum(),
        "std": std.sum(),
        "std_error_squared": (std - 1).square().sum(),
        "z": z.sum(0),  # (units,)
        "z_squared": z.square().mean(1).sum(),
    }
    if parts is not None:
        sums["active"] = (rows(parts.z) > 0).sum(0)
    if parts is not None and parts.z_i.shape[unit_dim] > 0:
        sums["z_e"], sums["subtraction"] = (rows(drive).mean(1).sum() for drive in (parts.z_e, parts.subtraction))
        sums["active_interneurons"] = (rows(parts.z_i) > 0).sum(0)
    return sums


@torch.no_grad()
def weight_diagnostics(layer: nn.Module) -> dict[str, float]:
    """The quantities of a layer's weights, by name. Takes as long as the singular values of its net weight."""
    values = {}
    net: Tensor | None
    of_units: Tensor | None
    if isinstance(layer, DaleModule):
        for name, parameter in layer.nonnegative_parameters():
            values[f"zeros_{name}"] = float((whole(parameter) == 0).float().mean())
        net, of_units = layer.net_weight(), imbalance(layer)
        if (part := totals(layer)) is not None:
            excitation = whole(part.excitation)
            values["lost_units"] = float((excitation <= excitation.median() / 1000).float().mean())
    else:
        weight: Tensor = layer.weight  # type: ignore[assignment]
        net, of_units = weight, _imbalance_of_ordinary(whole(weight))
    if of_units is not None:
        values["imbalance"] = float(of_units.mean())
    if net is not None:
        net = whole(net).flatten(1)
        entropy = singular_value_entropy(net)
        values["effective_rank"] = math.exp(entropy)
        values["spectral_entropy"] = entropy / math.log(min(net.shape)) if min(net.shape) > 1 else 1.0
    return values


def _imbalance_of_ordinary(weight: Tensor) -> Tensor:
    excitation, inhibition = total(weight.clamp(min=0)), total(weight.clamp(max=0).neg())
    return torch.where(excitation == 0, 0, (excitation - inhibition).abs() / excitation)


def singular_value_entropy(W: Tensor) -> float:
    """H = - sum p_k log p_k of the normalised singular values p_k of a matrix; NaN for a zero or non-finite one."""
    W = at_least_float32(W.detach())
    if not bool(W.isfinite().all()):  # for which the singular values would not converge
        return math.nan
    sigma = torch.linalg.svdvals(W)
    return float(torch.special.entr(sigma / sigma.sum()).sum())


def effective_rank(W: Tensor) -> float:
    """exp(H) of a matrix, from 1 to min(shape) (Roy & Vetterli, *The effective rank*, EUSIPCO 2007)."""
    return math.exp(singular_value_entropy(W))


@torch.no_grad()
def projection_cosine(start: Sequence[Tensor], stepped: Sequence[Tensor], projected: Sequence[Tensor]) -> float:
    """Cosine of the angle by which projection turns a step: of ``stepped - start`` and ``projected - start``.

    Both are taken as one vector over all tensors. From 0 (nothing of the step is left) to 1 (nothing was clamped), for
    a projection that clamps; NaN if there was no step.
    """
    free = torch.cat([whole(after - before).flatten() for before, after in zip(start, stepped, strict=True)])
    kept = torch.cat([whole(after - before).flatten() for before, after in zip(start, projected, strict=True)])
    free, kept = at_least_float32(free), at_least_float32(kept)
    lengths = float(free.norm() * kept.norm())
    if lengths == 0:
        return 0.0 if bool(free.any()) else math.nan
    return min(float(free @ kept) / lengths, 1.0)  # not above by rounding
