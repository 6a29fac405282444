"""Parameters and buffers of many networks of one architecture as stacks, on which one call computes all of them."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap


class Stacks:
    """Calls a method of all replicas, modules of one architecture, at once, on stacks (R, ...) of their tensors.

    The replicas stay ordinary modules: their parameters and buffers are slices of the stacks.
    """

    def __init__(self, replicas: Sequence[nn.Module]) -> None:
        self.replicas = replicas
        self.template = copy.deepcopy(replicas[0]).to("meta")  # the architecture alone
        self._stacks: dict[str, _Stack] = {}

    def call(self, method: str, *inputs: Any, own: bool = False) -> Any:
        """``replica.method(*inputs)`` of every replica, stacked (R, ...); with ``own``, inputs are stacked too."""
        state = self._tensors()
        for ours, theirs in self._pairs:
            ours.training = theirs.training  # of some parts it may differ (frozen ones)
        called = _Called(self.template)

        def one(state: dict[str, Tensor], inputs: Any) -> Any:
            return functional_call(called, state, (method, *inputs))

        return vmap(one, in_dims=(0, 0 if own else None), randomness="different")(state, inputs)

    def _tensors(self) -> dict[str, Tensor]:
        if not self._stacks:
            replicas = [dict(replica.named_modules()) for replica in self.replicas]
            self._pairs = [(module, replicas[0][name]) for name, module in self.template.named_modules()]
            for name, _ in (*self.template.named_parameters(), *self.template.named_buffers()):
                owner, _, own_name = name.rpartition(".")
                self._stacks[f"template.{name}"] = _Stack([modules[owner] for modules in replicas], own_name)
        return {name: stack.tensor() for name, stack in self._stacks.items()}


class _Called(nn.Module):
    """A forward pass that is any method of ``template``, because `functional_call` calls forward alone."""

    def __init__(self, template: nn.Module) -> None:
        super().__init__()
        self.template = template

    def forward(self, method: str, *inputs: Any) -> Any:
        return getattr(self.template, method)(*inputs)


class _Stack:
    """One parameter or buffer of all replicas in one tensor, of which theirs are slices.

    Tensors that have been given other memory since (by `torch.nn.Module.to`, a copy, a load) are stacked anew.
    """

    def __init__(self, owners: list[nn.Module], name: str) -> None:
        self.owners, self.name = owners, name
        self._addresses: list[int] = []

    def tensor(self) -> Tensor:
        """The stack. If it is trained, a leaf, whose gradient becomes the gradients of the slices."""
        slices: list[Tensor] = [getattr(owner, self.name) for owner in self.owners]
        if [s.data_ptr() for s in slices] != self._addresses:
            self._stack(slices)
        if not torch.is_grad_enabled() or not any(s.requires_grad for s in slices):
            return self.whole
        leaf = self.whole.detach().requires_grad_()

        def hand_down(leaf: Tensor) -> None:
            for s, gradient in zip(slices, leaf.grad.unbind(), strict=True):  # type: ignore[union-attr]
                if s.requires_grad:
                    s.grad = gradient if s.grad is None else s.grad + gradient

        leaf.register_post_accumulate_grad_hook(hand_down)
        return leaf

    @torch.inference_mode(False)  # in a first forward pass under it, the weights could never be trained again
    @torch.no_grad()
    def _stack(self, slices: list[Tensor]) -> None:
        self.whole = torch.stack([s.detach() for s in slices])
        if self.whole.dim() == 3:
            # transposed in memory, as the gradient of a batched matrix product is, which then need not be copied
            self.whole = self.whole.mT.contiguous().mT
        for s, view in zip(slices, self.whole, strict=True):
            s.data = view
        self._addresses = [view.data_ptr() for view in self.whole]
