"""The pages on batches in parts, on masks and on export run, and print what they say."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"```python\n([\s\S]*?)```\n\n((?:    .*\n)+)")


@pytest.mark.filterwarnings("ignore::DeprecationWarning:onnxscript")  # theirs, at import
@pytest.mark.filterwarnings("ignore::FutureWarning:copyreg")  # torch.export copies its own specs
@pytest.mark.parametrize("page", ["distributed", "export", "masks"])
def test_every_example_prints_what_stands_below(page, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (DOCS / f"{page}.md").read_text()
    namespace = {}
    blocks = BLOCK.findall(text)
    assert len(blocks) == text.count("```python")
    for code, shown in blocks:
        exec(code, namespace)
        assert capsys.readouterr().out.splitlines() == [line[4:] for line in shown.splitlines()]
