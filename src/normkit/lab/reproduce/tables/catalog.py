"""All tables, by name."""

from __future__ import annotations

from functools import cache

from normkit.lab.reproduce.tables.table import PRESETS, Table, read_table


@cache
def tables() -> dict[str, Table]:
    """Every preset of ``lab/presets/``, by name in the order of the names."""
    found = [read_table(path) for path in sorted(PRESETS.glob("*.toml"))]
    return {table.name: table for table in found}


def find_table(name: str) -> Table | None:
    """The table of this name or place, in any case; None if there is none."""
    by_name = {
        known.lower(): table for table in tables().values() for known in (table.name, *table.also)
    }
    return by_name.get(name.lower())
