"""Tables of the papers: their files, quantities, runs, results, and dry runs."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from normkit.cli import main
from normkit.errors import SpecError
from normkit.lab.data.known import random_dataset
from normkit.lab.dry_run import measure_steps
from normkit.lab.experiment import _silent
from normkit.lab.figures import Curve, draw_points
from normkit.lab.models import build_model
from normkit.lab.records import Epoch
from normkit.lab.reproduce.preset import SCALES
from normkit.lab.reproduce.report import result_path
from normkit.lab.reproduce.tables.catalog import find_table, tables
from normkit.lab.reproduce.tables.dry_run import estimate_table
from normkit.lab.reproduce.tables.page import ours
from normkit.lab.reproduce.tables.quantity import At, Cells, Quantity
from normkit.lab.reproduce.tables.result import (
    Cell,
    Results,
    Run,
    conclude_table,
    read_table_result,
)
from normkit.lab.reproduce.tables.run import run_table
from normkit.lab.reproduce.tables.table import Table, read_table
from normkit.lab.spec import TrainingSpec
from normkit.lab.task import parse_task
from normkit.lab.text import MISSING
from normkit.lab.work import Upkeep, Way

EXPECTED = {
    "G-T1", "G-T2", "G-T3", "G-T4", "G-A5", "G-F2", "G-F3", "G-F4",
    "S-F1", "S-F2", "S-F3", "S-F4", "S-F5", "S-3.3", "S-3.4", "S-B", "S-A",
    "Q-T1", "Q-T2", "Q-T3", "Q-T4", "Q-T5", "Q-T6", "Q-T7", "Q-T8", "Q-F8", "Q-A",
    "H-T1", "H-T2", "H-T3", "H-F7", "H-F8", "H-GW", "Z-T1", "Z-T2", "Z-T3", "Z-T4",
    "Z-T5", "Z-T6", "Z-T7", "Q-T9", "Q-T10", "Q-T11", "Q-T12", "H-T4", "H-T5", "H-T6",
}  # fmt: skip
CELLS = Cells({"": ["BN", "GN"]}, {"": [2, 8]})
PARTS = Cells({"a": ["BN", "GN"], "b": ["BN"]}, {"a": [2, 8], "b": [4]})
SCORES = {
    At("BN", "", 2): 60.0, At("BN", "", 8): 80.0, At("GN", "", 2): 75.0, At("GN", "", 8): None,
}  # fmt: skip


def test_every_table_is_there():
    assert set(tables()) >= EXPECTED  # tables of other tasks have tests of their own


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_table_can_be_read_at_every_scale(name):
    table = tables()[name]
    for scale in SCALES:
        claims = table.claims_at(scale)  # refuses a quantity of cells that are not there
        assert len(claims) == sum(scale in claim.scales for claim in table.claims)
        for part in table.parts(scale):
            assert [part.label(norm) for norm in part.sweep.norms] == list(part.arms)
            task = parse_task(part.sweep.protocol.task)
            assert set(table.scores) <= {*task.scores, *task.further}
    assert table.claims_at("small")
    assert table.differences("paper") == table.cannot
    assert len(table.differences("small")) > len(table.cannot)


def test_differences_name_what_the_paper_says_of_each_part():
    def written(parts, small):
        values = {name: tables()["G-T2"].model_dump()[name] for name in Table.model_fields}
        paper = {"model": "vgg11", "parts": parts}
        return Table.checked(values | {"paper": paper, "small": small, "claims": ()})

    parts = {
        "a": {"data": "cifar10", "epochs": 9},
        "b": {"data": "cifar100"},
        "c": {"data": "svhn"},
    }
    table = written(parts, {"data": "digits", "augment": (), "hold_out": True, "without": ("c",)})
    assert table.differences("small") == (
        "data digits (paper: cifar10, cifar100)", "without the part c",
    )  # fmt: skip
    assert written({"a": {"data": "digits"}}, {"data": "digits"}).differences("small") == ()
    said = written(parts, {"epochs": 2, "hold_out": False}).differences("small")
    assert said == ("epochs 2 (paper: 9)", "hold out no (paper: none)")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("GN(2) - BN(2)", 15.0),
        ("BN(2) / (BN(8) - BN(2))", 3.0),
        ("BN(largest) - BN(smallest)", 20.0),
        ("spread(BN(all))", 20.0),
        ("mean(BN(all), GN(2)) * 2 + 1", 2 * (60 + 80 + 75) / 3 + 1),
        ("max(BN(2), -GN(2)) / 4", 15.0),
        ("diverged(GN(all))", 0.5),
        ("diverged(BN(all), GN(8))", 1 / 3),
    ],
)
def test_a_quantity_is_arithmetic_on_cells(text, expected):
    assert Quantity(text, CELLS)(SCORES) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("text", ["GN(8) - BN(8)", "mean(GN(all))", "min(GN(8), BN(2))"])
def test_a_quantity_of_a_run_that_diverged_is_no_number(text):
    assert math.isnan(Quantity(text, CELLS)(SCORES))


def test_parts_are_named_and_arms_that_a_part_has_not_are_passed_by():
    scores = {At("BN", "a", 2): 1.0, At("BN", "a", 8): 2.0, At("BN", "b", 4): 6.0}
    scores |= {At("GN", "a", 2): 3.0, At("GN", "a", 8): 5.0}
    assert Quantity("BN(b)", PARTS)(scores) == 6
    assert Quantity("GN(a, 8) - BN(a, largest)", PARTS)(scores) == 3
    assert Quantity("mean(BN(all))", PARTS)(scores) == 3
    assert Quantity("spread(GN(all))", PARTS)(scores) == 2


READ = Cells(
    {"a": ["BN", "GN"], "b": ["BN"]},
    {"a": [2, 8], "b": [4]},
    {"a": ["tuned", "loss"], "b": ["loss"]},
)


def test_an_option_of_a_scale_gives_way_to_that_of_its_part_and_not_to_the_papers():
    models = {p.name: p.sweep.protocol.model for p in tables()["G-A5"].parts("small")}
    assert models == {
        "A": "vgg11", "B": "vgg11", "A_stack": "vgg11:stacked=8", "B_stack": "vgg11:stacked=8"
    }  # fmt: skip
    table = tables()["G-A5"]
    plain = table.model_copy(update={"small": {**table.small, "parts": {}, "base_lr": 0.5}})
    assert {part.sweep.protocol.model for part in plain.parts("small")} == {"vgg11"}
    assert {part.sweep.protocol.base_lr for part in plain.parts("small")} == {0.5}


def test_readings_stand_beside_parts_and_batch_sizes():
    scores = {
        At("BN", "a", 2): 1.0, At("BN", "a", 8): 2.0, At("BN", "b", 4): 3.0,
        At("BN", "a", 2, "tuned"): 10.0, At("BN", "a", 8, "tuned"): 20.0,
        At("BN", "a", 2, "loss"): 100.0, At("BN", "a", 8, "loss"): 200.0,
        At("BN", "b", 4, "loss"): 300.0,
    }  # fmt: skip
    assert Quantity("BN(a, 8, tuned) - BN(a, 8)", READ)(scores) == 18
    assert Quantity("BN(tuned, smallest, a)", READ)(scores) == 10
    assert Quantity("mean(BN(loss))", READ)(scores) == 200
    assert Quantity("mean(BN(all, tuned))", READ)(scores) == 15  # b has no such reading
    assert Quantity("max(BN(b, each))", READ)(scores) == 300
    assert Quantity("mean(BN(a, 2, each))", READ)(scores) == 55
    assert math.isnan(Quantity("GN(2, tuned)", READ)(scores))
    with pytest.raises(SpecError, match="its readings \\['tuned', 'loss'\\]"):
        Quantity("BN(b, tuned)", READ)


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, 30.0), ({"on": "validation"}, 60.0)],
)
@pytest.mark.parametrize("median", [False, True])
def test_scores_are_of_the_split_that_the_preset_says(options, expected, median, record):
    def epoch(at):
        scores = {"accuracy": 0.1 * at}
        return Epoch(learning_rate=0.1, train_loss=1.0, validation_scores=scores)

    table = Table.checked({
        "name": "T", "of": "zhou", "place": "Table", "title": "t", "arms": {"BN": "bn"},
        "score": "median of the last 5 epochs" if median else "last epoch",
        "small": {}, "tiny": {}, "paper": {"batch_sizes": (10,), "seeds": (1,)} | options,
    })  # fmt: skip
    epochs = tuple(epoch(at) for at in (1, 9, 8, 2, 3, 6))
    run = record(accuracy=0.3, epochs=epochs, median_of_5=0.25)
    (part,) = table.parts("paper")
    result = conclude_table(table, "paper", [(part, Results([run], ()))])
    medians = {30.0: 25.0, 60.0: 60.0}  # of 0.9, 0.8, 0.2, 0.3 and 0.6
    assert result.cells[0].scores == [medians[expected] if median else expected]
    assert result.measured.startswith(f"{options.get('on', 'test')} accuracy, ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("GN(2", "is no arithmetic"),
        ("BN(all) - 1", "takes 'BN\\(all\\)', which is several numbers, as one"),
        ("BN(all)", "gives several numbers; take their mean"),
        ("XN(2)", "names XN\\(2\\), which the table does not have; its arms are BN, GN"),
        ("BN(4)", "asks for 4; the batch sizes are \\[2, 8\\], smallest, largest and all"),
        ("BN(a)", "asks for a; the batch sizes are"),
        ("BN[2]", "has 'BN\\[2\\]', which is neither a number nor a cell"),
        ("__import__('os')", "names __import__"),
        ("mean()", "calls a function without cells"),
        ("BN(2) ** 2", "which is neither a number nor a cell"),
    ],
)
def test_a_quantity_that_cannot_be_computed_is_refused(text, message):
    with pytest.raises(SpecError, match=message):
        Quantity(text, CELLS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("[arms]", "[arms]]"), "is no TOML file"),
        (("epochs = 1\n", "epoch = 1\n"), "names epoch; its arms are BN, GN"),
        (('measure = "error"', "measure = 1"), "measure was given 1"),
        (("[tiny.specs]\nGN = ", "[tiny.specs]\nXN = "), "names XN; its arms are BN, SN"),
    ],
)
def test_a_file_that_says_something_else_is_refused(tmp_path, change, message):
    name = "q-t8" if "measure" in change[0] or "epochs" in change[0] else "q-t2"
    text = (Path(read_table.__code__.co_filename).parents[2] / f"presets/{name}.toml").read_text()
    assert change[0] in text
    path = tmp_path / "preset.toml"
    path.write_text(text.replace(change[0], change[1], 1))
    with pytest.raises(SpecError, match=message.replace("BN, GN", "BN, SN")):
        read_table(path).parts("tiny")


def one_seed(table: Table) -> Table:
    return table.model_copy(update={"tiny": {**table.tiny, "seeds": (1,)}})


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_the_tiny_scale_of_a_table_runs_and_is_judged(name, tmp_path):
    table = one_seed(tables()[name])
    result = run_table(
        table,
        "tiny",
        folder=tmp_path,
        way=lambda folder: Way(out=folder, num_workers=1, upkeep=Upkeep(folder=folder)),
        show=_silent,
        tell=lambda note: None,
    )
    assert len(result.claims) == len(table.claims_at("tiny"))
    assert all(judged.verdict.outcome == "not decided" for judged in result.claims)  # one seed
    for cell in result.cells:
        assert len(cell.runs) == 1 or cell.part.endswith("shift")  # of running statistics
        assert all(run.score is None or 0 <= run.score <= 100 for run in cell.runs)


@pytest.mark.parametrize("parts", [(), ("a", "b")])
def test_a_table_shows_several_scores_of_a_run(parts, record):
    values = {
        "name": "T", "of": "zhou", "place": "Table", "title": "t", "arms": {"BN": "bn"},
        "scores": ("accuracy", "loss"), "small": {}, "tiny": {},
        "paper": {"batch_sizes": (10,), "seeds": (1, 2)}
        | ({"parts": {name: {} for name in parts}} if parts else {}),
    }  # fmt: skip
    table = Table.checked(values)
    names = ["a_accuracy", "a_loss", "b_accuracy", "b_loss"] if parts else ["accuracy", "loss"]
    assert table.cells("paper").parts == names
    runs = [record(seed=seed, scores={"accuracy": 0.1 * seed, "loss": 0.5}) for seed in (1, 2)]
    result = conclude_table(
        table, "paper", [(part, Results(runs, ())) for part in table.parts("paper")]
    )
    assert [cell.part for cell in result.cells] == names
    assert [cell.scores for cell in result.cells] == [[10, 20], [0.5, 0.5]] * (len(names) // 2)
    assert Quantity(f"mean(BN({names[1]}))", table.cells("paper"))(
        {At("BN", name, 10): float(at) for at, name in enumerate(names)}
    ) == 1  # fmt: skip


def test_a_score_that_a_finished_run_does_not_have_is_not_a_diverged_run(record):
    table = Table.checked({
        "name": "T", "of": "zhou", "place": "Table", "title": "t", "small": {}, "tiny": {},
        "arms": {"BN": "bn", "GN": "gn:2", "LN": "ln"}, "scores": ("robust", "clean_shift"),
        "paper": {"batch_sizes": (10,), "seeds": (1,), "task": "adversarial"},
    })  # fmt: skip
    (part,) = table.parts("paper")
    runs = [
        record("bn", scores={"robust": 0.5, "clean_shift": 0.0812}),
        record("gn:2", scores={"robust": 0.4}),
        record("ln", scores={}, status="diverged", diverged_step=3),
    ]
    result = conclude_table(table, "paper", [(part, Results(runs, ()))])
    assert ours(result)[1:] == [
        ["BN", "50.00", "0.081"], ["GN", "40.00", MISSING],
        ["LN", "1 of 1 diverged", "1 of 1 diverged"],
    ]  # fmt: skip


def test_scores_come_from_the_records_seed_by_seed(tmp_path):
    table = tables()["Q-T3"]
    way = Way(out=tmp_path, num_workers=1, upkeep=Upkeep(folder=tmp_path))
    given = {"folder": tmp_path, "show": _silent, "tell": lambda note: None}
    result = run_table(table, "tiny", way=lambda _: way, **given)
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    found = {
        (record["spec"]["norm"], record["spec"]["seed"]): 100
        - 100 * record["outcome"]["scores"]["accuracy"]
        for record in records
    }
    assert len(found) == 12
    for cell in result.cells:
        spec = table.tiny["specs"][cell.arm]
        for run in cell.runs:
            assert run.score == pytest.approx(found[spec, run.seed], abs=1e-3)
    judged = next(j for j in result.claims if j.quantity == "WS(1) - CWN(1)")
    by_hand = [found["gn:2+ws", seed] - found["gn:2+cwn", seed] for seed in (1, 2, 3)]
    assert judged.verdict.values == pytest.approx(by_hand, abs=1e-3)


def test_a_cell_says_its_interval_and_what_diverged():
    def cell(*scores):
        runs = (Run(seed=s, score=score, learning_rate=0.1) for s, score in enumerate(scores))
        return Cell(arm="BN", part="", batch_size=2, runs=tuple(runs))

    assert str(cell(1.0, 2.0, 3.0)) == "2.00 ± 2.48"  # 4.303 / sqrt(3)
    assert str(cell(1.0, None)) == "1.00 (1 of 2 diverged)"
    assert str(cell(None)) == "1 of 1 diverged"
    assert str(cell(None).model_copy(update={"reading": "reduction"})) == MISSING


def test_the_command_runs_judges_draws_and_reports_a_table(tmp_path, capsys):
    given = ["reproduce", "h-t3", "--scale", "tiny", "--workers", "1", "--out", str(tmp_path)]
    assert main(given) == 0
    output = capsys.readouterr().out
    assert output.startswith("H-T3: Huang et al., ")
    assert "smoothing" in output
    assert "the paper's" in output
    assert "XBN(mixup) - BN(mixup): " in output
    result = read_table_result(tmp_path / "reproduce-H-T3.json")
    assert ours(result)[0][1:] == ["smoothing", "mixup", "cosine", "together"]
    assert (tmp_path / "reproduce-H-T3.svg").exists()
    assert (tmp_path / "H-T3" / "mixup" / "report.html").exists()
    assert main([*given, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["preset"] == "H-T3"
    assert main(["reproduce", "--report", "--out", str(tmp_path)]) == 0
    assert "### H-T3\n" in capsys.readouterr().out


def test_parts_of_other_processes_are_named_with_the_command_that_starts_them(tmp_path, capsys):
    given = ["--scale", "paper", "--device", "cpu", "--out", str(tmp_path)]
    assert main(["reproduce", "Z-T2", *given]) == 2
    errors = capsys.readouterr().err
    assert "Z-T2 is trained by 8 processes together, and 1 was started" in errors
    assert "torchrun --nproc-per-node 8 -m normkit reproduce Z-T2 --scale paper" in errors


def test_missing_data_are_said_with_their_place(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("NORMKIT_DATA", str(tmp_path / "data"))
    given = ["--scale", "paper", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert main(["reproduce", "q-t3", *given]) == 2
    errors = capsys.readouterr().err
    assert f"{tmp_path / 'data' / 'imagenet'} does not exist; put folders train and val" in errors
    assert "Traceback" not in errors


def test_tables_are_listed(capsys):
    assert main(["reproduce", "z-T2", "--list"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("Z-T2, Z-F1: ResNet-50 on ImageNet, ")
    assert "BGN is far ahead of batch norm at the smallest batch (Table 2)" in output
    assert find_table("nothing") is None


ROWS = (
    "G-T1 G-T2 G-T3 G-T4 G-F2 G-F3 G-F4 G-A5 S-F1 S-F2 S-F3 S-F4 S-F5 S-3.3 S-3.4 S-B Q-T1 Q-T2 "
    "Q-T3 Q-T4 Q-T5 Q-T6 Q-T7 Q-T8 Q-F4 Q-F5 Q-F6 Q-F8 Q-A S-A H-F2 H-F3 H-F4 H-F5 H-F7 H-F8 H-T1 "
    "H-T2 H-T3 H-GW Z-T1 Z-T2 Z-F1"
)
"""Rows of the papers' tables and figures on classification, and of their analyses."""


