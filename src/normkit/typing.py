"""Shapes of the tensors that functions of normkit pass to each other.

``N`` is the number of examples, ``C`` of channels, ``K`` of segments in an example, ``B`` of runs
of examples, and ``G`` of groups in an example; ``S`` stands for the spatial axes. A segment table
has a single row if all examples share its values.
"""

from jaxtyping import Float
from torch import Tensor

FeatureMap = Float[Tensor, "n c *s"]
PerChannel = Float[Tensor, "c"]
SegmentTable = Float[Tensor, "n k"]
GroupTable = Float[Tensor, "b g"]

__all__ = ["FeatureMap", "GroupTable", "PerChannel", "SegmentTable"]
