"""What the engine does with a task that it does not know."""

import json
import sys
from pathlib import Path

import pytest

from normkit.errors import SpecError
from normkit.lab import task as tasks
from normkit.lab.dry_run import estimate
from normkit.lab.experiment import compare
from normkit.lab.records import sources_of
from normkit.lab.spec import Protocol, SweepSpec, TrainingSpec
from normkit.lab.task import parse_task
from normkit.lab.train import run, train
from normkit.lab.work import Upkeep

PROTOCOL = Protocol(model="mlp:depth=2:width=8", limit=40, epochs=2, task="brightness:weight=0.5")


@pytest.fixture(autouse=True)
def brightness(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    known = dict(tasks.TASKS) | {"brightness": "own_task:Brightness"}
    monkeypatch.setattr(tasks, "TASKS", known)
    parse_task.cache_clear()
    yield
    parse_task.cache_clear()
    sys.modules.pop("own_task", None)


def spec_of(**changes):
    protocol = PROTOCOL.model_copy(update=changes)
    return TrainingSpec(protocol=protocol, norm="bn", batch_size=10, seed=1)


def test_a_task_is_written_as_it_is_read():
    text = "brightness:weight=0.5:doubled=true"
    task = parse_task(text)
    assert (task.weight, task.doubled) == (0.5, True)
    assert str(task) == text
    assert str(parse_task("brightness:weight=0.1")) == "brightness"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("guess", r"there is no task 'guess'; known are classification, .*brightness"),
        ("brightness:depth=1", r"argument 'depth=1'; it takes weight=..., doubled=..., each once"),
        ("brightness:weight=1:weight=2", r"argument 'weight=2'"),
        ("brightness:weight", r"argument 'weight'"),
        ("brightness:weight=-1", r"brightness:weight was given '-1'.* give 0 or more"),
        ("brightness:doubled=perhaps", r"brightness:doubled was given 'perhaps'.* give yes or no"),
        ("classification:weight=1", r"argument 'weight=1'; it takes none"),
    ],
)
def test_what_is_no_task_is_refused(text, complaint):
    with pytest.raises(SpecError, match=complaint):
        parse_task(text)


def test_the_scores_of_a_task_are_recorded_and_nothing_else_is():
    outcome = run(spec_of()).outcome
    assert outcome.status == "finished", outcome.message
    assert set(outcome.scores) == {"nearness", "seen"}
    assert outcome.scores["seen"] == outcome.num_steps == 8
    assert outcome.epochs[0].train_accuracy is None
    assert [e.validation_scores["seen"] for e in outcome.epochs] == [4, 8]


def test_a_group_of_parameters_has_its_share_of_the_learning_rate():
    before = train(spec_of(base_lr=1e-30))
    after = train(spec_of(base_lr=1.0))
    (first, *rest), (own, *others) = before.parameters(), after.parameters()
    assert first.equal(own)
    assert not any(a.equal(b) for a, b in zip(rest, others, strict=True) if a.dim() > 1)


def test_a_killed_run_goes_on_with_the_state_of_its_task(tmp_path):
    whole = run(spec_of(base_lr=1.0))
    num_steps = 0

    def kill():
        nonlocal num_steps
        num_steps += 1
        if num_steps == 6:
            raise KeyboardInterrupt

    upkeep = Upkeep(folder=tmp_path, checkpoint_seconds=0)
    with pytest.raises(KeyboardInterrupt):
        run(spec_of(base_lr=1.0), kill, upkeep)
    assert run(spec_of(base_lr=1.0), upkeep=upkeep).outcome.scores == whole.outcome.scores
    assert whole.outcome.epochs[-1].train_loss > 0


def test_norms_are_compared_by_the_first_score(tmp_path):
    result = compare(
        "mlp:depth=2:width=8", norms=["bn", "ln"], batch_sizes=[10], seeds=[1], limit=40,
        task="brightness", recipe={"epochs": 1}, out=tmp_path,
    )  # fmt: skip
    assert result.comparison.metric == "nearness"
    lines = (tmp_path / "records.jsonl").read_text().splitlines()
    scores = [json.loads(line)["outcome"]["scores"]["nearness"] for line in lines]
    assert [row["accuracy"] for row in result.rows()] == scores
    page = result.report().read_text()
    assert "Test nearness" in page
    assert "Test accuracy" not in page
    assert "test_nearness" in (tmp_path / "results.csv").read_text()


def test_a_batch_larger_than_the_data_and_a_function_of_ones_own_are_refused(tmp_path):
    given = {"norms": ["bn"], "seeds": [1], "limit": 40, "task": "brightness", "out": tmp_path}
    with pytest.raises(SpecError, match=r"batch-sizes was given 41, but digits has 40"):
        compare("mlp:depth=2:width=8", batch_sizes=[41], **given)
    with pytest.raises(SpecError, match=r"--task brightness was given with --train"):
        compare(train=lambda *_: 0.0, batch_sizes=[2], **given)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_takes_steps_of_the_task():
    sweep = SweepSpec(protocol=PROTOCOL, norms=("bn",), batch_sizes=(10,), seeds=(1,))
    data = parse_task(PROTOCOL.task).sample(PROTOCOL).data
    (cell,) = estimate(sweep, data)
    assert cell.num_steps == 8
    assert cell.peak_bytes > 0


@pytest.mark.parametrize("name", ["search:genotype", "video:backbones", "detection:backbones"])
def test_files_that_options_name_decide_the_records(tmp_path, name):
    file = tmp_path / "weights.safetensors"
    file.write_text("one")
    given = file if "genotype" in name else tmp_path
    protocol = PROTOCOL.model_copy(update={"task": f"{name}={given}"})
    before = sources_of(protocol, None)
    file.write_text("other")
    assert sources_of(protocol, None).model_hash != before.model_hash
    assert sources_of(PROTOCOL, None).model_hash is None
