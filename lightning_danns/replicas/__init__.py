"""Many at once: seeds and learning rates of one small network, trained side by side as one stack of weights."""

from lightning_danns.replicas.checkpoint import ReplicaCheckpoint, ReplicaProjection
from lightning_danns.replicas.module import ReplicatedClassifier

__all__ = ["ReplicaCheckpoint", "ReplicaProjection", "ReplicatedClassifier"]
