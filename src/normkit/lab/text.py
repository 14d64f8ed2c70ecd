"""How figures are written, in the reports and in the terminal."""

from normkit.lab.comparison import Summary

MINUS = "\N{MINUS SIGN}"
MISSING = "\N{EN DASH}"


def percent(summary: Summary) -> str:
    """A summary of shares in percent: ``"97.31 ± 0.42"``."""
    spread = "" if summary.spread is None else f" ± {100 * summary.spread:.2f}"
    return f"{100 * summary.mean:.2f}{spread}"


def points(summary: Summary) -> str:
    """A summary of differences in percentage points, with its sign: ``"+0.31 ± 0.42"``."""
    sign = MINUS if summary.mean < 0 else "+"
    spread = "" if summary.spread is None else f" ± {100 * summary.spread:.2f}"
    return f"{sign}{abs(100 * summary.mean):.2f}{spread}"


def size_text(num_bytes: float) -> str:
    """Bytes in the decimal unit that fits: ``"1.68 MB"``."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} GB"
