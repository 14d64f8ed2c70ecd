"""The program as a process: streams, exit codes, starts, interruptions."""

import inspect
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import version

import pytest

import normkit as nk
import normkit_program
from normkit.cli import app, main
from normkit.cli.app import COMMANDS
from normkit.cli.shared import print_json

TINY = ["--model", "mlp:depth=2:width=8", "--limit", "40", "--epochs", "1", "--workers", "1"]


def program(*arguments, env=None, **options):
    environment = {**os.environ, **(env or {})}
    command = [sys.executable, "-m", "normkit", *arguments]
    return subprocess.run(
        command, env=environment, capture_output="stdout" not in options, check=False, **options
    )


WRONG = {
    "compare": ["--epochs", "0"],
    "recommend": ["--batch-size", "0"],
    "convert": ["--model", "nope", "--to", "gn:4"],
    "validate": ["--model", "nope", "--batch-size", "2"],
    "diagnose": ["--model", "mlp", "--train-data", "digits", "--test-data", "nope"],
    "tune": ["--model", "nope", "--data", "digits"],
    "explain": ["gn8"],
    "list": ["nope"],
    "bench": ["--norms", "nope"],
    "reproduce": ["nope"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_errors_are_a_sentence_and_with_json_also_json(capsys, command):
    assert main([command, *WRONG[command]]) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert re.fullmatch(r"normkit: .*\n", errors)
    assert main([command, *WRONG[command], "--json"]) == 2
    output, again = capsys.readouterr()
    assert again == errors
    said = json.loads(output)
    assert said["error"] == errors.removeprefix("normkit: ").rstrip("\n")
    assert said["type"].endswith("Error")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["compare", "--epochs", "two"], "Error parsing --epochs: no type matching {None}|INT"),
        (["compare", "--colour", "red"], "Unrecognized options: --colour, red"),
        (["tune"], "Missing from normkit tune: --model STR Network: small-resnet, mlp, vgg11"),
        (["nope"], "Unrecognized options: nope"),
        (["compare", "--seeds", "9" * 5000], "a number of 5000 digits was given, 99999999999999"),
        (
            ["tune", "--model", "mlp", "--data", "digits", "--examples", "9" * 5000],
            "a number of 50",
        ),
    ],
)
def test_a_command_line_that_cannot_be_read_is_json_too(capsys, arguments, said):
    assert main([*arguments, "--json"]) == 2
    output, errors = capsys.readouterr()
    assert json.loads(output)["error"].startswith(said)
    assert "Traceback" not in errors


def test_numbers_that_are_not_finite_are_null_in_json(capsys):
    print_json({"losses": [1.5, math.nan, (-math.inf,)], "steps": 3, "name": "NaN"})
    output = capsys.readouterr().out

    def refuse(word):
        pytest.fail(f"{word} is no JSON")

    found = json.loads(output, parse_constant=refuse)
    assert found == {"losses": [1.5, None, [None]], "steps": 3, "name": "NaN"}


def test_python_m_normkit_is_the_program_and_has_one_version():
    done = program("--version", text=True)
    assert (done.returncode, done.stdout) == (0, f"normkit {nk.__version__}\n")
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", nk.__version__)


ASCII = [
    {"PYTHONIOENCODING": "ascii"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
]


@pytest.mark.parametrize("env", ASCII, ids=["PYTHONIOENCODING", "LC_ALL"])
@pytest.mark.parametrize("arguments", [["list"], ["compare", "--help"], ["list", "gn", "--json"]])
def test_a_terminal_without_unicode_gets_ascii(env, arguments):
    done = program(*arguments, env={**env, "COLUMNS": "20"})
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode("ascii")
    assert "?" not in text
    if arguments == ["list"]:
        assert "y = gamma_c (x - mu_c) / sqrt(sigma^2_c +" in " ".join(
            text.replace("|", " ").split()
        )


def test_a_narrow_terminal_loses_nothing(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "20")
    assert main(["list"]) == 0
    assert "Normalization" in capsys.readouterr().out
    assert os.environ["COLUMNS"] == "20"


def test_nothing_is_coloured_in_a_pipe(tmp_path):
    few = ["--norms", "bn", "--batch-sizes", "10", "--seeds", "1"]
    done = program("compare", *TINY, *few, "--out", str(tmp_path / "out"), text=True)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr


def test_a_reader_that_has_seen_enough_is_no_error():
    shell = f"{sys.executable} -m normkit list | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Methods")


