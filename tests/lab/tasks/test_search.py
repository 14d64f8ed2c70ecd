"""The search for cells, and the training of what is found."""

import math
from dataclasses import replace
from functools import partial
from threading import Thread
from typing import Any

import pytest
import torch
from torch.nn import functional

from normkit.errors import SpecError
from normkit.lab.check import check, num_steps
from normkit.lab.course import Course
from normkit.lab.data import open_data
from normkit.lab.dry_run import estimate
from normkit.lab.lock import in_turn
from normkit.lab.models.darts import Cell, CellNetwork
from normkit.lab.models.genotype import GENOTYPES, read_genotype
from normkit.lab.resume import Checkpoint
from normkit.lab.spec import Protocol, SweepSpec, TrainingSpec
from normkit.lab.task import parse_task
from normkit.lab.tasks import searching as searching_module
from normkit.lab.tasks.cell_figure import draw_genotype
from normkit.lab.tasks.searching import ArchitectureSteps, SearchRun, kept_at
from normkit.lab.train import run, train

SMALL = "search:search_epochs=1:search_cells=1:search_channels=2:rate=0.1:auxiliary=0"
GIVEN = "search:genotype=darts-v2"

OWN = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self, num_classes, cell):
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 3, padding=1)
        self.first = cell((2, 2), 2, halves=True)
        self.second = cell((2, self.first.num_channels), 2, after_halving=True)
        self.head = nn.Linear(self.second.num_channels, num_classes)
    def forward(self, x):
        x = self.stem(x)
        y = self.first(x, x)
        return self.head(self.second(x, y).mean((2, 3)))
def make(num_classes, cell):
    return Net(num_classes, cell)
def plain(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes), nn.BatchNorm1d(num_classes))
def wrong(cell):
    return 3
