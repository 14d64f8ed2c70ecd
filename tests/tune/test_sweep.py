"""Several weights in one forward: what they give, and which models allow it."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import normkit as nk
from normkit.errors import DataError
from normkit.passes import forward_batch, untouched
from normkit.tune.batch_copies import weighed_by_copy
from normkit.tune.layers import WeighedLayers
from normkit.tune.metrics import read_metric
from normkit.tune.sweep import WAYS, Sweep
from tune.nets import NUM_CLASSES, Branches, Bypass, FixedSize, Mixed, data, plain_net, trained
from tune.oracle import weighed_batch_norm

AT_NORM, AT_INPUT, ONE_BY_ONE = WAYS
ALPHAS = (0.0, 0.05, 0.3, 0.7, 1.0)


def sweep_of(model, batches=None, forward=forward_batch, metric="loss"):
    layers = WeighedLayers(model)
    layers.convert_()
    return Sweep(layers, read_metric(metric, True), forward, batches or data())


@torch.no_grad()
def by_hand(model, batches, alphas):
    """Losses of plain evaluations, weight by weight."""
    rows = []
    for alpha in alphas:
        nk.set_example_weight(model, alpha)
        losses = [nn.functional.cross_entropy(model(x), t, reduction="none") for x, t in batches]
        rows.append(torch.cat(losses).double())
    nk.set_example_weight(model, 0.0)
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_each_copy_is_weighed_as_the_definition_says(dtype):
    norm = trained(nk.BatchNorm(4))
    model = nn.Sequential(norm)
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = {"mean": norm.running_mean, "var": norm.running_var, "eps": norm.eps}
    values |= {"weight": norm.weight.detach(), "bias": norm.bias.detach()}
    values = {k: v if k == "eps" else v.double().tolist() for k, v in values.items()}
    alphas = [alpha for alpha in ALPHAS for _ in range(2)]  # copy by copy
    expected = weighed_batch_norm(torch.cat([x] * len(ALPHAS)), alphas, values)
    layers = WeighedLayers(model)
    with torch.no_grad(), untouched(model), weighed_by_copy(layers, ALPHAS, repeat=True):
        y = model.to(dtype)(x.to(dtype))
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {}
    assert_close(y, expected.to(dtype), **tolerance)
    assert norm.example_weight == 0
    assert not norm._forward_pre_hooks


@pytest.mark.parametrize(
    ("make", "how"),
    [(plain_net, AT_NORM), (Branches, AT_NORM), (Bypass, AT_INPUT), (Mixed, ONE_BY_ONE),
     (FixedSize, ONE_BY_ONE)],
)  # fmt: skip
def test_shared_forwards_give_what_plain_ones_do(make, how):
    model = make()
    sweep = sweep_of(model)
    found = sweep.scores(ALPHAS)
    assert sweep.how == how
    assert_close(found, by_hand(model, data(), ALPHAS), rtol=1e-6, atol=1e-6)


def test_the_first_convolution_runs_once_a_batch():
    model = plain_net()
    sweep = sweep_of(model)
    sweep.scores(ALPHAS)  # settles how, on the first batch
    seen = []
    model[0].register_forward_hook(lambda module, args, y: seen.append(len(y)))
    sweep.scores(ALPHAS)
    assert seen == [4, 4, 4]


def test_a_batch_of_one_is_told_apart_too():
    batches = data(5, size=1)
    model = Bypass()
    found = sweep_of(model, batches).scores(ALPHAS)
    assert_close(found, by_hand(model, batches, ALPHAS), rtol=1e-6, atol=1e-6)


def test_batches_of_other_sizes_follow_the_first():
    batches = [*data(2, size=4), *data(1, size=3)]
    model = plain_net()
    found = sweep_of(model, batches).scores(ALPHAS)
    assert_close(found, by_hand(model, batches, ALPHAS), rtol=1e-6, atol=1e-6)


def test_composites_weigh_in_their_batch_stage():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nk.BatchChannelNorm(8, num_groups=2), nk.GroupNormPlus(8, num_groups=2),
        nk.InstanceBatchNorm(8), nk.SwitchableNorm(8), nk.GhostBatchNorm(8),
        nn.Flatten(), nn.Linear(392, NUM_CLASSES),
    )  # fmt: skip
    trained(model)
    sweep = sweep_of(model)
    found = sweep.scores(ALPHAS)
    assert sweep.how == AT_NORM
    assert_close(found, by_hand(model, data(), ALPHAS), rtol=1e-5, atol=1e-5)


def test_layers_that_are_called_by_name_and_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.head = trained(nk.BatchNorm(3)), nn.Linear(3, NUM_CLASSES)

        def forward(self, x):
            return self.head(self.norm(x=self.norm(x=x).relu()).mean((2, 3)))

    model = Twice().eval()
    sweep = sweep_of(model)
    found = sweep.scores(ALPHAS)
    assert sweep.how == AT_NORM
    assert_close(found, by_hand(model, data(), ALPHAS), rtol=1e-6, atol=1e-6)


class Small(nn.Module):
    """Has memory for at most eight examples behind the first norm."""

    def __init__(self, limit):
        super().__init__()
        self.body, self.limit, self.sizes = plain_net(), limit, []

    def forward(self, x):
        y = self.body[:2](x)
        self.sizes.append(len(y))
        if len(y) > self.limit:
            raise torch.OutOfMemoryError("no memory")
        return self.body[2:](y)


@pytest.mark.parametrize("limit", [8, 4])
def test_without_memory_fewer_weights_share_a_forward(limit):
    model = Small(limit)
    sweep = sweep_of(model)
    found = sweep.scores(ALPHAS)
    assert max(model.sizes[-3:]) <= limit
    assert_close(found, by_hand(model, data(), ALPHAS), rtol=1e-6, atol=1e-6)


def test_copies_of_large_maps_are_made_in_parts(monkeypatch):
    monkeypatch.setattr("normkit.tune.sweep.CPU_BYTES", 2 * (4 * 6 * 7 * 7 * 4))
    model = plain_net()
    sweep = sweep_of(model)
    found = sweep.scores(ALPHAS)
    assert sweep.max_copies == 2
    assert [len(part) for part in sweep._parts(ALPHAS)] == [2, 2, 1]
    assert_close(found, by_hand(model, data(), ALPHAS), rtol=1e-6, atol=1e-6)


def test_a_forward_that_goes_past_the_norms_is_refused():
    sweep = sweep_of(plain_net(), forward=lambda model, batch: torch.zeros(4, NUM_CLASSES))
    with pytest.raises(DataError, match="reached none of the 2 layers with running statistics"):
        sweep.scores(ALPHAS)
