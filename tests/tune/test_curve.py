"""Curves over the example weight against plain evaluations and the definition."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional

import normkit as nk
from diagnostics.test_measures import assert_untouched, state
from normkit.errors import DataError, OptionError
from normkit.tune.grids import GRID, NEXT_TO_ONE
from tune.nets import plain_net


def data(num_classes=5, sizes=(9, 4)):
    torch.manual_seed(5)
    return [(torch.randn(n, 3, 9, 9) + 0.5, torch.randint(num_classes, (n,))) for n in sizes]


def wide_net(norm=nn.BatchNorm2d, num_classes=8):
    model = plain_net(norm)
    model[9] = nn.Linear(8, num_classes)
    return model


def test_a_curve_is_that_of_as_many_plain_evaluations():
    model, batches = wide_net(), data(8)
    before = state(model)
    found = nk.example_weight_curve(model, batches)
    assert_untouched(model, before)
    assert [point.alpha for point in found.points] == list(GRID)
    assert (found.num_layers, found.num_examples) == (2, 13)
    assert found.own == found.points[0]
    ours = nk.convert_norm(model, "bn").model.eval()
    for point in found.points[::4]:
        nk.set_example_weight(ours, point.alpha)
        with torch.no_grad():
            scores = torch.cat([ours(x) for x, _ in batches]).double()
        target = torch.cat([y for _, y in batches])
        ranks = (scores > scores.gather(1, target[:, None])).sum(1)
        assert point.top1 == pytest.approx(float((ranks == 0).double().mean()))
        assert point.top5 == pytest.approx(float((ranks < 5).double().mean()))
        assert point.loss == pytest.approx(
            float(functional.cross_entropy(scores, target)), rel=1e-5
        )


@pytest.mark.parametrize("is_ours", [False, True])
def test_a_group_norm_is_weighed_by_statistics_of_the_training_data(is_ours):
    """By the definition: own moments of each group, and those pooled from all training images."""
    torch.manual_seed(0)
    norm = nk.GroupNorm(6, num_groups=2) if is_ours else nn.GroupNorm(2, 6)
    model = nn.Sequential(norm, nn.Flatten(), nn.Linear(6 * 4, 3)).double()
    train = [torch.randn(n, 6, 2, 2).double() * 2 + 1 for n in (5, 3)]
    x, target = torch.randn(7, 6, 2, 2).double(), torch.arange(7) % 3
    found = nk.example_weight_curve(
        model, [(x, target)], grid=(0.5, 0.99, 1.0), train_batches=train
    )
    every = torch.cat(train).movedim(1, 0).flatten(1)
    mean, var = every.mean(1).view(2, 3), every.var(1).view(2, 3)  # running ones: unbiased
    m_r = mean.mean(1)
    v_r = var.mean(1) + (mean - m_r[:, None]).square().mean(1)
    groups = x.view(7, 2, 12)
    e, v_e = groups.mean(2), groups.var(2, correction=0)
    for point in found.points:
        a = point.alpha
        m = a * e + (1 - a) * m_r
        v = a * v_e + (1 - a) * v_r + a * (1 - a) * (e - m_r).square()
        y = ((groups - m[..., None]) / (v[..., None] + 1e-5).sqrt()).view(7, -1)
        loss = functional.cross_entropy(model[2](y), target)
        assert point.loss == pytest.approx(loss.item(), rel=1e-9)
    assert found.own == found.points[-1]
    assert found.own.alpha == 1
    assert found.own.top5 is None
    assert type(model[0]) is type(norm)
    assert model[0] is norm


def test_the_grid_is_fine_next_to_one_for_norms_of_examples():
    tracked = nn.Sequential(
        nk.GroupNorm(6, num_groups=2, track_running_stats=True), nn.Flatten(), nn.Linear(24, 8)
    )
    batches = [(torch.randn(4, 6, 2, 2), torch.arange(4))]
    found = nk.example_weight_curve(tracked, batches)
    assert [point.alpha for point in found.points] == sorted(GRID + NEXT_TO_ONE)
    tuned = nk.tune_example_weight(tracked, batches, refine=False)
    assert [point.alpha for point in tuned.curve] == sorted(GRID + NEXT_TO_ONE)


def test_layers_with_different_weights_are_their_own_point():
    model = nk.convert_norm(wide_net(), "bn").model.eval()
    model[1].example_weight, model[5].example_weight = 0.3, 0.7
    found = nk.example_weight_curve(model, data(8), grid=(0.1,))
    assert found.own.alpha is None
    with torch.no_grad():
        scores = torch.cat([model(x) for x, _ in data(8)]).double()
    target = torch.cat([y for _, y in data(8)])
    assert found.own.loss == pytest.approx(
        float(functional.cross_entropy(scores, target)), rel=1e-5
    )
    assert "Against the layers' own weights (different)" in found.reading


def test_a_curve_is_read_printed_written_and_drawn(tmp_path):
    found = nk.example_weight_curve(wide_net(), data(8), grid=(0, 0.1, 0.5))
    best = min(found.points, key=lambda point: point.loss)
    assert found.best("loss") == best
    assert f"at {best.alpha:g}. The same examples chose and judged" in found.reading
    assert len(found.table().splitlines()) == 4
    assert [p["alpha"] for p in json.loads(found.to_json())["points"]] == [0, 0.1, 0.5]
    figure = found.plot()
    figure.savefig(tmp_path / "curve.png")
    assert [axes.get_title() for axes in figure.axes] == [
        "top 1 accuracy", "top 5 accuracy", "loss",
    ]  # fmt: skip
    assert list(figure.axes[2].get_lines()[0].get_ydata()) == [p.loss for p in found.points]
    few = nk.example_weight_curve(plain_net(), data(), grid=(0, 0.5))
    assert len(few.plot().axes) == 2
    with pytest.raises(OptionError, match="column='top5' was given; it is one of top1, loss"):
        few.best("top5")


def test_what_is_not_weighed_is_named():
    model = nn.Sequential(nn.GroupNorm(3, 3), wide_net())
    found = nk.example_weight_curve(model, data(8), grid=(0, 0.5))
    assert [(row.name, row.why) for row in found.left] == [
        ("0", "it has no running statistics; with train_batches= they are measured")
    ]
    every = nk.example_weight_curve(model, data(8), grid=(0, 0.5), train_batches=data(8))
    assert every.num_layers == 3
    assert every.left == ()
    assert every.own.alpha is None


def test_a_curve_leaves_the_model_when_it_is_interrupted():
    model = wide_net(lambda c: nn.GroupNorm(2, c))
    batches = data(8)
    before = state(model)

    def broken():
        yield batches[0]
        torch.rand(1)
        raise KeyboardInterrupt

    for options in ({"train_batches": broken()}, {"train_batches": batches}):
        with pytest.raises(KeyboardInterrupt):
            nk.example_weight_curve(model, broken(), **options)
        assert_untouched(model, before)


@pytest.mark.parametrize(
    ("make", "options", "error", "said"),
    [
        (lambda: nn.GroupNorm(3, 3), {"train_batches": data()}, OptionError, "is itself a group"),
        (wide_net, {"train_batches": data()}, OptionError, "has no group norm without running"),
        (wide_net, {"grid": (1.5,)}, OptionError, "grid"),
        (wide_net, {"grid": ()}, OptionError, "give at least one weight"),
        (lambda: nn.Linear(3, 3), {}, OptionError, "nothing to weigh"),
    ],
)
def test_a_curve_that_cannot_be_drawn_is_refused(make, options, error, said):
    with pytest.raises(error, match=said):
        nk.example_weight_curve(make(), data(), **options)


def test_data_without_examples_or_targets_are_refused():
    with pytest.raises(DataError, match="gave no batch"):
        nk.example_weight_curve(wide_net(), [])
    with pytest.raises(DataError, match="a batch of type Tensor was given"):
        nk.example_weight_curve(wide_net(), [data()[0][0]])
    empty = [(torch.randn(0, 3, 9, 9), torch.zeros(0).long())]
    with pytest.raises(DataError, match="has reached none of the 2 layers"):
        nk.example_weight_curve(wide_net(), empty)
