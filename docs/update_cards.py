"""Put each method's facts from the catalogue into its card, between the card's markers.

    python docs/update_cards.py

A marker ``<!-- begin NAME -->`` in a page of ``docs/methods`` names an entry of ``CATALOG``.
"""

import re
from pathlib import Path

from normkit.catalog import CATALOG

CARDS = Path(__file__).parent / "methods"
MARKED = re.compile(r"(<!-- begin (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
CODE = ("spec", "layer", "parameters", "buffers")  # shown as code
ELSEWHERE = ("formula", "source")  # the cards have sections of their own for these


def main() -> None:
    """Rewrite the cards."""
    for path in sorted(CARDS.glob("*.md")):
        page = path.read_text(encoding="utf-8")
        path.write_text(updated(page), encoding="utf-8")


def updated(page: str) -> str:
    """Return the page with the facts that the catalogue has now."""
    return MARKED.sub(lambda match: f"{match[1]}\n{_table(match[2])}\n{match[3]}", page)


def _table(name: str) -> str:
    facts = {key: text for key, text in CATALOG[name].facts().items() if key not in ELSEWHERE}
    rows = [f"| {key} | {_code(text) if key in CODE else text} |\n" for key, text in facts.items()]
    return "".join(["| | |\n|---|---|\n", *rows])


def _code(text: str) -> str:
    return text if text == "none" else f"`{text}`"


if __name__ == "__main__":
    main()
