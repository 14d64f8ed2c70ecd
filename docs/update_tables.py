"""Write a page for each paper with all its tables: the paper's numbers, ours, and the verdicts.

    python docs/update_tables.py

Ours come from the results in ``docs/records``, which ``normkit reproduce NAME`` writes; verdicts
and figures are made anew.
"""

from pathlib import Path

from normkit.lab.reproduce.papers import PAPERS
from normkit.lab.reproduce.report import result_path
from normkit.lab.reproduce.tables.catalog import tables
from normkit.lab.reproduce.tables.figure import draw_table
from normkit.lab.reproduce.tables.page import table_markdown, unrun_markdown
from normkit.lab.reproduce.tables.result import read_table_result
from normkit.lab.reproduce.tables.table import Table

DOCS = Path(__file__).parent
PAGES, RECORDS, IMAGES = DOCS / "tables", DOCS / "records", DOCS / "images"
HEAD = """# Tables of {authors}

*{title}*

Made by `docs/update_tables.py` from `src/normkit/lab/presets` and the results in `docs/records`.
[How a claim is judged, and what a verdict can say](../reproduce.md#the-rule).
"""


def main() -> None:
    """Rewrite the pages and figures."""
    for key in PAPERS:
        (PAGES / f"{key}.md").write_text(page(key), encoding="utf-8")
    for table in tables().values():
        path = result_path(RECORDS, table.name)
        if path.exists():
            draw_table(read_table_result(path), IMAGES / f"reproduce-{table.name}.svg")


def page(key: str) -> str:
    """The page of a paper."""
    paper = PAPERS[key]
    head = HEAD.format(authors=paper.authors, title=paper.title)
    sections = [section(table) for table in tables().values() if table.of == key]
    return "\n".join([head, *sections]).rstrip() + "\n"


def section(table: Table) -> str:
    """What there is to say of a table."""
    path = result_path(RECORDS, table.name)
    if not path.exists():
        return unrun_markdown(table)
    return table_markdown(read_table_result(path), "../images/")


if __name__ == "__main__":
    main()
