import subprocess
import sys

import pytest

from normkit.errors import SpecError
from normkit.lab.user_code import (
    absolute,
    is_reference,
    load_function,
    name_of,
    reference_of,
    source_hash,
)


def write(folder, text, name="my.py"):
    path = folder / name
    path.write_text(text)
    return path


def test_what_is_a_reference():
    assert is_reference("my.py:make")
    assert is_reference("a/my.py:make")
    assert is_reference("my.py")
    for name in ("digits", "timm:resnet18", "folder:photos", "mlp:depth=2:width=8", "vgg11"):
        assert not is_reference(name)


def test_a_function_is_imported_with_what_stands_beside_it(tmp_path):
    write(tmp_path, "VALUE = 7\n", "beside.py")
    path = write(tmp_path, "import beside\n\ndef make():\n    return beside.VALUE\n")
    assert load_function(f"{path}:make", "--model")() == 7


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        ("def make(): pass\n", "", r"after the file comes a colon and the name of a function"),
        ("def make(): pass\n", ":other", r"my.py has no such function; it has make"),
        ("x = 1\n", ":x", r"my.py has no such function; it has none"),
        ("x = (\n", ":make", r"cannot be imported: SyntaxError: .*\(my.py, line 1\)"),
        ("\nx = nothing\n", ":make", r"NameError: name 'nothing' is not defined \(my.py, line 2\)"),
        ("import no_such\n", ":make", r"ModuleNotFoundError: No module named 'no_such' \(my.py, l"),
        ("raise SystemExit(3)\n", ":make", r"cannot be imported: SystemExit: 3 \(my.py, line 1\)"),
    ],
)
def test_what_cannot_be_used_is_said_with_its_file_and_line(tmp_path, text, name, said):
    path = write(tmp_path, text)
    with pytest.raises(SpecError, match=said):
        load_function(f"{path}{name}", "--model")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SpecError, match=r"there is no file .*absent.py"):
        load_function(f"{tmp_path}/absent.py:make", "--model")


def test_the_source_hash_changes_with_the_file_and_with_what_it_imports(tmp_path):
    beside = write(tmp_path, "VALUE = 7\n", "beside.py")
    path = write(tmp_path, "from beside import VALUE\n\ndef make(): pass\n")
    write(tmp_path, "", "unrelated.py")
    first = source_hash(f"{path}:make", "digits", None)
    assert first == source_hash(f"{path}:make")
    write(tmp_path, "x = 1", "unrelated.py")
    assert source_hash(f"{path}:make") == first
    beside.write_text("VALUE = 8\n")
    second = source_hash(f"{path}:make")
    path.write_text(path.read_text() + "# another comment\n")
    assert len({first, second, source_hash(f"{path}:make")}) == 3
    assert source_hash("digits", None) is None


def test_functions_at_the_top_of_a_file_have_a_reference_and_others_a_name():
    assert reference_of(test_what_is_a_reference) == f"{__file__}:test_what_is_a_reference"
    assert reference_of(lambda: None) is None
    named = name_of(lambda: 3, "model")
    assert named.startswith("python:model:<lambda>:")
    assert load_function(named, "--model")() == 3


def test_a_name_of_another_process_is_refused():
    with pytest.raises(SpecError, match=r"known only to the process that gave it"):
        load_function("python:model:make:0123", "--model")


def test_a_file_that_was_run_is_found_again_by_others(tmp_path):
    text = (
        "from normkit.lab.user_code import name_of\n\ndef make():\n    return 5\n\n"
        "if __name__ == '__main__':\n    print(name_of(make, 'model'))\n"
    )
    path = write(tmp_path, text)
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, check=True)
    assert load_function(done.stdout.strip(), "--model")() == 5


def test_a_file_of_normkits_is_found_from_anywhere_and_keeps_its_short_name(tmp_path, monkeypatch):
    text = "normkit/lab/stochastic.py:NoisyGroupNorm"
    monkeypatch.chdir(tmp_path)
    assert absolute(text) == text
    assert load_function(text, "--own-norms").__name__ == "NoisyGroupNorm"
    own = tmp_path / "normkit" / "lab"
    own.mkdir(parents=True)
    (own / "stochastic.py").write_text("class NoisyGroupNorm: mine = True")
    assert absolute(text) == f"{own.resolve()}/stochastic.py:NoisyGroupNorm"
    assert load_function(text, "--own-norms").mine
