"""Numbers about norms, as printed in the papers' tables and in this project's own runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

ZHOU = "Zhou et al., Batch Group Normalization"
GUNAWAN = "Gunawan et al., Understanding and Improving Group Normalization"
SUMMERS = "Summers & Dinneen, Four Things Everyone Should Know to Improve Batch Normalization"
QIAO = "Qiao et al., Micro-Batch Training with Batch-Channel Normalization"
HUANG = "Huang et al., Delving into the Estimation Shift of Batch Normalization"
OURS = "normkit's own runs"

ACCURACY, ERROR = "accuracy, %", "error, %"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """The numbers of one comparison, as printed.

    Args:
        source: Authors and title, or "normkit's own runs".
        place: The table; the section, if the numbers are in the text.
        setting: Network, data and batch size.
        metric: The metric and its unit.
        values: The number of each method; the recommended one first.
    """

    source: str
    place: str
    setting: str
    metric: str
    values: Mapping[str, str]

    def __str__(self) -> str:
        return f"{self.source}, {self.place}: {self.setting}, {self.metric}: {self.numbers}"

    @property
    def numbers(self) -> str:
        """The methods with their numbers."""
        return ", ".join(f"{what} {value}" for what, value in self.values.items())

    def as_dict(self) -> dict[str, object]:
        """The fields as plain values, for JSON."""
        return asdict(self)


IMAGENET = "ResNet-50 on ImageNet"
BATCH_SIZES = (128, 64, 32, 16, 8, 4, 2)
ZHOU_TABLE_2 = {
    "BN": ("76.832", "76.832", "76.656", "75.744", "75.632", "72.752", "66.512"),
    "GN": ("75.776", "76.544", "75.952", "76.496", "75.632", "76.240", "75.872"),
    "BGN": ("77.008", "77.104", "76.784", "76.624", "76.208", "76.336", "76.096"),
}
"""Top-1 accuracy by images per GPU."""

ZHOU_OTHERS = {
    128: ("table 3", "DARTS on CIFAR-10, batches of 96, 256 groups", ("97.40", "97.33", "94.78")),
    64: (
        "table 4",
        "MANAS on CIFAR-10, batches of 64, 64 groups where table 2 has 256",
        ("97.15", "97.18", "95.52"),
    ),
    32: (
        "table 7",
        "CAN on Office-31, batches of 30, groups by task: 512 (three), 1, 8 and 32",
        ("90.9", "90.1", "88.6"),
    ),
}
"""Accuracy of BGN, BN and GN in the paper's other tasks with a batch size, and its groups there.

The key is the nearest batch size of table 2. For its remaining tasks the paper does not say both.
"""

GUNAWAN_TABLE_2 = {
    "BN": {8: "95.17", 16: "95.38", 32: "95.31", 64: "94.56", 128: "94.19"},
    "GN": {8: "94.01", 16: "93.74", 32: "93.52", 64: "92.66", 128: "91.88"},
}
"""Validation accuracy on CIFAR-10 by batch size."""

OWN_RUNS = {
    2: {
        "bn": "67.40 ± 0.86",
        "gn:8": "67.65 ± 1.98",
        "gn:8+ws": "71.78 ± 0.78",
        "bgn:auto": "65.94 ± 2.69",
        "bcn:8:micro_batch+ws": "73.17 ± 0.75",
    },
    32: {
        "bn": "70.84 ± 0.20",
        "gn:8": "61.50 ± 0.46",
        "gn:8+ws": "68.25 ± 0.78",
        "bgn:auto": "70.87 ± 0.32",
        "ghost:4": "68.55 ± 1.08",
        "bcn:8:micro_batch+ws": "69.90 ± 0.62",
    },
}
"""Test accuracy of docs/compare.md by batch size: mean and standard deviation of three seeds."""


def by_batch_size(name: str, batch_size: int, others: tuple[str, ...]) -> Iterator[Evidence]:
    """Table 2 of Zhou et al. at a batch size; nothing if that is below the table's smallest."""
    if batch_size >= BATCH_SIZES[-1]:
        column = BATCH_SIZES.index(batch_size)
        yield Evidence(
            source=ZHOU,
            place="table 2",
            setting=f"{IMAGENET}, {batch_size} images a GPU",
            metric=f"top-1 {ACCURACY}",
            values={each: ZHOU_TABLE_2[each][column] for each in (name, *others)},
        )


def other_tasks(batch_size: int) -> Iterator[Evidence]:
    """The other task of Zhou et al. at this batch size, with the groups that they used there."""
    if batch_size in ZHOU_OTHERS:
        place, setting, numbers = ZHOU_OTHERS[batch_size]
        values: dict[str, str] = dict(zip(("BGN", "BN", "GN"), numbers, strict=True))
        yield Evidence(source=ZHOU, place=place, setting=setting, metric=ACCURACY, values=values)


def cifar_by_batch_size(batch_size: int) -> Iterator[Evidence]:
    """Table 2 of Gunawan et al., if it has the batch size."""
    if batch_size in GUNAWAN_TABLE_2["BN"]:
        yield Evidence(
            source=GUNAWAN,
            place="table 2",
            setting=f"CIFAR-10, batches of {batch_size}",
            metric=ACCURACY,
            values={each: column[batch_size] for each, column in GUNAWAN_TABLE_2.items()},
        )


def own_runs(name: str, batch_size: int) -> Iterator[Evidence]:
    """This project's own runs, if there are some at the batch size."""
    if name in OWN_RUNS.get(batch_size, {}):
        found = OWN_RUNS[batch_size]
        yield Evidence(
            source=OURS,
            place="docs/compare.md",
            setting=f"small-resnet on 2000 images of fashion-mnist, batches of {batch_size}",
            metric=ACCURACY,
            values={each: found[each] for each in dict.fromkeys((name, "bn", "gn:8"))},
        )


