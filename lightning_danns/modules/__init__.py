"""LightningModules: the experiments of this package, and the base of yours."""

from lightning_danns.modules.base import ImageClassifier
from lightning_danns.modules.models import DANNMLP, MLP

__all__ = ["DANNMLP", "MLP", "ImageClassifier"]
