"""What Dale's ANN layers share: excitatory units, and interneurons that inhibit them by subtraction and by division.

    z_e   = Wex x                         excitatory drive
    z_i   = Wix x                         interneurons: linear, and >= 0 because x and Wix are
    gamma = Wei (exp(alpha) * z_i) + eps  divisive (shunting) inhibition
    z     = g * (z_e - Wei z_i) / gamma + b

Weights are W_post,pre with shape (post, pre). ``ne`` excitatory units, ``ni`` interneurons, ``d`` inputs per unit.
Source: Cornford et al., *Learning to live with Dale's principle*, ICLR 2021.

`DANN.components` computes these equations as they stand. Each layer's ``forward`` computes the same z in the order
of operations that is fastest for it.
"""

import math
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from lightning_danns.errors import UsageError
from lightning_danns.initialization import (
    Inhibition,
    Inputs,
    excitatory_scale,
    exponential_,
    inhibition_,
    inhibition_groups_,
    inhibition_iid_,
    log_gain,
)
from lightning_danns.layers.dale import (
    Balance,
    DaleModule,
    DANNComponents,
    balance_,
    scale_rows,
    total,
    without_autocast,
)

EPS = 1e-8
"""Added to gamma, as published, so that a unit without any inhibition does not divide by zero."""
BALANCED_EPS = 0.3
"""The same of balanced layers, whose gamma is about 1 at the start.

A balanced layer answers a uniform patch of an image with exactly 0, so in the next layer gamma is 0 there and z is
rounding noise divided by eps. It is the semi-saturation constant of divisive normalisation (Heeger, 1992).
"""


def at_least_float32(values: Tensor) -> Tensor:
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


