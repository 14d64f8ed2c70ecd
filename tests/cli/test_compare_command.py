import json
import re
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version

import pytest

from normkit.cli import main
from normkit.lab.data import READERS
from normkit.lab.data.opening import forget_data
from normkit.lab.lock import only_user
from normkit.lab.models import build_model
from normkit.lab.train import _Training

TINY = ["compare", "--model", "mlp:depth=2:width=8", "--limit", "40", "--epochs", "1"]
SMALL = [*TINY, "--norms", "bn,ln", "--batch-sizes", "10,20", "--seeds", "1,2", "--workers", "1"]


@pytest.fixture
def compare(tmp_path, capsys):
    """Run `normkit compare`; returns the exit code, the standard output and the error output."""

    def run(*arguments, command=SMALL, out=tmp_path / "out"):
        code = main([*command, *arguments, "--out", str(out)])
        return code, *capsys.readouterr()

    return run


def test_it_prints_the_tables_and_writes_its_files(compare, tmp_path):
    code, output, progress = compare()
    assert code == 0
    for text in ("Test accuracy", "ln \N{MINUS SIGN} bn", "batch 20", " ms", " kB", "±"):
        assert text in output
    assert "bn, batch size 10, seed 1: " in progress
    assert "8 of 8 runs" in progress
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["experiment.toml", "records.jsonl", "report.html", "results.csv"]


def test_the_verdict_is_the_first_line_of_the_output_and_in_the_json(compare):
    first_line = compare()[1].splitlines()[0]
    assert re.match(r"(No norm|ln) is (ahead of|behind|undecided)", first_line)
    verdict = json.loads(compare("--json")[1])["verdict"]
    assert verdict["lines"][0] == first_line
    assert (verdict["first"], verdict["num_comparisons"]) == ("bn", 2)
    assert [(each["norm"], each["batch_size"]) for each in verdict["judged"]] == [
        ("ln", 10), ("ln", 20),
    ]  # fmt: skip


def test_json_is_all_that_the_standard_output_gets(compare, tmp_path):
    code, output, _ = compare("--json")
    result = json.loads(output)
    assert code == 0
    assert [(c["norm"], c["batch_size"]) for c in result["cells"]] == [
        ("bn", 10), ("bn", 20), ("ln", 10), ("ln", 20),
    ]  # fmt: skip
    cell = result["cells"][2]
    assert cell["accuracy"]["num_seeds"] == cell["difference"]["num_seeds"] == 2
    assert result["report"] == str(tmp_path / "out" / "report.html")
    assert result["results"] == str(tmp_path / "out" / "results.csv")
    assert result["troubled"] == []


def test_the_same_command_again_runs_nothing_and_says_the_same(compare, tmp_path):
    first = json.loads(compare("--json")[1])
    records = (tmp_path / "out" / "records.jsonl").read_bytes()
    code, output, progress = compare("--json")
    assert (code, json.loads(output), progress) == (0, first, "")
    assert (tmp_path / "out" / "records.jsonl").read_bytes() == records


def test_a_wider_command_runs_only_what_is_new(compare, tmp_path):
    compare()
    code, output, _ = compare("--json", "--seeds", "1,2,3")
    assert code == 0
    assert len((tmp_path / "out" / "records.jsonl").read_text().splitlines()) == 12
    assert json.loads(output)["cells"][0]["num_finished"] == 3


def test_failed_runs_give_exit_code_1_and_the_others_go_on(compare, monkeypatch):
    def broken_for_ln(name, *, norm, **options):
        if norm == "ln":
            raise ZeroDivisionError("by zero")
        return build_model(name, norm=norm, **options)

    monkeypatch.setattr("normkit.lab.start.build_model", broken_for_ln)
    code, output, errors = compare()
    assert code == 1
    assert "2 failed" in output
    assert "by zero" in output
    assert "Traceback" not in output + errors
    result = json.loads(compare("--json")[1])
    assert {t["norm"] for t in result["troubled"]} == {"ln"}
    assert [c["num_finished"] for c in result["cells"]] == [2, 2, 0, 0]


def test_some_diverged_runs_are_a_result_and_no_failure(compare, monkeypatch):
    before_step = _Training._before_step

    def with_rate_of_seed(training, *given):
        training.course.loop.set_rate(10.0 ** (30 * training.spec.seed - 32))
        before_step(training, *given)

    monkeypatch.setattr(_Training, "_before_step", with_rate_of_seed)
    code, output, errors = compare("--norms", "ln", "--epochs", "3")
    assert code == 0
    assert "1 diverged" in output
    assert "the training loss was" in output
    assert "there is nothing to compare" not in errors


