"""Data sets: training, validation and test examples, scaled by statistics of the training set."""

from normkit.lab.extra import lab_packages

with lab_packages():
    from normkit.lab.data.dataset import Dataset, Examples, Split, stratified_order
    from normkit.lab.data.files import MAX_CLASSES, read_examples
    from normkit.lab.data.opening import load, open_data
    from normkit.lab.data.papers import FOLDERS
    from normkit.lab.data.sources import READERS

__all__ = [
    "FOLDERS",
    "MAX_CLASSES",
    "READERS",
    "Dataset",
    "Examples",
    "Split",
    "load",
    "open_data",
    "read_examples",
    "stratified_order",
]
