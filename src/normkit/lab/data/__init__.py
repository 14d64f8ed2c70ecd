"""Data sets held in memory: training, validation and test examples, normalised."""

from normkit.lab.data.dataset import Dataset, Examples, stratified_order
from normkit.lab.data.files import MAX_CLASSES, read_examples
from normkit.lab.data.sources import READERS, load

__all__ = [
    "MAX_CLASSES",
    "READERS",
    "Dataset",
    "Examples",
    "load",
    "read_examples",
    "stratified_order",
]
