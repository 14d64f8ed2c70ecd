"""What a probe records, against definitions in float64 that import nothing of ours."""

import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import normkit as nk
from normkit.errors import OptionError


class Net(nn.Module):
    """Every kind of row: running statistics, groups of channels, a shared and a bare ReLU."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.conv2, self.gn = nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8)
        self.bgn = nk.BatchGroupNorm(8, num_groups=4)
        self.relu, self.drop = nn.ReLU(), nn.Dropout(0.2)
        self.ln, self.head = nn.LayerNorm(8), nn.Linear(8, 4)
        with torch.no_grad():
            self.bn.bias[:2] = -50  # off in every example

    def forward(self, x):
        x = self.relu(self.bn(self.conv1(x)))
        x = self.relu(self.gn(self.conv2(self.drop(x))))
        x = torch.relu(self.bgn(x)).mean((2, 3))
        return self.head(self.ln(x))


class Captured:
    """What goes into, and comes out of, named modules."""

    def __init__(self, model, names):
        self.inputs, self.outputs = {n: [] for n in names}, {n: [] for n in names}
        for name in names:
            model.get_submodule(name).register_forward_hook(self.hook(name))

    def hook(self, name):
        def keep(_module, args, output):
            self.inputs[name].append(args[0].detach().double())
            self.outputs[name].append(output.detach().double())

        return keep

    def clear(self):
        for values in (*self.inputs.values(), *self.outputs.values()):
            values.clear()


def batches(num_steps, num_forwards=1, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        [torch.randn(n, 3, 8, 8, generator=generator) * 2 + 1 for n in range(4, 4 + num_forwards)]
        for _ in range(num_steps)
    ]


def loss_of(model, parts):
    return sum(model(x).square().mean() for x in parts) / len(parts)


def train(model, probe, steps, after=lambda _number: None):
    """Train with as many forwards a step as each step has parts."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for number, parts in enumerate(steps, start=1):
        optimizer.zero_grad()
        loss = loss_of(model, parts)
        loss.backward()
        optimizer.step()
        if probe is not None:
            probe.step(loss)
        after(number)
    return model


def rows_by_name(record):
    return {row.name: row for row in record.layers}


def moments(values, groups=None):
    """Mean and population standard deviation of each channel or group of ``(N, C, *S)`` maps."""
    parts = [v.reshape(v.shape[0], groups or v.shape[1], -1).transpose(0, 1) for v in values]
    table = torch.cat([part.flatten(1) for part in parts], dim=1)
    mean = table.sum(1) / table.shape[1]
    return mean, ((table - mean[:, None]) ** 2).mean(1).sqrt()


def length(tensors):
    return math.sqrt(sum(float((t.double() ** 2).sum()) for t in tensors))


@pytest.fixture(scope="module")
def second():
    """The record of a second step of two forwards, and everything that it is computed of."""
    torch.manual_seed(0)
    model = Net()
    seen = Captured(model, ["bn", "gn", "bgn", "ln", "relu"])
    running, gradients, losses = {}, [], []

    def after(number):
        gradients.append({n: p.grad.double().clone() for n, p in model.named_parameters()})
        if number == 1:
            seen.clear()
            running.update({n: b.double().clone() for n, b in model.named_buffers()})

    with nk.Probe(model, every=2) as probe:
        hooked = probe.step

        def step(loss):
            losses.append(loss.item())
            return hooked(loss)

        probe.step = step
        train(model, probe, batches(2, num_forwards=2), after)
    return probe, model, seen, running, gradients, losses


def test_shifts_are_those_of_the_steps_inputs_from_the_running_statistics_before(second):
    probe, _, seen, running, _, _ = second
    rows = rows_by_name(probe.records[0])
    for name, groups in (("bn", None), ("bgn", 4)):
        mean, std = moments(seen.inputs[name], groups)
        row = rows[name]
        shift = running[f"{name}.running_mean"] - mean
        assert row.shift_mean == pytest.approx(float((shift**2).sum() ** 0.5), rel=1e-9)
        shift = running[f"{name}.running_var"].sqrt() - std
        assert row.shift_std == pytest.approx(float((shift**2).sum() ** 0.5), rel=1e-9)
    assert {n for n, row in rows.items() if row.shift_mean is not None} == {"bn", "bgn"}


