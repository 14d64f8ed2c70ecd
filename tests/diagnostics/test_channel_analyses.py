"""Propagation of similarity, channels normalised together, and output bounds."""

import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

import normkit as nk
import oracle
from diagnostics import definitions as d
from diagnostics.test_measures import assert_untouched, state
from normkit.errors import DataError, OptionError


@pytest.fixture
def batches():
    torch.manual_seed(3)
    return [torch.randn(n, 3, 6, 6) * 2 + 1 for n in (8, 3)]


def convs(groups=1, bias=True):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=bias), nn.ReLU(), nn.Conv2d(4, 6, 2, groups=groups, padding=1)
    )


def moments(maps):
    """Mean and biased variance of each channel of all maps together."""
    values = torch.cat([x.double().movedim(1, 0).flatten(1) for x in maps], dim=1)
    return values.mean(1), values.var(1, correction=0)


@pytest.mark.parametrize(("groups", "is_standardised"), [(1, False), (2, False), (1, True)])
def test_similarity_before_after_and_predicted_is_that_of_its_equations(
    groups, is_standardised, batches
):
    model = convs(groups).double()  # in float32 rounding shows where filters have equal lengths
    if is_standardised:
        nk.standardize_weights_(model, lambda _m, _n: True)
    maps = [x.double() for x in batches]
    found = nk.similarity_propagation(model, maps)
    assert [row.name for row in found.layers] == ["0", "2"]
    with torch.no_grad():
        for index, row in zip((0, 2), found.layers, strict=True):
            layer = model[index]
            before = moments(maps)
            weight = layer.weight.double()
            model_of = d.propagated(weight, layer.bias, *before, groups=layer.groups)
            outputs = [layer(x) for x in maps]
            for name, (mean, var) in {
                "input": before, "output": moments(outputs), "predicted": model_of
            }.items():  # fmt: skip
                difference, spread = d.difference(mean, var)
                assert getattr(row, f"{name}_difference") == pytest.approx(difference, rel=1e-9)
                assert getattr(row, f"{name}_spread") == pytest.approx(spread, rel=1e-9)
            maps = [x.relu() for x in outputs]
    assert found.layers[1].fan_in == 16 // groups