def test_an_output_that_cannot_be_written_is_said():
    with open("/dev/full", "w") as full:  # noqa: PTH123 -- a device
        done = program("list", stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "normkit: the output cannot be written: No space left on device\n"


def test_closed_streams_are_no_error():
    shell = f"{sys.executable} -m normkit list >&- 2>&-"
    assert subprocess.run(["bash", "-c", shell], check=False).returncode == 0


def test_files_are_written_before_the_output_that_nobody_reads(tmp_path):
    saved = tmp_path / "weights.safetensors"
    small = "--model small-resnet --num-classes 10 --input-shape 1,8,8"
    command = f"{sys.executable} -m normkit convert {small} --to gn:4 --save {saved} | true"
    subprocess.run(["bash", "-c", command], check=False, capture_output=True)
    assert saved.exists()


def test_without_the_labs_packages_the_extra_is_named(tmp_path):
    (tmp_path / "tyro.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'tyro'\", name='tyro')"
    )
    env = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    done = program("list", env=env, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "normkit: the package tyro is not installed; normkit.lab and the commands need the extra "
        "lab: pip install 'normkit[lab]'\n"
    )
    assert program("--version", env=env, text=True).returncode == 0
    assert program("--help", env=env, text=True).stdout == normkit_program.help_text()


@pytest.mark.parametrize(
    "line",
    [
        "from normkit.lab import compare",
        "from normkit.lab.data import load",
        "from normkit.lab.models import build_model",
    ],
)
def test_in_python_the_extra_is_named_too(tmp_path, line):
    (tmp_path / "pydantic.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'pydantic'\", name='pydantic')"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", line], env=env, capture_output=True, text=True, check=False
    )
    assert done.stderr.splitlines()[-1] == (
        "normkit.errors.PackageError: the package pydantic is not installed; normkit.lab and the "
        "commands need the extra lab: pip install 'normkit[lab]'"
    )


def test_the_version_says_what_the_commands_lack(monkeypatch, capsys):
    required = [
        "torch>=2.11",
        'tyro>=0.9; extra == "lab"',
        'no-such-package[more]>=2; extra == "lab"',
        'no-other-package; extra == "test"',
    ]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: required)
    monkeypatch.setattr(sys, "argv", ["normkit", "--version"])
    assert normkit_program.main() == 0
    output, errors = capsys.readouterr()
    assert output == f"normkit {version('normkit')}\n"
    assert errors == (
        "normkit: the commands need the extra lab: pip install 'normkit[lab]' "
        "(not installed: no-such-package)\n"
    )


LONG = {
    "compare": [*TINY[:2], "--norms", "bn", "--batch-sizes", "2", "--epochs", "100000"],
    "reproduce": ["landscape", "--scale", "small"],
    "bench": ["--norms", "bn", "--budget-s", "100", "--repeats", "100000"],
}


