"""What is read off the runs of a stack: gaps, shifts by depth, slopes over sizes."""

from collections.abc import Callable

import numpy as np

from normkit.lab.reproduce.preset import Arms
from normkit.lab.reproduce.tasks.records import Values
from normkit.lab.reproduce.tasks.stack import BLOCKED

EARLY = 30  # iterations that the paper looks at


def early(values: Values, name: str) -> np.ndarray:
    """A curve's rows of the first 30 iterations."""
    kept = np.array(values["iterations"]) <= EARLY
    return np.array(values[name], dtype=float)[kept]


def gap(values: Values) -> float:
    """Test error less training error, mean over the first 30 iterations."""
    return float((early(values, "test_error") - early(values, "train_error")).mean())


def last_share(values: Values, name: str) -> float:
    """A shift, mean over layers, at the end over its largest."""
    means = np.array(values[name], dtype=float).mean(1)
    return float(means[-1] / means.max())


def halves(rows: np.ndarray) -> tuple[float, float]:
    """Means of rows ``(time, layers)`` over the earlier and the later half of the layers."""
    half = rows.shape[1] // 2
    return float(rows[:, :half].mean()), float(rows[:, rows.shape[1] - half :].mean())


def growth(rows: np.ndarray) -> float:
    """Later half over earlier half of the layers, minus 1."""
    earlier, later = halves(rows)
    return later / earlier - 1


def last(values: Values, name: str) -> np.ndarray:
    """A curve's last row, as ``(1, layers)``."""
    return np.array(values[name][-1:], dtype=float)


def of_norm(arms: Arms, norm: str) -> dict[int, Values]:
    """Runs of a norm by the size of the training set, smallest first."""
    found = {v["num_train"]: v for arm, v in arms.items() if arm.split("-")[0] == norm}
    return dict(sorted(found.items()))


def slope(arms: Arms, norm: str, value: Callable[[Values], float]) -> float:
    """Least-squares slope of a value over the binary logarithm of the training set's size."""
    runs = of_norm(arms, norm)
    return float(np.polyfit(np.log2(list(runs)), [value(v) for v in runs.values()], 1)[0])


def same_layers(arms: Arms, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Last shifts of BN and GNBN in the layers where both have batch norm."""
    plain, blocked = of_norm(arms, "bn")[size], of_norm(arms, BLOCKED)[size]
    kept = [plain["norms"].index(place) for place in blocked["norms"]]
    return last(plain, "esm_std")[:, kept], last(blocked, "esm_std")


def mean_over_sizes(arms: Arms, value: Callable[[int], float]) -> float:
    """Mean of a value over the sizes of the training set."""
    return float(np.mean([value(size) for size in of_norm(arms, "bn")]))


def relative_shift(plain: np.ndarray, blocked: np.ndarray) -> float:
    """How much larger the second shift is, means over layers."""
    return float(blocked.mean() / plain.mean() - 1)
