import csv
import dataclasses
import json
import re
import sys
from collections import Counter
from contextlib import nullcontext

import pandas as pd
import pytest
import torch
from torch import nn

from normkit.cli.app import run as command
from normkit.cli.compare import Compare
from normkit.errors import DataError, NormError, PackageError, SpecError
from normkit.lab import Recipe, compare, experiment
from normkit.lab.comparison import best_rates, due_runs
from normkit.lab.config import ALSO, KNOWN, options_of, read_config, sweep_of, write_config
from normkit.lab.data import open_data
from normkit.lab.dry_run import estimate
from normkit.lab.experiment import _notes_on, plan
from normkit.lab.records import Sources, TrainingRecord, changed_runs, read_records
from normkit.lab.spec import Protocol, SweepSpec
from normkit.lab.work import RunOptions
from pictures import fill

ALSO_NAMED = {name: also for also, name in ALSO.items()}
FAST = {
    "norms": ["bn", "ln"],
    "batch_sizes": [8],
    "seeds": [1, 2],
    "recipe": Recipe(epochs=1),
    "workers": 1,
}


class Net(nn.Module):
    """A user's network, whose norm is torch's."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 10)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


def pictures(num):
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(256, (num, 1, 8, 8), dtype=torch.uint8, generator=generator)
    return torch.utils.data.TensorDataset(values, torch.arange(num) % 10)


def test_a_users_network_and_data_are_compared(tmp_path):
    data = {"train": pictures(40), "validation": pictures(20), "test": pictures(20)}
    result = compare(Net, data, **FAST, out=tmp_path)
    assert [(row["norm"], row["batch_size"], row["num_finished"]) for row in result.rows()] == [
        ("bn", 8, 2), ("ln", 8, 2)
    ]  # fmt: skip
    (first, *_) = result.records
    assert first.outcome.norms[0].name == "norm"
    assert first.spec.protocol.model == f"{__file__}:Net"
    assert isinstance(result.frame(), pd.DataFrame)
    assert len(result.frame()) == 2
    assert result.report().read_text().startswith("<!doctype html>")


def test_a_function_without_a_name_of_its_own_serves_as_well(tmp_path):
    result = compare(lambda: Net(), "digits", **FAST, limit=40, out=tmp_path)  # noqa: PLW0108
    assert all(record.outcome.status == "finished" for record in result.records)


def test_runs_with_a_record_are_not_repeated_until_the_source_changes(tmp_path):
    path = tmp_path / "my.py"
    text = (
        "from torch import nn\n\ndef make():\n    return nn.Sequential(nn.Flatten(), "
        "nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))\n"
    )
    path.write_text(text)
    out = tmp_path / "out"
    options = {**FAST, "limit": 40, "out": out}

    def num_records():
        return len(read_records(out, TrainingRecord).records)

    compare(f"{path}:make", **options)
    compare(f"{path}:make", **options)
    assert num_records() == 4
    path.write_text(text + "# edited\n")
    sweep = SweepSpec(
        protocol=Protocol(model=f"{path}:make", limit=40, epochs=1),
        norms=("bn", "ln"), batch_sizes=(8,), seeds=(1, 2),
    )  # fmt: skip
    found = plan(sweep, out)
    assert len(found.missing) == 4
    (note,) = found.notes
    assert note == (
        "4 of these runs have earlier records of other versions of your files, which are kept and "
        "left out; they are run anew"
    )
    with pytest.warns(UserWarning, match="4 of these runs have earlier records of other version"):
        result = compare(f"{path}:make", **options)
    assert num_records() == 8
    assert {r.model_hash for r in result.records} == {found.sources.model_hash}


def test_a_note_says_what_has_changed_of_which_runs(record):
    """Each run is counted once, by its latest record that is left out."""
    sources = Sources(code_hash="0" * 12, data_hash="d", model_hash="m")

    def made(seed, **hashes):
        return record(seed=seed).model_copy(update={"data_hash": "d", "model_hash": "m"} | hashes)

    first, second, third = (made(seed).spec.key for seed in (1, 2, 3))
    specs = [made(seed).spec for seed in (1, 2, 3, 4)]
    records = [
        made(1, data_hash="older", code_hash="older"), made(1, data_hash="old"), made(1),
        made(2, model_hash="old"), made(3, model_hash=None), made(4), made(5, data_hash="old"),
    ]  # fmt: skip
    changed = changed_runs(specs, records, sources)
    assert changed == {first: ("data",), second: ("files",), third: ("files",)}
    one, two = _notes_on(changed)
    assert one == (
        "1 of these runs has earlier records of other data, which are kept and left out; it is run "
        "anew"
    )
    assert two.startswith("2 of these runs have earlier records of other versions of your files,")


def test_a_picture_that_is_gone_is_a_new_run(tmp_path):
    fill(tmp_path / "photos", per_class=20)
    options = {**FAST, "out": tmp_path / "out", "seeds": [1]}
    compare("mlp:depth=2:width=8", f"folder:{tmp_path}/photos", **options)
    (tmp_path / "photos" / "cat" / "0.png").unlink()
    said = "2 of these runs have earlier records of other data, which are kept and left out"
    with pytest.warns(UserWarning, match=said):
        result = compare("mlp:depth=2:width=8", tmp_path / "photos", **options)
    assert f"\nnote: {said}" in str(result)
    assert f"<b>Note:</b> {said}" in result.report().read_text()
    with (tmp_path / "out" / "results.csv").open() as file:
        assert [row["changed"] for row in csv.DictReader(file)] == ["data", "data"]
    records = read_records(tmp_path / "out", TrainingRecord).records
    assert len(records) == 4
    assert len({record.data_hash for record in records}) == 2


def own_training(apply_norm, batch_size, seed, report):
    """A regression by a loop of one's own, in plain torch."""
    torch.manual_seed(seed)
    net = apply_norm(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)))
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    x = torch.randn(64, 4)
    for index in torch.arange(64).split(batch_size):
        loss = (net(x[index]) - x[index].sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        report(loss=loss.item())
    return {"error": loss.item(), "steps": 64 / batch_size}


def test_a_training_of_ones_own_is_compared(tmp_path):
    steps = []

    class Counting:
        def on_steps(self, spec, num_steps):
            steps.append(num_steps)

        def on_record(self, record):
            pass

    result = compare(
        train=own_training, norms=["bn", "ln"], batch_sizes=[8, 16], seeds=[1, 2], out=tmp_path,
        show=lambda specs, num: nullcontext(Counting()),
    )  # fmt: skip
    assert [row["num_finished"] for row in result.rows()] == [2, 2, 2, 2]
    by_spec = {(r.spec.norm, r.spec.batch_size, r.spec.seed): r for r in result.records}
    torch.manual_seed(1)

    def plain(net):
        return net

    expected = own_training(plain, 16, 1, lambda **_: None)["error"]
    assert by_spec["bn", 16, 1].outcome.scores["error"] == pytest.approx(expected, rel=1e-5)
    assert by_spec["ln", 16, 1].outcome.scores["error"] != pytest.approx(expected, rel=1e-5)
    assert by_spec["bn", 8, 2].outcome.num_steps == 8


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda apply_norm, batch_size, seed, report: apply_norm(Net()), r"returned Net; it ret"),
        (lambda apply_norm, batch_size, seed, report: 0.5, r"never called apply_norm\(model\)"),
    ],
)
def test_a_training_that_breaks_its_rule_is_a_failed_run_that_says_so(tmp_path, function, said):
    result = compare(train=function, norms=["bn"], batch_sizes=[2], seeds=[1], out=tmp_path)
    (record,) = result.records
    assert record.outcome.status == "failed"
    assert re.search(said, record.outcome.message)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"model": lambda: 3}, r"gave a int; it must return an nn.Module"),
        ({"model": lambda: 1 / 0}, r"failed: ZeroDivisionError: .*\(test_experiment.py, line"),
        ({"model": lambda: nn.Linear(2, 2)}, r"cannot take inputs of shape \(1, 8, 8\)"),
        ({"batch_sizes": [41]}, r"--batch-sizes was given 41, but digits has 40 training"),
        ({"precision": "16-mixed"}, r"16-mixed needs a GPU"),
        ({"data": "folder:/no/such"}, r"/no/such is not a folder"),
        ({"norms": ["xyz"]}, r"xyz"),
        ({"drop_path": 0.1}, r"has no drop path to set to 0.1; timm's networks have"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(tmp_path, given, said):
    options = {"model": "mlp:depth=2:width=8", "data": "digits", **FAST, "limit": 40} | given
    with pytest.raises(NormError, match=said):
        compare(options.pop("model"), options.pop("data"), **options, out=tmp_path / "out")
    assert not (tmp_path / "out" / "records.jsonl").exists()


def test_each_cell_gets_the_learning_rate_that_is_best_on_validation_data(tmp_path):
    rates = [1e-6, 0.3, 1e9]
    result = compare(
        "mlp:depth=2:width=16", **(FAST | {"recipe": Recipe(epochs=3)}), limit=200, out=tmp_path,
        tune_lr=rates,
    )  # fmt: skip
    assert len(read_records(tmp_path, TrainingRecord).records) == 2 * 2 * 3
    assert {row["base_lr"] for row in result.rows()} == {0.3}
    assert {record.spec.protocol.base_lr for record in result.records} == {0.3}


def test_seeds_that_do_not_choose_run_with_the_best_rate_only(tmp_path):
    options = {
        "norms": ["bn", "gn:8"], "batch_sizes": [8], "seeds": [3, 1, 2], "limit": 200,
        "recipe": Recipe(epochs=3), "tune_lr": [1e-6, 0.3, 1e9], "tune_seeds": 1,
        "out": tmp_path,
    }  # fmt: skip
    result = compare("mlp:depth=2:width=16", **options)
    ran = Counter(
        (r.spec.norm, r.spec.seed, r.spec.protocol.base_lr)
        for r in read_records(tmp_path, TrainingRecord).records
    )
    expected = {(n, 3, rate) for n in options["norms"] for rate in options["tune_lr"]}
    expected |= {(norm, seed, 0.3) for norm in options["norms"] for seed in (1, 2)}
    assert ran == dict.fromkeys(expected, 1)
    assert {(row["base_lr"], row["num_finished"]) for row in result.rows()} == {(0.3, 3)}
    again = compare("mlp:depth=2:width=16", **options)
    assert len(read_records(tmp_path, TrainingRecord).records) == len(expected)
    assert again.rows() == result.rows()
    foreseen = compare("mlp:depth=2:width=16", **options | {"out": "unused"}, dry_run=True)
    assert [row["num_runs"] for row in foreseen.rows()] == [5, 5]


def test_a_rate_is_chosen_once_all_rates_of_its_cell_have_run(tmp_path):
    sweep = SweepSpec(
        norms=("bn", "ln"), batch_sizes=(8,), seeds=(1, 2), learning_rates=(0.1, 0.2), tune_seeds=1
    )
    template = compare("mlp:depth=2:width=8", **FAST, limit=40, out=tmp_path).records[0]

    def record(norm, rate, score, seed=1):
        wanted = (norm, seed, rate)
        spec = next(s for s in sweep.runs() if (s.norm, s.seed, s.protocol.base_lr) == wanted)
        epoch = template.outcome.epochs[-1].model_copy(
            update={"validation_scores": {"accuracy": score}}
        )
        outcome = template.outcome.model_copy(update={"epochs": (epoch,)})
        return template.model_copy(update={"spec": spec, "outcome": outcome})

    records = [record("bn", 0.1, 0.4), record("bn", 0.2, 0.3), record("ln", 0.2, 0.9)]
    later = [s for s in due_runs(sweep, records) if s.seed == 2]
    assert [(s.norm, s.protocol.base_lr) for s in later] == [("bn", 0.1)]
    assert sum(s.seed == 1 for s in due_runs(sweep, records)) == 4
    records.append(record("bn", 0.1, 0.0, seed=2))  # does not choose
    chosen = best_rates(sweep, records)
    assert [r.spec.protocol.base_lr for r in chosen] == [0.1, 0.1, 0.2]
    assert [s for s in due_runs(sweep, records) if s.seed == 2] == later


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tune_seeds": 1}, "--tune-seeds was given without --tune-lr"),
        ({"tune_seeds": 3, "tune_lr": [0.1]}, "--tune-seeds was given 3, but there are 2 seeds"),
        ({"tune_seeds": 0, "tune_lr": [0.1]}, "tune_seeds was given 0: input should be greater"),
    ],
)
def test_a_wrong_number_of_seeds_that_choose_is_refused(given, said, tmp_path):
    with pytest.raises(SpecError, match=said):
        compare("mlp:depth=2:width=8", **FAST, **given, limit=40, out=tmp_path)


