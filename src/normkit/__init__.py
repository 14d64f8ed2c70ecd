"""normkit: the normalization toolkit for PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from normkit import functional
from normkit.core.partition import largest_divisor
from normkit.errors import (
    ArgumentError,
    CallbackError,
    ConversionError,
    DataError,
    InputError,
    InputTypeError,
    KernelError,
    NormError,
    OptionError,
    PackageError,
    PartitionError,
    SpecError,
    TraceError,
    WeightError,
)
from normkit.explain import Explanation, explain
from normkit.kernels.select import use_kernels
from normkit.layers.batch_channel import BatchChannelNorm, sync_update_rates
from normkit.layers.group_plus import GroupNormPlus
from normkit.layers.instance_batch import InstanceBatchNorm
from normkit.layers.over_batch import (
    BatchGroupNorm,
    BatchNorm,
    GeneralBatchGroupNorm,
    GhostBatchNorm,
)
from normkit.layers.over_example import GroupNorm, InstanceNorm, LayerNorm, PositionalNorm
from normkit.layers.switchable import SwitchableNorm
from normkit.layers.whitening import GroupWhitening
from normkit.param_groups import decay_gamma_to_one, param_groups
from normkit.recipes import register_norm
from normkit.spec import NormSpec, build, parse_specs
from normkit.version import __version__

if TYPE_CHECKING:
    from normkit import weights
    from normkit.advice import Finding, Recommendation, recommend, validate
    from normkit.by_batch_size import FourThings, four_things
    from normkit.convert import (
        Conversion,
        apply_recipe,
        back_to_torch_,
        convert_norm,
        convert_norm_,
        place_gnbn_,
        place_ibn_,
        place_xbn_,
    )
    from normkit.diagnostics import (
        ChannelDifference,
        EstimationShift,
        GradientLandscape,
        GroupedChannels,
        HessianNorms,
        InactiveChannels,
        LipschitzTerms,
        OutputBound,
        Probe,
        ProjectedUpdates,
        SimilarityPropagation,
        SingularityRatio,
        add_output_noise,
        channel_difference,
        disturb_statistics,
        estimation_shift,
        gradient_landscape,
        grouped_channels,
        hessian_norms,
        inactive_channels,
        lipschitz_terms,
        output_bound,
        projected_updates,
        similarity_propagation,
        singularity_ratio,
    )
    from normkit.distributed import (
        Accumulation,
        Synchronization,
        accumulate_statistics,
        synchronize_,
    )
    from normkit.doctor import Diagnosis, diagnose
    from normkit.folding import Folding, fold
    from normkit.fusing import Fusion, fuse_activations_
    from normkit.inference import (
        Guard,
        StatisticsPatch,
        freeze_statistics,
        guard_statistics_,
        recalibrate,
        set_example_weight,
        thaw_statistics,
    )
    from normkit.tune import Tuning, WeightCurve, example_weight_curve, tune_example_weight
    from normkit.weights import bake_weights_, standardize_weights_

LAZY_IMPORTS = {
    "normkit.advice": ("Finding", "Recommendation", "recommend", "validate"),
    "normkit.by_batch_size": ("FourThings", "four_things"),
    "normkit.convert": (
        "Conversion",
        "apply_recipe",
        "back_to_torch_",
        "convert_norm",
        "convert_norm_",
        "place_gnbn_",
        "place_ibn_",
        "place_xbn_",
    ),
    "normkit.diagnostics": (
        "ChannelDifference",
        "EstimationShift",
        "GradientLandscape",
        "GroupedChannels",
        "HessianNorms",
        "InactiveChannels",
        "LipschitzTerms",
        "OutputBound",
        "Probe",
        "ProjectedUpdates",
        "SimilarityPropagation",
        "SingularityRatio",
        "add_output_noise",
        "channel_difference",
        "disturb_statistics",
        "estimation_shift",
        "gradient_landscape",
        "grouped_channels",
        "hessian_norms",
        "inactive_channels",
        "lipschitz_terms",
        "output_bound",
        "projected_updates",
        "similarity_propagation",
        "singularity_ratio",
    ),
    "normkit.distributed": (
        "Accumulation",
        "Synchronization",
        "accumulate_statistics",
        "synchronize_",
    ),
    "normkit.doctor": ("Diagnosis", "diagnose"),
    "normkit.folding": ("Folding", "fold"),
    "normkit.fusing": ("Fusion", "fuse_activations_"),
    "normkit.inference": (
        "Guard",
        "StatisticsPatch",
        "freeze_statistics",
        "guard_statistics_",
        "recalibrate",
        "set_example_weight",
        "thaw_statistics",
    ),
    "normkit.tune": ("Tuning", "WeightCurve", "example_weight_curve", "tune_example_weight"),
    "normkit.weights": ("bake_weights_", "standardize_weights_"),
}
"""Names that are imported at their first use, by module: building a model does not need them."""


def __getattr__(name: str) -> Any:
    import importlib

    if name == "weights":
        return importlib.import_module("normkit.weights")
    for module, names in LAZY_IMPORTS.items():
        if name in names:
            found = getattr(importlib.import_module(module), name)
            globals()[name] = found
            return found
    raise AttributeError(f"module 'normkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "Accumulation",
    "ArgumentError",
    "BatchChannelNorm",
    "BatchGroupNorm",
    "BatchNorm",
    "CallbackError",
    "ChannelDifference",
    "Conversion",
    "ConversionError",
    "DataError",
    "Diagnosis",
    "EstimationShift",
    "Explanation",
    "Finding",
    "Folding",
    "FourThings",
    "Fusion",
    "GeneralBatchGroupNorm",
    "GhostBatchNorm",
    "GradientLandscape",
    "GroupNorm",
    "GroupNormPlus",
    "GroupWhitening",
    "GroupedChannels",
    "Guard",
    "HessianNorms",
    "InactiveChannels",
    "InputError",
    "InputTypeError",
    "InstanceBatchNorm",
    "InstanceNorm",
    "KernelError",
    "LayerNorm",
    "LipschitzTerms",
    "NormError",
    "NormSpec",
    "OptionError",
    "OutputBound",
    "PackageError",
    "PartitionError",
    "PositionalNorm",
    "Probe",
    "ProjectedUpdates",
    "Recommendation",
    "SimilarityPropagation",
    "SingularityRatio",
    "SpecError",
    "StatisticsPatch",
    "SwitchableNorm",
    "Synchronization",
    "TraceError",
    "Tuning",
    "WeightCurve",
    "WeightError",
    "__version__",
    "accumulate_statistics",
    "add_output_noise",
    "apply_recipe",
    "back_to_torch_",
    "bake_weights_",
    "build",
    "channel_difference",
    "convert_norm",
    "convert_norm_",
    "decay_gamma_to_one",
    "diagnose",
    "disturb_statistics",
    "estimation_shift",
    "example_weight_curve",
    "explain",
    "fold",
    "four_things",
    "freeze_statistics",
    "functional",
    "fuse_activations_",
    "gradient_landscape",
    "grouped_channels",
    "guard_statistics_",
    "hessian_norms",
    "inactive_channels",
    "largest_divisor",
    "lipschitz_terms",
    "output_bound",
    "param_groups",
    "parse_specs",
    "place_gnbn_",
    "place_ibn_",
    "place_xbn_",
    "projected_updates",
    "recalibrate",
    "recommend",
    "register_norm",
    "set_example_weight",
    "similarity_propagation",
    "singularity_ratio",
    "standardize_weights_",
    "sync_update_rates",
    "synchronize_",
    "thaw_statistics",
    "tune_example_weight",
    "use_kernels",
    "validate",
    "weights",
]
