"""Measures against their definitions in float64 on concatenated data, and the model afterwards."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import normkit as nk
from normkit.errors import DataError, OptionError


class Cnn(nn.Module):
    """Two stages with a shared ReLU, a functional one and two kinds of norms."""

    def __init__(self, norm=nn.BatchNorm2d, second=None):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3), norm(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3), (second or norm)(8)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.relu(self.norm1(self.conv1(x)))
        x = self.relu(self.norm2(self.conv2(self.drop(x))))
        return self.head(torch.relu(x).mean((2, 3)))


class Mlp(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nk.BatchGroupNorm(8))


def lived(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for name, buffer in model.named_buffers():
        if name.endswith("mean"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator))
        elif name.endswith("var"):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return model


@pytest.fixture
def batches():
    torch.manual_seed(3)
    return [torch.randn(n, 3, 8, 8) * 2 + 1 for n in (8, 8, 1)]


def inputs(model, name, batches):
    """All inputs of a layer at evaluation, with its channels first, in float64."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _m, a: seen.append(a[0]))
    model = model.eval()
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    return torch.cat([x.double().movedim(1, 0).flatten(1) for x in seen], dim=1)


def shift_by_definition(values, mean, var):
    spread = (values - values.mean(1, keepdim=True)).square().mean(1).sqrt()
    return (
        float((mean.double() - values.mean(1)).square().sum().sqrt()),
        float((var.double().sqrt() - spread).square().sum().sqrt()),
    )


def state(model):
    """Everything that a measurement must leave alone."""
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    modes = {n: m.training for n, m in model.named_modules()}
    hooks = [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]
    return tensors, modes, hooks, torch.get_rng_state()


def assert_untouched(model, before):
    tensors, modes, hooks, rng = state(model)
    assert all(torch.equal(value, before[0][key]) for key, value in tensors.items())
    assert modes == before[1]
    assert hooks == before[2]
    assert torch.equal(rng, before[3])


def test_estimation_shift_is_its_definition_for_a_cnn(batches):
    model = lived(Cnn())
    found = nk.estimation_shift(model, batches)
    assert [row.name for row in found.layers] == ["input", "norm1", "norm2"]
    assert found.layers[0].esm_std is None
    for row in found.layers[1:]:
        layer = model.get_submodule(row.name)
        values = inputs(model, row.name, batches)
        mean, std = shift_by_definition(values, layer.running_mean, layer.running_var)
        assert row.esm_mean == pytest.approx(mean, rel=1e-9)
        assert row.esm_std == pytest.approx(std, rel=1e-9)
        assert (row.num_groups, row.num_values) == values.shape


def test_estimation_shift_of_an_mlp_and_of_groups_and_of_the_input():
    torch.manual_seed(0)
    model = lived(Mlp())
    test = [torch.randn(n, 6) for n in (5, 2)]
    train = [torch.randn(n, 6) * 3 + 1 for n in (4, 4)]
    found = nk.estimation_shift(model, test, train_batches=train, normalize="sqrt_c")
    first, _, last = found.layers
    a, b = torch.cat(train).double(), torch.cat(test).double()
    mean, std = (float((f(a) - f(b)).norm()) / 6**0.5 for f in (_mean, _std))
    assert first.esm_mean == pytest.approx(mean)
    assert first.esm_std == pytest.approx(std)
    values = inputs(model, "3", test).reshape(1, -1)
    expected = shift_by_definition(values, model[3].running_mean, model[3].running_var)
    assert (last.esm_mean, last.esm_std) == pytest.approx(expected)
    assert last.num_groups == 1


def test_estimation_shift_in_standard_deviations_does_not_depend_on_the_unit_of_a_channel(batches):
    model = lived(Cnn())
    found = nk.estimation_shift(model, batches, normalize="std").layers[1:]
    for row in found:
        layer = model.get_submodule(row.name)
        values = inputs(model, row.name, batches)
        unit = (values.var(1, correction=0) + layer.eps).sqrt()
        mean = (layer.running_mean.double() - values.mean(1)) / unit
        std = (layer.running_var.double().sqrt() - values.std(1, correction=0)) / unit
        assert row.esm_mean == pytest.approx(float(mean.square().mean().sqrt()), rel=1e-9)
        assert row.esm_std == pytest.approx(float(std.square().mean().sqrt()), rel=1e-9)
    assert found[0].esm_mean > 0