def test_every_row_has_a_preset_that_is_listed(capsys):
    assert main(["reproduce", "--list"]) == 0
    heads = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    listed = {name for head in heads if not head.startswith(" ") for name in head.split(", ")}
    assert {*ROWS.split()} <= listed
    for name in ROWS.split():
        assert main(["reproduce", name.lower(), "--list"]) == 0
        assert name in capsys.readouterr().out.partition(":")[0].split(", ")


def test_a_dry_run_measures_each_cell_and_says_which_data_are_missing(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("NORMKIT_DATA", str(tmp_path))
    table = tables()["G-T1"].model_copy(update={"paper": {**tables()["G-T1"].paper, "limit": 64}})
    monkeypatch.setattr("normkit.cli.reproduce.find_table", lambda name: table)
    out = tmp_path / "out"
    assert main(["reproduce", "G-T1", "--scale", "paper", "--dry-run", "--out", str(out)]) == 0
    output = capsys.readouterr().out
    assert "G-T1 plain at scale paper, on cifar10" in output
    assert f"missing data: {tmp_path / 'cifar-10-batches-py'} is not there" in output
    assert "Nothing" in output
    assert not out.exists()


@pytest.mark.parametrize(("hold_out", "num_train"), [(False, 50_000), (True, 45_000)])
def test_a_dry_run_counts_the_steps_of_the_whole_training(hold_out, num_train):
    paper = {**tables()["G-T1"].paper, "hold_out": hold_out, "accumulate": 5}
    table = tables()["G-T1"].model_copy(
        update={"paper": {**paper, "arms": ("BN",), "parts": {"plain": {"weight_decay": 0.0}}}}
    )
    (part,) = estimate_table(table, "paper")
    (cell,) = part.cells
    assert cell.num_steps == 20 * math.ceil(num_train / (128 * 5))


def test_a_dry_run_of_several_processes_measures_one_of_them():
    table = tables()["Z-T2"]
    changed = {"model": "small-resnet:width=4", "data": "cifar10", "image_size": None}
    paper = {**table.paper, **changed, "batch_sizes": (2,), "arms": ("BN",)}
    (part,) = estimate_table(table.model_copy(update={"paper": paper}), "paper")
    (cell,) = part.cells
    assert cell.num_steps == 120 * 50_000 // (2 * table.paper["processes"])
    assert cell.step_time_s > 0


def test_records_of_other_processes_must_be_whole_and_of_this_code(tmp_path, monkeypatch):
    tiny = {**tables()["Q-T8"].tiny, "seeds": (1,)}
    table = tables()["Q-T8"].model_copy(update={"tiny": tiny})
    given = {"folder": tmp_path, "show": _silent, "tell": lambda note: None}
    given["way"] = lambda folder: Way(out=folder, num_workers=1, upkeep=Upkeep(folder=folder))
    assert run_table(table, "tiny", **given).cells
    parts = {name: dict(part) for name, part in tiny["parts"].items()}
    parts["micro"]["processes"] = 2
    split = table.model_copy(update={"tiny": {**tiny, "parts": parts}})
    command = "Q-T8 micro is trained by 2 processes together, and 1 was started; .*torchrun"
    with pytest.raises(SpecError, match=command):  # what is there was trained by one process
        run_table(split, "tiny", **given)
    path = tmp_path / "Q-T8" / "micro" / "records.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:  # as if two had trained it; they cannot be started here
        line["spec"]["protocol"]["processes"] = 2
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run_table(split, "tiny", **given).cells
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[1:]))
    with pytest.raises(SpecError, match=command):
        run_table(split, "tiny", **given)
    for line in lines:
        line["code_hash"] = "of another"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(SpecError, match=command):
        run_table(split, "tiny", **given)


