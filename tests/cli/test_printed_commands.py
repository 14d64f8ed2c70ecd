"""Every `normkit compare` on a page can be run as it is printed."""

import re
import shlex
from pathlib import Path

import pytest

from normkit.cli.app import _parse
from normkit.cli.compare import Compare
from normkit.cli.shared import flag
from normkit.errors import SpecError
from normkit.lab.check import check
from normkit.lab.config import asked

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMAND = re.compile(r"^(?: {4})?(?:[A-Z_]+=\S+ )?(normkit compare (?:.*\\\n)*.*)$", re.MULTILINE)
AT_HAND = ("digits", "fashion-mnist", "scenes", "clips")


def printed():
    """The commands, each with its page."""
    for page in PAGES:
        for found in COMMAND.findall(page.read_text(encoding="utf-8")):
            words = shlex.split(found.replace("\\\n", " "), comments=True)
            if "NAME:option=value" in words:  # it says what an option looks like
                continue
            yield pytest.param(words[1:], id=f"{page.stem}: {' '.join(words[2:])}"[:100])


def parsed(words):
    command = _parse(words)
    assert isinstance(command, Compare)
    return command


def swept(command):
    return asked(command.values(), flag)[0]


@pytest.mark.parametrize("words", list(printed()))
def test_a_printed_comparison_can_be_run(words):
    command = parsed(words)
    of_reader = [word for word in words if "my.py" in word or word.startswith(("folder:", "./"))]
    data = command.data or "digits"
    if of_reader or data.partition(":")[0] not in AT_HAND or command.config is not None:
        return  # what it needs is the reader's: its options were read
    check(swept(command))


def test_commands_were_found():
    assert len(list(printed())) > 20


def test_a_command_that_cannot_run_is_seen():
    words = shlex.split("compare --model torchvision:resnet18 --norms bn,ibn-a")
    with pytest.raises(SpecError, match="ibn-a does not fit"):
        check(swept(parsed(words)))
