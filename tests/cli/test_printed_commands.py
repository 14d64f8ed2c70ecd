"""Every command on a page or in an example can be run as it is printed."""

import re
import shlex
from pathlib import Path

import pytest

from normkit.cli.app import COMMANDS, _parse
from normkit.cli.compare import Compare
from normkit.cli.explain import Explain
from normkit.cli.listing import List
from normkit.cli.reproduce import ALL, Reproduce
from normkit.cli.shared import flag
from normkit.errors import SpecError
from normkit.lab.check import check
from normkit.lab.config import asked
from normkit.lab.reproduce import find_preset
from normkit.lab.reproduce.tables.catalog import find_table

ROOT = Path(__file__).parents[2]
TEXTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").glob("*.py")),
]
PROGRAM = r"(?:[A-Z_]+=\S+ )?(?:(?:torchrun [^`\n]*|python )-m )?normkit(?:\.cli)?"
NAME = rf"(?:{'|'.join(COMMANDS)})\b"
LINE = re.compile(rf"^#? *{PROGRAM} ({NAME}(?:.*\\\n)*.*)$", re.MULTILINE)
# a name with nothing behind it, such as `normkit reproduce`, is the command and not what is typed
WITHIN = re.compile(rf"`{PROGRAM} ({NAME} [^`]+)`")
AT_HAND = ("digits", "fashion-mnist", "scenes", "clips")


def printed():
    """The words of each command after `normkit`, each with its page."""
    for page in TEXTS:
        text = page.read_text(encoding="utf-8")
        for found in (*LINE.findall(text), *WITHIN.findall(text)):
            words = shlex.split(found.replace("\\\n", " "), comments=True)
            if "..." in words or "NAME:option=value" in words:  # part of it is the reader's
                continue
            yield page, words


def check_command(words, folder):
    """Parse a command, then check or run as much of it as needs nothing of the reader's."""
    command = _parse(words)
    if isinstance(command, Compare):
        of_reader = [w for w in words if "my.py" in w or w.startswith(("folder:", "./"))]
        data = (command.data or "digits").partition(":")[0]
        if not of_reader and data in AT_HAND and command.config is None:
            check(asked(command.values(), flag)[0])
    elif isinstance(command, Reproduce):
        for name in command.names:
            if name != ALL:
                assert find_table(name) or find_preset(name)
    elif isinstance(command, List | Explain):
        out = getattr(command, "out", None)
        again = [str(folder / out) if out is not None and w == str(out) else w for w in words]
        assert _parse(again).run() == 0


@pytest.mark.parametrize(
    "words",
    [pytest.param(words, id=f"{page.stem}: {' '.join(words)}"[:100]) for page, words in printed()],
)
def test_a_printed_command_can_be_run(words, tmp_path):
    check_command(words, tmp_path)


def test_commands_were_found():
    found = [words[0] for _, words in printed()]
    assert {name: found.count(name) for name in COMMANDS if name not in found} == {}
    assert len(found) > 60
    assert {page.parent.name for page, _ in printed()} >= {"docs", "tasks", "examples"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("compare --model torchvision:resnet18 --norms bn,ibn-a", "ibn-a does not fit"),
        ("explain bn:4 --shape 4,8,4,4", "bn"),
        ("reproduce gnbm", "gnbm"),
    ],
)
def test_a_command_that_cannot_run_is_seen(line, said, tmp_path):
    with pytest.raises(SpecError, match=said):
        check_command(shlex.split(line), tmp_path)


def test_an_option_that_is_none_is_seen(tmp_path):
    with pytest.raises(SystemExit):
        check_command(["tune", "--model", "mlp", "--no-such-option", "1"], tmp_path)