def test_runs_that_all_diverged_are_said_and_give_exit_code_1(compare):
    for _ in range(2):  # and the same when they are there already
        code, output, errors = compare("--norms", "ln", "--base-lr", "1e30", "--epochs", "3")
        assert code == 1
        assert "2 diverged" in output
        assert "all 4 runs diverged, so there is nothing to compare; give a lower" in errors


def test_a_corrupt_line_is_told_by_number_and_left_where_it_is(compare, tmp_path):
    compare()
    path = tmp_path / "out" / "records.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], "{]\n", *lines[1:]]))
    before = path.read_bytes()
    code, _, errors = compare()
    assert code == 0
    assert f"line 2 of {path} is not a record" in errors
    assert "it is left out, the others are used" in errors
    assert path.read_bytes() == before


def test_runs_on_data_that_has_changed_are_done_anew(compare, tmp_path, monkeypatch):
    first = json.loads(compare("--json")[1])
    original = READERS["digits"]

    def other():
        source = original()
        pictures = replace(source.pictures, values=source.pictures.values.flip(3))
        return source._replace(pictures=pictures)

    for reader, expected in ((other, 16), (original, 16)):
        monkeypatch.setitem(READERS, "digits", reader)
        forget_data()
        found = json.loads(compare("--json")[1])
        assert len((tmp_path / "out" / "records.jsonl").read_text().splitlines()) == expected
        assert (found["cells"] == first["cells"]) == (reader is original)


def test_a_second_process_in_the_folder_is_refused(compare, tmp_path):
    (tmp_path / "out").mkdir()
    with only_user(tmp_path / "out"):
        code, output, errors = compare()
    assert (code, output) == (2, "")
    assert re.fullmatch(
        r"normkit: .*out is in use by process .*another folder with --out\n", errors
    )
    assert compare()[0] == 0


def test_the_report_names_the_command_that_makes_it_again(compare, tmp_path):
    compare()
    report = re.sub("</?span>", "", (tmp_path / "out" / "report.html").read_text())
    assert (
        "normkit compare --model mlp:depth=2:width=8 --limit 40 --epochs 1 --norms bn,ln" in report
    )


BAD = [
    (["--norms", "bn,nope"], r"nope"),
    (["--norms", "bn,bn"], r"names bn twice"),
    (["--data", "nope"], r"no data set 'nope'; known are digits, fashion-mnist"),
    (["--model", "resnet17"], r"no model 'resnet17'; write .*close names are resnet18"),
    (["--device", "tpu"], r"no device 'tpu' here; choose auto or cpu"),
    (
        ["--batch-sizes", "2,x"],
        r"--batch-sizes was given '2,x', in which 'x' is not a whole number",
    ),
    (["--batch-sizes", "0"], r"--batch-sizes was given 0: .*greater than or equal to 1"),
    (["--seeds", "1,1"], r"name 1 more than once"),
    (["--seeds", "9" * 23], r"--seeds was given 9+: .*less than or equal to 9223372036854775807"),
    (["--seeds", "9" * 5000], r"a number of 5000 digits was given, 9{20}\.\.\.; no option takes"),
    (
        ["--batch-sizes", "9" * 23],
        r"--batch-sizes was given 9+: .*less than or equal to 2147483647",
    ),
    (["--epochs", "0"], r"--epochs was given 0: .*; give passes over the training data, 1 or"),
    (
        ["--limit", "0"],
        r"--limit was given 0.*; give the number of training examples to keep, 1 or more",
    ),
    (["--base-lr", "-1"], r"--base-lr was given -1.0"),
    (["--limit", "9"], r"--limit was given 9, but digits has 10 classes; give 10 or more"),
    (["--norms", "bn,gn:3"], r"norm gn:3 does not fit layer '2' at batch size 10: .*3 groups"),
    (
        ["--norms", "gn:8", "--model", "mlp:depth=2:width=20"],
        r"norm gn:8 does not fit layer '2' at batch size 10: .*length 20, which 8 groups",
    ),
    (["--norms", "bn,in"], r"norm in does not fit layer '2' at batch size 10: .*a single value"),
    (["--batch-sizes", "2,1"], r"norm bn does not fit layer '2' at batch size 1: .*a single val"),
    (
        ["--norms", "bn,gn:2+ws", "--model", "mlp:depth=2:width=20"],
        r"\+ws has nothing to standardise in model 'mlp:depth=2:width=20'.*leave \+ws out",
    ),
    (["--workers", "0"], r"--workers was given 0; give 1 or more, and 1024 at most"),
]


