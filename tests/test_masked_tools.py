"""Statistics of padded inputs, where a model gives its norms a mask."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import normkit as nk

EXACT = {"rtol": 1e-6, "atol": 1e-6}
KINDS = {
    "bn": lambda: nk.BatchNorm(6),
    "ghost": lambda: nk.GhostBatchNorm(6, ghost_batch_size=2),
    "tracked gn": lambda: nk.GroupNorm(6, num_groups=3, track_running_stats=True),
    "bcn": lambda: nk.BatchChannelNorm(6, num_groups=3),
    "micro bcn": lambda: nk.BatchChannelNorm(6, num_groups=3, micro_batch=True),
    "sn": lambda: nk.SwitchableNorm(6),
    "gnplus, batch first": lambda: nk.GroupNormPlus(6, num_groups=3, order="batch-first"),
    "bgn": lambda: nk.BatchGroupNorm(6, num_groups=3),
}
BIASED = ("micro bcn",)


class Padded(nn.Module):
    """Takes sequences ``(N, 6, L)`` and their lengths, and gives its norm both."""

    def __init__(self, norm, *, by_name=False):
        super().__init__()
        self.norm, self.by_name = norm, by_name

    def forward(self, x, lengths):
        return self.norm(x, mask=lengths) if self.by_name else self.norm(x, lengths)


@pytest.fixture
def batches():
    """Padding is far off, and not even a number in the last."""
    torch.manual_seed(0)
    found = []
    for size in (4, 3, 2):
        x = torch.randn(size, 6, 7) * torch.arange(1.0, 7)[:, None] + 3
        lengths = torch.randint(2, 7, (size,))
        x[torch.arange(7)[None, None].expand(size, 6, 7) >= lengths[:, None, None]] = (
            torch.nan if size == 2 else 1e3
        )
        found.append({"x": x, "lengths": lengths})
    return found


def valid(batches):
    """Every valid position's channels, ``(M, 6)``."""
    rows = [
        x[:, :n].T.double()
        for batch in batches
        for x, n in zip(batch["x"], batch["lengths"], strict=True)
    ]
    return torch.cat(rows)


@pytest.mark.parametrize("sequential", [False, True], ids=["at once", "in order"])
@pytest.mark.parametrize("kind", KINDS)
def test_recalibration_counts_valid_positions(kind, sequential, batches):
    model = Padded(KINDS[kind](), by_name=sequential)
    (row,) = nk.recalibrate(model, batches, sequential=sequential).layers
    groups = 3 if kind == "bgn" else 6
    values = valid(batches).unflatten(1, (groups, -1)).movedim(1, 0).flatten(1)
    assert row.num_values == values.shape[1]
    assert_close(row.new["running_mean"].double(), values.mean(1), **EXACT)
    var = values.var(1, correction=0 if kind in BIASED else 1)
    assert_close(row.new["running_var"].double(), var, **EXACT)
    assert row.new.get("num_batches_tracked", 3) == 3


def test_of_group_first_it_is_what_the_group_norm_puts_out(batches):
    norm = nk.GroupNormPlus(6, num_groups=3)
    rows = []
    for batch in batches:
        for x, n in zip(batch["x"], batch["lengths"], strict=True):
            cells = x[:, :n].double().reshape(3, -1)
            std = (cells.var(1, correction=0, keepdim=True) + norm.eps).sqrt()
            rows.append(((cells - cells.mean(1, keepdim=True)) / std).reshape(6, -1).T)
    values = torch.cat(rows)
    for sequential in (False, True):
        (row,) = nk.recalibrate(Padded(norm), batches, sequential=sequential).layers
        assert_close(row.new["running_mean"].double(), values.mean(0), **EXACT)
        assert_close(row.new["running_var"].double(), values.var(0), **EXACT)


def test_the_channels_of_halves(batches):
    model = Padded(nk.InstanceBatchNorm(6))
    (row,) = nk.recalibrate(model, batches).layers
    assert_close(row.new["running_var"].double(), valid(batches)[:, 3:].var(0), **EXACT)


def test_estimation_shift_is_of_valid_positions(batches):
    row = nk.estimation_shift(Padded(nk.BatchNorm(6)), batches).layers[1]
    values = valid(batches)
    assert row.num_values == len(values)
    assert row.esm_mean == pytest.approx(float(values.mean(0).norm()))
    assert row.esm_std == pytest.approx(float((1 - values.std(0, correction=0)).norm()))


def test_channel_difference_is_of_valid_positions(batches):
    found = nk.channel_difference(Padded(nk.GroupNorm(6, num_groups=2)), batches, momentum=None)
    mean, std = valid(batches).mean(0).view(2, 3), valid(batches).std(0, correction=0).view(2, 3)
    expected = (mean.std(1, correction=0) / std.mean(1)).mean()
    assert found.mean == pytest.approx(float(expected), rel=1e-6)


