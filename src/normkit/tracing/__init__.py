"""Which layer feeds which: what converting, folding and standardising need to know of a model."""

from normkit.passes import require_unwrapped
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
    "require_unwrapped",
    "trace",
    "trace_feeds",
]