@pytest.mark.parametrize(("arguments", "text"), BAD, ids=str)
def test_bad_input_gives_exit_code_2_and_no_traceback(compare, tmp_path, arguments, text):
    code, output, errors = compare(*arguments)
    assert (code, output) == (2, "")
    assert errors.startswith("normkit: ")
    assert re.search(text, errors), errors
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()


def test_a_complaint_is_made_once_and_names_the_flag(compare):
    rule = "input should be greater than or equal to 1; give one batch size or more, each 1 or more"
    assert compare("--batch-sizes", "0")[2] == f"normkit: --batch-sizes was given 0: {rule}\n"
    assert compare("--batch-sizes", "0,0")[2] == f"normkit: --batch-sizes was given 0: {rule}\n"


def test_unknown_kernels_in_the_environment_give_exit_code_2(compare, tmp_path, monkeypatch):
    monkeypatch.setenv("NORMKIT_KERNELS", "fast")
    code, output, errors = compare()
    assert (code, output) == (2, "")
    assert errors.startswith("normkit: NORMKIT_KERNELS is 'fast': there are no kernels 'fast'")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["records.jsonl", "report.html", "results.csv"])
def test_a_folder_in_a_files_place_gives_exit_code_2_before_training(
    compare, tmp_path, monkeypatch, name
):
    monkeypatch.setattr("normkit.lab.experiment.carry_out", None)
    (tmp_path / "out" / name).mkdir(parents=True)
    code, output, errors = compare()
    assert (code, output) == (2, "")
    way_out = "is no file; move it away or give another one with --out"
    assert errors == f"normkit: {tmp_path / 'out' / name} {way_out}\n"


def test_an_output_folder_that_cannot_be_written_gives_exit_code_2(compare):
    code, _, errors = compare(out="/proc/normkit")
    assert code == 2
    assert "/proc/normkit cannot be written to" in errors
    assert "give another one with --out" in errors


def test_missing_data_files_give_exit_code_2(compare, tmp_path, monkeypatch):
    monkeypatch.setattr("normkit.lab.data.sources.FASHION_MNIST_FOLDER", tmp_path)
    code, _, errors = compare("--data", "fashion-mnist")
    assert code == 2
    assert "train-images-idx3-ubyte.gz cannot be read" in errors


@pytest.mark.parametrize("arguments", [["--colour", "red"], ["--epochs", "two"]], ids=str)
def test_a_flag_that_cannot_be_read_gives_exit_code_2(compare, capsys, arguments):
    with pytest.raises(SystemExit) as exit_info:
        compare(*arguments)
    assert exit_info.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_an_interrupt_is_said_to_keep_what_is_finished(compare, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("normkit.lab.experiment.carry_out", interrupted)
    code, _, errors = compare()
    assert code == 130
    assert "interrupted; finished runs are kept" in errors


def test_the_program_itself_exits_with_the_code(tmp_path):
    command = [sys.executable, "-m", "normkit.cli", *SMALL, "--out", str(tmp_path), "--norms", "?"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("normkit: ")
    assert "Traceback" not in done.stderr


def test_list_names_what_can_be_named(capsys):
    assert main(["list", "--json"]) == 0
    names = json.loads(capsys.readouterr().out)
    assert {"bn", "gn", "bgn"} <= set(names["norms"])
    assert names["data"][:5] == ["digits", "fashion-mnist", "cifar10", "cifar100", "svhn"]
    assert set(names["data"][5:]) == {
        "mnist", "cifar100-40k", "svhn-extra", "imagenet", "caltech256",
        "office31-amazon", "office31-dslr", "office31-webcam",
    }  # fmt: skip
    assert names["models"][:3] == ["small-resnet", "mlp", "vgg11"]
    assert main(["list"]) == 0
    assert "data: digits, fashion-mnist" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--help"], ["compare", "--help"]], ids=str)
def test_help_is_no_error(capsys, arguments):
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 0
    assert "compare" in capsys.readouterr().out


def test_the_version_is_the_packages(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"normkit {version('normkit')}\n"