def test_a_dry_run_of_networks_that_are_given_counts_evaluations(tmp_path, monkeypatch):
    monkeypatch.setenv("NORMKIT_DATA", str(tmp_path))
    paper = dict(tables()["S-F1"].paper)
    part = paper["parts"]["mobilenet"] | {"data": "cifar10", "image_size": None}
    table = tables()["S-F1"].model_copy(update={"paper": {**paper, "parts": {"mobilenet": part}}})
    (found,) = estimate_table(table, "paper")
    assert str(tmp_path / "weights" / "mobilenet_v2.safetensors") in found.missing
    assert "cifar-10-batches-py is not there" in found.missing
    num_states = 7  # plain and six weights
    assert found.cells[0].num_steps == math.ceil(num_states * (5_000 + 10_000) / 128)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_the_paper_scale_can_be_built_exactly(name):
    built = set()
    for part in tables()[name].parts("paper"):
        protocol = part.sweep.protocol
        task = parse_task(protocol.task)
        data = task.sample(protocol).data
        key = protocol.task, protocol.model, data.input_shape, data.num_classes
        if key in built:
            continue
        built.add(key)
        options = {"norm": part.sweep.norms[-1], "batch_size": part.sweep.batch_sizes[-1]}
        if task.name == "classification":
            sizes = {"num_classes": data.num_classes, "input_shape": data.input_shape}
            with torch.device("meta"):
                network = build_model(protocol.model, **sizes, **options)
            assert network.norms
        else:  # some of these look at values while they are built, and take long: one of a table
            assert task.build(TrainingSpec(protocol=protocol, **options), data).norms
            break


