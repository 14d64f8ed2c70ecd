"""What Gunawan et al. say of the landscape of VGG-11, for either protocol."""

from typing import Literal

import numpy as np

from normkit.lab.reproduce.preset import Arms, Claim
from normkit.lab.reproduce.tasks.records import Values
from normkit.lab.reproduce.verdict import ABOVE, BELOW, Criterion

Kind = Literal["loss", "change"]  # the loss, or how far the gradient moves
Period = Literal["all", "initial", "middle"]
PERIODS: dict[Period, tuple[float, float]] = {
    "all": (0, 1),
    "initial": (0, 0.25),
    "middle": (0.25, 0.75),
}
IN_PERIOD = "the first quarter of the steps"
MIDWAY = "the second and third quarter of the steps"
UNMOVED = 0.1  # a change by less is none


def ranges(values: Values, kind: str) -> np.ndarray:
    """Largest minus least of each step."""
    return curve(values, f"max_{kind}") - curve(values, f"min_{kind}")


def curve(values: Values, name: str, period: Period = "all") -> np.ndarray:
    """Part of a curve over steps."""
    whole = np.array(values[name], dtype=float)
    first, last = (round(share * len(whole)) for share in PERIODS[period])
    return whole[first:last]


def relative(arms: Arms, pair: tuple[str, str], kind: Kind, period: Period = "all") -> float:
    """Mean range of the first arm over that of the second, minus 1."""
    one, other = (
        (curve(arms[arm], f"max_{kind}", period) - curve(arms[arm], f"min_{kind}", period)).mean()
        for arm in pair
    )
    return float(one / other - 1)


def lead(arms: Arms, more: str, less: str, period: Period = "all") -> float:
    """Mean of a curve of GN less one of BN; each is ``min_loss`` or ``max_loss``."""
    return float((curve(arms["gn"], more, period) - curve(arms["bn"], less, period)).mean())


def level(arms: Arms, arm: str) -> float:
    """Middle between the least and the largest loss, mean over steps."""
    both = curve(arms[arm], "min_loss") + curve(arms[arm], "max_loss")
    return float(both.mean() / 2)


FIG_6_7_9 = (
    Claim(
        source="Fig. 6 left, sec. 3.2.2",
        text="The loss ranges wider with GN than with BN.",
        quantity="range of the loss of GN / of BN - 1, means over steps",
        criterion=ABOVE,
        value=lambda arms: relative(arms, ("gn", "bn"), "loss"),
    ),
    Claim(
        source="Fig. 6 left, sec. 3.2.2",
        text="The least loss of GN is higher than that of BN.",
        quantity="least loss of GN - of BN, mean over steps",
        criterion=ABOVE,
        value=lambda arms: lead(arms, "min_loss", "min_loss"),
    ),
    Claim(
        source="Fig. 6 left, sec. 3.2.2",
        text="In the initial period the least loss of GN is higher than the largest of BN.",
        quantity=f"least loss of GN - largest of BN, mean over {IN_PERIOD}",
        criterion=ABOVE,
        value=lambda arms: lead(arms, "min_loss", "max_loss", "initial"),
    ),
    Claim(
        source="Fig. 6 right, sec. 3.2.2",
        text="The change of the gradient ranges wider with GN than with BN.",
        quantity="range of the gradient's change of GN / of BN - 1, means over steps",
        criterion=ABOVE,
        value=lambda arms: relative(arms, ("gn", "bn"), "change"),
    ),
    Claim(
        source="Fig. 7 left, sec. 3.2.2",
        text="In the initial period the loss ranges wider with GN than without a norm.",
        quantity=f"range of the loss of GN / without a norm - 1, means over {IN_PERIOD}",
        criterion=ABOVE,
        value=lambda arms: relative(arms, ("gn", "none"), "loss", "initial"),
    ),
    Claim(
        source="Fig. 7 left, appendix A.3",
        text="In the middle period GN makes the range of the loss smaller.",
        quantity=f"range of the loss of GN / without a norm - 1, means over {MIDWAY}",
        criterion=BELOW,
        value=lambda arms: relative(arms, ("gn", "none"), "loss", "middle"),
    ),
    Claim(
        source="Fig. 7 right, appendix A.3",
        text="In the middle period GN makes the range of the gradient's change smaller.",
        quantity=f"range of the gradient's change of GN / without a norm - 1, means over {MIDWAY}",
        criterion=BELOW,
        value=lambda arms: relative(arms, ("gn", "none"), "change", "middle"),
    ),
    Claim(
        source="Fig. 9 left, sec. 5.3",
        text="The loss ranges less with GNPlus than with GN.",
        quantity="range of the loss of GNPlus / of GN - 1, means over steps",
        criterion=BELOW,
        value=lambda arms: relative(arms, ("gnplus", "gn"), "loss"),
    ),
    Claim(
        source="Fig. 9 left, sec. 5.3",
        text="The loss is lower with GNPlus than with GN.",
        quantity="middle of the range of the loss of GNPlus - of GN, mean over steps",
        criterion=BELOW,
        value=lambda arms: level(arms, "gnplus") - level(arms, "gn"),
    ),
    Claim(
        source="Fig. 9 right, sec. 5.3",
        text="The change of the gradient ranges less with GNPlus than with GN.",
        quantity="range of the gradient's change of GNPlus / of GN - 1, means over steps",
        criterion=BELOW,
        value=lambda arms: relative(arms, ("gnplus", "gn"), "change"),
    ),
)

_NAMES: dict[Kind, str] = {"loss": "range of the loss", "change": "range of the gradient's change"}


def _widened(kind: Kind) -> Claim:
    return Claim(
        source=f"Fig. 8 {'left' if kind == 'loss' else 'right'}, sec. 3.2.3",
        text=f"L2 regularization makes the {_NAMES[kind]} of GN wider.",
        quantity=f"{_NAMES[kind]} of GN with L2 / without - 1, means over steps",
        criterion=ABOVE,
        value=lambda arms: relative(arms, ("gn+l2", "gn"), kind),
    )


def _unmoved(norm: str, name: str, source: str, kind: Kind) -> Claim:
    return Claim(
        source=source,
        text=f"L2 regularization does not change the {_NAMES[kind]} of {name}.",
        quantity=f"{_NAMES[kind]} of {name} with L2 / without - 1, means over steps; no change is "
        "less than a tenth",
        criterion=Criterion(side="within", bound=UNMOVED),
        value=lambda arms: relative(arms, (f"{norm}+l2", norm), kind),
    )


FIG_8_10 = (
    _widened("loss"),
    _widened("change"),
    _unmoved("bn", "BN", "Fig. 8 left, sec. 3.2.3", "loss"),
    _unmoved("bn", "BN", "Fig. 8 right, sec. 3.2.3", "change"),
    _unmoved("gnplus", "GNPlus", "Fig. 10 left, sec. 5.3", "loss"),
    _unmoved("gnplus", "GNPlus", "Fig. 10 right, sec. 5.3", "change"),
)