"""


@pytest.fixture(autouse=True)
def searched(tmp_path, monkeypatch):
    monkeypatch.setenv("NORMKIT_SEARCHED", str(tmp_path / "searched"))
    return tmp_path / "searched"


def protocol_of(task=SMALL, **changes):
    given = {"model": "darts:cells=1:channels=2", "limit": 32, "epochs": 1, "lr_batch_size": None}
    return Protocol(**{**given, "base_lr": 0.05, "task": task, **changes})


def spec_of(task=SMALL, norm="bn", batch_size=8, seed=1, **changes):
    protocol = protocol_of(task, **changes)
    return TrainingSpec(protocol=protocol, norm=norm, batch_size=batch_size, seed=seed)


def sweep_of(task=SMALL, norms=("bn",), batch_sizes=(8,), **changes):
    protocol = protocol_of(task, **changes)
    return SweepSpec(protocol=protocol, norms=norms, batch_sizes=batch_sizes, seeds=(1,))


def own_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(OWN)
    return file


def test_cells_are_searched_kept_and_drawn_and_their_network_is_trained(searched):
    outcome = run(spec_of()).outcome
    assert outcome.status == "finished", outcome.message
    (kept,) = searched.glob("*.json")
    genotype = read_genotype(str(kept))
    assert "reduction cell" in kept.with_suffix(".svg").read_text()
    assert str(genotype) in kept.with_suffix(".jsonl").read_text()
    assert not list(searched.glob("*.safetensors"))  # a search that has ended needs none
    again = run(spec_of(f"search:genotype={kept}:auxiliary=0")).outcome
    assert again.model_dump() == outcome.model_dump()


def test_a_search_is_found_again_by_runs_that_differ_in_the_training_only(searched):
    def number():
        return len(list(searched.glob("*.json")))

    run(spec_of())
    run(spec_of(epochs=2, augment=("cutout",)))
    assert number() == 1
    run(spec_of(norm="ln"))
    run(spec_of(seed=2))
    assert number() == 3


def test_a_killed_search_goes_on(searched, monkeypatch):
    spec = spec_of(SMALL.replace("search_epochs=1", "search_epochs=2"))
    whole = run(spec).outcome
    (kept,) = searched.glob("*.json")
    log = kept.with_suffix(".jsonl")
    expected = kept.read_text(), log.read_text()
    assert len(log.read_text().splitlines()) == 2
    kept.unlink()
    log.unlink()
    steps = SearchRun.begin_step
    count = 0

    def killed(self, *given):
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        steps(self, *given)

    monkeypatch.setattr(SearchRun, "begin_step", killed)
    monkeypatch.setattr(searching_module, "Checkpoint", partial(Checkpoint, seconds=0.0))
    with pytest.raises(KeyboardInterrupt):
        run(spec)
    assert list(searched.glob("*.safetensors"))
    assert run(spec).outcome == whole
    assert count == 5  # 4 steps in all: three before, the fourth that was killed, and that again
    assert (kept.read_text(), log.read_text()) == expected


def test_a_search_whose_loss_is_not_finite_has_diverged(searched, monkeypatch):
    loss = SearchRun.loss
    monkeypatch.setattr(
        SearchRun,
        "loss",
        lambda self, *given: replace(loss(self, *given), loss=loss(self, *given).loss * math.nan),
    )
    outcome = run(spec_of(SMALL)).outcome
    assert outcome.status == "diverged"
    assert outcome.message == "the training loss was nan at step 1; lower --base-lr to train on"
    assert not list(searched.glob("*.json"))


def searching(order="first", rate=0.1):
    """A search before its first step, with two batches."""
    spec = spec_of()
    data = open_data("digits", 32)
    task = parse_task(spec.protocol.task)
    supernet = task._supernet(spec, data)
    steps = ArchitectureSteps(order=order, rate=rate, weight_decay=0.0)
    started = SearchRun(supernet, data, spec, steps)
    course = Course(task=started, protocol=spec.protocol, batch_size=8, seed=1)
    batches = data.train.take(torch.arange(8)), data.train.take(torch.arange(8, 16))
    return started, course.loop, batches


@pytest.mark.parametrize("order", ["first", "second"])
def test_an_architecture_step_moves_nothing_else(order):
    started, loop, (part, held) = searching(order)
    loop.model.train()
    before = {name: value.clone() for name, value in loop.network.state_dict().items()}
    started.move_architecture(loop, part, held)
    moved = {n for n, v in loop.network.state_dict().items() if not torch.equal(v, before[n])}
    assert moved == {"architecture.reduce"}  # its one cell is no normal one
    assert all(p.grad is None for p in loop.network.parameters())


def test_the_first_order_is_adam_on_the_other_halfs_loss():
    started, loop, (part, held) = searching(rate=0.01)
    loop.model.train()
    network = loop.network
    before = network.architecture.reduce.detach().clone()
    loss = functional.cross_entropy(network(held.inputs), held.targets)
    (gradient,) = torch.autograd.grad(loss, network.architecture.reduce)
    started.move_architecture(loop, part, held)
    # Adam's first step has the length of the rate, whatever the gradient's
    expected = before - 0.01 * gradient / (gradient.abs() + 1e-8)
    torch.testing.assert_close(network.architecture.reduce.detach(), expected, rtol=0, atol=1e-4)


def test_weights_and_architecture_learn_from_different_halves():
    started, _, _ = searching()
    ours, others = started.examples, started._others
    assert len(ours) == len(others) == 16
    rows = {tuple(x.flatten().tolist()) for x in ours.take(torch.arange(16)).inputs}
    assert rows.isdisjoint(
        tuple(x.flatten().tolist()) for x in others.take(torch.arange(16)).inputs
    )
    weights = {id(p) for p in started.parameters(started.network, started._spec.protocol)}
    assert weights.isdisjoint(id(p) for p in started.network.architecture.parameters())


def test_an_auxiliary_head_is_trained_on_and_gets_the_norm(tmp_path):
    spec = spec_of(GIVEN, norm="ln")
    task, data = parse_task(spec.protocol.task), open_data("digits", 32)
    built = task.build(spec, data)
    assert isinstance(built.model, CellNetwork)
    assert [place.norm for place in built.norms if "auxiliary" in place.name] == ["ln", "ln"]
    started = task.start(spec, data, built.model)
    part = data.train.take(torch.arange(8))
    found = started.loss(built.model.train(), part)
    scores, extra = built.model(part.inputs)
    expected = functional.cross_entropy(scores, part.targets)
    expected = expected + 0.4 * functional.cross_entropy(extra, part.targets)
    torch.testing.assert_close(found.loss, expected)


def test_drop_path_grows_with_the_epochs():
    spec = spec_of(GIVEN, epochs=4, drop_path=0.2)
    task, data = parse_task(spec.protocol.task), open_data("digits", 32)
    built = task.build(spec, data)
    started = task.start(spec, data, built.model)
    cells = [module for module in built.model.modules() if isinstance(module, Cell)]
    shares = []
    for epoch in range(4):
        started.begin_epoch(None, epoch)
        shares.append({cell.drop_path for cell in cells})
    assert [*map(len, shares)] == [1] * 4
    assert [share.pop() for share in shares] == pytest.approx([0.0, 0.05, 0.1, 0.15])
    fresh = task.start(spec, data, task.build(spec, data).model)
    fresh.load_state(started.state())
    assert {cell.drop_path for cell in fresh._cells} == {cells[0].drop_path}


def test_drop_path_stays_below_its_share_where_steps_are_counted():
    spec = spec_of(GIVEN, epochs=None, steps=12, drop_path=0.3)
    task, data = parse_task(spec.protocol.task), open_data("digits", 32)
    started = task.start(spec, data, task.build(spec, data).model)
    num_epochs = -(-12 // -(-32 // spec.batch_size))
    assert num_epochs > 1
    started.begin_epoch(None, num_epochs - 1)
    assert started._cells[0].drop_path == pytest.approx(0.3 * (num_epochs - 1) / num_epochs)


def test_a_network_of_ones_own_has_its_cells_searched(tmp_path, searched):
    file = own_file(tmp_path)
    network = train(spec_of(model=f"{file}:make"))
    assert type(network).__name__ == "Net"
    assert isinstance(network.first, Cell)
    assert len(list(searched.glob("*.json"))) == 1
    outcome = run(spec_of(GIVEN, model=f"{file}:make", norm="gn:2")).outcome
    assert outcome.status == "finished", outcome.message
    assert {place.norm for place in outcome.norms} == {"gn:2"}


@pytest.mark.parametrize(
    ("task", "changes", "complaint"),
    [
        ("search:genotype=darts-v3", {}, "there is no genotype 'darts-v3'"),
        ("search:order=third", {}, "search:order was given 'third'.*'first' or 'second'"),
        ("search:search_cells=0", {}, "search:search_cells was given '0'"),
        (SMALL, {"model": "small-resnet"}, "small-resnet, which is not made of cells; give darts:"),
        (SMALL, {"mixup": 0.2}, "--mixup was given, which this task does not do"),
        (SMALL, {"batch_sizes": (20,)}, "takes 20 examples, and half of the digits .* are 16"),
        (SMALL, {"norms": ("gn:3",)}, "norm gn:3 does not fit layer"),
        (GIVEN, {"norms": ("in",)}, "norm in does not fit layer 'auxiliary"),
    ],
)
def test_bad_input_is_answered_in_a_sentence(task, changes, complaint):
    with pytest.raises(SpecError, match=complaint):
        check(sweep_of(task, **changes))


def test_functions_that_make_no_network_of_cells_are_refused(tmp_path):
    file = own_file(tmp_path)
    with pytest.raises(SpecError, match=r"plain has no argument cell, .* write def make"):
        check(sweep_of(model=f"{file}:plain"))
    with pytest.raises(SpecError, match=r"wrong gave a int; it gives an nn.Module"):
        check(sweep_of(model=f"{file}:wrong"))


def test_progress_counts_the_steps_of_the_search_and_of_the_training(searched):
    task = SMALL.replace("search_epochs=1", "search_epochs=2:search_batch=6")
    spec, calls = spec_of(task, epochs=3), []
    run(spec, lambda: calls.append(1))
    # halves of 32 examples in batches of 6 for 2 epochs, then 32 in batches of 8 for 3
    assert len(calls) == num_steps(spec, 32) == 2 * 3 + 3 * 4
    calls.clear()
    run(spec, lambda: calls.append(1))
    assert len(calls) == 3 * 4  # the search was kept
    assert num_steps(spec_of(GIVEN), 32) == 4


def test_of_runs_that_share_a_search_one_searches_and_the_others_wait(searched, monkeypatch):
    task = f"{SMALL}:search_batch=8"
    spec, other = spec_of(task), spec_of(task, batch_size=4)
    found: Any = parse_task(task)
    data = found.data(spec.protocol)
    (path,) = {kept_at(found._search_spec(each), data) for each in (spec, other)}
    monkeypatch.setattr(type(found), "_searched", lambda *given: pytest.fail("searched"))
    genotypes = []
    waiting = Thread(target=lambda: genotypes.append(found._genotype(other, data)))
    path.parent.mkdir(parents=True)
    with in_turn(path):
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive()
        GENOTYPES["darts-v1"].write(path)
    waiting.join(20)
    assert genotypes == [GENOTYPES["darts-v1"]]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_dry_run_takes_the_size_of_the_pictures(searched):
    sample = parse_task(SMALL).sample(protocol_of(data="imagenet", image_size=48))
    assert sample.data.input_shape == (3, 48, 48)
    assert sample.data.train.take(torch.arange(2)).inputs.shape == (2, 3, 48, 48)


def test_a_dry_run_searches_nothing(searched):
    protocol = protocol_of(data="cifar10", limit=None)
    sample = parse_task(protocol.task).sample(protocol)
    assert "cifar-10-batches-py is not there" in sample.missing
    sweep = SweepSpec(protocol=protocol, norms=("bn",), batch_sizes=(8,), seeds=(1,))
    (cell,) = estimate(sweep, sample.data, most_examples=4)
    assert cell.num_steps == 45_000 // 8
    assert not searched.exists()


def test_both_cells_are_drawn(tmp_path):
    draw_genotype(GENOTYPES["darts-v2"], tmp_path / "cells.svg")
    text = (tmp_path / "cells.svg").read_text()
    for said, number in (("sep conv 3x3", 5), ("max pool 3x3", 5), ("skip connect", 5)):
        assert text.count(f">{said}<") == number
    assert text.count(">dil conv 3x3<") == 1
    assert text.count(">normal cell<") == text.count(">reduction cell<") == 1