def test_an_experiment_is_written_whole_and_runs_again_by_itself(tmp_path):
    sweep = SweepSpec(
        protocol=Protocol(
            model="vgg11", steps=30, lr_batch_size=None, augment=("crop", "flip"),
            norm_weight_decay=0.0, compile=True, schedule="cosine",
        ),
        norms=("bn", "none", "xbn/gn:64"), batch_sizes=(2, 8), seeds=(1,), learning_rates=(0.1, 1),
        tune_seeds=1,
    )  # fmt: skip
    options = RunOptions(out="there", workers=3, save_weights=True, loggers=("csv",))
    path = write_config(tmp_path / "experiment.toml", sweep, options)
    values = read_config(path)
    assert sweep_of(values, str) == sweep
    assert options_of(values, str) == options


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("epoch = 3", SpecError, r"has epoch, which no option is named; known are norms"),
        ("epochs = ", DataError, r"is no TOML file"),
        ("epochs = 0", SpecError, r"epochs was given 0"),
    ],
)
def test_an_experiment_that_breaks_a_rule_says_so(tmp_path, text, error, said):
    path = tmp_path / "x.toml"
    path.write_text(text)
    with pytest.raises(error, match=said):
        sweep_of(read_config(path) | {"norms": ["bn"], "batch_sizes": [2], "seeds": [1]}, str)


