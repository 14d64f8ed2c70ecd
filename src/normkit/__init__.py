"""normkit: the normalization toolkit for PyTorch."""

from normkit import functional
from normkit.core.partition import largest_divisor
from normkit.errors import (
    DataError,
    InputError,
    InputTypeError,
    KernelError,
    NormError,
    OptionError,
    PartitionError,
    SpecError,
)
from normkit.explain import Explanation, explain
from normkit.kernels.select import use_kernels
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
    "Explanation",
    "GeneralBatchGroupNorm",
    "GhostBatchNorm",
    "GroupNorm",
    "InputError",
    "InputTypeError",
    "InstanceNorm",
    "KernelError",
    "LayerNorm",
    "NormError",
    "NormSpec",
    "OptionError",
    "PartitionError",
    "PositionalNorm",
    "SpecError",
    "build",
    "explain",
    "functional",
    "largest_divisor",
    "parse_specs",
    "use_kernels",
]
