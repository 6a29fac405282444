"""One replica: the classifier of a seed and a learning rate, or the reason why it cannot be one of many."""

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from lightning_danns.errors import UsageError
from lightning_danns.modules.arguments import NOT_SAVED, direct, plain
from lightning_danns.modules.tasks import ImageClassifier
from lightning_danns.optim import measured

OWN = (
    *("forward", "step", "check", "likelihood", "default_metrics", "metrics_of", "parameter_groups", "best"),
    *("setup", "on_train_start", "on_save_checkpoint", "on_load_checkpoint"),
)
"""What each replica does by itself; other steps and hooks run once for all."""


class ClassifierFactory(Protocol):
    """Makes one of the replicas; a protocol, so that the command line offers all options of a class but these two."""

    def __call__(self, *, input_shape: Sequence[int], num_classes: int) -> ImageClassifier: ...


def make_replica(classifier: Any, data: dict[str, Any], seed: int, rate: float | None) -> ImageClassifier:
    """The replica of a seed and rate; refused if it does more than `ReplicatedClassifier` does for it."""
    if isinstance(classifier, Mapping) and NOT_SAVED in classifier:
        raise UsageError(f"the checkpoint could not keep classifier={classifier[NOT_SAVED]}: give it again")
    if not callable(classifier) or isinstance(classifier, nn.Module):
        raise UsageError(
            f"classifier={type(classifier).__name__} object: give what makes one, e.g. "
            "functools.partial(DANNMLP, hidden_sizes=[100, 100])"
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        replica = classifier(**data)
    kind, made = type(replica), direct(classifier)
    if not isinstance(replica, ImageClassifier):
        raise UsageError(f"classifier made a {kind.__name__}, which is no ImageClassifier")
    if next(replica.parameters(), None) is None:
        raise UsageError(f"{kind.__name__} has no parameters: set self.network in its __init__")
    shared = set(dir(ImageClassifier)) - set(dir(nn.Module)) - set(OWN)
    lookup = inspect.getattr_static
    own = [name for name in shared if name[0] != "_" and lookup(kind, name) is not lookup(ImageClassifier, name)]
    if own or not replica.automatic_optimization:
        raise UsageError(
            f"{kind.__name__} has its own {', '.join(sorted(own) or ['optimization'])}, which replicas do not run: "
            "they train by step and loss alone (callbacks belong to the Trainer)"
        )
    if replica.decay_to != "zero":
        raise UsageError(f"decay_to={replica.decay_to!r}, which replicas do not know: use 'zero', or single runs")
    if replica.correction is measured:
        raise UsageError("correction='measured' measures one network, not many: use 'fisher', or single runs")
    if kind in (made, getattr(made, "func", None)) and not getattr(made, "args", ()):
        replica.hparams.clear()  # the command line tells it the arguments of us all instead of its own
        replica.hparams.update(plain({**getattr(made, "keywords", {}), **data}))
    if rate is not None:  # of its own optimizer, for whoever trains or loads the replica alone
        replica.optimizer_factory = functools.partial(replica.optimizer_factory, lr=rate)
        replica.hparams["optimizer"] = plain(replica.optimizer_factory)
    return replica
