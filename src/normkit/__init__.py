"""normkit: the normalization toolkit for PyTorch."""

from normkit import functional
from normkit.core.partition import largest_divisor
from normkit.errors import (
    DataError,
    InputError,
    InputTypeError,
    NormError,
    OptionError,
    PartitionError,
    SpecError,
)
from normkit.layers.single import (
    BatchGroupNorm,
    BatchNorm,
    GeneralBatchGroupNorm,
    GhostBatchNorm,
    GroupNorm,
    InstanceNorm,
    LayerNorm,
    PositionalNorm,
)
from normkit.spec import NormSpec, build, parse_specs

__all__ = [
    "BatchGroupNorm",
    "BatchNorm",
    "DataError",
    "GeneralBatchGroupNorm",
    "GhostBatchNorm",
    "GroupNorm",
    "InputError",
    "InputTypeError",
    "InstanceNorm",
    "LayerNorm",
    "NormError",
    "NormSpec",
    "OptionError",
    "PartitionError",
    "PositionalNorm",
    "SpecError",
    "build",
    "functional",
    "largest_divisor",
    "parse_specs",
]