def test_groups_that_cut_through_positions_are_left_out_by_name(batches):
    class Both(Padded):
        def __init__(self):
            super().__init__(nk.BatchNorm(6))
            self.cut = nk.BatchGroupNorm(6, num_groups=42)

        def forward(self, x, lengths):
            return self.cut(self.norm(x, lengths), lengths)

    for sequential in (False, True):
        patch = nk.recalibrate(Both(), batches, sequential=sequential)
        assert [row.name for row in patch.layers] == ["norm"]
        assert "its groups cut through positions" in patch.left[0].why


def test_single_valid_values_are_refused_where_they_have_no_variance(batches):
    one = {"x": batches[0]["x"], "lengths": torch.tensor([1, 0, 0, 0])}
    few = torch.tensor([3, 3, 1, 0])
    with pytest.raises(nk.InputError, match=r"layer 'norm' got .* one value for each of its stat"):
        nk.recalibrate(Padded(nk.BatchNorm(6)), [*batches, one])
    with pytest.raises(nk.PartitionError, match="layer 'norm' expected more than 1 valid value"):
        nk.recalibrate(Padded(KINDS["ghost"]()), [*batches, {**one, "lengths": few}])
    nothing = {"x": batches[0]["x"], "lengths": torch.zeros(4, dtype=torch.long)}
    row = nk.recalibrate(Padded(nk.BatchNorm(6)), [nothing, *batches]).layers[0]
    assert row.new["num_batches_tracked"] == 3


@pytest.mark.parametrize("kind", ["bn", "ghost", "tracked gn", "bcn", "sn", "bgn"])
def test_accumulated_statistics_are_those_of_all_valid_positions(kind, batches):
    model, parts = Padded(KINDS[kind]()), batches[:2]
    with nk.accumulate_statistics(model, steps=2):
        for batch in parts:
            model(**batch)
    layer = model.norm.batch if kind == "bcn" else model.norm
    groups = 3 if kind == "bgn" else 6
    values = valid(parts).unflatten(1, (groups, -1)).movedim(1, 0).flatten(1)
    assert_close(layer.running_mean.double(), 0.1 * values.mean(1), **EXACT)
    assert_close(layer.running_var.double(), 0.9 + 0.1 * values.var(1), **EXACT)
    assert layer.num_batches_tracked == 1


def test_a_probe_looks_at_valid_positions(batches):
    norms = (nk.BatchNorm(6), nk.BatchChannelNorm(6, num_groups=2))
    model = nn.ModuleDict(dict(zip(("bn", "bcn"), norms, strict=True)))
    model["cut"] = nk.BatchGroupNorm(6, num_groups=42)
    model.forward = lambda x, lengths: (
        model["bn"](x, lengths), model["bcn"](x, mask=lengths), model["cut"](x, lengths)
    )  # fmt: skip
    batch = batches[0]
    with nk.Probe(model, every=1) as probe:
        sum(y.square().sum() for y in model(**batch)).backward()
        record = probe.step()
    rows = {row.name: row for row in record.layers}
    values = valid([batch])
    mean, std = values.mean(0), values.std(0, correction=0)
    for name in ("bn", "bcn.batch"):
        assert rows[name].shift_mean == pytest.approx(float(mean.norm()), rel=1e-6)
        assert rows[name].shift_std == pytest.approx(float((1 - std).norm()), rel=1e-6)
    normed = ((values - mean) / (std.square() + 1e-5).sqrt()).movedim(1, 0).view(2, 3, -1)
    expected = normed.mean(2).std(1, correction=0) / normed.std(2, correction=0).mean(1)
    assert rows["bcn.channel"].stat_diff == pytest.approx(float(expected.mean()), abs=1e-6)
    assert "what cut normalises: its groups cut through positions" in "".join(record.notes)


def test_noise_leaves_padding_zero(batches):
    norm = nk.BatchNorm(6)
    with nk.add_output_noise(norm):
        y = norm(x=batches[0]["x"], mask=batches[0]["lengths"])
    padding = torch.arange(7) >= batches[0]["lengths"][:, None]
    assert (y.movedim(1, -1)[padding] == 0).all()
    assert (y.movedim(1, -1)[~padding] != 0).all()


def test_example_weights_are_tuned_with_a_mask(batches):
    class Scores(Padded):
        def __init__(self):
            super().__init__(nk.BatchNorm(6))

        def forward(self, x, lengths):
            return super().forward(x, lengths).sum(2)

    pairs = [(b, torch.arange(len(b["x"])) % 6) for b in batches[:2]]
    model = Scores()
    result = nk.tune_example_weight(model, pairs, grid=(0.3,), refine=False)
    assert result.how == "from the first norm on"
    losses = []
    for weight in (0.0, 0.3):
        nk.set_example_weight(model.eval(), weight)
        with torch.no_grad():
            each = [nn.functional.cross_entropy(model(**b), t, reduction="none") for b, t in pairs]
        losses.append(torch.cat(each).double().mean())
    assert result.curve[1].gain == pytest.approx(float(losses[0] - losses[1]), rel=1e-5)
