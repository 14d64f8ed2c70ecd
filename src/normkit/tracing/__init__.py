"""Tracing a model: which modules its forward calls, and which layer feeds which norm."""

from normkit.tracing.feeds import Feeds, Pair, trace_feeds
from normkit.tracing.graph import Call, Graph
from normkit.tracing.kinds import CONVOLUTIONS, is_norm, is_producer
from normkit.tracing.trace import trace

__all__ = [
    "CONVOLUTIONS",
    "Call",
    "Feeds",
    "Graph",
    "Pair",
    "is_norm",
    "is_producer",
    "trace",
    "trace_feeds",
]
