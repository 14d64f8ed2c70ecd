"""The base class of all measurements: one-sentence summary, table, JSON and plot."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from normkit.errors import PackageError
from normkit.text import listed, module_name, table_lines


@dataclass(frozen=True, kw_only=True)
class Measurement(ABC):
    """A measurement with one row for each layer, or each training step.

    Layers are in the order of the forward. ``str`` gives the reading and the table.
    """

    drawn: ClassVar[tuple[str, ...]]
    """Columns that ``plot`` draws over the rows."""

    @property
    def rows(self) -> tuple[Any, ...]:
        """The rows: the field ``layers``, or ``steps``."""
        return getattr(self, "layers", ()) or getattr(self, "steps", ())

    @property
    @abstractmethod
    def reading(self) -> str:
        """The result in one sentence."""

    def to_json(self) -> str:
        """All numbers as JSON; numbers that are not finite become null."""
        return json.dumps({"measure": type(self).__name__, **_plain(self)})

    def table(self) -> str:
        """The rows as a plain-text table."""
        if not self.rows:
            return ""
        names = [field.name for field in fields(self.rows[0])]
        rows = [[_cell(getattr(row, name)) for name in names] for row in self.rows]
        return "\n".join(table_lines([[name.replace("_", " ") for name in names], *rows]))

    def plot(self) -> Any:
        """Plot the columns of ``drawn`` over the rows; return a matplotlib ``Figure``.

        Raises:
            PackageError: If matplotlib is not installed.
        """
        rows = [row for row in self.rows if any(_is_number(getattr(row, c)) for c in self.drawn)]
        figure = new_figure(figsize=(max(6.0, 0.28 * len(rows) + 2), 4), layout="constrained")
        axes = figure.subplots()
        for column, marker in zip(self.drawn, "os^dv", strict=False):
            values = [getattr(row, column) for row in rows]
            shown = [value if _is_number(value) else math.nan for value in values]
            axes.plot(range(len(rows)), shown, marker=marker, label=column.replace("_", " "))
        names = [str(getattr(row, "name", i)) for i, row in enumerate(rows)]
        axes.set_xticks(range(len(rows)), names, rotation=90, fontsize=8)
        axes.set_ylim(bottom=0)
        axes.set_title(self.reading, fontsize=9, wrap=True)
        axes.grid(alpha=0.3)
        axes.legend()
        return figure

    def __str__(self) -> str:
        left = map(str, getattr(self, "left", ()))
        return "\n".join(part for part in (self.reading, self.table(), *left) if part)


def new_figure(**options: Any) -> Any:
    """Make a matplotlib ``Figure``; matplotlib is imported here, because only plots need it.

    Raises:
        PackageError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # slow and optional
    except ImportError as error:
        raise PackageError(
            f'matplotlib is not installed ({error}); pip install "normkit[lab]" brings it'
        ) from error
    return Figure(**options)


def read_finite_rows(rows: Sequence[Any], read: Callable[[Sequence[Any]], str]) -> str:
    """Summarise the rows with finite numbers, and name the other rows.

    Args:
        rows: Rows of a measurement.
        read: Makes a sentence of one or more rows.
    """
    broken = [module_name(str(row.name)) for row in rows if not _is_finite(row)]
    finite = [row for row in rows if _is_finite(row)]
    sentences = [read(finite)] if finite else []
    if broken:
        sentences.append(
            f"Not finite, and not counted: {len(broken)} of {len(rows)} ({listed(broken)}); look "
            f"for NaN, infinity and huge values in the batches, parameters and statistics."
        )
    return " ".join(sentences)


def _is_finite(row: Any) -> bool:
    values = (getattr(row, field.name) for field in fields(row))
    return all(not isinstance(value, float) or math.isfinite(value) for value in values)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | int):
        return value
    if (columns := getattr(value, "__dataclass_fields__", None)) is not None:
        return {name: _plain(getattr(value, name)) for name in columns}
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
