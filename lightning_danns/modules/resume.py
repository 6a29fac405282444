"""What a checkpoint must share with the module that goes on from it: said before torch says it in its own words."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl

from lightning_danns.errors import UsageError
from lightning_danns.layers.dale import dale_layers
from lightning_danns.optim import DECAY_TO_INHIBITION, fisher_optimizer, measured

if TYPE_CHECKING:
    from lightning_danns.modules.base import DaleLightningModule

KEPT = ("weight_decay", DECAY_TO_INHIBITION, "momentum", "betas", "base_rate")
"""Settings of a group that a resumed fit takes from its checkpoint, besides its rate."""

CONSTANTS = "dale_constants"
"""Where a checkpoint keeps `DaleModule.constants` of each layer; checkpoints before 0.2 have none."""

ANEW = "or start anew from its weights (load_from_checkpoint)"


def refuse_compiled(module: pl.LightningModule) -> None:
    """Refuse a part that `torch.compile` has wrapped: it would be saved under names that do not load."""
    compiled = next((name for name in module.state_dict() if "_orig_mod." in name), None)
    if compiled is not None:
        path = compiled.partition("._orig_mod.")[0]
        raise UsageError(
            f"torch.compile(self.{path}) would be saved as {compiled}, which does not reload: compile it in place, "
            f"self.{path}.compile()"
        )


def refuse_misfit(module: "DaleLightningModule", checkpoint: Mapping[str, Any], *, optimizer: bool) -> None:
    """Refuse another network's weights and, if asked to, the state of an optimizer other than the module's."""
    if not attached(module):
        return  # load_from_checkpoint, where torch reports what does not fit and strict=False allows it
    if "state_dict" in checkpoint:  # sharded strategies load their weights elsewhere
        if module.strict_loading:
            _refuse_other_network(module, checkpoint)
            _refuse_other_constants(module, checkpoint.get(CONSTANTS, {}))
        if module.trainer.training and "optimizer_states" not in checkpoint:
            raise UsageError(f"the checkpoint holds weights alone, so no fit can continue from it: test it, {ANEW}")
    if optimizer and module.trainer.training:
        _refuse_other_optimizer(module, checkpoint.get("optimizer_states", []))


def attached(module: pl.LightningModule) -> bool:
    """Whether a Trainer runs the module."""
    try:
        return module.trainer is not None
    except RuntimeError:
        return False


def _refuse_other_network(module: pl.LightningModule, checkpoint: Mapping[str, Any]) -> None:
    ours = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    theirs = {name: tuple(value.shape) for name, value in checkpoint["state_dict"].items()}
    if ours == theirs:
        return
    name = next(name for name in [*ours, *theirs] if ours.get(name) != theirs.get(name))
    saved = checkpoint.get(module.CHECKPOINT_HYPER_PARAMS_KEY, {})
    different = {k: v for k, v in saved.items() if k in module.hparams and v != module.hparams[k] and k != "optimizer"}
    described = ", ".join(f"{key}={value}" for key, value in different.items())
    raise UsageError(
        f"the checkpoint holds another network than this {type(module).__name__}: {name} is "
        f"{ours.get(name, 'absent')} here and {theirs.get(name, 'absent')} there. It was saved by a model with "
        f"{described or 'other layers'}"
    )


def constants_of(module: pl.LightningModule) -> dict[str, dict[str, Any]]:
    """`DaleModule.constants` of each layer by its name."""
    return {name: layer.constants() for name, layer in dale_layers(module)}


def _refuse_other_constants(module: pl.LightningModule, theirs: Mapping[str, Mapping[str, Any]]) -> None:
    for layer, ours in constants_of(module).items():
        for key, there in theirs.get(layer, {}).items():
            if key in ours and ours[key] != there:
                raise UsageError(
                    f"the checkpoint's layer {layer!r} has {key}={there}, here it has {key}={ours[key]}: the weights "
                    "fit, but would compute something else. Make the network as it was (load_from_checkpoint does)"
                )


def _refuse_other_optimizer(module: "DaleLightningModule", states: list[dict[str, Any]]) -> None:
    """Refuse other factors (unless they are measured anew), other settings, or an optimizer of another kind."""
    anew, constant = module.correction is measured, module.lr_scheduler_factory is None
    ours = fisher_optimizer(module.optimizer_factory, module.parameter_groups()).param_groups
    theirs = states[0]["param_groups"] if states else []
    if not theirs or not all("lr_scale" in group for group in (*ours, *theirs)):
        return  # groups of somebody's own
    our_scales, their_scales = ({g["name"]: g["lr_scale"] for g in groups} for groups in (ours, theirs))
    if our_scales != their_scales and not (anew and our_scales.keys() == their_scales.keys()):
        raise UsageError(
            f"the checkpoint was trained with other learning-rate factors or decay: {len(their_scales)} groups there, "
            f"{len(our_scales)} here. Resume with the same correction and decay_to, {ANEW}"
        )
    for ours_, theirs_ in zip(ours, theirs, strict=True):
        changed = {key: (ours_.get(key), theirs_.get(key)) for key in KEPT if key in ours_ and key in theirs_}
        if not anew and (constant or "initial_lr" in theirs_):  # which schedulers leave as it was
            changed["lr"] = ours_["lr"], theirs_.get("initial_lr", theirs_["lr"])
        for key, (here, there) in changed.items():
            if here != there:
                raise UsageError(
                    f"{key}={here} of group {ours_['name']!r}, but the checkpoint goes on with {there}, because a "
                    f"resumed fit keeps its optimizer's settings. Leave them as they were, {ANEW}"
                )
    missing = set(ours[0]) - set(theirs[0])
    if missing:
        raise UsageError(
            f"the checkpoint was trained with another optimizer, which has no {', '.join(sorted(missing))}. Resume "
            f"with the same optimizer, {ANEW}"
        )