def test_random_pictures_have_the_sizes_of_the_data_set():
    found = random_dataset("imagenet")
    assert (len(found.train), len(found.validation), len(found.test)) == (
        1153050,
        128117,
        50000,
    )
    assert found.train.take(torch.arange(2)).inputs.shape == (2, 3, 224, 224)
    (nasnet,) = (part for part in tables()["S-F1"].parts("paper") if part.name == "nasnet")
    protocol = nasnet.sweep.protocol
    assert parse_task(protocol.task).sample(protocol).data.input_shape == (3, 331, 331)
    with pytest.raises(SpecError, match="the sizes of 'digits' are not known; known are cifar10"):
        random_dataset("digits")


def test_a_dry_run_measures_equal_steps_of_several_parts_once(monkeypatch):
    measured = []

    def counted(run, protocol, batch_size, most_examples):
        measured.append((protocol.task, batch_size))
        return measure_steps(run, protocol, batch_size, most_examples)

    monkeypatch.setattr("normkit.lab.dry_run.measure_steps", counted)
    task = "domain-adaptation:target="
    table = Table.checked({
        "name": "T", "of": "zhou", "place": "Table", "title": "t", "arms": {"BN": "bn"},
        "small": {}, "tiny": {},
        "paper": {
            "data": "digits", "model": "mlp:depth=2:width=8", "epochs": 2, "batch_sizes": (12, 14),
            "seeds": (1, 2), "parts": {
                "rotated": {"task": f"{task}rotated"},
                "blurred": {"task": f"{task}blurred:distance=0.05", "limit": 200, "seeds": (1,)},
                "source": {"task": f"{task}blurred:method=source", "limit": 200},
            },
        },
    })  # fmt: skip
    found = {part.part: part.cells for part in estimate_table(table, "paper")}
    assert [task.partition(":")[2] for task, _ in measured] == [
        "target=rotated", "target=rotated", "target=blurred:method=source",
        "target=blurred:method=source",
    ]  # fmt: skip
    assert [cell.step_time_s for cell in found["rotated"]] == [
        cell.step_time_s for cell in found["blurred"]
    ]
    num_source = 100  # every second one of 200
    assert [cell.num_steps for cell in found["blurred"]] == [
        2 * -(-num_source // 12), 2 * -(-num_source // 14),
    ]  # fmt: skip
    assert [cell.num_runs for cell in found["rotated"]] == [2, 2]
    assert [cell.num_runs for cell in found["blurred"]] == [1, 1]
    assert found["rotated"][0].num_steps > found["blurred"][0].num_steps


def test_columns_in_no_order_are_points_beside_each_other_and_no_line():
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots()
    curves = [
        Curve(label="bn", x=[0, 1], values=np.array([[1.0, 2.0], [3.0, 4.0]])),
        Curve(label="gn", x=[1], values=np.array([[5.0], [9.0]])),
    ]
    draw_points(axes, curves, {"title": "", "x": "", "y": "%"})
    bn, gn = axes.containers
    assert bn[0].get_linestyle() == gn[0].get_linestyle() == "None"
    assert [point.tolist() for point in bn[0].get_data()] == [[-0.15, 0.85], [2.0, 3.0]]
    assert [point.tolist() for point in gn[0].get_data()] == [[1.15], [7.0]]
    (ends,) = (bars.get_segments() for bars in gn[2])
    assert ends[0][:, 1].tolist() == [5.0, 9.0]
    plt.close(figure)


def test_arms_are_columns_where_they_are_fewer_than_columns_that_do_not_fit():
    folder = Path(__file__).parents[3] / "docs" / "records"
    wide, narrow = (ours(read_table_result(result_path(folder, name))) for name in ("S-F1", "Z-T3"))
    assert wide[0] == ["", "BN"]
    assert wide[1][0].startswith("resnet batch 64")
    assert narrow[0][:2] == ["", "batch 32"]
    assert [row[0] for row in narrow[1:]] == ["BN", "GN", "PN", "LN", "BGN"]
