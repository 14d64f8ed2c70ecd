"""Put what the records of `normkit reproduce` say into its page, between the page's markers.

    python docs/update_reproduce.py

Verdicts and figures are made anew from the runs in the records.
"""

import re
from pathlib import Path

from normkit.lab.reproduce import (
    as_markdown,
    conclude,
    find_preset,
    measured,
    results_in,
    write_result,
)

DOCS = Path(__file__).parent
PAGE, RECORDS, IMAGES = DOCS / "reproduce.md", DOCS / "records", DOCS / "images"
MARKED = re.compile(r"(<!-- begin results -->\n).*(<!-- end results -->)", re.DOTALL)


def main() -> None:
    """Rewrite the records' verdicts, the figures and the page."""
    for result in results_in(RECORDS):
        preset = find_preset(result.preset)
        write_result(RECORDS, conclude(preset, result.scale, result.runs))
        figure = IMAGES / f"reproduce-{preset.name}.svg"
        preset.write_figure(measured(result.runs), figure)
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def updated(page: str) -> str:
    """Return the page with the tables of the records."""
    tables = as_markdown(results_in(RECORDS), "images/")
    return MARKED.sub(lambda match: f"{match[1]}\n{tables}\n{match[2]}", page)


if __name__ == "__main__":
    main()
