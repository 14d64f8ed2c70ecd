"""What a probe does with gradients, inputs and options that are not as usual."""

import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

import normkit as nk
from diagnostics.probed import Net, batches, length, moments, rows_by_name, train
from normkit.errors import OptionError


def test_of_a_forward_that_raises_nothing_is_kept():
    torch.manual_seed(0)
    model = Net()
    with nk.Probe(model, every=1) as probe:
        model.head = nn.Linear(9, 4)  # does not fit
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            model(torch.randn(4, 3, 8, 8) + 100)
        model.head = nn.Linear(8, 4)
        x = torch.randn(4, 3, 8, 8)
        running = model.bn.running_mean.double().clone()
        model(x).sum().backward()
        record = probe.step()
    mean, _ = moments([model.conv1(x).detach().double()])
    shift = rows_by_name(record)["bn"].shift_mean
    assert shift == pytest.approx(length([running - mean]), rel=1e-5)


class Tokens(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class TwoStages(nk.BatchChannelNorm):
    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


def test_what_norms_with_a_forward_of_their_own_normalise_is_not_known():
    model = nn.Sequential(Tokens(4), nn.Linear(4, 4), TwoStages(4, num_groups=2))
    with nk.Probe(model, every=1) as probe:
        model(torch.randn(6, 5, 4)).sum().backward()
        record = probe.step()
    rows = rows_by_name(record)
    assert all(row.shift_mean is row.stat_diff is None for row in rows.values())
    assert rows["0"].gamma_norm == 2.0
    notes = [note for note in record.notes if note.startswith("it is unknown")]
    assert [note.partition(":")[0] for note in notes] == [
        f"it is unknown what {name} normalises" for name in ("0", "2.batch", "2.channel")
    ]
    assert "Tokens has a forward of its own" in notes[0]
    assert not any("were not seen" in note for note in record.notes)


def test_losses_and_inputs_that_are_not_finite_are_recorded_and_said():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU())
    with nk.Probe(model, every=1) as probe:
        loss = model(torch.full((4, 6), torch.nan)).sum()
        loss.backward()
        record = probe.step(loss)
    assert math.isnan(record.loss)
    assert math.isnan(rows_by_name(record)["1"].shift_mean)
    assert "not finite: the loss (nan), 0, 1" in record.notes
    assert record.reading.startswith("Step 1: the loss is nan; 0 of 4 rectified channels are off")
    assert json.loads(record.to_json())["loss"] is None


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_that_are_gone_are_said(set_to_none):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters())
    with nk.Probe(model, every=1) as probe:
        for _ in range(2):
            model(torch.randn(4, 3)).sum().backward()
            optimizer.zero_grad(set_to_none=set_to_none)
            record = probe.step()
    what = "no chosen parameter had a gradient" if set_to_none else "all gradients are zero"
    assert record.notes == (f"{what} when step() was called; call it before optimizer.zero_grad()",)


def test_a_gradient_that_comes_late_and_one_that_is_sparse():
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    model[1].requires_grad_(requires_grad=False)
    with nk.Probe(model, every=2) as probe:
        for number in range(2):
            model.zero_grad()
            model(torch.tensor([number, number])).sum().backward()
            model[1].requires_grad_()
            probe.step()
    record = probe.records[0]
    weight = model[1].weight.detach().sum(0) * 2
    bias = model[1].weight.grad.double()
    late = length([bias, model[1].bias.grad])
    assert rows_by_name(record)["1"].gradient_change == pytest.approx(late)
    moved = length([weight, weight])  # one row lost its gradient, another has it
    assert rows_by_name(record)["0"].gradient_change == pytest.approx(moved, rel=1e-6)
    assert record.gradient_change == pytest.approx(math.hypot(late, moved), rel=1e-6)


def test_chosen_norms_and_parameters():
    torch.manual_seed(0)
    model = Net()
    choice = {"where": lambda _layer, name: name == "bn", "params": lambda n, _p: "head" in n}
    with nk.Probe(model, every=1, **choice) as probe:
        train(model, probe, batches(1))
    rows = probe.records[0].layers
    assert [row.name for row in rows if row.shift_mean is not None] == ["bn"]
    assert [row.name for row in rows if row.gradient_norm is not None] == ["head"]


def test_parts_that_are_not_run_are_named():
    model = nn.ModuleDict({"a": nn.BatchNorm1d(3), "b": nn.BatchNorm1d(3)})
    with nk.Probe(model, every=1) as probe:
        model["a"](torch.randn(4, 3)).sum().backward()
        record = probe.step()
        assert "1 of 2 norms were not seen: b" in record.notes
        assert rows_by_name(record)["a"].shift_mean > 0
        record = probe.step()
    assert record.notes[0].startswith("no training forward of the model was seen in this step")


def test_an_axis_that_changes_its_size_does_not_count_channels():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    with nk.Probe(model, every=1) as probe:
        for size in (4, 5):
            model(torch.randn(2, size, 3)).sum().backward()
        record = probe.step()
    assert "the second axis of the input of 1 changes its size" in record.notes[1 - 1]
    with pytest.raises(OSError, match="the second axis of the input of 1 changes its size"):
        nk.inactive_channels(model, [torch.randn(2, size, 3) for size in (4, 5)])


class TwoDevices(nn.Linear):
    device_ids = (0, 1)


def test_what_cannot_be_meant_is_refused():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    with pytest.raises(OptionError, match="every=0 was given; it counts something"):
        nk.Probe(model, every=0)
    with pytest.raises(OptionError, match=r"writer= and log_dir= were both given; pass only"):
        nk.Probe(model, writer=object(), log_dir="runs")
    with pytest.raises(OptionError, match=r"where= chooses no norm .*; there are: 1"):
        nk.Probe(model, where=lambda _layer, _name: False)
    with pytest.raises(OptionError, match="params= chooses none of the model's parameters"):
        nk.Probe(model, params=lambda _name, _parameter: False)
    with pytest.raises(OptionError, match="runs on several devices in one process"):
        nk.Probe(TwoDevices(2, 2))
    probe = nk.Probe(model, every=2)
    with pytest.raises(OptionError, match="a probe that is not open; train inside"):
        probe.step(1.0)
    with probe, pytest.raises(OptionError, match="the probe is open already"):
        probe.start()
    with probe:
        with pytest.raises(OptionError, match=r"a tensor of shape \(2,\) was given as the loss"):
            probe.step(torch.ones(2))
        with pytest.raises(OptionError, match="a dict was given as the loss of a step"):
            probe.step({"loss": 1.0})


def test_functional_relu_is_seen_in_whichever_form():
    class Forms(nn.Module):
        def forward(self, x):
            return functional.relu(x) + x.relu() + torch.relu(x) + functional.relu(input=x)

    with nk.Probe(Forms(), every=1) as probe:
        Forms().train()
        probe._model(torch.randn(3, 4))
        record = probe.step()
    names = ["the model itself", *(f"the model itself, call {n}" for n in (2, 3, 4))]
    assert [row.name for row in record.layers] == names


def test_gradients_that_are_written_over_in_place_are_compared_all_the_same():
    model, gradients = nn.Linear(3, 2), []
    with nk.Probe(model, every=2) as probe:
        for scale in (1.0, 3.0):
            model.zero_grad(set_to_none=False)
            (model(torch.ones(4, 3)) * scale).sum().backward()
            gradients.append([p.grad.double() for p in model.parameters()])
            record = probe.step()
    moved = [b - a for a, b in zip(*gradients, strict=True)]
    assert record.gradient_change == pytest.approx(length(moved))
    assert record.gradient_change > 0
