"""The README's examples run, and its commands are the ones that there are."""

import re
import shlex
from pathlib import Path

import pytest
from torch import nn

import normkit as nk
from normkit.cli import main
from normkit.lab.torchvision_ops import register_missing_operators

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()


def test_the_examples_run_one_after_the_other():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 4
    register_missing_operators()  # this machine's torchvision may be built for another torch
    namespace = {}
    for block in blocks:
        exec(block, namespace)
    assert namespace["y"].shape == namespace["x"].shape


@pytest.mark.parametrize("target", re.findall(r"^    make (\w+)", README, flags=re.MULTILINE))
def test_every_make_target_exists(target):
    assert re.search(rf"^{target}:", MAKEFILE, flags=re.MULTILINE)


def test_the_printed_comparison_is_the_demo():
    command, *_ = re.findall(r"^    (normkit compare .*)$", README, flags=re.MULTILINE)
    demo = MAKEFILE.split("demo: ")[1].split("\n\n")[0].replace("\\\n", " ")
    assert shlex.split(command) == shlex.split(demo[demo.index("normkit compare") :])


COMMANDS = re.findall(r"^    normkit ((?:list|explain).*)$", README, flags=re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_list_and_explain_work_as_printed(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(command, comments=True)) == 0
    for picture in tmp_path.rglob("*.svg"):
        kept = ROOT / "docs" / "images" / picture.name
        assert texts(kept) == texts(picture)


def texts(picture):
    return re.findall(r"<text[^>]*>([^<]*)<", picture.read_text())


def is_layer(kind):
    return isinstance(kind, type) and issubclass(kind, nn.Module)


def test_every_layer_is_in_the_table_with_a_spec_that_builds_it():
    rows = re.findall(r"^\| `(\w+)` \| (`[^|]*`) \|", README, flags=re.MULTILINE)
    for layer, specs in rows:
        for spec in re.findall("`([^`]+)`", specs):
            built = nk.build(spec, 64, batch_size=8)
            assert type(built).__name__ == layer
    layers = {name for name, kind in vars(nk).items() if is_layer(kind)}
    assert {layer for layer, _ in rows} == layers


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", README))
def test_every_link_leads_somewhere(link):
    assert (ROOT / link).exists()