def test_a_channel_that_is_constant_in_the_data_has_a_shift_by_eps():
    layer = nn.BatchNorm1d(2, eps=0.01)
    (_, row) = nk.estimation_shift(layer, [torch.zeros(4, 2)], normalize="std").layers
    assert (row.esm_mean, row.esm_std) == pytest.approx((0.0, 10.0))


def _mean(x):
    return x.mean(0)


def _std(x):
    return x.std(0, correction=0)


def test_a_layer_with_the_statistics_of_the_data_has_no_shift(batches):
    model = Cnn()
    nk.recalibrate(model, batches, sequential=True).apply()
    found = nk.estimation_shift(model, batches)
    for row in found.layers[1:]:
        assert row.esm_mean < 1e-5
        assert row.esm_std < 1e-2  # the running variance is unbiased


def test_disturbed_statistics_come_back(batches):
    model = lived(Cnn()).eval()
    before = state(model)

    def interrupted():
        with nk.disturb_statistics(model, 0.5, seed=1) as names:
            assert names == ("norm1", "norm2")
            for name in names:
                layer = model.get_submodule(name)
                for kind in ("running_mean", "running_var"):
                    old = before[0][f"{name}.{kind}"]
                    factor = layer.get_buffer(kind) / old
                    assert bool((factor >= 0.5).all() and (factor <= 1.5).all())
                    assert factor.unique().numel() == 8
            model.train()(batches[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    model.eval()
    assert all(torch.equal(v, before[0][k]) for k, v in model.state_dict().items())


def test_what_is_drawn_depends_on_seed_and_name_alone():
    model = lived(Cnn())
    seen = []
    for seed, where in [(0, None), (0, lambda _m, name: name == "norm2"), (1, None)]:
        with nk.disturb_statistics(model, 1.0, seed=seed, where=where):
            seen.append(model.norm2.running_var.clone())
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    draws = torch.stack([_factors(seed) for seed in range(300)])
    assert_close(draws.mean(), torch.tensor(1.0), rtol=0, atol=0.05)
    assert_close(draws.std(), torch.tensor(1 / 3**0.5), rtol=0, atol=0.05)  # uniform on 0 to 2


def _factors(seed):
    norm = nn.BatchNorm2d(8)
    with nk.disturb_statistics(norm, 1.0, seed=seed):
        return norm.running_var.clone()


@pytest.mark.parametrize(
    ("norm", "num_groups"),
    [
        (lambda c: nn.GroupNorm(2, c), 2),
        (lambda c: nn.GroupNorm(1, c), 1),
        (lambda c: nk.GroupNorm(c, num_groups=4), 4),
        (nk.LayerNorm, 1),
        (lambda c: nk.BatchChannelNorm(c, num_groups=2), 2),
        (lambda c: nk.GroupNormPlus(c, num_groups=2), 2),
    ],
)
def test_channel_difference_is_its_definition(norm, num_groups, batches):
    model = lived(Cnn(nn.BatchNorm2d, norm))
    found = nk.channel_difference(model, batches, momentum=None)
    name = "norm2.channel" if hasattr(model.norm2, "channel") else "norm2"
    assert [row.name for row in found.layers] == [name]
    values = inputs(model, name, batches)
    mean = values.mean(1).numpy().reshape(num_groups, -1)
    std = values.std(1, correction=0).numpy().reshape(num_groups, -1)
    expected = mean.std(1) / std.mean(1)
    assert found.layers[0].mean == pytest.approx(expected.mean(), rel=1e-9)
    assert found.layers[0].std == pytest.approx(expected.std(), rel=1e-6, abs=1e-9)
    assert found.mean == pytest.approx(expected.mean(), rel=1e-9)


def test_the_observer_of_channel_difference_follows_batches(batches):
    model = lived(Cnn(nn.BatchNorm2d, lambda c: nn.GroupNorm(2, c)))
    found = nk.channel_difference(model, batches)
    mean = var = None
    for batch in batches:
        values = inputs(model, "norm2", [batch])
        m, v = values.mean(1), values.var(1, correction=0)
        mean, var = (m, v) if mean is None else (0.9 * mean + 0.1 * m, 0.9 * var + 0.1 * v)
    expected = mean.view(2, 4).std(1, correction=0) / var.sqrt().view(2, 4).mean(1)
    assert found.layers[0].mean == pytest.approx(float(expected.mean()), rel=1e-9)


def test_channels_last_norms_are_read_along_their_channels():
    model = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4))
    x = torch.randn(3, 5, 6) + torch.arange(6.0)
    found = nk.channel_difference(model, [x])
    values = x.double().flatten(0, 1)
    expected = values.mean(0).std(correction=0) / values.std(0, correction=0).mean()
    assert found.layers[0].mean == pytest.approx(float(expected), rel=1e-9)


