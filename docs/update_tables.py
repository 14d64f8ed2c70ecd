"""Write a page for each paper with all its tables: the paper's numbers, ours, and the verdicts.

    python docs/update_tables.py

Ours come from the results in ``docs/records``, which ``normkit reproduce NAME`` writes; verdicts,
figures and the list in ``docs/reproduce.md`` are made anew. A result of other settings than those
of the preset is refused; which code made it stands on the page.
"""

import re
from collections import Counter
from pathlib import Path

from normkit.errors import DataError
from normkit.lab.reproduce.papers import PAPERS
from normkit.lab.reproduce.report import result_path
from normkit.lab.reproduce.tables.catalog import tables
from normkit.lab.reproduce.tables.figure import draw_table
from normkit.lab.reproduce.tables.page import table_markdown, unrun_markdown
from normkit.lab.reproduce.tables.result import TableResult, judged, read_table_result, write_table
from normkit.lab.reproduce.tables.table import Table
from normkit.lab.reproduce.verdict import OUTCOMES

DOCS = Path(__file__).parent
PAGES, RECORDS, IMAGES, LIST = (
    DOCS / "tables",
    DOCS / "records",
    DOCS / "images",
    DOCS / "reproduce.md",
)
MARKED = re.compile(r"(<!-- begin tables -->\n).*(<!-- end tables -->)", re.DOTALL)
HEAD = """# Tables of {authors}

*{title}*

Made by `docs/update_tables.py` from `src/normkit/lab/presets` and the results in `docs/records`.
[How a claim is judged, and what a verdict can say](../reproduce.md#the-rule).
"""


def main() -> None:
    """Judge the results anew, and rewrite the pages, figures and the list."""
    for table in tables().values():
        result = result_of(table)
        if result is not None:
            claims = judged(table, "small", result.cells)
            result = result.model_copy(update={"claims": claims, "numbers": table.numbers})
            write_table(RECORDS, result)
            draw_table(result, IMAGES / f"reproduce-{table.name}.svg")
    for key in PAPERS:
        (PAGES / f"{key}.md").write_text(page(key), encoding="utf-8")
    LIST.write_text(updated(LIST.read_text(encoding="utf-8")), encoding="utf-8")


def result_of(table: Table) -> TableResult | None:
    """The result that is kept of a table; None if there is none.

    Raises:
        DataError: If it is of other settings than those of the preset.
    """
    path = result_path(RECORDS, table.name)
    if not path.exists():
        return None
    result = read_table_result(path)
    if (result.scale, result.differences) != ("small", table.differences("small")):
        raise DataError(
            f"{path} is of other settings than preset {table.name} has at scale small; run "
            f"normkit reproduce {table.name} again, or take the file away"
        )
    return result


def page(key: str) -> str:
    """The page of a paper."""
    paper = PAPERS[key]
    head = HEAD.format(authors=paper.authors, title=paper.title)
    sections = [section(table) for table in tables().values() if table.of == key]
    return "\n".join([head, *sections]).rstrip() + "\n"


def section(table: Table) -> str:
    """What there is to say of a table."""
    result = result_of(table)
    return unrun_markdown(table) if result is None else table_markdown(result, "../images/")


def updated(text: str) -> str:
    """Return the page with the list of all tables."""
    return MARKED.sub(lambda match: f"{match[1]}\n{overview()}\n{match[2]}", text)


def overview() -> str:
    """All tables, and what became of their claims at small scale."""
    rows, total = list[str](), Counter[str]()
    for table in tables().values():
        result = result_of(table)
        anchor = table.name.lower().replace(".", "")
        counts = Counter(one.verdict.outcome for one in result.claims) if result else None
        total += counts or Counter()
        cells = [str(counts[o]) if counts else "" for o in OUTCOMES]
        seeds = str(result.num_seeds) if result else "not run"
        names = ", ".join((table.name, *table.also))
        link = f"[{names}](tables/{table.of}.md#{anchor})"
        rows.append(f"| {' | '.join([link, table.title, seeds, *cells])} |")
    run = sum(result_of(table) is not None for table in tables().values())
    said = ", ".join(f"{total[outcome]} {outcome}" for outcome in OUTCOMES)
    head = [
        f"{run} of {len(rows)} tables have a result at small scale. Of its {total.total()} claims:",
        f"{said}.\n",
        f"| table | what | seeds | {' | '.join(OUTCOMES)} |",
        "|---|---|---:|---:|---:|---:|",
    ]
    return "\n".join([*head, *rows, ""])


if __name__ == "__main__":
    main()
