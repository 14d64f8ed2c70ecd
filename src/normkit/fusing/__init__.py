"""Fusing the activations and residual sums of a model into the norms before them."""

from normkit.fusing.verbs import Fused, Fusion, NotFused, fuse_activations_

__all__ = ["Fused", "Fusion", "NotFused", "fuse_activations_"]
