"""The examples run by the commands that they name, and print what stands in them."""

import os
import re
import subprocess
import sys
from difflib import SequenceMatcher
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs" / "site"))
tutorials = pytest.importorskip(
    "tutorials", reason="mkdocs is not installed: pip install '.[docs]'"
)
sys.path.pop(0)

NUMBER = re.compile(r"[+−-]?\d[\d.,]*(?:e[+-]?\d+)?")  # noqa: RUF001 - the minus of our tables
NEEDS = {
    "lightning_trainer": "lightning",
    "huggingface_trainer": "transformers",
    "accelerate_loop": "accelerate",
}


def without_numbers(text):
    """The words of each line: processors round differently, and training makes that larger."""
    return [" ".join(NUMBER.sub("#", line).split()) for line in text.strip().splitlines()]


def run(path, folder):
    source = path.read_text(encoding="utf-8")
    given = [str(path) if part.endswith(".py") else part for part in tutorials.command(source)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        given, cwd=folder, env=environment, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def shown(path):
    parts = tutorials.sections(path.read_text(encoding="utf-8"))
    return "\n".join(part.printed for part in parts if part.printed)


def percent(text, words):
    return float(re.search(rf"{words}: ([\d.]+) ?%", text)[1])


def batch_norm_is_behind(printed):
    table = dict(re.findall(r"^(bn|gn:8|ln) +([\d.]+) ±", printed, re.MULTILINE))
    assert float(table["bn"]) + 10 < min(float(table["gn:8"]), float(table["ln"]))


def calibration_keeps_more_and_training_brings_it_back(printed):
    before, plain = percent(printed, "as trained"), percent(printed, "not calibrated")
    calibrated, tuned = (percent(printed, words) for words in ("norms, calibrated", "fine-tuned"))
    assert plain + 3 < calibrated < before + 1
    assert before - 2 < tuned


def the_doctor_names_it_and_recalibration_mends_it(printed):
    assert printed.index("1. stale statistics: explains") > 0
    assert percent(printed, "in training mode") > 90 < percent(printed, "after recalibration")
    assert percent(printed, "in evaluation mode") < 70


def only_accumulated_gradients_of_batch_norm_differ(printed):
    said = re.findall(r"^(.*) is that of the whole batch: (True|False)", printed, re.MULTILINE)
    assert [what for what, is_equal in said if is_equal == "False"] == ["accumulated: the gradient"]
    assert len(said) == 5


def the_own_norm_is_right(printed):
    assert "values: True gradients: True\ngradcheck: True" in printed


CLAIMS = {
    "batch_of_two": batch_norm_is_behind,
    "pretrained_to_group_norm": calibration_keeps_more_and_training_brings_it_back,
    "bad_at_test": the_doctor_names_it_and_recalibration_mends_it,
    "small_gpus": only_accumulated_gradients_of_batch_norm_differ,
    "own_norm": the_own_norm_is_right,
}


@pytest.mark.slow
@pytest.mark.parametrize("path", tutorials.examples(), ids=lambda path: path.stem)
def test_an_example_prints_what_stands_in_it(path, tmp_path):
    needed = NEEDS.get(path.stem, "torch")
    if find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed: pip install '.[trainers]'")
    printed = run(path, tmp_path)
    lines = SequenceMatcher(None, without_numbers(printed), without_numbers(shown(path)))
    assert lines.ratio() > 0.8, f"run python docs/update_examples.py {path.stem}\n{printed}"
    for text in (printed, shown(path)):
        CLAIMS.get(path.stem, lambda _: None)(text)


def test_every_example_is_in_the_table_of_contents():
    linked = re.findall(r"\((\w+)\.py\)", (ROOT / "examples" / "README.md").read_text())
    assert sorted(linked) == [path.stem for path in tutorials.examples()]
