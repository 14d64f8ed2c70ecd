"""Where a probe's records go, and who calls it."""

import builtins
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from lightning_fabric import Fabric
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import normkit as nk
from normkit.errors import DataError, OptionError


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.GroupNorm(2, 8))


def train(model, probe, num_steps=4):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with probe:
        for _ in range(num_steps):
            optimizer.zero_grad()
            loss = model(torch.randn(4, 3, 8, 8)).square().mean()
            loss.backward()
            optimizer.step()
            probe.step(loss)
    return probe


def test_each_record_is_a_line_that_is_readable_at_once(tmp_path):
    path, model = tmp_path / "lines.jsonl", network()
    with nk.Probe(model, every=1, path=path) as probe:
        for number in range(1, 4):
            loss = model(torch.randn(4, 3, 8, 8)).square().mean()
            loss.backward()
            record = probe.step(loss)
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            assert [line["step"] for line in lines] == list(range(1, number + 1))
            assert lines[-1] == json.loads(record.to_json())
    row = lines[0]["layers"][1]
    assert (row["name"], row["num_dead"]) == ("1", None)
    assert row["shift_std"] == probe.records[0].layers[1].shift_std
    probe.write(tmp_path / "again.jsonl")
    probe.write(tmp_path / "again.jsonl")  # over what is there
    assert (tmp_path / "again.jsonl").read_text() == path.read_text()