def test_stat_diff_is_that_of_the_steps_inputs(second):
    probe, _, seen, _, _, _ = second
    record = probe.records[0]
    rows, found = rows_by_name(record), []
    for name, groups in (("gn", 2), ("ln", 1), ("bgn", 4)):
        mean, std = (table.reshape(groups, -1) for table in moments(seen.inputs[name]))
        spread = ((mean - mean.mean(1, keepdim=True)) ** 2).mean(1).sqrt()
        values = spread / std.mean(1)
        found += values.tolist()
        assert rows[name].stat_diff == pytest.approx(float(values.mean()), rel=1e-9)
        assert rows[name].stat_diff_std == pytest.approx(float(values.std(correction=0)), abs=1e-9)
    assert record.stat_diff == pytest.approx(sum(found) / len(found), rel=1e-9)
    assert rows["bn"].stat_diff is None


def test_dead_channels_are_those_of_the_step(second):
    probe, _, seen, _, _, _ = second
    record = probe.records[0]
    rows = rows_by_name(record)
    inputs = {
        "relu": seen.inputs["relu"][::2],
        "relu, call 2": seen.inputs["relu"][1::2],
        "the model itself": seen.outputs["bgn"],
    }
    for name, values in inputs.items():
        channels = torch.cat([v.transpose(0, 1).flatten(1) for v in values], dim=1)
        assert rows[name].num_dead == int((channels <= 0).all(1).sum())
        assert rows[name].zero_share == pytest.approx(float((channels <= 0).double().mean()))
        assert rows[name].num_rectified == 8
    assert rows["relu"].num_dead == 2
    assert (record.num_dead, record.num_rectified) == (
        sum(r.num_dead or 0 for r in rows.values()),
        24,
    )


def test_gradients_are_those_of_this_step_and_the_one_before(second):
    probe, _, _, _, (first, last), _ = second
    record = probe.records[0]
    moved = {name: last[name] - first[name] for name in last}
    assert record.gradient_norm == pytest.approx(length(last.values()), rel=1e-9)
    assert record.gradient_change == pytest.approx(length(moved.values()), rel=1e-6)
    for name, row in rows_by_name(record).items():
        own = [n for n in last if n.rpartition(".")[0] == name]
        if own:
            assert row.gradient_norm == pytest.approx(length(last[n] for n in own), rel=1e-9)
            assert row.gradient_change == pytest.approx(length(moved[n] for n in own), rel=1e-6)
        else:
            assert row.gradient_norm is row.gradient_change is None


def test_weights_and_biases_of_norms_are_those_after_the_step(second):
    probe, model, _, _, _, losses = second
    record = probe.records[0]
    for name, row in rows_by_name(record).items():
        if name in ("bn", "gn", "bgn", "ln"):
            layer = model.get_submodule(name)
            assert row.gamma_norm == pytest.approx(length([layer.weight.detach()]), rel=1e-9)
            assert row.beta_norm == pytest.approx(length([layer.bias.detach()]), rel=1e-9)
        else:
            assert row.gamma_norm is row.beta_norm is None
    assert (record.step, record.loss) == (2, losses[1])
    assert record.notes == ()
    names = ["the model itself", "conv1", "bn", "conv2", "gn", "bgn", "relu", "relu, call 2", "ln"]
    assert [row.name for row in record.layers] == [*names, "head"]


class Composite(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3), norm

    def forward(self, x):
        return self.norm(self.conv(x)).relu()


