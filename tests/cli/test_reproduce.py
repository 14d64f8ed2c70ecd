"""`normkit reproduce`."""

import json

import pytest

from normkit.cli import main
from normkit.lab.reproduce import PRESETS, run


@pytest.fixture
def normkit(capsys):
    """Run a command; returns the exit code, the output and the errors."""

    def run(*arguments):
        code = main(["reproduce", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_without_a_name_the_presets_and_their_claims_are_listed(normkit):
    code, output, _ = normkit()
    assert code == 0
    for preset in PRESETS.values():
        assert f"{', '.join((preset.name, *preset.rows))}: {preset.title}\n" in output
        for claim in preset.claims:
            assert f"- {claim.text} ({claim.source})" in output
    assert normkit("--list")[1] == output
    only = json.loads(normkit("gnbn", "--list", "--json")[1])
    assert [(found["name"], found["scales"]) for found in only] == [
        ("gnbn", ["tiny", "small", "paper"])
    ]


def test_a_preset_is_run_judged_drawn_and_reported(normkit, tmp_path):
    given = ("gnbn", "--scale", "tiny", "--workers", "1", "--out", str(tmp_path))
    code, output, errors = normkit(*given)
    assert code == 0
    assert output.startswith("gnbn: Huang et al., ")
    assert "With GNBN ESM is nearly the same" in output
    assert "(n = 3); claimed: within ±0.5" in output
    assert "gnbn: 6 of 6 runs (gnbn, seed 3: " in errors
    assert f"figure: {tmp_path / 'reproduce-gnbn.svg'}" in errors
    again = normkit(*given, "--json", "--figure", "png")
    assert "runs (" not in again[2]
    assert (tmp_path / "reproduce-gnbn.png").exists()
    (found,) = json.loads(again[1])
    assert {judged["verdict"]["outcome"] for judged in found["claims"]} <= {
        "held",
        "did not hold",
        "not decided",
    }
    code, report, _ = normkit("--report", "--out", str(tmp_path))
    assert code == 0
    assert report.startswith("3 claims: ")
    assert "](reproduce-gnbn.svg)" in report


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing",), "there is no preset 'nothing'; known are estimation-shift, "),
        (("all", "gnbn"), "all stands for every preset; give it alone"),
        (("gnbn", "--workers", "0"), "--workers was given 0; give 1 or more"),
        (("gnbn", "--checkpoint-seconds", "-1"), "--checkpoint-seconds was given -1.0; give 0"),
        (("gnbn", "--device", "tpu"), "there is no device 'tpu' here"),
        (("--report",), "has no results; normkit reproduce NAME --out "),
    ],
)
def test_bad_input_is_refused_before_anything_runs(normkit, tmp_path, arguments, message):
    code, output, errors = normkit(*arguments, "--out", str(tmp_path / "new"))
    assert (code, output) == (2, "")
    assert message in errors
    assert not (tmp_path / "new").exists()


def test_an_interrupt_keeps_what_is_finished(normkit, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "carry_out", interrupted)
    code, _, errors = normkit("gnbn", "--scale", "tiny", "--out", str(tmp_path))
    assert code == 130
    assert "interrupted; finished runs are kept" in errors
