"""A trained model at evaluation."""

from normkit.inference.example_weight import set_example_weight

__all__ = ["set_example_weight"]
