"""A table of a paper: what was compared how, the paper's numbers, and its claims, in a file."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from normkit.errors import SpecError
from normkit.lab.config import KNOWN, sweep_of
from normkit.lab.data.sources import data_folder
from normkit.lab.files import require_file
from normkit.lab.frozen import Frozen
from normkit.lab.reproduce.papers import PAPERS, Paper
from normkit.lab.reproduce.preset import SCALES, Scale
from normkit.lab.reproduce.tables.quantity import Cells, Quantity
from normkit.lab.reproduce.tables.reading import PLAIN, Reading
from normkit.lab.reproduce.verdict import Criterion, Side
from normkit.lab.spec import Protocol, SweepSpec
from normkit.lab.task import parse_task
from normkit.text import listed, printable, shortened

PRESETS = Path(__file__).parents[2] / "presets"
ONLY = ""  # the name of the part of a table that has no parts
CHOICES = ("arms", "specs", "parts", "without", "readings")
ARMS = ("arms", "specs")  # where "none" is an arm
WEIGHTS = "weights"  # folder of pretrained networks in that of the data
Split = Literal["validation", "test"]
Number = float | Literal["-", "unreadable"]
"""A cell of the paper: a number, "-" for a training that failed, or one that cannot be read."""


class TableClaim(Frozen):
    """A sentence of a paper about a table, and the quantity that decides it.

    Args:
        text: What the paper says.
        source: Where.
        quantity: As :class:`Quantity` reads it, in percent or points of the table's measure.
        side: On which side of the bound the paper says it lies.
        bound: That bound.
        scales: The scales that have what the quantity needs; by default all.
    """

    text: str
    source: str
    quantity: str
    side: Side = "above"
    bound: float = 0.0
    scales: tuple[Scale, ...] = SCALES

    @property
    def criterion(self) -> Criterion:
        """What the claim says of the quantity's mean over seeds."""
        return Criterion(side=self.side, bound=self.bound)


class Numbers(Frozen):
    """The paper's table.

    Args:
        columns: A head for each column.
        rows: Numbers of each row by its name, in percent.
        note: What a reader must know of them.
    """

    columns: tuple[str, ...] = ()
    rows: Mapping[str, tuple[Number, ...]] = Field(default_factory=dict)
    note: str = ""


class Part(Frozen):
    """Arms that are compared under one protocol.

    Args:
        name: Of the part; empty if the table has no parts.
        arms: Labels and arms as ``normkit compare`` writes them.
        sweep: All runs of the part.
        on: Which examples the scores are of.
        trained: Whether the networks are trained; otherwise they have the weights of a file.
        readings: What is read off each network besides its score, by name.
    """

    name: str
    arms: Mapping[str, str]
    sweep: SweepSpec
    on: Split = "test"
    trained: bool = True
    readings: Mapping[str, Reading] = Field(default_factory=dict)

    @property
    def states(self) -> tuple[str, ...]:
        """States in which its networks are evaluated after the training."""
        plain = () if self.trained else (PLAIN,)
        read = (reading.state for reading in self.readings.values() if reading.of_network)
        return tuple(dict.fromkeys((*plain, *read)))

    def label(self, norm: str) -> str:
        """The label of an arm."""
        return list(self.arms)[list(self.sweep.norms).index(norm)]


