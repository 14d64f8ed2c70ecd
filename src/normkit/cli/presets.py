"""Lists of presets and tables, and estimates of tables, for the terminal."""

import sys
from collections.abc import Mapping, Sequence

from normkit.cli.shared import print_json
from normkit.lab.dry_run import DryRun
from normkit.lab.reproduce import SCALES, Preset, Scale
from normkit.lab.reproduce.tables.dry_run import PartEstimate
from normkit.lab.reproduce.tables.table import Table


def print_list(presets: Sequence[Preset], tables: Sequence[Table], as_json: bool) -> None:
    """Print names, titles, papers and claims of figures, then of tables."""
    if as_json:
        print_json([*map(_described, presets), *map(_described_table, tables)])
        return
    for preset in presets:
        sys.stdout.write(f"{', '.join((preset.name, *preset.rows))}: {preset.title}\n")
        scales = ", ".join(scale for scale in SCALES if scale in preset.scales)
        sys.stdout.write(f"  {preset.paper.authors}, {preset.figures}; scales {scales}\n")
        for claim in preset.claims:
            sys.stdout.write(f"  - {claim.text} ({claim.source})\n")
    for table in tables:
        sys.stdout.write(f"{', '.join((table.name, *table.also))}: {table.title}\n")
        sys.stdout.write(f"  {table.cited.authors}, {table.place}; scales {', '.join(SCALES)}\n")
        for claim in table.claims:
            sys.stdout.write(f"  - {claim.text} ({claim.source})\n")


def print_table_estimates(
    found: Mapping[str, Sequence[PartEstimate]], scale: Scale, as_json: bool
) -> None:
    """Print the estimated time and memory of each part of some tables."""
    if as_json:
        print_json(
            {
                name: [part.model_dump(mode="json") for part in parts]
                for name, parts in found.items()
            }
        )
        return
    for name, parts in found.items():
        for part in parts:
            about = f"{name} {part.part}".rstrip()
            sys.stdout.write(f"{about} at scale {scale}, on {part.data}\n")
            if part.missing:
                sys.stdout.write(f"missing data: {part.missing}\n")
            sys.stdout.write(f"{DryRun(cells=part.cells)}\n")


def _described(preset: Preset) -> dict[str, object]:
    return {
        "name": preset.name,
        "rows": list(preset.rows),
        "title": preset.title,
        "paper": f"{preset.paper.authors}, {preset.paper.title}",
        "figures": preset.figures,
        "scales": list(preset.scales),
        "claims": [
            {"claim": claim.text, "source": claim.source, "quantity": claim.quantity}
            for claim in preset.claims
        ],
    }


def _described_table(table: Table) -> dict[str, object]:
    return {
        "name": table.name,
        "rows": list(table.also),
        "title": table.title,
        "paper": str(table.cited),
        "figures": table.place,
        "scales": list(SCALES),
        "claims": [
            {"claim": claim.text, "source": claim.source, "quantity": claim.quantity}
            for claim in table.claims
        ],
    }
