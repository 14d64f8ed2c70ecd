"""What a probe records, against definitions in float64 that import nothing of ours."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import normkit as nk
from diagnostics.probed import Captured, Net, batches, length, moments, rows_by_name, train


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
    assert first.notes == ("before the first step there is no gradient to compare with",)
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
