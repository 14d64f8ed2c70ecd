"""Activations and sums that follow the norms of a model, put into the norms' own pass."""

from normkit.fusing.verbs import Fused, Fusion, NotFused, fuse_activations_

__all__ = ["Fused", "Fusion", "NotFused", "fuse_activations_"]
