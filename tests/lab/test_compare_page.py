"""The code on `docs/compare.md` runs, from the first block to the last."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "compare.md"


def test_the_code_of_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    path = tmp_path / "page.py"
    path.write_text("\n".join(blocks), encoding="utf-8")
    names = {"__name__": "page", "__file__": str(path)}
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), names)
    first, *_ = capsys.readouterr().out.splitlines()
    assert re.match(r"(No norm|ln) is (ahead of|behind|undecided)", first)