class DANN(DaleModule):
    """What the dense and the convolutional layer share: parameters, initialisation, factors and the equations.

    A subclass computes z (`forward`) and, for `components`, says how weights act on the input (`_drive`), how
    interneurons reach the excitatory units through given weights (`_inhibit`), how one value per unit broadcasts
    (`_per_unit`) and which inputs fit (`_refuse_misfit`).
    """

    nonnegative = ("Wex", "Wix", "Wei", "g")
    balancing = ("Wix", "Wei")
    relative_to = "Wex"
    alpha: nn.Parameter | None
    g: nn.Parameter | None
    b: nn.Parameter | None

    def __init__(
        self,
        input_shape: tuple[int, ...],
        ne: int,
        ni: int,
        divisive: bool,
        bias: bool,
        inputs: Inputs,
        inhibition: Inhibition | None,
        balanced: bool,
        eps: float | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        groups: int = 1,
    ) -> None:
        super().__init__()
        if not all(isinstance(number, Integral) for number in (ne, ni)):
            raise UsageError(f"ne={ne!r}, ni={ni!r}: both are whole numbers of units")
        if ne < 1:
            raise UsageError(f"ne={ne}: a layer needs at least one excitatory unit")
        if not 1 <= ni <= ne:
            raise UsageError(f"ni={ni}: the interneurons must number between 1 and ne={ne} (about a tenth of ne)")
        if inputs not in ("pixels", "rectified"):
            raise UsageError(f"inputs={inputs!r}: say 'pixels' (values in [0, 1]) or 'rectified' (ReLU outputs)")
        if inhibition is None:
            inhibition = "groups" if balanced else "mean"
        if inhibition not in ("mean", "iid", "groups"):
            raise UsageError(f"inhibition={inhibition!r}: choose 'mean' (Wei = 1/ni), 'groups' or 'iid'")
        if eps is None:
            eps = BALANCED_EPS if balanced else EPS
        if not 0 < eps < math.inf:
            raise UsageError(f"eps={eps}: what is added to gamma must be positive and finite")
        # ints of the whole layer: sharded parameters have smaller shapes
        self.ne, self.ni, self.d, self.groups = ne, ni, math.prod(input_shape), groups
        self.divisive, self.inputs, self.inhibition, self.balanced = divisive, inputs, inhibition, balanced
        self.eps = float(eps)

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.Wex = empty(ne, *input_shape)
        self.Wix = empty(ni, *input_shape)
        self.Wei = empty(ne, ni // groups)
        self.alpha = empty(ni) if divisive else None
        self.g = empty(ne) if divisive else None
        self.b = empty(ne) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new weights as the module docstring of `lightning_danns.initialization` describes."""
        s = excitatory_scale(self.d, self.inputs)
        exponential_(self.Wex, s)
        groups = (weight.chunk(self.groups) for weight in (self.Wex, self.Wix, self.Wei))
        for Wex, Wix, Wei in zip(*groups, strict=True):  # each group of channels has interneurons of its own
            if self.inhibition == "iid":
                inhibition_iid_(Wix, Wei, s)
            elif self.inhibition == "groups":
                inhibition_groups_(Wix, Wei, Wex)
            else:
                inhibition_(Wix, Wei, Wex, s)
        if self.alpha is not None and self.g is not None:
            self.alpha.fill_(log_gain(self.d))
            self.g.fill_(1)
        if self.b is not None:
            self.b.zero_()
        if self.balanced:
            balance_(self)

    def balance(self) -> Balance:
        """S_i = sum_j Wex_ij and I_i = sum_k Wei_ik sum_j Wix_kj, which a row of Wei scales."""
        Wix, Wei = total(self.Wix), at_least_float32(self.Wei)  # (ni,), (ne, ni / groups)
        # not a matrix product, which processors may round (TF32, bfloat16)
        inhibition = (Wei.view(self.groups, -1, Wei.shape[1]) * Wix.view(self.groups, 1, -1)).sum(-1).flatten()
        return Balance(total(self.Wex), inhibition, self.Wei)

    @torch.no_grad()
    def decays_to(self) -> dict[str, Tensor]:
        """Wex to Wei Wix, the inhibition that each weight meets."""
        Wei, Wix = (at_least_float32(weight).chunk(self.groups) for weight in (self.Wei, self.Wix))
        with without_autocast(self.Wex):
            of_groups = [onto @ of.flatten(1) for onto, of in zip(Wei, Wix, strict=True)]
        return {"Wex": torch.cat(of_groups).view(self.Wex.shape).to(self.Wex.dtype)}

    @torch.no_grad()
    def standardise_(self, mean: Tensor, std: Tensor) -> None:
        """z becomes (z - mean) / std by g and b; without division Wex and Wei take the place of g, which keeps balance.

        Without a bias, z becomes z / std.
        """
        for values in (self.Wex, self.Wei) if self.g is None else (self.g,):
            values.div_(std.view(-1, *[1] * (values.dim() - 1)))
        if self.b is not None:
            self.b.sub_(mean).div_(std)

    @torch.no_grad()
    def strengthen_(self, factor: float) -> None:
        """Wix times ``factor``, what that inhibits more added to Wex, and exp(alpha) divided by ``factor``: z stays."""
        if self.balanced:
            balance_(self)
        self.Wex.add_(self.decays_to()["Wex"], alpha=factor - 1)
        self.Wix.mul_(factor)
        if self.alpha is not None:
            self.alpha.sub_(math.log(factor))

    def lr_factors(self) -> dict[str, float]:
        """Fisher corrections: Wix 1/√ne, Wei 1/d, alpha 1/(d √ne); Wex, g and b keep 1.

        As published, also in balanced layers, where that of Wei lacks its reason (RESULTS, Fisher).
        """
        root = math.sqrt(self.ne // self.groups)
        factors = {"Wix": 1 / root, "Wei": 1 / self.d}
        if self.divisive:
            factors["alpha"] = 1 / (self.d * root)
        return factors

    def constants(self) -> dict[str, Any]:
        return super().constants() | ({} if self.alpha is None else {"eps": self.eps})

    def components(self, x: Tensor) -> DANNComponents:
        """Every part of the computation for input ``x``, for analysis.

        Drives in half precision (float16, bfloat16) are inhibited in float32; z has the precision of the weights.
        """
        self._refuse_misfit(x)
        z_e, z_i = self._drive(x, self.Wex), self._drive(x, self.Wix)
        eps, z_e, z_i = self._eps_for(z_e), at_least_float32(z_e), at_least_float32(z_i)
        gamma, Wei = None, self._weights_onto_units()
        with without_autocast(x):
            if self.alpha is not None and self.g is not None:
                # exp keeps the divisive gain positive, so alpha is never projected
                gain = self._per_unit(self.alpha.exp())
                subtraction, gamma = self._inhibit(Wei, z_i), self._inhibit(Wei, gain * z_i) + eps
                z = self._per_unit(self.g) * (z_e - subtraction) / gamma
            else:
                subtraction = self._inhibit(Wei, z_i)
                z = z_e - subtraction
            if self.b is not None:
                z = z + self._per_unit(self.b)
        return DANNComponents(z_e, z_i, subtraction, gamma, z.to(self.Wex.dtype))

    def net_weight(self) -> Tensor:
        """Wex - Wei Wix, in the shape of Wex."""
        return self._net_weight(self._weights_onto_units())

    def _net_weight(self, Wei: Tensor) -> Tensor:
        weights = (self.Wex.to(Wei), Wei, self.Wix.to(Wei))
        grouped = (weight.reshape(self.groups, len(weight) // self.groups, -1) for weight in weights)
        return torch.baddbmm(*grouped, alpha=-1).view(self.Wex.shape).to(self.Wex.dtype)

    def _weights_onto_units(self) -> Tensor:
        return self.in_balance() if self.balanced else self.Wei

    def _folded(self, x: Tensor) -> Tensor:
        """z, with what acts linearly on the input folded into the weights:

            z = (g (Wex - Wei Wix)) x / (Wei ((exp(alpha) Wix) x) + eps) + b

        The difference is then taken before the input comes in, so that half precision rounds z and not the large
        drives. It costs Wei Wix once a batch: little where weights are applied many times, as in a convolution.
        Without division this is an ordinary layer of weights Wex - Wei Wix, and z is as precise as that of one.
        """
        with without_autocast(x):
            Wei, Wix = self._weights_onto_units(), self.Wix  # type: Tensor, Tensor
            net = self._net_weight(Wei)
            if self.alpha is not None and self.g is not None:
                net, Wix = scale_rows(net, self.g), scale_rows(Wix, self.alpha.exp())
        if self.alpha is None:
            return self._drive(x, net, self.b)
        z_e, z_i = self._drives(x, net, Wix)
        eps = self._eps_for(z_e)
        with without_autocast(x):
            z = self._divide(at_least_float32(z_e), at_least_float32(z_i), Wei, eps)
            if self.b is not None:
                z = z + self._per_unit(self.b)
        return z.to(self.Wex.dtype)

    def _eps_for(self, drive: Tensor) -> float:
        """eps, or the smallest normal number of the drive's format if that is larger (6e-5 in float16).

        Gradients of drives go back through their format, and float16 cannot hold what a division by 1e-8 gives.
        """
        return max(self.eps, torch.finfo(drive.dtype).tiny)

    def _drives(self, x: Tensor, Wex: Tensor, Wix: Tensor) -> tuple[Tensor, Tensor]:
        if self.groups > 1:
            return self._drive(x, Wex), self._drive(x, Wix)
        z_e, z_i = self._drive(x, torch.cat([Wex, Wix])).split([self.ne, self.ni], self.unit_dim)
        return z_e, z_i

    def _divide(self, z_e: Tensor, z_i: Tensor, Wei: Tensor, eps: float) -> Tensor:
        return z_e / (self._inhibit(Wei, z_i) + eps)

    def _drive(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    def _inhibit(self, Wei: Tensor, z_i: Tensor) -> Tensor:
        raise NotImplementedError

    def _per_unit(self, values: Tensor) -> Tensor:
        raise NotImplementedError

    def _refuse_misfit(self, x: Tensor) -> None:
        raise NotImplementedError

    def _options(self) -> str:
        return (
            f"divisive={self.divisive}, bias={self.b is not None}, "
            f"inputs={self.inputs!r}, inhibition={self.inhibition!r}, balanced={self.balanced}, eps={self.eps:g}"
        )
