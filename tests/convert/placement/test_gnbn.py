"""GNBN: every other norm in the order of the calls."""

import pytest
import torch
from torch import nn

import normkit as nk
from convert.placement.nets import (
    DistributedDataParallel,
    Hidden,
    Late,
    assert_as_before,
    changed,
    images,
    state_of,
)

ODD = ["start.1", "first.norm_b", "second.norm_a", "second.skip.1"]
"""Of start.1; first: norm_a, norm_b, skip; second: norm_a, norm_b, skip in the order of calls."""


def stack(width=8, depth=4):
    layers = [nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width)) for _ in range(depth)]
    return nn.Sequential(*layers)


def test_the_first_and_the_third_of_a_stack():
    done = nk.place_gnbn_(stack())
    assert changed(done) == ["0.1", "2.1"]
    assert [change.new for change in done.changes] == ["gn:4", "gn:4"]
    assert [(left.name, left.why) for left in done.left] == [
        ("1.1", "it is norm 2 of 4"),
        ("3.1", "it is norm 4 of 4"),
    ]
    done.model(torch.randn(4, 8)).sum().backward()


@pytest.mark.parametrize("kind", [Late, Hidden])
def test_norms_count_as_they_are_called(kind):
    model = kind()
    given = None if kind is Late else images(12)
    before = state_of(model)
    done = nk.place_gnbn_(model, "gn:2", example_input=given)
    assert sorted(changed(done)) == sorted(ODD)
    done.revert()
    assert_as_before(model, before)


class Reusing(nn.Module):
    def __init__(self):
        super().__init__()
        self.unused, self.a, self.b = (nn.BatchNorm1d(8) for _ in range(3))

    def forward(self, x):
        """Compute the output."""
        return self.b(self.a(self.a(x)))


def test_a_norm_called_twice_counts_once_and_one_never_called_stays():
    done = nk.place_gnbn_(Reusing())
    assert changed(done) == ["a"]
    assert {left.name: left.why for left in done.left} == {
        "unused": "the forward does not call it",
        "b": "it is norm 2 of 2",
    }


def test_the_optimizer_follows():
    model = stack()
    optimizer = torch.optim.AdamW(model.parameters())
    done = nk.place_gnbn_(model, "in:affine=false", optimizer=optimizer)
    assert set(optimizer.param_groups[0]["params"]) == set(model.parameters())
    done.revert()
    assert set(optimizer.param_groups[0]["params"]) == set(model.parameters())


@pytest.mark.parametrize(
    ("model", "norm", "error", "message"),
    [
        (stack(depth=1), "gn:4", nk.OptionError, "calls 1 norms; .* at least two: .*convert_norm_"),
        (stack(), "bn", nk.SpecError, "norm='bn' takes statistics over the batch"),
        (stack(6), "gn:4", nk.PartitionError, r"2 layers .*\n.*0\.1, 2\.1 to gn:4[\s\S]*gn:max=4"),
        (Hidden(), "gn:4", nk.TraceError, "pass example_input="),
        (DistributedDataParallel(stack()), "gn:4", nk.OptionError, "is inside Distributed"),
    ],
)
def test_what_is_refused(model, norm, error, message):
    before = state_of(model)
    with pytest.raises(error, match=message):
        nk.place_gnbn_(model, norm)
    assert_as_before(model, before)
