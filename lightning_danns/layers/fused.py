"""Division with gradients by hand, which take fewer passes over memory than autograd's, or keep less of it.

`DANN.components` computes the same by autograd; the tests compare both.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from lightning_danns.layers.dale import autocasts, scalable, without_autocast


def in_half(x: Tensor) -> bool:
    """Whether ``x`` is, or autocast makes it, of half precision."""
    return autocasts(x) or x.dtype in (torch.float16, torch.bfloat16)


def transformed() -> bool:
    """Whether something other than autograd follows the operations: a compiler, torch.func, forward-mode autograd."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()  # as torch.autograd.Function asks
        or forward_ad._current_level >= 0
    )


def drives_in_balance(x: Tensor, Wex: Tensor, Wix: Tensor, Wei: Tensor) -> tuple[Tensor, ...]:
    """z_e, z_i, and Wei S / I; then what the gradients need: S / I, I, and Wix 1.

    Both totals are answers to ones, and cost less as one more sample than as sums, in both passes.
    """
    x = _and_ones(x)
    z_e, z_i = F.linear(x, Wex), F.linear(x, Wix)
    of_ones = z_i[-1]
    inhibition = scalable(torch.mv(Wei, of_ones))
    ratio = z_e[-1].clone() / inhibition  # a view would keep z_e for the backward pass
    return z_e[:-1], z_i[:-1], ratio[:, None] * Wei, ratio, inhibition, of_ones


def _and_ones(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(1, x.shape[1])])


def _dense(
    x: Tensor,
    Wex: Tensor,
    Wix: Tensor,
    Wei: Tensor,
    alpha: Tensor,
    g: Tensor,
    b: Tensor | None,
    eps: float,
    balanced: bool,
) -> tuple[Tensor, ...]:
    """z, and what its gradients need: Wei, gain, z_i, gain z_i, gamma and u; if balanced, S / I, I and Wix 1."""
    gain, balancing = alpha.exp(), []  # type: Tensor, list[Tensor]
    if balanced:
        z_e, z_i, Wei, *balancing = drives_in_balance(x, Wex, Wix, Wei)
    else:
        z_e, z_i = F.linear(x, Wex), F.linear(x, Wix)  # (batch, ne), (batch, ni)
    gained = gain * z_i
    gamma = F.linear(gained, Wei).add_(eps)  # (batch, ne)
    u = z_e.addmm_(z_i, Wei.t(), alpha=-1).div_(gamma)
    return g * u if b is None else torch.addcmul(b, g, u), Wei, gain, z_i, gained, gamma, u, *balancing


class DivisiveLinear(torch.autograd.Function):
    """x (batch, d) -> z (batch, ne). For each unit, with what comes back as dz:

    u       = (z_e - Wei z_i) / gamma
    z       = g u + b
    dz_e    = dz g / gamma
    dgamma  = -dz_e u
    dz_i    = -Wei' dz_e + gain * Wei' dgamma          gain = exp(alpha)
    dWei    = -dz_e z_i' + dgamma (gain * z_i)'
    dalpha  = sum of (gain * z_i) * Wei' dgamma
    dg, db  = sums of dz u and of dz

    The last argument says whether Wei is first scaled by S / I: then, with its gradient dWei and 1 an input of ones,

    dS      = sum of dWei * Wei / I                    goes back as dz_e of that input
    dI      = -dS S / I                                and Wei' dI as its dz_i
    dWei    <- dWei S / I + dI (Wix 1)'
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        z, *kept = _dense(*inputs)
        ctx.save_for_backward(*inputs[:7], *kept)
        ctx.options = inputs[7:]
        return z

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> Any:
        if in_half(dz):  # backward() under autocast, of a forward pass that was not
            with without_autocast(dz):
                return DivisiveLinear.backward(ctx, dz)
        needed = ctx.needs_input_grad
        if torch.is_grad_enabled():  # gradients that can be differentiated again
            inputs = (*ctx.saved_tensors[:7], *ctx.options)
            wanted = [value for value, wants in zip(inputs, needed, strict=True) if wants]
            gradients = iter(torch.autograd.grad(_dense(*inputs)[0], wanted, dz, create_graph=True))
            return tuple(next(gradients) if wants else None for wants in needed)
        x, Wex, Wix, own_Wei, _, g, b, Wei, gain, z_i, gained, gamma, u, *balancing = ctx.saved_tensors
        w = dz * u
        dg, db = w.sum(0), None if b is None else dz.sum(0)
        r = g / gamma
        dv = dz * r  # (batch, ne); dz_e is the same
        w *= r  # -dgamma
        divided = torch.mm(w, Wei)  # (batch, ni): minus the gradient of gain z_i
        dalpha = (divided * gained).sum(0).neg_()
        dz_i = divided.mul_(gain).addmm_(dv, Wei, beta=-1, alpha=-1)
        dWei = torch.mm(w.t(), gained).addmm_(dv.t(), z_i, beta=-1, alpha=-1)
        dx = torch.mm(dv, Wex).addmm_(dz_i, Wix) if needed[0] else None
        if balancing:
            ratio, inhibition, of_ones = balancing
            dS = (dWei * own_Wei).sum(1).div_(inhibition)
            dI = -dS * ratio
            dWei.mul_(ratio[:, None]).addr_(dI, of_ones)
            dv, dz_i = torch.cat([dv, dS[None]]), torch.cat([dz_i, torch.mv(own_Wei.t(), dI)[None]])
            x = _and_ones(x)
        dWex = torch.mm(dv.t(), x) if needed[1] else None
        dWix = torch.mm(dz_i.t(), x) if needed[2] else None
        return dx, dWex, dWix, dWei, dalpha, dg, db, None, None


class Quotient(torch.autograd.Function):
    """z_e (N, ne, H, W), z_i (N, ni, H, W) -> u (N, ne, H, W). Keeps u and z_i, and computes gamma again:

    gamma   = Wei z_i + eps
    u       = z_e / gamma
    dz_e    = du / gamma
    dgamma  = -dz_e u
    dz_i    = Wei' dgamma
    dWei    = dgamma z_i'
    """

    @staticmethod
    def forward(ctx: Any, z_e: Tensor, z_i: Tensor, Wei: Tensor, eps: float) -> Tensor:
        u = z_e / F.conv2d(z_i, Wei[:, :, None, None]).add_(eps)
        ctx.save_for_backward(z_i, Wei, u)
        ctx.eps = eps
        return u

    @staticmethod
    def backward(ctx: Any, du: Tensor) -> Any:
        if autocasts(du):
            with without_autocast(du):
                return Quotient.backward(ctx, du)
        z_i, Wei, u = ctx.saved_tensors
        kernel = Wei[:, :, None, None]
        dz_e = du / F.conv2d(z_i, kernel).add_(ctx.eps)
        dz_i, dkernel, _ = torch.ops.aten.convolution_backward(
            (dz_e * u).neg_(), z_i, kernel, None, (1, 1), (0, 0), (1, 1), False, (0, 0), 1, (True, True, False)
        )
        return dz_e, dz_i, dkernel[:, :, 0, 0], None
