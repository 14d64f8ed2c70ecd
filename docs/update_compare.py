"""Put what the records of `normkit compare` say into the README, between its markers.

    python docs/update_compare.py [--picture runs/demo/report.html]

The verdict and the table are made from the records; the picture is that of a report, taken with
Chromium at the width of 1040 pixels.
"""

import argparse
import re
import shutil
import textwrap
from pathlib import Path

from normkit.lab.comparison import Comparison, compared
from normkit.lab.records import TrainingRecord
from normkit.lab.spec import SweepSpec
from normkit.lab.text import MINUS, percent, points
from normkit.lab.verdict import verdict_of

DOCS = Path(__file__).parent
PAGE, RECORDS = DOCS.parent / "README.md", DOCS / "records"
PICTURE, WIDTH, HEIGHT = DOCS / "images" / "compare-report.png", 1040, 1455
NORMS = ("bn", "gn:8", "bgn:auto")
MARKED = re.compile(r"(<!-- begin (compare-[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    """Rewrite the README, and take the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", type=Path, help="a report to take the picture of")
    given = parser.parse_args()
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    if given.picture is not None:
        take_picture(given.picture, PICTURE, WIDTH)


def updated(page: str) -> str:
    """Return the page with the verdicts and tables of the records."""
    return MARKED.sub(lambda match: f"{match[1]}\n{section(match[2])}\n\n{match[3]}", page)


def section(name: str) -> str:
    """The verdict and the table of a file of records."""
    lines = (RECORDS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    records = [TrainingRecord.model_validate_json(line) for line in lines]
    sweep = SweepSpec(
        protocol=records[0].spec.protocol,
        norms=NORMS,
        batch_sizes=tuple(sorted({record.spec.batch_size for record in records})),
        seeds=tuple(sorted({record.spec.seed for record in records})),
    )
    comparison = compared(sweep, records)
    verdict = textwrap.wrap(verdict_of(comparison).lines[0], 126)
    return "\n".join([*(f"> {line}" for line in verdict), "", *table(comparison)])


def table(comparison: Comparison) -> list[str]:
    """Accuracies and differences to the first norm, as Markdown."""
    first, sizes = comparison.norms[0], comparison.batch_sizes
    cells = {norm: [comparison.cell(norm, size) for size in sizes] for norm in comparison.norms}
    rows = {
        f"`{norm}`": [percent(c.accuracy) for c in row if c.accuracy] for norm, row in cells.items()
    }
    for norm in comparison.norms[1:]:
        differences = [points(cell.difference) for cell in cells[norm] if cell.difference]
        rows[f"`{norm}` {MINUS} `{first}`"] = differences
    head = ["norm", *(f"batch {size}" for size in sizes)]
    return [
        f"| {' | '.join(head)} |",
        f"|---|{'---:|' * len(sizes)}",
        *(f"| {' | '.join([name, *values])} |" for name, values in rows.items()),
    ]


def take_picture(report: Path, path: Path, width: int, height: int = HEIGHT) -> None:
    """Picture the upper part of a report."""
    from selenium import webdriver  # for this alone

    options = webdriver.ChromeOptions()
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "hide-scrollbars"):
        options.add_argument(f"--{flag}")
    options.binary_location = shutil.which("chromium") or ""
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    browser = webdriver.Chrome(options=options, service=service)
    try:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get(report.resolve().as_uri())
        browser.save_screenshot(str(path))
    finally:
        browser.quit()


if __name__ == "__main__":
    main()
