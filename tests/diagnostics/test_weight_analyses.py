"""Hessian norms, projected steps and singularity ratios against loops over their definitions."""

import math

import pytest
import torch
from torch import nn

import normkit as nk
from diagnostics import definitions as d
from diagnostics.test_measures import assert_untouched, state
from normkit.errors import DataError, OptionError


def small(seed=0, groups=1):
    """Conv with 3 filters of 8 values, batch norm, tanh, flatten, linear; float64."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)
    ).double()
    with torch.no_grad():
        model[0].weight.add_(0.3)
    return model


@pytest.fixture
def pairs():
    torch.manual_seed(3)
    return [(torch.randn(n, 2, 3, 3).double() + 1, torch.randint(3, (n,))) for n in (5, 4)]


RULES = {
    "plain": {},
    "large eps": {"eps": 1e-2},
    "preserve": {"preserve": True},
    "unbiased, eps to the deviation": {"unbiased": True, "eps_to": "std", "eps": 1e-3},
    "center alone": {"scale": False},
}


def squares(model, pairs, options):
    """Squared Frobenius norms by the centred and the raw weight, and (sum of all)^2 / I^2."""
    rule = model[0].parametrizations.weight[0]
    raw = model[0].parametrizations.weight.original.detach().flatten(1)
    gain, offset = torch.ones(3).double(), torch.zeros(3).double()
    if options.get("preserve"):
        gain, offset = (values.detach() for values in rule.gain_and_offset())
    how = {key: options[key] for key in ("unbiased", "eps_to", "scale") if key in options}
    how["eps"] = options.get("eps", 1e-5)
    before = after = least = 0.0
    for pair in pairs:

        def by_centred(rows, pair=pair):
            return d.loss_of(d.standardised(rows, **how), model, pair, gain, offset)

        def by_raw(rows, by_centred=by_centred):
            return by_centred(d.centred(rows))

        for index in range(3):
            dotted = d.hessian(by_centred, d.centred(raw), index)
            plain = d.hessian(by_raw, raw, index)
            size = len(dotted)
            for i in range(size):  # eq. 22
                for j in range(size):
                    expected = dotted[i, j] + dotted.sum() / size**2
                    expected -= (dotted[i].sum() + dotted[:, j].sum()) / size
                    assert plain[i, j] == pytest.approx(float(expected), abs=2e-6)
            assert plain.sum() == pytest.approx(0, abs=2e-6)  # eq. 23
            before += float(dotted.square().sum())
            after += float(plain.square().sum())
            least += float(dotted.sum() / size) ** 2
    return before, after, least


@pytest.mark.parametrize("name", RULES)
def test_hessian_norms_are_those_of_second_differences(name, pairs):
    model = small()
    nk.standardize_weights_(model, **RULES[name])
    before, after, least = squares(model, pairs, RULES[name])
    found = nk.hessian_norms(model, pairs, num_probes=None)
    (row,) = found.layers
    assert (row.name, row.num_filters, row.fan_in) == ("0", 3, 8)
    assert row.centred_squares == pytest.approx(before, rel=1e-4)
    assert row.raw_squares == pytest.approx(after, rel=1e-4)
    assert row.reduction == pytest.approx(1 - after / before, rel=1e-3)
    assert row.least_reduction == pytest.approx(least / before, rel=1e-3)
    assert 0 < row.least_reduction < row.reduction < 1


def test_probes_estimate_what_all_columns_give_and_leave_the_reduction_exact(pairs):
    model = small()
    nk.standardize_weights_(model)
    exact = nk.hessian_norms(model, pairs[:1], num_filters=1, num_probes=None).layers[0]
    found = nk.hessian_norms(model, pairs[:1], num_filters=1, num_probes=100)
    row = found.layers[0]
    assert row.raw_squares == pytest.approx(exact.raw_squares, rel=0.2)
    taken = exact.centred_squares - exact.raw_squares
    assert row.centred_squares - row.raw_squares == pytest.approx(taken, rel=1e-9)
    assert "estimated by 100 vectors" in found.reading
    again = nk.hessian_norms(model, pairs[:1], num_filters=1, num_probes=100)
    assert again.layers == found.layers


def test_filters_are_chosen_evenly(pairs):
    model = small()
    nk.standardize_weights_(model)
    whole = nk.hessian_norms(model, pairs[:1], num_probes=None).layers[0]
    ends = nk.hessian_norms(model, pairs[:1], num_filters=2, num_probes=None).layers[0]
    assert ends.num_filters == 2
    assert ends.centred_squares < whole.centred_squares


def test_a_loss_that_is_linear_in_the_weight_has_no_hessian():
    model = nn.Sequential(nn.Conv1d(2, 3, 2)).double()
    nk.standardize_weights_(model, lambda _m, _n: True, scale=False)
    batch = torch.randn(2, 2, 4).double(), None
    found = nk.hessian_norms(model, [batch], loss=lambda output, _: output.sum())
    row = found.layers[0]
    assert (row.centred_squares, row.raw_squares, row.reduction) == (0, 0, 0)


@pytest.mark.parametrize("options", [{}, {"unbiased": True}, {"preserve": True, "eps": 1e-3}])
@pytest.mark.parametrize("rate", [0.01, 0.5])
def test_projected_updates_are_those_of_their_equations(options, rate, pairs):
    model = small()
    nk.standardize_weights_(model, **options)
    rule = model[0].parametrizations.weight[0]
    raw = model[0].parametrizations.weight.original.detach().flatten(1)
    gain, offset = torch.ones(3).double(), torch.zeros(3).double()
    if options.get("preserve"):
        gain, offset = (values.detach() for values in rule.gain_and_offset())
    unbiased = options.get("unbiased", False)
    length = 7 if unbiased else 8
    angles, errors, tangents = [[], [], []], [], [0.0, 0.0]
    for pair in pairs:

        def by_filters(rows, pair=pair):
            return d.loss_of(rows, model, pair, gain, offset)

        def project(rows):
            return d.standardised(d.centred(rows), unbiased=unbiased)

        unit = project(raw)
        assert torch.allclose(unit.square().sum(1), torch.tensor(float(length)).double())  # eq. 25
        g = d.gradient(by_filters, unit)
        along = (unit * g).sum(1, keepdim=True)
        after = (
            project(unit - rate * g),
            unit - rate * (g - along / length * unit - g.sum(1, keepdim=True) / 8),
            project(raw - rate * d.gradient(lambda rows: by_filters(project(rows)), raw)),
        )
        for index in range(3):
            for found, moved in zip(angles, after, strict=True):
                found.append(d.degrees(unit[index], moved[index]))
            step = (after[0] - unit)[index].norm()
            errors.append(float((after[1] - after[0])[index].norm() / step))
            tangents[0] += math.tan(math.radians(angles[0][-1]))
            tangents[1] += math.tan(math.radians(angles[2][-1]))
    (row,) = nk.projected_updates(model, pairs, rate=rate).layers
    means = [sum(each) / len(each) for each in angles]
    assert row.projected_degrees == pytest.approx(means[0], rel=1e-4)
    assert row.tangent_degrees == pytest.approx(means[1], rel=1e-4)
    assert row.standardized_degrees == pytest.approx(means[2], rel=1e-4)
    assert row.tangent_error == pytest.approx(sum(errors) / len(errors), rel=1e-3, abs=1e-6)
    assert row.rate_ratio == pytest.approx(tangents[1] / tangents[0], rel=1e-4)


def test_the_tangent_step_misses_the_projected_one_by_the_order_of_the_rate(pairs):
    model = small()
    model[1] = nn.Identity()  # a norm would take the gradient along the filter out
    nk.standardize_weights_(model, lambda _m, name: name == "0")
    errors = [nk.projected_updates(model, pairs, rate=r).layers[0].tangent_error for r in RATES]
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.05)


RATES = (1e-2, 1e-3)


def test_a_step_of_a_small_raw_weight_is_a_large_one(pairs):
    """Followed by a norm, its rate counts 1 / variance times."""
    model = small()
    nk.standardize_weights_(model, eps=1e-12)
    raw = model[0].parametrizations.weight.original
    with torch.no_grad():
        rows = d.standardised(d.centred(raw.flatten(1)))
        raw.copy_(0.01 * rows.view_as(raw))
    found = nk.projected_updates(model, pairs, rate=1e-6)
    assert found.layers[0].rate_ratio == pytest.approx(1e4, rel=1e-2)
    assert "as if its rate were 1e+04 times as large" in found.reading


LAYERS = {
    "conv": lambda: nn.Conv2d(4, 6, 3),
    "grouped": lambda: nn.Conv1d(4, 6, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 8, 3, groups=4),
    "transposed, grouped": lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
    "linear": lambda: nn.Linear(5, 3),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_singularity_ratio_is_that_of_sums_over_input_channels(name):
    torch.manual_seed(0)
    layer = LAYERS[name]()
    sums = d.input_sums(
        layer.weight, getattr(layer, "groups", 1), "Transpose" in type(layer).__name__
    )
    (row,) = nk.singularity_ratio(layer).layers
    assert row.num_channels == len(sums)
    assert row.smallest == pytest.approx(min(sums), rel=1e-6)
    assert row.mean == pytest.approx(sum(sums) / len(sums), rel=1e-6)
    assert row.ratio == pytest.approx(min(sums) / (sum(sums) / len(sums)), rel=1e-6)


def test_the_singularity_ratio_is_of_the_weights_that_are_used():
    model = small()
    nk.standardize_weights_(model)
    used = d.input_sums(model[0].weight)
    found = nk.singularity_ratio(model)
    assert found.layers[0].smallest == pytest.approx(min(used))
    assert found.ratio == pytest.approx(sum(row.ratio for row in found.layers) / 2)
    chosen = nk.singularity_ratio(model, where=lambda _m, name: name == "4")
    assert [row.name for row in chosen.layers] == ["4"]
    with torch.no_grad():
        model[4].weight.zero_()
    assert nk.singularity_ratio(model).layers[1].ratio == 0


MEASURES = {
    "hessian_norms": nk.hessian_norms,
    "projected_updates": nk.projected_updates,
}


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_an_analysis_of_weights_leaves_the_model_as_it_was(measure, pairs):
    model = small()
    nk.standardize_weights_(model)
    model[1].eval()
    model(pairs[0][0]).sum().backward()
    before, grads = state(model), [p.grad.clone() for p in model.parameters()]
    measure(model, pairs[:1])
    assert_untouched(model, before)

    def broken():
        yield pairs[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(model, broken())
    assert_untouched(model, before)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    rule = model[0].parametrizations.weight[0]
    assert not rule._forward_hooks


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_what_an_analysis_of_weights_cannot_measure_is_refused_or_named(measure, pairs):
    with pytest.raises(OptionError, match=r"no standardised weight; nk\.standardize_weights_"):
        measure(small(), pairs)
    model = nn.Sequential(small(), nn.ModuleList([nn.Conv2d(2, 3, 2).double()]))
    nk.standardize_weights_(model, lambda _m, name: name != "0.4")
    with pytest.raises(DataError, match="gave no batch"):
        measure(model, [])
    with pytest.raises(DataError, match="no batch has reached a layer with a standardised weight"):
        measure(
            model[0], pairs, forward=lambda m, b: m[1:](torch.ones(len(b[1]), 3, 2, 2).double())
        )
    found = measure(model, pairs, forward=lambda m, b: m[0](b[0]))
    assert [row.name for row in found.layers] == ["0.0"]
    assert [(row.name, row.why) for row in found.left] == [("1.0", "no batch has reached it")]
    uncentred = small()
    nk.standardize_weights_(uncentred, center=False)
    with pytest.raises(OptionError, match="can be measured; 0: it does not centre its weight"):
        measure(uncentred, pairs)


def test_options_that_break_a_rule_are_refused(pairs):
    model = small()
    nk.standardize_weights_(model, scale=False)
    with pytest.raises(OptionError, match="does not divide by the deviation"):
        nk.projected_updates(model, pairs)
    with pytest.raises(OptionError, match="rate=0 was given; it is a finite number above 0"):
        nk.projected_updates(model, pairs, rate=0)
    with pytest.raises(OptionError, match="num_filters"):
        nk.hessian_norms(model, pairs, num_filters=0)
    with pytest.raises(OptionError, match="num_probes"):
        nk.hessian_norms(model, pairs, num_probes=0)
    with pytest.raises(OptionError, match="no convolution and no linear layer"):
        nk.singularity_ratio(nn.ReLU())
    with pytest.raises(OptionError, match=r"where= chooses none of the 2 layers"):
        nk.singularity_ratio(model, where=lambda _m, _n: False)


class Twice(nn.Module):
    """Calls one convolution twice in a forward, so that its weight is computed once for both."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)
        self.head = nn.Linear(18, 3)

    def forward(self, x):
        return self.head(self.norm(self.conv(self.norm(self.conv(x)).tanh())).tanh().flatten(1))


def test_a_layer_that_is_called_twice_gets_the_gradient_of_both_calls(pairs):
    """A step of the raw weight, taken by hand, turns its filters as far as it says."""
    model = Twice().double()
    nk.standardize_weights_(model, eps=1e-12)
    raw = model.conv.parametrizations.weight.original
    x, target = pairs[0]
    loss = nn.functional.cross_entropy(model(x), target)
    (grad,) = torch.autograd.grad(loss, raw)
    with torch.no_grad():
        before, after = (d.centred(w.flatten(1)) for w in (raw, raw - 0.1 * grad))
    angles = [d.degrees(a, b) for a, b in zip(before, after, strict=True)]
    (row,) = nk.projected_updates(model, pairs[:1], rate=0.1).layers
    assert row.standardized_degrees == pytest.approx(sum(angles) / 2, rel=1e-6)
    hessian = nk.hessian_norms(model, pairs[:1], num_filters=1, num_probes=1).layers[0]
    assert hessian.least_reduction <= hessian.reduction