def test_lines_are_appended_also_after_one_that_was_torn(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"step": 1}\n{"st')
    model = network()
    train(model, nk.Probe(model, every=4, path=path))
    first, torn, last = path.read_text().splitlines()
    assert (first, torn, json.loads(last)["step"]) == ('{"step": 1}', '{"st', 4)


def test_a_file_that_cannot_be_written_is_refused(tmp_path):
    path = tmp_path / "missing" / "lines.jsonl"
    model = network()
    with pytest.raises(DataError, match=r"cannot be written \(No such file or directory\); give"):
        nk.Probe(model, every=1, path=path).start()
    assert not model[0]._forward_pre_hooks


class Writer:
    """Takes scalars as a ``SummaryWriter`` does."""

    def __init__(self):
        self.scalars, self.is_flushed, self.is_closed = {}, False, False

    def add_scalar(self, tag, scalar_value, global_step):
        self.scalars[tag, global_step] = scalar_value

    def flush(self):
        self.is_flushed = True

    def close(self):
        self.is_closed = True


def test_a_writer_gets_every_number_and_stays_open():
    writer, model = Writer(), network()
    probe = train(model, nk.Probe(model, every=2, writer=writer))
    expected = {}
    for record in probe.records:
        data = json.loads(record.to_json())
        for name in ("loss", "stat_diff", "gradient_norm", "gradient_change"):
            expected[f"normkit/{name}", record.step] = data[name]
        expected["normkit/num_dead", record.step] = data["layers"][2]["num_dead"]
        for row in data["layers"]:
            name = row.pop("name")
            for column, value in row.items():
                expected[f"normkit/{column}/{name}", record.step] = value
    assert writer.scalars == {key: value for key, value in expected.items() if value is not None}
    assert writer.is_flushed
    assert not writer.is_closed


def test_tensorboard_reads_what_was_written(tmp_path):
    model = network()
    probe = train(model, nk.Probe(model, every=2, log_dir=tmp_path / "board"))
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    found = [(e.step, e.value) for e in events.Scalars("normkit/shift_std/1")]
    expected = [(record.step, record.layers[1].shift_std) for record in probe.records]
    assert found == [(step, pytest.approx(value)) for step, value in expected]


def test_without_tensorboard_a_folder_for_it_is_refused(monkeypatch, tmp_path):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("torch.utils.tensorboard"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"TensorBoard is not installed; install it \(pip install"):
        nk.Probe(network(), log_dir=tmp_path).start()


def test_the_history_can_be_read_printed_written_and_drawn():
    model = network()
    probe = nk.Probe(model, every=2)
    assert probe.reading == "No step has been recorded yet; one step in 2 is recorded."
    assert probe.table() == ""
    train(model, probe, num_steps=2)
    assert probe.reading == probe.records[0].reading
    train(model, probe)
    assert [record.step for record in probe.records] == [2, 4, 6]
    first, last = probe.records[0], probe.records[-1]
    assert probe.reading == (
        f"Between step 2 and step 6 (3 recorded): the loss from {first.loss:.3g} to "
        f"{last.loss:.3g}, the largest shift of standard deviations from "
        f"{first.layers[1].shift_std:.3g} to {last.layers[1].shift_std:.3g}, StatDiff from "
        f"{first.stat_diff:.3g} to {last.stat_diff:.3g}, the number of channels that are off from "
        f"{first.num_dead} to {last.num_dead}, the change of the gradient between steps from "
        f"{first.gradient_change:.3g} to {last.gradient_change:.3g}."
    )
    heading, *rows = probe.table().splitlines()
    assert heading.split()[:3] == ["name", "loss", "shift"]
    assert [row.split()[0] for row in rows] == ["2", "4", "6"]
    assert rows[-1].split()[-1] == f"{last.gradient_change:.4g}"
    data = json.loads(probe.to_json())
    assert [step["step"] for step in data["steps"]] == [2, 4, 6]
    assert str(probe) == f"{probe.reading}\n{probe.table()}"


def test_a_record_reads_its_worst_layer():
    model = network()
    record = train(model, nk.Probe(model, every=2)).records[-1]
    shift, stat_diff = record.layers[1], record.layers[3].stat_diff
    assert record.reading == (
        f"Step 4: running statistics are furthest from the batch's in 1 ({shift.shift_std:.3g} in "
        f"the standard deviations, {shift.shift_mean:.3g} in the means); channels that share "
        f"statistics differ in their means by {stat_diff:.3g} of their standard deviations; "
        f"{record.num_dead} of 8 rectified channels are off; the gradient's length is "
        f"{record.gradient_norm:.3g}, and it moved by {record.gradient_change:.3g} since the step "
        f"before."
    )
    assert str(record).startswith(f"{record.reading}\n  name")


def test_the_plot_shows_what_was_recorded():
    model = network()
    probe = train(model, nk.Probe(model, every=1))
    shifts, dead, gradients = probe.plot().axes
    lines = {line.get_label(): line for axes in (shifts, dead, gradients) for line in axes.lines}
    assert lines["shift std"].get_xdata().tolist() == [1, 2, 3, 4]
    expected = [record.layers[1].shift_std for record in probe.records]
    assert lines["shift std"].get_ydata().tolist() == pytest.approx(expected)
    assert lines["gradient change"].get_xdata().tolist() == [2, 3, 4]
    assert dead.lines[0].get_ydata().tolist() == [record.num_dead for record in probe.records]
    assert gradients.get_xlabel() == "step"
    assert len(probe.records[0].plot().axes) == 1


def test_fabric_calls_the_probe():
    model, same = network(), network()
    probe = nk.Probe(model, every=2)
    fabric = Fabric(accelerator="cpu", devices=1, callbacks=[probe])
    fabric.launch()
    ready, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    torch.manual_seed(1)
    fabric.call("on_train_start")
    for number in range(4):
        optimizer.zero_grad()
        loss = ready(torch.randn(4, 3, 8, 8)).square().mean()
        fabric.backward(loss)
        optimizer.step()
        if number % 2:
            fabric.call("on_train_batch_end", {"loss": loss}, None, number)
        else:
            fabric.call("on_train_batch_end", loss=loss)
    fabric.call("on_train_end")
    assert not model[0]._forward_pre_hooks
    torch.manual_seed(1)
    by_hand = train(same, nk.Probe(same, every=2))
    assert probe.records == by_hand.records
    assert all(math.isfinite(record.loss) for record in probe.records)


def test_without_lightning_its_callback_is_refused(monkeypatch):
    monkeypatch.setattr("normkit.diagnostics.probe.lightning.PACKAGES", ("no_such", "nor_this"))
    with pytest.raises(OptionError, match=r"neither no_such nor nor_this is installed; install"):
        nk.Probe(network()).callback()


def test_a_callback_counts_steps_of_the_optimizer(monkeypatch):
    monkeypatch.setattr("normkit.diagnostics.probe.lightning.PACKAGES", ("tests_lightning",))
    monkeypatch.setitem(sys.modules, "tests_lightning", SimpleNamespace(Callback=object))
    model, trainer = network(), SimpleNamespace(global_step=0)
    probe = nk.Probe(model, every=1)
    callback = probe.callback()
    callback.on_train_start(trainer, model)
    for number in range(4):
        loss = model(torch.randn(4, 3, 8, 8)).square().mean()
        loss.backward()
        trainer.global_step += number % 2
        callback.on_train_batch_end(trainer, model, {"loss": loss}, None, number)
    assert probe.num_steps == 2
    assert probe.records[1].loss == loss.item()
    callback.on_exception(trainer, model, KeyboardInterrupt())
    callback.on_train_end(trainer, model)
    assert not model[0]._forward_pre_hooks