def test_without_pandas_its_rows_are_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pandas", None)
    result = compare("mlp:depth=2:width=8", **FAST, limit=40, out=tmp_path)
    with pytest.raises(PackageError, match=r"frame\(\) needs pandas: pip install pandas; or"):
        result.frame()
    assert len(result.rows()) == 2


def test_python_and_the_command_line_have_the_same_options():
    of_command = {field.name for field in dataclasses.fields(Compare)}
    of_command -= {"config", "json_output", "dry_run"}
    switched_off = {name for name in of_command if name.startswith("no_")}
    made_by_the_launcher = {"processes"}
    assert of_command - switched_off == {ALSO_NAMED.get(n, n) for n in KNOWN} - made_by_the_launcher


def test_python_takes_every_option_of_the_command_line(tmp_path):
    """What is asked for reaches the file of the experiment, from where it can be repeated."""
    given = {
        "norms": ["bn", "ln"], "batch_sizes": 8, "seeds": range(1, 3), "limit": 40,
        "out": tmp_path / "out", "workers": 1, "data_workers": 0, "checkpoint_seconds": 7,
        "save_weights": True, "loggers": "csv", "threads": 1, "device": "cpu",
    }  # fmt: skip
    result = compare("mlp:depth=2:width=8", recipe={"epochs": 1}, **given)
    written = read_config(tmp_path / "out" / "experiment.toml")
    changed = {"batch_sizes": (8,), "seeds": (1, 2), "loggers": ("csv",)}
    assert (
        written.items()
        >= (
            given | changed | {"norms": ("bn", "ln"), "epochs": 1, "out": str(tmp_path / "out")}
        ).items()
    )
    assert len(list((tmp_path / "out" / "weights").iterdir())) == 4
    assert len(list((tmp_path / "out" / "logs").iterdir())) == 4
    command = f"normkit compare --config {tmp_path / 'out' / 'experiment.toml'}"
    assert command in re.sub("</?span>", "", result.report().read_text())