@pytest.mark.parametrize("micro", [False, True])
def test_the_stages_of_a_composite_are_measured_from_outside(micro):
    torch.manual_seed(0)
    model = Composite(nk.BatchChannelNorm(6, num_groups=2, micro_batch=micro))
    seen, before = Captured(model, ["norm"]), {}
    with nk.Probe(model, every=2) as probe:

        def after(number):
            if number == 1:
                seen.clear()
                stage = model.norm.batch
                before.update({n: b.double().clone() for n, b in stage.named_buffers()})
                before["weight"] = stage.weight.detach().double().clone()
                before["bias"] = stage.bias.detach().double().clone()

        train(model, probe, batches(2), after)
    rows = rows_by_name(probe.records[0])
    (x,) = seen.inputs["norm"]
    mean, std = moments([x])
    expected = [before["running_mean"] - mean, before["running_var"].sqrt() - std]
    for value, column in zip(expected, ("shift_mean", "shift_std"), strict=True):
        assert getattr(rows["norm.batch"], column) == pytest.approx(length([value]), rel=1e-9)
    shape, var = (1, 6, 1, 1), std**2
    if micro:  # it has normalised by estimates that had moved first (Algorithm 1)
        mean = 0.9 * before["running_mean"] + 0.1 * mean
        squares = ((x - before["running_mean"].view(shape)) ** 2).mean((0, 2, 3))
        var = 0.9 * before["running_var"] + 0.1 * squares
    inner = (x - mean.view(shape)) / (var.view(shape) + 1e-5).sqrt()
    inner = inner * before["weight"].view(shape) + before["bias"].view(shape)
    mean, std = (table.reshape(2, 3) for table in moments([inner]))
    values = mean.std(1, correction=0) / std.mean(1)
    assert rows["norm.channel"].stat_diff == pytest.approx(float(values.mean()), rel=1e-5)
    assert probe.records[0].notes == ()


def test_the_batch_norm_beside_an_instance_norm_has_the_last_channels():
    torch.manual_seed(0)
    model = Composite(nk.InstanceBatchNorm(6))
    seen = Captured(model, ["norm"])
    with nk.Probe(model, every=1) as probe:
        train(model, probe, batches(1))
    mean, std = moments([seen.inputs["norm"][0][:, 3:]])
    row = rows_by_name(probe.records[0])["norm.batch"]
    assert (row.shift_mean, row.shift_std) == pytest.approx((length([mean]), length([1 - std])))


def test_every_step_can_be_recorded_and_none_between_others_is():
    torch.manual_seed(0)
    model = Net()
    with nk.Probe(model, every=1) as probe:
        train(model, probe, batches(3))
    assert [record.step for record in probe.records] == [1, 2, 3]
    first, second, _ = probe.records
    assert first.gradient_change is None
    assert first.notes == ("the first step has no gradient before it",)
    assert second.gradient_change > 0
    with nk.Probe(model, every=3) as probe:
        train(model, probe, batches(7))
    assert [record.step for record in probe.records] == [3, 6]


def test_evaluation_and_second_looks_do_not_count():
    torch.manual_seed(0)
    model = Net()
    plain, mixed = nk.Probe(model, every=1), nk.Probe(model, every=1)
    x = torch.randn(4, 3, 8, 8)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for probe in (plain, mixed):
        model.load_state_dict(state)
        torch.manual_seed(1)
        with probe:
            model.zero_grad()
            if probe is mixed:
                with torch.no_grad():
                    model.eval()(x + 5)
                model.train()
                checkpoint(model, x, use_reentrant=False).sum().backward()
            else:
                model(x).sum().backward()
            probe.step()
    assert plain.records == mixed.records
    assert plain.records[0].loss is None


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
    with pytest.raises(OptionError, match=r"writer= and log_dir= were given; one of them"):
        nk.Probe(model, writer=object(), log_dir="runs")
    with pytest.raises(OptionError, match=r"where= chooses no norm .*; there are: 1"):
        nk.Probe(model, where=lambda _layer, _name: False)
    with pytest.raises(OptionError, match="params= chooses none of the model's parameters"):
        nk.Probe(model, params=lambda _name, _parameter: False)
    with pytest.raises(OptionError, match="runs on several devices in one process"):
        nk.Probe(TwoDevices(2, 2))
    probe = nk.Probe(model, every=2)
    with pytest.raises(OptionError, match="a probe that is not open; train inside of"):
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