@pytest.mark.parametrize("command", LONG)
def test_an_interrupt_ends_with_130_and_leaves_no_half_file(tmp_path, command):
    out = tmp_path / "out" if command != "bench" else tmp_path / "out" / "bench.json"
    process = subprocess.Popen(
        [sys.executable, "-m", "normkit", command, *LONG[command], "--json", "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "out").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    said = json.loads(output)
    assert said["error"].startswith("interrupted; ")
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {
        "experiment.toml",
        "records.jsonl",
    }


INSIDE_OF_AN_EXEC = """
import sys
from normkit.cli import app

app.List.run = lambda command: exec("raise KeyboardInterrupt")
sys.exit(app.run(["list"]))
"""


def test_an_interrupt_inside_of_an_exec_ends_with_130_too(tmp_path):
    """Started by -m, for Python looks at what it remembers only then."""
    (tmp_path / "interrupted.py").write_text(INSIDE_OF_AN_EXEC)
    done = subprocess.run(
        [sys.executable, "-m", "interrupted"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, done.stderr.count("interrupted")) == (130, 1), done.stderr


def test_an_interrupt_while_the_libraries_are_imported_is_no_traceback(tmp_path):
    (tmp_path / "torch.py").write_text(
        "import time\nprint('importing', flush=True)\ntime.sleep(60)"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", "import normkit_program; normkit_program.main()"],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT  # 130 in a shell
    assert errors == ""


def test_a_sweep_that_nobody_listens_to_ends_as_other_programs_do(tmp_path):
    sweep = " ".join([*TINY, "--norms bn,ln --batch-sizes 10 --out", str(tmp_path / "out")])
    command = f"{sys.executable} -m normkit compare {sweep} 2>&1 >/dev/null | head -c 10"
    done = subprocess.run(
        ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (141, "6 runs beg")
    assert (tmp_path / "out" / "records.jsonl").exists()


def test_what_a_launcher_has_set_wrongly_is_said(capsys, monkeypatch, tmp_path):
    given = {"RANK": "x", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "99999999"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert main(["compare", *TINY, "--out", str(tmp_path / "out")]) == 2
    errors = capsys.readouterr().err
    assert re.fullmatch(
        r"normkit: the processes that a launcher .* RANK=x, .* by torchrun.*\n", errors
    )


@pytest.mark.parametrize("argument", ["--version", "--help", "-h"])
def test_what_needs_no_library_is_answered_without_torch(argument):
    program = (
        "import sys, normkit_program\n"
        f"sys.argv = ['normkit', {argument!r}]\n"
        "code = normkit_program.main()\n"
        "assert not {'torch', 'numpy', 'normkit'} & set(sys.modules), 'imported'\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    expected = f"normkit {version('normkit')}" if argument == "--version" else "usage: normkit"
    assert done.stdout.startswith(expected)
    assert done.stderr == ""


def test_the_help_says_of_each_command_what_the_command_says_of_itself():
    first = {
        name: inspect.getdoc(command).split("\n\n")[0].replace("\n", " ")
        for name, command in COMMANDS.items()
    }
    assert first == normkit_program.COMMANDS
    assert all(sentence in normkit_program.help_text() for sentence in first.values())


class Importing:
    """A command that is interrupted, or not, while an extension module is imported."""

    def __init__(self, interrupted):
        self.interrupted = interrupted

    def run(self):
        try:
            raise KeyboardInterrupt if self.interrupted else OSError("no such library")
        except BaseException as error:
            raise ImportError("initialization failed") from error


def test_an_interrupt_while_an_extension_is_imported_is_one(monkeypatch, capsys):
    monkeypatch.setattr(app, "_parse", lambda given: Importing(interrupted=True))
    assert app.run(["list"]) == 130
    assert capsys.readouterr().err == "normkit: interrupted; no file is half written\n"
    monkeypatch.setattr(app, "_parse", lambda given: Importing(interrupted=False))
    with pytest.raises(ImportError, match="initialization failed"):
        app.run(["list"])


COMPLETE = """
source {script}
COMP_WORDS=({words}) COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
_tyro_normkit
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def completion(tmp_path_factory):
    done = program("--tyro-print-completion", "bash", text=True)
    assert done.returncode == 0, done.stderr
    path = tmp_path_factory.mktemp("completion") / "normkit"
    path.write_text(done.stdout)
    return path


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("normkit comp", ["compare"]),
        ("normkit reproduce --scale ''", ["tiny", "small", "paper"]),
        ("normkit compare --batch-s", ["--batch-sizes"]),
    ],
)
def test_bash_completes_commands_and_options(completion, words, expected):
    script = COMPLETE.format(script=completion, words=words)
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == expected


def test_the_completion_for_zsh_is_of_this_program():
    assert program("--tyro-print-completion", "zsh", text=True).stdout.startswith(
        "#compdef normkit\n"
    )
