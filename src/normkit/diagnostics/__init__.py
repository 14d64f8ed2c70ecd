"""What normalization does in a network, measured; the network is left as it was."""

from normkit.diagnostics.channel_difference import ChannelDifference, channel_difference
from normkit.diagnostics.disturb import disturb_statistics
from normkit.diagnostics.estimation_shift import EstimationShift, estimation_shift
from normkit.diagnostics.inactive_channels import InactiveChannels, inactive_channels

__all__ = [
    "ChannelDifference",
    "EstimationShift",
    "InactiveChannels",
    "channel_difference",
    "disturb_statistics",
    "estimation_shift",
    "inactive_channels",
]