def test_inactive_channels_are_counted(batches):
    model = lived(Cnn())
    with torch.no_grad():
        model.norm1.weight[2], model.norm1.bias[2] = 0, -1  # off everywhere
        model.norm1.weight[3], model.norm1.bias[3] = 0, 0  # likewise: exactly 0
        model.norm2.bias[5] = 40  # on everywhere
    found = nk.inactive_channels(model, batches)
    assert [row.name for row in found.layers] == ["relu", "relu, call 2", "the model itself"]
    x = torch.cat(batches)
    with torch.no_grad():
        model.eval()
        first = model.norm1(model.conv1(x))
        second = model.norm2(model.conv2(first.relu()))
    for row, values in zip(found.layers, (first, second, second.relu()), strict=True):
        zeros = (values.relu() == 0).double().mean((0, 2, 3))
        assert row.zero_share == pytest.approx(float(zeros.mean()), rel=1e-6)
        assert row.largest_zero_share == pytest.approx(float(zeros.max()), rel=1e-6)
        assert row.num_eliminated == int((values.amax((0, 2, 3)) <= 0).sum())
    assert found.layers[0].num_eliminated == 2
    assert "are off everywhere in the data" in found.reading


MEASURES = {
    "estimation_shift": nk.estimation_shift,
    "channel_difference": nk.channel_difference,
    "inactive_channels": nk.inactive_channels,
}


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_a_measurement_leaves_the_model_as_it_was(measure, batches):
    model = lived(Cnn(nn.BatchNorm2d, lambda c: nn.GroupNorm(2, c)))
    model.norm1.eval()
    before = state(model)
    measure(model, batches)
    assert_untouched(model, before)

    def broken():
        yield batches[0]
        torch.rand(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(model, broken())
    assert_untouched(model, before)
    with pytest.raises(RuntimeError, match=r"size of tensor|channels"):
        measure(model, [batches[0], torch.ones(2, 5, 8, 8)])
    assert_untouched(model, before)


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_a_measurement_is_read_printed_written_and_drawn(measure, batches, tmp_path):
    model = lived(Cnn(nn.BatchNorm2d, lambda c: nn.GroupNorm(2, c)))
    found = measure(model, [(x, torch.zeros(len(x))) for x in batches])
    assert found.reading.endswith(".")
    assert str(found).startswith(found.reading)
    assert len(found.table().splitlines()) == len(found.layers) + 1
    written = json.loads(found.to_json())
    assert written["measure"] == type(found).__name__
    assert [row["name"] for row in written["layers"]] == [row.name for row in found.layers]
    figure = found.plot()
    figure.savefig(tmp_path / "figure.png")
    lines = figure.axes[0].get_lines()
    column = [getattr(row, found.drawn[0]) for row in found.layers]
    assert np.allclose(lines[0].get_ydata(), [v for v in column if v is not None])


def test_what_cannot_be_measured_is_refused(batches):
    with pytest.raises(OptionError, match="no layer with running statistics, so nothing can shift"):
        nk.estimation_shift(nn.Conv2d(3, 4, 3), batches)
    with pytest.raises(OptionError, match="normalize='max'"):
        nk.estimation_shift(Cnn(), batches, normalize="max")
    with pytest.raises(DataError, match="gave no batch"):
        nk.estimation_shift(Cnn(), [])
    with pytest.raises(OptionError, match="delta=2"):
        nk.disturb_statistics(Cnn(), 2.0).__enter__()
    with pytest.raises(OptionError, match="nothing to disturb"):
        nk.disturb_statistics(nn.ReLU(), 0.5).__enter__()
    with pytest.raises(OptionError, match="no norm that pools channels"):
        nk.channel_difference(Cnn(), batches)
    for measure in MEASURES.values():
        with pytest.raises(DataError, match="batches= gave no batch; an iterator that was used up"):
            measure(Cnn(second=nk.LayerNorm), [])
    with pytest.raises(DataError, match="no batch has reached a norm that pools channels"):
        nk.channel_difference(Cnn(nk.LayerNorm), [batches[0][:0]])
    with pytest.raises(DataError, match="no ReLU was called"):
        nk.inactive_channels(nn.Conv2d(3, 4, 3), batches)
