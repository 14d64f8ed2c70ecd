"""Put the papers' tables into the pages of tasks, from the results in ``docs/records``.

    python docs/update_tasks.py

A table stands between ``<!-- table NAME -->`` and ``<!-- end -->``. Figures are made by
``update_tables.py``.
"""

import re
from pathlib import Path

from normkit.lab.reproduce.report import result_path
from normkit.lab.reproduce.tables.catalog import tables
from normkit.lab.reproduce.tables.result import read_table_result, table_markdown, unrun_markdown

DOCS = Path(__file__).parent
PAGES = sorted((DOCS / "tasks").glob("*.md"))
MARKED = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    """Rewrite the pages."""
    for path in PAGES:
        path.write_text(updated(path.read_text(encoding="utf-8")), encoding="utf-8")


def updated(page: str) -> str:
    """A page with the tables that its marks name."""
    return MARKED.sub(lambda mark: f"{mark[1]}{_section(mark[2])}{mark[3]}", page)


def _section(name: str) -> str:
    path = result_path(DOCS / "records", name)
    if not path.exists():
        return unrun_markdown(tables()[name])
    return table_markdown(read_table_result(path), "../images/")


if __name__ == "__main__":
    main()
