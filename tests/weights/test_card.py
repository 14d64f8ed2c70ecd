"""The method card's example runs and prints what the card says."""

import re
from pathlib import Path

CARD = (Path(__file__).parents[2] / "docs/methods/ws.md").read_text()


def test_the_example_prints_what_the_card_says(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", CARD, flags=re.DOTALL)
    (text,) = re.findall(r"```text\n(.*?)```", CARD, flags=re.DOTALL)
    namespace = {}
    exec(code, namespace)
    assert capsys.readouterr().out == text
    assert "0.weight" in namespace["model"].state_dict()
