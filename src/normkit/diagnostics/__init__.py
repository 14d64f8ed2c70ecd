"""Measure what normalization does in a network, and leave the network as it was."""

from normkit.diagnostics.channel_difference import ChannelDifference, channel_difference
from normkit.diagnostics.disturb import disturb_statistics
from normkit.diagnostics.estimation_shift import EstimationShift, estimation_shift
from normkit.diagnostics.inactive_channels import InactiveChannels, inactive_channels
from normkit.diagnostics.landscape import GradientLandscape, gradient_landscape
from normkit.diagnostics.lipschitz import LipschitzTerms, lipschitz_terms
from normkit.diagnostics.noise import add_output_noise
from normkit.diagnostics.probe import LayerRecord, Probe, ProbedStep, ProbeHistory

__all__ = [
    "ChannelDifference",
    "EstimationShift",
    "GradientLandscape",
    "InactiveChannels",
    "LayerRecord",
    "LipschitzTerms",
    "Probe",
    "ProbeHistory",
    "ProbedStep",
    "add_output_noise",
    "channel_difference",
    "disturb_statistics",
    "estimation_shift",
    "gradient_landscape",
    "inactive_channels",
    "lipschitz_terms",
]