def test_a_file_of_options_gives_defaults_and_arguments_win(tmp_path):
    path = tmp_path / "exp.toml"
    path.write_text(
        f'model = "mlp:depth=2:width=8"\nnorms = "bn,ln"\nbatch-sizes = [8]\nseeds = 1\n'
        f'limit = 40\nsteps = 5\nworkers = 1\nschedule = "cosine"\nout = "{tmp_path}/there"\n'
    )
    first = compare(config=path)
    assert (first.comparison.seeds, first.folder) == ((1,), tmp_path / "there")
    assert first.records[0].spec.protocol.steps == 5
    second = compare(config=path, norms="bn", recipe={"epochs": 1}, out=tmp_path / "here")
    (record,) = second.records
    assert second.folder == tmp_path / "here"
    assert (record.spec.protocol.epochs, record.spec.protocol.steps) == (1, None)
    assert record.spec.protocol.schedule == "cosine"
    (whole,) = compare(config=path, norms="bn", recipe=Recipe(epochs=1)).records
    assert whole.spec.protocol.schedule == "list"  # a whole recipe has all of its fields


def test_a_dry_run_in_python_is_the_table_of_the_command(tmp_path, capsys):
    options = {"norms": ["bn", "ln"], "batch_sizes": [8], "seeds": [1, 2], "limit": 40}
    found = compare("mlp:depth=2:width=8", **options, dry_run=True, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert [(row["norm"], row["num_runs"], row["num_steps"]) for row in found.rows()] == [
        ("bn", 2, 4 * 5), ("ln", 2, 4 * 5)
    ]  # fmt: skip
    arguments = ["--norms", "bn,ln", "--batch-sizes", "8", "--seeds", "1,2", "--limit", "40"]
    assert command(["compare", "--model", "mlp:depth=2:width=8", *arguments, "--dry-run"]) == 0

    def without_numbers(text):
        return re.sub(r"[\d.]+ (ms|s|min|kB|MB)", "", re.sub(" +", " ", text))

    assert without_numbers(capsys.readouterr().out) == without_numbers(f"{found}\n")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"cluster": "slurm"}, r"cluster was given 'slurm'.*; give ray, or none"),
        ({"cluster": "ray", "loggers": ["csv"]}, r"--loggers was given with --cluster ray"),
        ({"checkpoint_seconds": -1}, r"checkpoint_seconds was given -1"),
        ({"loggers": ["pen"]}, r"no logger 'pen'; known are tensorboard"),
        ({"epoch": 3}, r"compare\(\) has epoch, which no option is named; known are norms, batch"),
        ({"config": "absent.toml"}, r"absent.toml cannot be read"),
        ({"recipe": {"epoch": 3}}, r"'epoch' is no field; known are epochs"),
    ],
)
def test_an_option_that_breaks_its_rule_is_refused(tmp_path, given, said):
    with pytest.raises(NormError, match=said):
        compare("mlp:depth=2:width=8", **(FAST | given), limit=40, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dry_run_counts_steps_and_trains_nothing():
    sweep = SweepSpec(
        protocol=Protocol(model="small-resnet", limit=100, epochs=3, accumulate=2),
        norms=("bn", "gn:4"), batch_sizes=(4, 16), seeds=(1, 2),
    )  # fmt: skip
    found = estimate(sweep, open_data("digits", 100))
    assert [(e.norm, e.batch_size, e.num_runs) for e in found] == [
        ("bn", 4, 2), ("bn", 16, 2), ("gn:4", 4, 2), ("gn:4", 16, 2)
    ]  # fmt: skip
    assert [e.num_steps for e in found[:2]] == [3 * 13, 3 * 4]  # 25 and 7 batches, two a step
    assert found[0].peak_bytes < found[1].peak_bytes
    assert found[0].duration_s == 2 * 39 * found[0].step_time_s > 0


def test_pretrained_weights_are_where_every_run_starts(tmp_path):
    """Without a step that matters the accuracy is that of the file, by its own norms."""
    trained = compare(
        "small-resnet:width=8", **(FAST | {"recipe": Recipe(epochs=8), "norms": ["bn"]}),
        limit=600, out=tmp_path / "first", save_weights=True,
    )  # fmt: skip
    (path, *_) = (tmp_path / "first" / "weights").iterdir()
    started = compare(
        "small-resnet:width=8", norms=["bn", "gn:4"], batch_sizes=[8], seeds=[1], limit=600,
        recipe=Recipe(steps=1, base_lr=1e-12), weights=str(path), out=tmp_path / "second",
    )  # fmt: skip
    accuracies = {row["norm"]: row["accuracy"] for row in started.rows()}
    expected = trained.rows()[0]["accuracy"]
    assert accuracies["bn"] == pytest.approx(expected, abs=0.08)
    assert accuracies["gn:4"] > 0.5  # calibrated: a plain swap is at chance


def test_records_say_everything_in_json(tmp_path):
    compare("mlp:depth=2:width=8", **FAST, limit=40, out=tmp_path)
    for line in (tmp_path / "records.jsonl").read_text().splitlines():
        found = json.loads(line)
        assert {"code_hash", "data_hash", "model_hash"} <= found.keys()


def test_records_of_who_held_the_folder_before_are_not_made_again(tmp_path, monkeypatch):
    """Another process ends while this one is checking: its records are seen under the lock."""
    arguments = ["mlp:depth=2:width=8"]
    options = {**FAST, "limit": 40, "out": tmp_path / "out"}
    real = experiment.plan

    def slow(sweep, out):
        found = real(sweep, out)
        monkeypatch.setattr(experiment, "plan", real)
        compare(*arguments, **options)  # the other process
        return found

    monkeypatch.setattr(experiment, "plan", slow)
    compare(*arguments, **options)
    assert len(read_records(tmp_path / "out", TrainingRecord).records) == 4
