"""Running statistics of a trained model: measure, freeze or guard them, or mix in an example's."""

from normkit.inference.example_weight import set_example_weight
from normkit.inference.freeze import freeze_statistics, thaw_statistics
from normkit.inference.guard import Guard, guard_statistics_
from normkit.inference.patch import StatisticsPatch
from normkit.inference.recalibrate import recalibrate

__all__ = [
    "Guard",
    "StatisticsPatch",
    "freeze_statistics",
    "guard_statistics_",
    "recalibrate",
    "set_example_weight",
    "thaw_statistics",
]
