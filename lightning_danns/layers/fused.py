"""The equations of `lightning_danns.layers.dann` with division, and their gradients by hand: fewer passes over
memory and fewer small products than autograd's. For each unit, with what comes back as dz:

    u       = (z_e - Wei z_i) / gamma
    z       = g u + b
    dz_e    = dz g / gamma
    dgamma  = -dz_e u
    dz_i    = -Wei' dz_e + gain * Wei' dgamma          gain = exp(alpha)
    dWei    = -dz_e z_i' + dgamma (gain * z_i)'
    dalpha  = sum of (gain * z_i) * Wei' dgamma
    dg, db  = sums of dz u and of dz

`DANN.components` computes the same by autograd; the tests compare both.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from lightning_danns.layers.dale import autocasts, without_autocast

Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
"""Stride, padding and dilation of a convolution."""
POINTWISE: Geometry = ((1, 1), (0, 0), (1, 1))


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


def _by_autograd(equations: Callable[..., tuple[Tensor, ...]], inputs: tuple[Any, ...], ctx: Any, dz: Tensor) -> Any:
    """Gradients that can be differentiated again."""
    needed = ctx.needs_input_grad
    z, *_ = equations(*inputs)
    wanted = [value for value, wants in zip(inputs, needed, strict=True) if wants]
    gradients = iter(torch.autograd.grad(z, wanted, dz, create_graph=True))
    return tuple(next(gradients) if wants else None for wants in needed)


def _dense(
    x: Tensor, Wex: Tensor, Wix: Tensor, Wei: Tensor, alpha: Tensor, g: Tensor, b: Tensor | None, eps: float
) -> tuple[Tensor, ...]:
    """z, and what its gradients need: gain, z_i, gain z_i, gamma and u."""
    gain = alpha.exp()
    z_i = F.linear(x, Wix)  # (batch, ni)
    gained = gain * z_i
    gamma = F.linear(gained, Wei).add_(eps)  # (batch, ne)
    u = F.linear(x, Wex).addmm_(z_i, Wei.t(), alpha=-1).div_(gamma)
    return g * u if b is None else torch.addcmul(b, g, u), gain, z_i, gained, gamma, u


class DivisiveLinear(torch.autograd.Function):
    """x (batch, d) -> z (batch, ne)."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        z, *kept = _dense(*inputs)
        ctx.save_for_backward(*inputs[:-1], *kept)
        ctx.eps = inputs[-1]
        return z

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> Any:
        if in_half(dz):  # backward() under autocast, of a forward pass that was not
            with without_autocast(dz):
                return DivisiveLinear.backward(ctx, dz)
        if torch.is_grad_enabled():
            return _by_autograd(_dense, (*ctx.saved_tensors[:7], ctx.eps), ctx, dz)
        x, Wex, Wix, Wei, _, g, b, gain, z_i, gained, gamma, u = ctx.saved_tensors
        needed = ctx.needs_input_grad
        w = dz * u
        dg, db = w.sum(0), None if b is None else dz.sum(0)
        r = g / gamma
        dv = dz * r  # (batch, ne); dz_e is the same
        w *= r  # -dgamma
        divided = torch.mm(w, Wei)  # (batch, ni): minus the gradient of gain z_i
        dalpha = (divided * gained).sum(0).neg_()
        dz_i = divided.mul_(gain).addmm_(dv, Wei, beta=-1, alpha=-1)
        dWei = torch.mm(w.t(), gained).addmm_(dv.t(), z_i, beta=-1, alpha=-1)
        dWex = torch.mm(dv.t(), x) if needed[1] else None
        dWix = torch.mm(dz_i.t(), x) if needed[2] else None
        dx = torch.mm(dv, Wex).addmm_(dz_i, Wix) if needed[0] else None
        return dx, dWex, dWix, dWei, dalpha, dg, db, None


def _convolution(
    x: Tensor,
    Wex: Tensor,
    Wix: Tensor,
    Wei: Tensor,
    alpha: Tensor,
    g: Tensor,
    b: Tensor | None,
    eps: float,
    geometry: Geometry,
) -> tuple[Tensor, ...]:
    """z, and what its gradients need: z_i and u. One convolution for both drives, one for what inhibits twice."""
    drives = F.conv2d(x, torch.cat([Wex, Wix]), None, *geometry)
    z_e, z_i = drives[:, : len(Wex)], drives[:, len(Wex) :].clone()  # without the clone, all drives would be kept
    gained = _per_channel(alpha.exp()) * z_i
    subtraction, gamma = F.conv2d(torch.cat([z_i, gained]), Wei[:, :, None, None]).chunk(2)
    u = (z_e - subtraction).div_(gamma + eps)
    g = _per_channel(g)
    return g * u if b is None else torch.addcmul(_per_channel(b), g, u), z_i, u


def _per_channel(values: Tensor) -> Tensor:
    return values[:, None, None]


PIXELS = (0, 2, 3)
"""Dimensions of an image batch that are not channels."""


class DivisiveConv2d(torch.autograd.Function):
    """x (N, C, H, W) -> z (N, ne, H', W'), without groups. Keeps z_i and u alone, and computes gamma again."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        z, *kept = _convolution(*inputs)
        ctx.save_for_backward(*inputs[:-2], *kept)
        ctx.eps, ctx.geometry = inputs[-2:]
        return z

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> Any:
        if in_half(dz):  # backward() under autocast, of a forward pass that was not
            with without_autocast(dz):
                return DivisiveConv2d.backward(ctx, dz)
        if torch.is_grad_enabled():
            return _by_autograd(_convolution, (*ctx.saved_tensors[:7], ctx.eps, ctx.geometry), ctx, dz)
        x, Wex, Wix, Wei, alpha, g, b, z_i, u = ctx.saved_tensors
        needed = ctx.needs_input_grad
        n, ne, gain, kernel = len(x), len(Wex), _per_channel(alpha.exp()), Wei[:, :, None, None]
        gained = gain * z_i
        r = _per_channel(g) / F.conv2d(gained, kernel).add_(ctx.eps)
        w = dz * u
        dg, db = w.sum(PIXELS), None if b is None else dz.sum(PIXELS)
        both = torch.cat([dz, w])
        dv, w = both[:n].mul_(r), both[n:].mul_(r)  # dz_e and -dgamma
        inhibited, dWei = _gradients(both, torch.cat([z_i, gained]), -kernel)
        subtracted, divided = inhibited.chunk(2)  # gradients of z_i as it subtracts, of gain z_i
        dalpha = (divided * gained).sum(PIXELS)
        drives = torch.cat([dv, torch.addcmul(subtracted, gain, divided)], 1)
        dx, dW = _gradients(drives, x, torch.cat([Wex, Wix]), ctx.geometry, (needed[0], needed[1] or needed[2]))
        dWex, dWix = (None, None) if dW is None else (dW[:ne], dW[ne:])
        return dx, dWex, dWix, -dWei[:, :, 0, 0], dalpha, dg, db, None, None


def _gradients(
    dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry = POINTWISE, needed: tuple[bool, bool] = (True, True)
) -> tuple[Any, Any]:
    """Of a convolution's input and weight, both in one call (`torch.nn.grad` takes two)."""
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        dy, x, weight, None, *geometry, False, (0, 0), 1, (*needed, False)
    )
    return dx, dweight