def qiao(place: str, setting: str, metric: str, **values: str) -> Evidence:
    """A table of Qiao et al.; ``_WS`` in a name is ``+WS``."""
    named = {name.replace("_", "+"): value for name, value in values.items()}
    return Evidence(source=QIAO, place=place, setting=setting, metric=metric, values=named)


def huang(place: str, setting: str, metric: str, **values: str) -> Evidence:
    """A table of Huang et al."""
    return Evidence(source=HUANG, place=place, setting=setting, metric=metric, values=values)


def summers(place: str, setting: str, metric: str, **values: str) -> Evidence:
    """A passage of Summers & Dinneen; ``_`` in a name is a space."""
    named = {name.replace("_", " "): value for name, value in values.items()}
    return Evidence(source=SUMMERS, place=place, setting=setting, metric=metric, values=named)


MICRO_IMAGENET = qiao(
    "table 1", f"{IMAGENET}, 1 image a GPU, BN 64", f"top-1 {ERROR}",
    GN_WS="23.72", GN="24.81", BN="24.30",
)  # fmt: skip
CHANNELS_IMAGENET = qiao(
    "table 1", f"{IMAGENET}, 1 image a GPU, BN 64", f"top-1 {ERROR}",
    GN="24.81", BN="24.30", LN="27.22", IN="29.49",
)  # fmt: skip
BN_WS_IMAGENET = qiao(
    "table 1", f"{IMAGENET}, 64 images a GPU", f"top-1 {ERROR}", BN_WS="23.76", BN="24.30"
)
BCN_IMAGENET = qiao(
    "table 6", f"{IMAGENET}, 32 or 64 images a GPU by the caption", f"top-1 {ERROR}",
    BCN_WS="23.09", GN_WS="23.72", GN="24.81",
)  # fmt: skip
BCN_CIFAR_MICRO = qiao(
    "table 7", "ResNet-110 on CIFAR-10, batches of 1", ERROR,
    BCN_WS="6.31", GN_WS="6.82", GN="7.45",
)  # fmt: skip
BCN_CIFAR_100_MICRO = qiao(
    "table 7", "ResNet-110 on CIFAR-100, batches of 1", ERROR,
    BCN_WS="28.28", GN_WS="29.49", GN="32.86",
)  # fmt: skip
BCN_CIFAR = qiao(
    "table 7", "ResNet-110 on CIFAR-10, batches of 128", ERROR, BCN_WS="5.90", BN="6.43"
)
BCN_SN_MICRO = qiao(
    "table 8", "ResNet-18 on CIFAR-10, batches of 1, BN and SN 2", ERROR,
    BCN_WS="5.43", SN="7.62", BN="8.45",
)  # fmt: skip
FINE_TUNED_COCO = Evidence(
    source=HUANG,
    place="table 5",
    setting="Faster R-CNN on COCO, fine-tuned, 2fc box head, 2 images a GPU",
    metric="box AP",
    values={"BN frozen": "36.31", "GN": "36.62", "XBN": "37.17"},
)
XBN_IMAGENET = huang(
    "table 2", f"{IMAGENET}, batches of 256", f"top-1 {ACCURACY}",
    XBN="77.40", BN="76.29", GN="75.73",
)  # fmt: skip
XBN_RESNEXT = huang(
    "table 2", "ResNeXt-101 on ImageNet, batches of 256", f"top-1 {ACCURACY}",
    XBN="79.84", BN="79.17", GN="78.02",
)  # fmt: skip
TUNED_WEIGHT_IMAGENET = summers(
    "section 3.1", "ResNet-152 on ImageNet, example weight tuned", f"top-1 {ACCURACY}",
    gain_of_at_most="0.6",
)  # fmt: skip
GBGN_CIFAR_100 = summers(
    "section 3.4", "CIFAR-100, batches of 2, example weight tuned", ACCURACY,
    GBGN="74.60", GN="73.91",
)  # fmt: skip
GBGN_CALTECH = summers(
    "section 3.4", "Caltech-256, batches of 2, example weight tuned", ACCURACY,
    GBGN="53.2", GN="48.2",
)  # fmt: skip
GHOST_CIFAR_100 = summers(
    "section 3.2", "CIFAR-100, size of the runs tuned", ACCURACY, gain_of_at_most="0.84"
)
GHOST_CALTECH = summers(
    "section 3.2", "Caltech-256, size of the runs tuned", ACCURACY, gain_of_at_most="5.8"
)
COCO_BOXES = {"BCN_WS": "41.4", "GN_WS": "40.8", "GN": "39.8"}
COCO_MASKS = {"BCN_WS": "37.3", "GN_WS": "36.5", "GN": "36.1"}
VOC = {"BCN_WS": "78.22", "GN_WS": "77.20", "BN_WS": "77.15", "BN": "76.49", "GN": "74.90"}
VIDEO = {"BN_WS": "46.49", "BCN_WS": "45.27", "BN": "44.30", "GN_WS": "44.26", "GN": "42.07"}
COCO_FROM_SCRATCH = {
    "XBN": {2: "27.45", 4: "30.51", 8: "30.58"},
    "BN": {2: "25.35", 4: "29.33", 8: "29.56"},
    "GN": {2: "28.19", 4: "27.36", 8: "28.22"},
}
"""Box AP of Huang et al., table 6, by images per GPU."""
