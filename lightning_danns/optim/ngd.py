"""Diagonal natural gradient: each parameter's step divided by its own Fisher information."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.optim import Optimizer

from lightning_danns.errors import UsageError

CHUNK = 32
"""Samples whose gradients are held at once: their memory is that many times the network's."""


class DiagonalNGD(Optimizer):
    """Natural gradient descent with the diagonal of the Fisher information, estimated as training goes.

    For every parameter, with the gradient g of each sample's loss for a label drawn from the network's own softmax:

        F    <- (1 - decay) F + decay * fisher_scale * mean over the batch of g^2     (the first F: fisher_scale * mean)
        step  = gradient / (F + eps), divided for a whole layer by | 1 / (F + eps) | of the layer's first parameter

    The first parameter of a DANN layer is ``Wex``, of an `nn.Linear` its weight. Call `update_fisher` on each batch
    before its step; `ImageClassifier` does. The running F is part of ``state_dict``. In several processes, F is the
    mean over all of them.

    It replaces the Fisher factors of parameter groups and refuses them: use ``correction="none"``.

    Args:
        params: parameters or groups.
        lr: step size.
        fisher_scale: factor f of every estimate.
        decay: weight c of the newest estimate.
        eps: added to F.

    Raises:
        UsageError: groups with learning-rate factors; a step without F; a layer that mixes the samples of a batch.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 300.0,
        fisher_scale: float = 2.5e-5,
        decay: float = 0.02,
        eps: float = 1e-8,
    ) -> None:
        if not lr >= 0 or not fisher_scale > 0 or not 0 <= decay <= 1 or not eps > 0:
            raise UsageError(
                f"lr={lr}, fisher_scale={fisher_scale}, decay={decay}, eps={eps}: lr must be at least 0, fisher_scale "
                "and eps above 0, decay from 0 to 1"
            )
        super().__init__(params, {"lr": lr, "fisher_scale": fisher_scale, "decay": decay, "eps": eps})
        self._layers: list[list[nn.Parameter]] = []
        if any(group.get("lr_scale", 1) != 1 for group in self.param_groups):
            raise UsageError(
                "DiagonalNGD estimates the Fisher information itself and takes no learning-rate factors: use "
                "correction='none'"
            )

    def update_fisher(self, network: nn.Module, images: Tensor, generator: torch.Generator | None = None) -> None:
        """Take the Fisher information of ``network`` on ``images`` into the running estimate."""
        self._layers = [parameters for _, parameters in _layers(network)]
        squares = mean_squared_gradients(network, images, generator)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter not in squares:
                    continue
                estimate = group["fisher_scale"] * squares[parameter]
                state = self.state[parameter]
                if "fisher" in state:
                    state["fisher"].lerp_(estimate, group["decay"])
                else:
                    state["fisher"] = estimate

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group_of = {parameter: group for group in self.param_groups for parameter in group["params"]}
        if any(p.grad is not None and "fisher" not in self.state[p] for p in group_of) or not self._layers:
            raise UsageError("DiagonalNGD has no Fisher information for this step: call update_fisher(network, images)")
        stepped: set[nn.Parameter] = set()  # a shared parameter steps with the first layer that owns it
        for layer in self._layers:
            first = layer[0]
            if first not in group_of:
                continue
            norm = (self.state[first]["fisher"] + group_of[first]["eps"]).reciprocal().norm()
            for parameter in layer:
                if parameter.grad is not None and parameter in group_of and parameter not in stepped:
                    stepped.add(parameter)
                    group = group_of[parameter]
                    step = parameter.grad / (self.state[parameter]["fisher"] + group["eps"])
                    parameter.sub_(group["lr"] * step / norm)
        return loss


def mean_squared_gradients(
    network: nn.Module, images: Tensor, generator: torch.Generator | None = None
) -> dict[nn.Parameter, Tensor]:
    """Mean over samples of the squared gradient of -log p(label), labels drawn from the network's own softmax.

    Right for any network whose samples do not interact. In several processes the mean is over all of them.

    Args:
        network: maps images (N, ...) to logits (N, classes).
        images: a batch.
        generator: draws the labels; torch's default if not given.

    Returns:
        By trainable parameter, the diagonal of its Fisher information in the parameter's shape.

    Raises:
        UsageError: the network normalises over the batch, so that a sample has no gradient of its own.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise UsageError(f"layer {name!r} normalises over the batch: its samples have no gradients of their own")
    parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
    values = {name: p.detach() for name, p in parameters.items()}
    with torch.no_grad():
        labels = torch.multinomial(network(images).softmax(-1), 1, generator=generator)[:, 0]

    def loss(values: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(network, values, (image[None],)), label[None])

    gradients = vmap(grad(loss), in_dims=(None, 0, 0), randomness="different")
    total = {name: torch.zeros_like(value) for name, value in values.items()}
    for chunk in zip(images.split(CHUNK), labels.split(CHUNK), strict=True):
        for name, gradient in gradients(values, *chunk).items():
            total[name] += gradient.square().sum(0)
    count = torch.tensor(float(len(images)), device=images.device)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for tensor in (*total.values(), count):
            torch.distributed.all_reduce(tensor)
    return {parameters[name]: square / count for name, square in total.items()}


def _layers(network: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
    """Modules that own trainable parameters, and these in order."""
    for module in network.modules():
        parameters = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if parameters:
            yield module, parameters
