"""`normkit explain`: the groups drawn, written, as JSON, and what it refuses."""

import json

import pytest
import torch

import normkit as nk
from normkit.catalog import CATALOG
from normkit.cli import main
from normkit.sharing import parts


@pytest.fixture
def explain(capsys, monkeypatch):
    """Run the command; returns the exit code, the output and the errors."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments):
        code = main(["explain", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_a_map_is_drawn_and_explained(explain):
    code, output, _ = explain("bgn", "--num-groups", "8", "--shape", "4,8,6,6")
    lines = output.splitlines()
    assert code == 0
    assert lines[0] == "8 groups, statistics over 144 elements each"
    assert lines[2] == "n0 " + " ".join(letter * 6 for letter in "ABCDEFGH")
    assert sum(line[3:] == lines[2][3:] for line in lines) == 4 * 6
    assert "BatchGroupNorm: statistics over a group of 4 of 4 examples, 1 of 8" in output
    assert "kernels: " in lines[-1]
    assert "\x1b" not in output


@pytest.mark.parametrize("no_color", [False, True])
def test_cells_are_coloured_unless_that_is_not_wanted(explain, monkeypatch, no_color):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.setenv("TERM", "xterm-256color")
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    else:
        monkeypatch.delenv("NO_COLOR", raising=False)
    _, output, _ = explain("bn", "--shape", "2,2,2,2")
    assert ("48;2;230;159;0" in output) == (not no_color)
    assert "A" in output


@pytest.mark.parametrize("spec", [m.example for m in CATALOG.values() if m.example])
@pytest.mark.parametrize("mode", [(), ("--eval",)], ids=["training", "evaluation"])
def test_every_method_is_explained(explain, spec, mode):
    code, output, _ = explain(spec, "--shape", "4,64,4,4", *mode)
    assert code == 0
    assert max(map(len, output.splitlines())) <= 80
    assert ("standardizes the weights" in output) == spec.endswith("+ws")


def test_json_has_the_groups_themselves(explain):
    code, output, _ = explain("gnplus:2", "--shape", "2,4,3", "--eval", "--json")
    found = json.loads(output)
    layer = nk.GroupNormPlus(4, num_groups=2).eval()
    assert code == 0
    assert (found["spec"], found["shape"], found["mode"]) == ("gnplus:2", [2, 4, 3], "evaluation")
    assert [part["origin"] for part in found["parts"]] == ["input", "running"]
    for part, expected in zip(found["parts"], parts(layer), strict=True):
        assert torch.equal(torch.tensor(part["index"]), expected.index((2, 4, 3)))
    assert found["groups"] == nk.explain(layer, torch.randn(2, 4, 3)).groups


@pytest.mark.parametrize("name", ["groups.png", "groups.svg"])
def test_a_picture_is_written(explain, tmp_path, name):
    path = tmp_path / "new" / name
    code, _, errors = explain("sn", "--shape", "2,4,3,3", "--out", str(path))
    assert code == 0
    assert f"picture: {path}" in errors
    assert path.read_bytes()[1:4] == (b"PNG" if name.endswith("png") else b"?xm")


def test_auto_follows_the_shape(explain):
    _, output, _ = explain("bgn:auto", "--shape", "4,8,6,6")
    assert output.startswith("2 groups, statistics over 576 elements each")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["zz"], "names norm 'zz'; the norms are: bn, in"),
        (["ws"], "names norm 'ws'; the norms are: bn, in"),
        (["gn:3", "--shape", "4,8,6,6"], r"length 8, which 3 groups do not divide; choose a"),
        (["bgn:7", "--shape", "4,8,6,6"], r"has 288 elements, which 7 groups do not divide"),
        (["bn", "--shape", "4"], r"--shape was given '4'; it has the numbers of examples and"),
        (["bn", "--shape", "4,0,3"], r"--shape was given '4,0,3'; it has"),
        (["bn", "--shape", "4,x"], r"--shape was given '4,x', in which 'x' is not a whole number"),
        (["bn", "--shape", "99999,99999"], r"at most 16777216 are numbered; give fewer"),
        (["sn", "--num-groups", "4"], r"sn, which has no number of groups; these have: gn, bgn"),
        (["gn:2", "--num-groups", "4"], r"gn:2, which says the groups itself; give gn --num"),
        (["gn:channels=2", "--num-groups", "4"], r"gn:channels=2, which says the groups itself"),
        (["gn", "--num-groups", "0"], r"--num-groups was given 0; give 1 or more"),
        (["bn", "--out", "picture.gif"], r"'picture.gif'; its name ends in .png or .svg"),
        (["in", "--shape", "4,8"], r"InstanceNorm expected more than 1 value per statistics group"),
    ],
)
def test_what_cannot_be_drawn_is_refused(explain, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, output, errors = explain(*arguments)
    assert code == 2
    assert output == ""
    assert message in errors
    assert list(tmp_path.iterdir()) == []
