"""`normkit list`: every method, and one in full."""

import json
import subprocess
import sys

import pytest

from normkit.catalog import CATALOG
from normkit.cli import main
from normkit.lab.arm_names import ARMS


@pytest.mark.parametrize("width", [80, 100])
def test_every_method_is_listed_with_all_there_is_to_know(capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= width
    rows = [line.split("│") for line in printed.splitlines() if line.startswith("│")]
    flowing = " ".join(" ".join(row[2] for row in rows).split())
    for method in CATALOG.values():
        for text in (method.name, method.formula, method.groups, method.evaluation, method.kept):
            assert text in flowing
    names = [row[1].strip() for row in rows if row[1].strip()]
    assert names == ["+ws" if name == "ws" else name for name in CATALOG]


def test_one_method_is_shown_in_full(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["list", "gn"]) == 0
    printed = capsys.readouterr().out
    for text in CATALOG["gn"].facts().values():
        assert text in printed
    assert "num_groups=32, eps=1e-05" in printed


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("ws", "standardize_weights_"),
        ("+ws", "standardize_weights_"),
        ("wn", "weight_norm_"),
        ("cwn", "centered_weight_norm_"),
        ("iew", "set_example_weight"),
    ],
)
def test_what_is_no_layer_is_a_method_too(capsys, name, call):
    assert main(["list", name]) == 0
    assert call in capsys.readouterr().out


def test_every_arm_is_listed_with_its_meaning(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["list"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert [f"{arm} {meaning}" for arm, meaning in ARMS.items()] == [
        line for line in lines if line.partition(" ")[0] in ARMS
    ]


def test_json_has_every_field(capsys):
    assert main(["list", "--json"]) == 0
    everything = json.loads(capsys.readouterr().out)
    assert [method["spec"] for method in everything["methods"]] == list(CATALOG)
    assert everything["weights"] == ["+ws", "+ws:center", "+ws:scale", "+wn", "+cwn"]
    assert everything["arms"] == dict(ARMS)
    assert main(["list", "bcn", "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert alone == everything["methods"][list(CATALOG).index("bcn")]
    assert alone["parameters"]["channel.weight"] == "(G)"
    assert alone["batch_in_training"]
    assert not alone["batch_in_evaluation"]


def test_an_unknown_method_is_refused(capsys):
    assert main(["list", "batch"]) == 2
    assert "there is no method 'batch'; the methods are: bn, in, ln" in capsys.readouterr().err


@pytest.mark.parametrize("wanted", ["list", "--help"])
def test_a_reader_that_has_seen_enough_gets_no_traceback(wanted):
    command = [sys.executable, "-m", "normkit.cli", wanted]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()  # as head does, only sooner
        assert process.stderr.read() == b""
    assert process.returncode in (0, 1)
