"""The five papers, as they are cited."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True, kw_only=True)
class Paper:
    """A paper, as it is cited."""

    authors: str
    title: str

    def __str__(self) -> str:
        return f"{self.authors}, {self.title}"


ZHOU = Paper(authors="Zhou et al.", title="Batch Group Normalization")
SUMMERS = Paper(
    authors="Summers and Dinneen",
    title="Four Things Everyone Should Know to Improve Batch Normalization",
)
GUNAWAN = Paper(authors="Gunawan et al.", title="Understanding and Improving Group Normalization")
QIAO = Paper(
    authors="Qiao et al.",
    title="Micro-Batch Training with Batch-Channel Normalization and Weight Standardization",
)
HUANG = Paper(
    authors="Huang et al.",
    title="Delving into the Estimation Shift of Batch Normalization in a Network",
)
PAPERS: Mapping[str, Paper] = MappingProxyType(
    {"zhou": ZHOU, "summers": SUMMERS, "gunawan": GUNAWAN, "qiao": QIAO, "huang": HUANG}
)