def test_standardised_filters_pass_similarity_on():
    """Eqs. 38 and 39: of inputs that are alike the outputs are alike, with mean 0."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 16, 3, bias=False))
    with torch.no_grad():
        model[0].weight.add_(0.1 * torch.randn(16, 1, 1, 1))
    alike = [torch.randn(400, 4, 6, 6).double() + 3]
    plain = nk.similarity_propagation(model.double(), alike).layers[0]
    nk.standardize_weights_(model, lambda _m, _n: True, eps=1e-12)
    row = nk.similarity_propagation(model, alike).layers[0]
    assert row.input_difference < 0.05
    assert row.output_difference < 0.05
    assert plain.output_difference > 0.5
    assert row.predicted_spread < 0.01
    assert row.output_spread < 0.02
    assert plain.output_spread > 0.05


def test_an_example_without_a_batch_axis_and_an_own_forward():
    class StdConv2d(nn.Conv2d):
        pass

    model = nn.Sequential(nn.Conv2d(3, 4, 3), StdConv2d(4, 4, 3))
    found = nk.similarity_propagation(model, [torch.randn(3, 6, 6)], forward=lambda m, x: m(x))
    assert [row.name for row in found.layers] == ["0"]
    assert [(row.name, row.kind) for row in found.left] == [("1", "StdConv2d")]
    with pytest.raises(DataError, match="no batch has reached a convolution; 1: it standardises"):
        nk.similarity_propagation(model[1:], [torch.randn(2, 4, 6, 6)])
    with pytest.raises(OptionError, match="ReLU has no convolution"):
        nk.similarity_propagation(nn.ReLU(), [torch.randn(3, 6, 6)])
    with pytest.raises(DataError, match="gave no batch"):
        nk.similarity_propagation(model, [])


EXAMPLES = [((0.0, 4.0), (1.0, 1.0)), ((0.0, 1.0), (1.0, 3.0)), ((-1.0, 0.0, 5.0), (0.2, 1.0, 2.0))]


@pytest.mark.parametrize(("means", "stds"), EXAMPLES)
def test_channels_normalised_together_are_what_a_group_norm_makes_of_samples(means, stds):
    quantiles = torch.distributions.Normal(0.0, 1.0).icdf(
        (torch.arange(20001).double() + 0.5) / 20001
    )
    x = torch.stack([m + s * quantiles for m, s in zip(means, stds, strict=True)])[None]
    y = functional.group_norm(x, 1, eps=0)[0]
    found = nk.grouped_channels(means, stds)
    for row, values in zip(found.layers, y, strict=True):
        assert row.new_mean == pytest.approx(float(values.mean()), abs=1e-3)
        assert row.new_std == pytest.approx(float(values.std()), rel=1e-3)
        assert row.zero_share == pytest.approx(float((values <= 0).double().mean()), abs=1e-3)
    center = sum(means) / len(means)
    spread = math.sqrt(sum((m - center) ** 2 for m in means) / len(means))
    assert found.stat_diff == pytest.approx(spread / (sum(stds) / len(stds)))


def test_channels_that_are_alike_stay_as_they_are():
    found = nk.grouped_channels(torch.zeros(3), torch.ones(3))
    assert {(row.new_mean, row.new_std, row.zero_share) for row in found.layers} == {(0, 1, 0.5)}
    assert found.stat_diff == 0
    before, after = found.plot().axes
    assert len(before.collections) == len(after.collections) == 6


@pytest.mark.parametrize(
    ("means", "stds", "said"),
    [
        ((0.0, 1.0), (1.0,), r"shape \(2,\) and stds of shape \(1,\)"),
        ((), (), r"shape \(0,\)"),
        ((0.0,), (0.0,), "standard deviations are above 0"),
        ((math.nan,), (1.0,), "all are finite"),
    ],
)
def test_channels_that_are_none_are_refused(means, stds, said):
    with pytest.raises(OptionError, match=said):
        nk.grouped_channels(means, stds)


NORMS = {
    "batch": (lambda: nk.BatchNorm(6), "bn", {}),
    "torch's batch": (lambda: nn.BatchNorm2d(6), "bn", {}),
    "torch's instance": (lambda: nn.InstanceNorm2d(6), "in", {}),
    "torch's group": (lambda: nn.GroupNorm(3, 6), "gn", {"num_groups": 3}),
    "layer": (lambda: nk.LayerNorm(6), "ln", {}),
    "tracked group": (lambda: nk.GroupNorm(6, num_groups=2, track_running_stats=True), "gn",
                      {"num_groups": 2}),
    "positional": (lambda: nk.PositionalNorm(6), "pn", {}),
    "bgn": (lambda: nk.BatchGroupNorm(6, num_groups=8), "bgn", {"num_groups": 8}),
    "ghost": (lambda: nk.GhostBatchNorm(6, ghost_batch_size=3), "ghost", {"ghost_batch_size": 3}),
    "gbgn": (lambda: nk.GeneralBatchGroupNorm(6, num_groups=2, examples_per_group=2), "gbgn",
             {"num_groups": 2, "examples_per_group": 2}),
}  # fmt: skip


@pytest.mark.parametrize("name", NORMS)
def test_the_reach_of_a_norm_is_that_of_its_definition(name):
    """In training by groups of the oracle; at evaluation the layer itself without an affine map."""
    torch.manual_seed(1)
    make, kind, options = NORMS[name]
    layer = make()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(0.5, 2)
        for key, buffer in layer.named_buffers():
            if key.startswith("running"):
                buffer.uniform_(0.1, 0.2)
    x = torch.randn(4, 6, 2, 4)
    x[0, 0, 0, 0] = 30
    (row,) = nk.output_bound(nn.Sequential(layer), [x]).layers
    ids = oracle.group_ids(kind, x.shape, **options)
    counts = torch.bincount(ids.flatten())
    unit = oracle.normalize(x.double(), ids, None, None, 1e-5).abs()
    smallest = int(counts[counts > 0].min())
    assert (row.num_values, row.bound) == (smallest, pytest.approx(math.sqrt(smallest - 1)))
    assert row.largest_training == pytest.approx(float(unit.max()), rel=1e-5)
    share = (unit / (counts[ids] - 1).double().sqrt()).max()
    assert row.share == pytest.approx(float(share), rel=1e-5)
    assert row.share <= 1
    bare = make().double()
    bare.load_state_dict(layer.state_dict())
    with torch.no_grad():
        for key, parameter in bare.named_parameters():
            parameter.fill_(1.0 if key == "weight" else 0.0)
        expected = bare.eval()(x.double()).abs().max()
    assert row.largest_evaluation == pytest.approx(float(expected), rel=1e-5)


def test_the_bound_is_reached_as_in_the_paper_and_exceeded_at_evaluation():
    norm = nn.BatchNorm1d(2, eps=1e-12).double()
    x = torch.ones(5, 2).double()
    x[0] = 0  # appendix A
    nk.recalibrate(nn.Sequential(norm), [torch.randn(50, 2).double() * 0.01]).apply()
    found = nk.output_bound(nn.Sequential(norm), [x])
    (row,) = found.layers
    assert (row.num_values, row.bound) == (5, 2)
    assert row.largest_training == pytest.approx(2, rel=1e-9)
    assert row.share == pytest.approx(1, rel=1e-9)
    assert row.largest_evaluation > 50  # the statistics are those of small inputs
    assert "1 of 1 norms do, most 0" in found.reading


def test_bounds_inside_of_composites_under_masks_and_of_channels_last():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nk.BatchChannelNorm(4, num_groups=2))
    found = nk.output_bound(model, [torch.randn(5, 3, 6)])
    assert [(row.name, row.num_values) for row in found.layers] == [
        ("1.batch", 30), ("1.channel", 12),
    ]  # fmt: skip
    micro = nn.Sequential(nk.BatchChannelNorm(4, num_groups=2, micro_batch=True))
    found = nk.output_bound(micro, [torch.randn(5, 4, 6)])
    assert [row.name for row in found.layers] == ["0.channel"]
    assert "running estimates in training too" in str(found)
    mixed = nn.Sequential(nk.SwitchableNorm(4), nn.BatchNorm2d(4))
    found = nk.output_bound(mixed, [torch.randn(5, 4, 2, 2)])
    assert [(row.name, row.why.split(" at")[0]) for row in found.left] == [
        ("0", "it normalises by several kinds of statistics")
    ]
    tokens = nn.Sequential(nn.LayerNorm(6))
    assert nk.output_bound(tokens, [torch.randn(2, 5, 6)]).layers[0].num_values == 6
    masked = nk.BatchNorm(4)
    lengths = torch.tensor([3, 6])
    found = nk.output_bound(masked, [torch.randn(2, 4, 6)], forward=lambda m, x: m(x, lengths))
    assert found.layers[0].num_values == 9


def test_bounds_that_cannot_be_measured_are_refused(batches):
    with pytest.raises(OptionError, match="has no norm of torch or normkit with groups"):
        nk.output_bound(nn.ReLU(), batches)
    with pytest.raises(DataError, match="gave no batch"):
        nk.output_bound(nn.BatchNorm2d(3), [])
    with pytest.raises(DataError, match="no batch has reached a norm that can be measured; 1: no"):
        nk.output_bound(
            nn.Sequential(nn.Identity(), nn.BatchNorm2d(3)), batches, forward=lambda m, x: m[0](x)
        )


MEASURES = {
    "similarity_propagation": nk.similarity_propagation,
    "output_bound": nk.output_bound,
    "singularity_ratio": lambda model, _: nk.singularity_ratio(model),
}


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_an_analysis_leaves_the_model_and_is_read_printed_written_and_drawn(
    measure, batches, tmp_path
):
    model = nn.Sequential(convs(), nk.BatchNorm(6), nn.ReLU(), nn.GroupNorm(2, 6))
    model[1].eval()
    before = state(model)
    found = measure(model, batches)
    assert_untouched(model, before)
    assert found.reading.endswith(".")
    assert str(found).startswith(found.reading)
    written = json.loads(found.to_json())
    assert [row["name"] for row in written["layers"]] == [row.name for row in found.layers]
    found.plot().savefig(tmp_path / "figure.png")

    def broken():
        yield batches[0]
        raise KeyboardInterrupt

    if measure is not MEASURES["singularity_ratio"]:
        with pytest.raises(KeyboardInterrupt):
            measure(model, broken())
        assert_untouched(model, before)
        with pytest.raises(RuntimeError, match=r"size of tensor|channels"):
            measure(model, [batches[0], torch.ones(2, 5, 8, 8)])
        assert_untouched(model, before)