class Table(Frozen):
    """A preset that repeats a table by the engine of ``compare``.

    ``paper``, ``small`` and ``tiny`` hold options of ``normkit compare`` by name. Those of
    ``paper`` are what the paper did; the other scales say what differs there. ``arms`` chooses
    arms by label, ``specs`` puts others in the place of arms, ``parts`` holds options of single
    parts, ``without`` leaves parts out, and ``readings`` chooses readings by name. ``on`` says
    which examples scores are of, ``validation`` or ``test``; ``trained = false`` evaluates the
    networks of ``weights``, a file below ``$NORMKIT_DATA/weights``, as they are.

    Args:
        name: The first letter of the authors and the place, such as ``Z-T2``.
        also: Other places of the paper that show the same runs, such as ``Z-F1``.
        of: Key of the paper.
        place: Table and section.
        title: What it shows.
        measure: What the numbers are, in percent: accuracy, error (what is missing to 100), or
            what a task calls its scores.
        scores: Names of the task's scores that the table shows, if it is more than the first. They
            are told apart as parts are: ``clean``, or ``r50_box`` if the table has parts, too.
        score: Of the last epoch, or the median over the last five.
        arms: Labels, and the arms that they stand for.
        readings: Names, and what is read off each network, as ``Reading`` has it.
        paper: What the paper did.
        small: What differs at small scale.
        tiny: What differs at tiny scale.
        silent: Options that the paper does not state, so that those of ``paper`` are ours.
        cannot: What of the paper's setting the engine does not do, in sentences.
        numbers: The paper's.
        claims: About the table.
    """

    name: str
    also: tuple[str, ...] = ()
    of: Literal["zhou", "summers", "gunawan", "qiao", "huang"]
    place: str
    title: str
    measure: str = "accuracy"
    scores: tuple[str, ...] = ()
    score: Literal["last epoch", "median of the last 5 epochs"] = "last epoch"
    arms: dict[str, str]
    readings: dict[str, str] = Field(default_factory=dict)
    paper: Mapping[str, Any]
    small: Mapping[str, Any]
    tiny: Mapping[str, Any]
    silent: tuple[str, ...] = ()
    cannot: tuple[str, ...] = ()
    numbers: Numbers = Numbers()
    claims: tuple[TableClaim, ...] = ()

    @property
    def cited(self) -> Paper:
        """The paper."""
        return PAPERS[self.of]

    def parts(self, scale: Scale, device: str = "cpu") -> tuple[Part, ...]:
        """Everything that is run at a scale.

        Raises:
            SpecError: If an option of the file breaks its rule.
        """
        values = self._values(scale)
        without = values.pop("without", ())
        by_part = values.pop("parts", None) or {ONLY: {}}
        return tuple(
            self._part(name, {**values, **own, "device": device})
            for name, own in by_part.items()
            if name not in without
        )

    def _values(self, scale: Scale) -> dict[str, Any]:
        """The paper's options, with those of the scale in their place."""
        if scale == "paper":
            return dict(self.paper)
        own = dict(getattr(self, scale))
        own_parts = own.pop("parts", {})
        parts = {  # what the scale says of all parts wins over the paper's part, not over its own
            name: {option: value for option, value in part.items() if option not in own}
            for name, part in self.paper.get("parts", {}).items()
        }
        for name, part in own_parts.items():
            parts[name] = parts.get(name, {}) | dict(part)
        merged = {**self.paper, **own} | ({"parts": parts} if parts else {})
        if "epochs" in own or "steps" in own:
            merged.pop("steps" if "epochs" in own else "epochs", None)
        return merged

    def _part(self, name: str, values: dict[str, Any]) -> Part:
        labels, specs = values.pop("arms", tuple(self.arms)), values.pop("specs", {})
        read = values.pop("readings", tuple(self.readings))
        evaluated = {option: values.pop(option) for option in ("on", "trained") if option in values}
        named = {*labels, *specs}
        unknown = sorted(named - {*self.arms}) + sorted({*values} - {*KNOWN})
        unknown += sorted({*read} - {*self.readings})
        if unknown:
            raise SpecError(
                f"preset {self.name} names {listed(unknown)}; its arms are "
                f"{listed(self.arms)}, its readings {listed(self.readings) or 'none'}, and options "
                f"are {', '.join(KNOWN)}"
            )
        arms = {label: (self.arms | specs)[label] for label in labels}
        if values.get("weights"):
            values["weights"] = str(data_folder() / WEIGHTS / values["weights"])
        sweep = sweep_of({**values, "norms": tuple(arms.values())}, str)
        task = parse_task(sweep.protocol.task)
        return Part.checked(
            {
                "name": name,
                "arms": arms,
                "sweep": sweep,
                "readings": {name: Reading.parse(self.readings[name], task) for name in read},
                **evaluated,
            }
        )

    def cells(self, scale: Scale) -> Cells:
        """The cells of the table at a scale."""
        columns = [
            (name, part) for part in self.parts(scale) for name in self.columns_of(part.name)
        ]
        return Cells(
            arms={name: list(part.arms) for name, part in columns},
            batch_sizes={name: part.sweep.batch_sizes for name, part in columns},
            readings={name: list(part.readings) for name, part in columns},
        )

    def columns_of(self, part: str) -> dict[str, str | None]:
        """What a part's scores are called in the table, and which they are; None for the first."""
        if not self.scores:
            return {part: None}
        return {f"{part}_{score}" if part else score: score for score in self.scores}

    def claims_at(self, scale: Scale) -> list[tuple[TableClaim, Quantity]]:
        """Claims that a scale can decide, with their quantities.

        Raises:
            SpecError: If one names what the table does not have there.
        """
        cells = self.cells(scale)
        return [
            (claim, Quantity(claim.quantity, cells))
            for claim in self.claims
            if scale in claim.scales
        ]

    def unstated(self) -> tuple[str, ...]:
        """Settings at paper scale that the paper does not state, so that they are ours."""
        defaults = Protocol().model_dump()
        return tuple(
            f"{name.replace('_', ' ')} {_said(self.paper.get(name, defaults.get(name)))}"
            for name in self.silent
        )

    def settings(self, scale: Scale) -> tuple[str, ...]:
        """Model, data and recipe of each part, in words."""
        return tuple(
            f"{f'{part.name}: ' if part.name else ''}{protocol.title}, "
            f"{protocol.epochs} epochs, {protocol.sentence}"
            for part in self.parts(scale)
            for protocol in (part.sweep.protocol,)
        )

    def differences(self, scale: Scale) -> tuple[str, ...]:
        """Settings that are not the paper's, from the file: none is written by hand."""
        ours, theirs = self._values(scale), dict(self.paper)
        names = [name for name in dict.fromkeys([*theirs, *ours]) if name not in CHOICES]
        papers = {name: self._stated(name, ours.get("without", ())) for name in names}
        unset = Protocol().model_dump()  # what a setting is where a file does not name it
        found = [
            f"{name.replace('_', ' ')} {_said(ours.get(name))} (paper: {_said(papers[name])})"
            for name in names
            if any(
                ours.get(name) != value and {ours.get(name), value} != {unset.get(name), None}
                for value in papers[name]
            )
        ]
        if "parts" in theirs or "parts" in ours:
            found += self._differing_parts(ours, theirs)
        labels, specs = ours.get("arms", tuple(self.arms)), ours.get("specs", {})
        found += [
            f"{label} {specs[label]} (paper: {self.arms[label]})"
            for label in labels
            if specs.get(label, self.arms[label]) != self.arms[label]
        ]
        left_out = [label for label in self.arms if label not in labels]
        found += [f"without {listed(left_out)}"] if left_out else []
        read = [ours.get("readings", [*self.readings])] if "readings" not in theirs else []
        left_out = [name for name in self.readings if read and name not in read[0]]
        found += [f"without the readings {listed(left_out)}"] if left_out else []
        return (*found, *self.cannot)

    def _stated(self, name: str, left_out: Sequence[str]) -> tuple[Any, ...]:
        """The paper's values of a setting: one, or those of the parts that are not left out."""
        parts = self.paper.get("parts", {})
        of_parts = [
            part[name] for key, part in parts.items() if name in part and key not in left_out
        ]
        if name in self.paper or not of_parts:
            return (self.paper.get(name),)
        return tuple(dict.fromkeys(of_parts))

    def _differing_parts(self, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
        found = [f"without the part {name}" for name in ours.get("without", ())]
        for name, part in ours.get("parts", {}).items():
            own = theirs.get("parts", {}).get(name, {})
            for option, value in part.items():
                paper = own.get(option, theirs.get(option))
                if value != paper and name not in ours.get("without", ()):
                    what = f"{name}: {option.replace('_', ' ')} {_said(value)}"
                    found.append(f"{what} (paper: {_said(paper)})")
        return found


def read_table(path: Path) -> Table:
    """Read a preset's file.

    Raises:
        DataError: If there is none.
        SpecError: If it is no TOML, or a value breaks its rule.
    """
    require_file(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"{printable(path)} is no TOML file: {shortened(error)}") from error
    return Table.checked(_tuples(values))


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            name: inner if name in ARMS and isinstance(inner, dict) else _tuples(inner)
            for name, inner in value.items()
        }
    if isinstance(value, list):
        return tuple(_tuples(inner) for inner in value)
    return None if value == "none" else value


def _said(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return ", ".join(map(_said, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
