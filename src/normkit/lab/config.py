"""What is asked for by name: in Python, on the command line, and in TOML files that run again."""

import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from normkit.errors import DataError, SpecError
from normkit.lab.arms import parse_arms
from normkit.lab.device import parse_device
from normkit.lab.files import require_file, write_whole
from normkit.lab.launch import num_launched
from normkit.lab.own_norms import norms_in_use, register_norms
from normkit.lab.spec import Protocol, SweepSpec
from normkit.lab.work import RunOptions
from normkit.text import listed, parts_of, printable, shortened

CONFIG_NAME = "experiment.toml"
NOTHING = "none"  # TOML has no empty value
LISTS = ("norms", "batch_sizes", "seeds", "learning_rates")
OF_SWEEP = (*LISTS, "tune_seeds")
WORDS = ("augment", "loggers", "own_norms")  # a text of these is cut at its commas
WAYS = tuple(RunOptions.model_fields)
KNOWN = (*OF_SWEEP, *Protocol.model_fields, *WAYS)
"""Every option of ``compare``, in Python, on the command line and in a file."""
ALSO = {"tune_lr": "learning_rates"}  # another name, and the one that it stands for
DEFAULTS: Mapping[str, Any] = {
    "norms": ("bn", "gn:8", "bgn:auto"),
    "batch_sizes": (2, 8, 32),
    "seeds": (1, 2, 3),
    "device": "auto",
}
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
    return known_options(values, printable(path))


def known_options(given: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Options by the names of ``KNOWN``.

    Args:
        given: By these names, or those of ``ALSO``.
        place: Where they were given, for the error message.

    Raises:
        SpecError: If there is no such option.
    """
    values = {ALSO.get(name, name): value for name, value in given.items()}
    unknown = sorted(set(values) - set(KNOWN))
    if unknown:
        raise SpecError(
            f"{place} has {listed(unknown)}, which no option is named; known are {', '.join(KNOWN)}"
        )
    values = {n: str(value) if isinstance(value, Path) else value for n, value in values.items()}
    for name in set(WORDS) & set(values):
        if isinstance(values[name], str):
            values[name] = parts_of(values[name])
    return values


def merged(config: Path | str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a file, if there is one, and those that were given, which win.

    Raises:
        NormError: If the file cannot be read, or has an option that there is not.
    """
    found = {} if config is None else read_config(Path(config))
    if given.get("steps") is not None:
        found.pop("epochs", None)
    if given.get("epochs") is not None:
        found.pop("steps", None)
    return found | dict(given)


def asked(values: Mapping[str, Any], spelled: Any) -> tuple[SweepSpec, RunOptions]:
    """What is compared, and how its runs are done; options that are not given have defaults.

    Args:
        values: Options by the names of ``KNOWN``.
        spelled: How messages write a name.

    Raises:
        SpecError: If one breaks its rule.
    """
    whole = {**DEFAULTS, **values, "processes": num_launched()}
    whole["device"] = str(parse_device(whole["device"]))
    sweep, options = sweep_of(whole, spelled), options_of(whole, spelled)
    if sweep.protocol.train is not None and options.probe_every is not None:
        raise SpecError(
            "--probe-every was given with --train, whose function makes its own probe: "
            "nk.Probe(net, writer=report); leave one of them out"
        )
    return sweep, options


def sweep_of(values: Mapping[str, Any], spelled: Any) -> SweepSpec:
    """A sweep from values by name.

    Args:
        values: Those of ``KNOWN``; others keep their defaults.
        spelled: How messages write a name.

    Raises:
        SpecError: If one breaks its rule.
    """
    found = {n: _listed(v) if n in LISTS else v for n, v in values.items() if n in OF_SWEEP}
    own = {name: value for name, value in values.items() if name not in (*OF_SWEEP, *WAYS)}
    own_norms = tuple(own.get("own_norms", ()))
    register_norms(own_norms)
    if "norms" in found:
        arms = [arm for part in found["norms"] for arm in parse_arms(str(part))]
        found["norms"] = tuple(map(str, arms))
        own["own_norms"] = own_norms or norms_in_use(arms)
    return SweepSpec.checked({"protocol": Protocol.checked(own, spelled)} | found, spelled)


def options_of(values: Mapping[str, Any], spelled: Any) -> RunOptions:
    """How the runs are done, from values by name; others keep their defaults.

    Raises:
        SpecError: If one breaks its rule.
    """
    return RunOptions.checked({n: v for n, v in values.items() if n in WAYS}, spelled)


def _listed(value: object) -> tuple[Any, ...]:
    """Several values; one alone is read as the only one."""
    if isinstance(value, Iterable) and not isinstance(value, str):
        return tuple(value)
    return (value,)


def _toml(value: object) -> str:
    if value is None:
        return json.dumps(NOTHING)
    return json.dumps(value)  # texts, numbers, truth values and lists are written alike


def _value(value: object) -> object:
    if isinstance(value, list):
        return tuple(value)
    return None if value == NOTHING else value
