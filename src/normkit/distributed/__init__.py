"""Statistics of batches that are split over several processes, or over several forwards."""

from normkit.distributed.accumulate import Accumulation, accumulate_statistics
from normkit.distributed.synchronize import Synchronization, synchronize_

__all__ = ["Accumulation", "Synchronization", "accumulate_statistics", "synchronize_"]
