"""Diagonal natural gradient: each parameter's step divided by its own Fisher information."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_danns.errors import UsageError
from lightning_danns.optim.groups import group_of_parameters
from lightning_danns.optim.information import Likelihood, categorical, mean_squared_gradients, reference_parameter


class DiagonalNGD(Optimizer):
    """Natural gradient descent with the diagonal of the Fisher information, estimated as training goes.

    For every parameter, with the gradient g of each sample's loss for a label drawn from the network's own softmax:

        F    <- (1 - decay) F + decay * fisher_scale * mean over the batch of g^2     (the first F: fisher_scale * mean)
        step  = gradient / (F + eps), divided for a whole layer by | 1 / (F + eps) | of the layer's reference parameter

    The reference of a DANN layer is ``Wex``, of an `nn.Linear` its weight (`reference_parameter`). Call
    `update_fisher` on each batch before its step; a `Task` does. Like gradients, batches accumulate until the step,
    which takes them into F as one. The running F is part of ``state_dict``. In several processes, F is the mean over
    all of them.

    It replaces the Fisher factors of parameter groups and refuses them: use ``correction="none"``.

    Args:
        params: parameters or groups.
        lr: step size. Where F is the same for all n entries of the reference, a step is that of SGD at lr / sqrt(n), so
            small layers want less. The authors' release takes 300, for batches of 250 images; batches of 32 have
            noisier gradients, with which 300 diverges and 30 learns.
        fisher_scale: factor f of every estimate.
        decay: weight c of the newest estimate.
        eps: added to F.

    Raises:
        UsageError: groups with learning-rate factors; a step without a batch for F; a layer that mixes the samples
            of a batch, or whose first parameter is not trained.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 30.0,
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
        self._start_batch()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # also how load_state_dict ends
        self._start_batch()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if param_group.get("lr_scale", 1) != 1:
            raise UsageError(
                f"group {param_group.get('name')!r} has lr_scale={param_group['lr_scale']:.4g}, but DiagonalNGD "
                "estimates the Fisher information itself and takes no learning-rate factors: use correction='none'"
            )
        super().add_param_group(param_group)

    def _start_batch(self) -> None:
        self._layers: list[list[nn.Parameter]] = []
        self._squares: dict[nn.Parameter, Tensor] = {}  # summed over the samples since the last step
        self._samples = 0

    def update_fisher(
        self,
        network: nn.Module,
        images: Tensor,
        generator: torch.Generator | None = None,
        likelihood: Likelihood = categorical,
    ) -> None:
        """Add the squared gradients of ``network`` on ``images`` to those that the next step takes into F.

        Args:
            network: maps images (N, ...) to logits (N, classes).
            images: the batch, or a part of it, whose gradient the step will use.
            likelihood: p(y | x) by the network's outputs; classes by their logits if not given.
            generator: draws the labels; torch's default if not given.
        """
        self._layers = self._trained_layers(network)
        for parameter, square in mean_squared_gradients(network, images, generator, likelihood).items():
            self._squares[parameter] = self._squares.get(parameter, 0) + len(images) * square
        self._samples += len(images)

    def _trained_layers(self, network: nn.Module) -> list[list[nn.Parameter]]:
        """The parameters of each layer that this optimizer trains, first the one that normalises its step."""
        ours = {parameter for parameter in group_of_parameters(self) if parameter.requires_grad}
        layers = []
        for name, module in network.named_modules():
            own = {parameter: own_name for own_name, parameter in module.named_parameters(recurse=False)}
            trained = [parameter for parameter in own if parameter in ours]
            if not trained:
                continue
            reference = reference_parameter(module)
            if reference not in ours:
                raise UsageError(
                    f"layer {name!r}: the Fisher information of its {own[reference]!r} normalises the step of all its "
                    "parameters, but it is frozen or not in the optimizer: train it too, or freeze the whole layer"
                )
            layers.append([reference, *(parameter for parameter in trained if parameter is not reference)])
        return layers

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group_of = group_of_parameters(self)
        layered = {parameter for layer in self._layers for parameter in layer}
        if not all(p in layered for p in group_of if p.grad is not None):
            raise UsageError(
                "DiagonalNGD has no Fisher information for this step: call update_fisher(network, images) on each "
                "batch before its step, with the network that holds all parameters of the optimizer"
            )
        self._renew_fisher(group_of)
        stepped: set[nn.Parameter] = set()  # a shared parameter steps with the first layer that owns it
        for layer in self._layers:
            norm = (self.state[layer[0]]["fisher"] + group_of[layer[0]]["eps"]).reciprocal().norm()
            for parameter in layer:
                if parameter.grad is not None and parameter not in stepped:
                    stepped.add(parameter)
                    group = group_of[parameter]
                    step = parameter.grad / (self.state[parameter]["fisher"] + group["eps"])
                    parameter.sub_(group["lr"] * step / norm)
        self._start_batch()
        return loss

    def _renew_fisher(self, group_of: dict[nn.Parameter, dict[str, Any]]) -> None:
        """Take the batch since the last step into F."""
        samples = torch.tensor(float(self._samples), device=next(iter(group_of)).device)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for tensor in (*self._squares.values(), samples):
                torch.distributed.all_reduce(tensor)
        for parameter, square in self._squares.items():
            if parameter not in group_of:
                continue
            group, state = group_of[parameter], self.state[parameter]
            estimate = group["fisher_scale"] * square / samples
            if "fisher" in state:
                state["fisher"].lerp_(estimate, group["decay"])
            else:
                state["fisher"] = estimate
