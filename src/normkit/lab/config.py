"""Experiments as TOML files: what was asked for, whole, so that it runs again by itself."""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from normkit.errors import DataError, SpecError
from normkit.lab.arms import parse_arms
from normkit.lab.files import require_file, write_whole
from normkit.lab.own_norms import register_norms
from normkit.lab.spec import Protocol, SweepSpec
from normkit.lab.work import RunOptions
from normkit.text import listed, printable, shortened

CONFIG_NAME = "experiment.toml"
NOTHING = "none"  # TOML has no empty value
LISTS = ("norms", "batch_sizes", "seeds", "learning_rates")
WAYS = tuple(RunOptions.model_fields)
KNOWN = (*LISTS, *Protocol.model_fields, *WAYS)
HEADER = (
    "# What was compared, and how. It runs again by: normkit compare --config FILE\n"
    "# Options on the command line win over those here.\n"
)


def write_config(path: Path, sweep: SweepSpec, options: RunOptions) -> Path:
    """Write everything that decides a sweep, and how its runs are done.

    Raises:
        DataError: If it cannot be written.
    """
    values = sweep.model_dump(mode="json", exclude={"protocol"})
    values |= sweep.protocol.model_dump(mode="json") | options.model_dump(mode="json")
    lines = [f"{name} = {_toml(value)}" for name, value in values.items()]
    return write_whole(path, HEADER + "\n".join(lines) + "\n")


def read_config(path: Path) -> dict[str, Any]:
    """Read an experiment: any of the names of options, with ``_`` or ``-`` in them.

    Raises:
        DataError: If it cannot be read.
        SpecError: If it has an option that there is not.
    """
    require_file(path)
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise DataError(f"{printable(path)} is no TOML file: {shortened(error)}") from error
    values = {name.replace("-", "_"): _value(value) for name, value in found.items()}
    if "tune_lr" in values:
        values["learning_rates"] = values.pop("tune_lr")
    for name in ("augment", "loggers", "own_norms"):
        text = values.get(name)
        if isinstance(text, str):
            values[name] = tuple(part.strip() for part in text.split(",") if part.strip())
    unknown = sorted(set(values) - set(KNOWN))
    if unknown:
        raise SpecError(
            f"{printable(path)} has {listed(unknown)}, which no option is named; known are "
            f"{', '.join(KNOWN)}"
        )
    return values


def sweep_of(values: Mapping[str, Any], spelled: Any) -> SweepSpec:
    """A sweep from values by name.

    Args:
        values: Those of ``KNOWN``; others keep their defaults.
        spelled: How messages write a name.

    Raises:
        SpecError: If one breaks its rule.
    """
    lists = {name: _listed(values[name]) for name in LISTS if name in values}
    register_norms(values.get("own_norms", ()))
    if "norms" in lists:
        lists["norms"] = tuple(str(arm) for part in lists["norms"] for arm in parse_arms(part))
    own = {name: value for name, value in values.items() if name not in (*LISTS, *WAYS)}
    return SweepSpec.checked({"protocol": Protocol.checked(own, spelled)} | lists, spelled)


def options_of(values: Mapping[str, Any], spelled: Any) -> RunOptions:
    """How the runs are done, from values by name; others keep their defaults.

    Raises:
        SpecError: If one breaks its rule.
    """
    return RunOptions.checked({n: v for n, v in values.items() if n in WAYS}, spelled)


def _listed(value: object) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _toml(value: object) -> str:
    if value is None:
        return json.dumps(NOTHING)
    return json.dumps(value)  # texts, numbers, truth values and lists are written alike


def _value(value: object) -> object:
    if isinstance(value, list):
        return tuple(value)
    return None if value == NOTHING else value
