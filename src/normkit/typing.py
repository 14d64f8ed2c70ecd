"""Names for the tensors that pass between the layers of the code.

``N`` examples, ``C`` channels, ``S`` spatial axes; ``K`` segments of an example, ``B`` runs of
examples, ``G`` groups of an example. A segment table has a row of 1 when every example shares it.
"""

from jaxtyping import Float
from torch import Tensor

FeatureMap = Float[Tensor, "n c *s"]
PerChannel = Float[Tensor, "c"]
SegmentTable = Float[Tensor, "n k"]
GroupTable = Float[Tensor, "b g"]

__all__ = ["FeatureMap", "GroupTable", "PerChannel", "SegmentTable"]
