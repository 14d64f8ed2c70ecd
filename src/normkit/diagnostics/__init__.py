"""Measure what normalization does in a network, and leave the network as it was."""

from normkit.diagnostics.channel_difference import ChannelDifference, channel_difference
from normkit.diagnostics.disturb import disturb_statistics
from normkit.diagnostics.estimation_shift import EstimationShift, estimation_shift
from normkit.diagnostics.grouped_channels import GroupedChannels, grouped_channels
from normkit.diagnostics.hessian import HessianNorms, hessian_norms
from normkit.diagnostics.inactive_channels import InactiveChannels, inactive_channels
from normkit.diagnostics.landscape import GradientLandscape, gradient_landscape
from normkit.diagnostics.lipschitz import LipschitzTerms, lipschitz_terms
from normkit.diagnostics.noise import add_output_noise
from normkit.diagnostics.output_bound import OutputBound, output_bound
from normkit.diagnostics.probe import LayerRecord, Probe, ProbedStep, ProbeHistory
from normkit.diagnostics.projected import ProjectedUpdates, projected_updates
from normkit.diagnostics.similarity import SimilarityPropagation, similarity_propagation
from normkit.diagnostics.singularity import SingularityRatio, singularity_ratio

__all__ = [
    "ChannelDifference",
    "EstimationShift",
    "GradientLandscape",
    "GroupedChannels",
    "HessianNorms",
    "InactiveChannels",
    "LayerRecord",
    "LipschitzTerms",
    "OutputBound",
    "Probe",
    "ProbeHistory",
    "ProbedStep",
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
]
