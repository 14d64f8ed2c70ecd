"""The page's examples run and print what it shows."""

import re
from pathlib import Path

import pytest
import torch

PAGE = (Path(__file__).parents[2] / "docs" / "fusing.md").read_text()


def test_the_examples_print_what_the_page_shows(capsys):
    torch.manual_seed(0)
    space = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(block, space)
    shown = re.findall(r"(?:^    .*\n)+", PAGE, flags=re.MULTILINE)
    shown = [text for text in shown if text.startswith("    fused ")]
    assert [line.strip() for line in capsys.readouterr().out.splitlines()] == [
        line.strip() for text in shown for line in text.splitlines()
    ]


@pytest.mark.parametrize("name", re.findall(r'`"(\w+)"`', PAGE))
def test_every_activation_that_it_names_exists(name):
    from normkit.kernels.activations import KINDS

    assert name in KINDS
