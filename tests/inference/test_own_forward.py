"""Norms that normalise something else than they are given: measured there, or left out by name."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.testing import assert_close

import normkit as nk
from normkit.lab.torchvision_ops import register_missing_operators

register_missing_operators()
from timm.layers import BatchNormAct2d, SplitBatchNorm2d  # noqa: E402 - torchvision's come first
from torchvision.ops import FrozenBatchNorm2d  # noqa: E402

EXACT = {"rtol": 1e-6, "atol": 1e-6}


class Tokens(nn.BatchNorm1d):
    """Channels last, ``(N, L, C)``."""

    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Padded(nn.BatchNorm1d):
    """Tokens ``(N, L, C)``, of which those that are all zeros do not count."""

    def forward(self, x):
        valid = x.abs().sum(-1) > 0
        y = torch.zeros_like(x)
        y[valid] = super().forward(x[valid])
        return y


class Wide(nn.BatchNorm1d):
    """Calls torch's operator itself, and does nothing where there is nothing."""

    def forward(self, x):
        if x.numel() == 0:
            return x
        flat = x.flatten(0, 1)
        y = torch.batch_norm(
            *(flat, self.weight, self.bias, self.running_mean, self.running_var),
            *(False, 0.1, self.eps, False),
        )
        return y.view_as(x)


class Pieces(nn.BatchNorm1d):
    """Normalises one half of the examples after the other."""

    def forward(self, x):
        parts = [functional.batch_norm(p.flatten(0, 1), *self.statistics()) for p in x.chunk(2)]
        return torch.cat(parts).view_as(x)

    def statistics(self):
        return self.running_mean, self.running_var


class TwoNorms(nn.BatchNorm1d):
    """Holds another norm, which normalises something else."""

    def __init__(self, size):
        super().__init__(size)
        self.other = nn.BatchNorm1d(size)

    def forward(self, x):
        flat = x.flatten(0, 1)
        return (super().forward(flat) + self.other(flat * 3 + 1)).view_as(x)


class OwnFormula(nn.BatchNorm1d):
    def forward(self, x):
        return (x - self.running_mean) / (self.running_var + self.eps).sqrt()


class OwnInTraining(nn.BatchNorm1d):
    """Counts valid tokens in training, and all of them at evaluation."""

    def forward(self, x):
        if self.training:
            return super().forward(x[x.abs().sum(-1) > 0])
        return super().forward(x.flatten(0, 1)).view_as(x)


class GraphInstanceNorm(_InstanceNorm):
    """As torch_geometric's without a batch index: one graph of nodes ``(N, C)``."""

    def forward(self, x):
        x = x.flatten(0, 1)
        y = functional.instance_norm(
            *(x.t()[None], self.running_mean, self.running_var, self.weight, self.bias),
            *(False, 0.1, self.eps),
        )
        return y[0].t()


class GraphByFormula(_InstanceNorm):
    def forward(self, x):
        return (x - x.mean(0)) / (x.var(0, unbiased=False) + self.eps).sqrt()


class OtherBase(_NormBase):
    def forward(self, x):
        return functional.batch_norm(x.flatten(0, 1), self.running_mean, self.running_var)


class OursOnTokens(nk.BatchNorm):
    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class OursInRows(nk.GroupNorm):
    """Tracks the statistics of tokens; groups are of an example's own."""

    def __init__(self, size):
        super().__init__(size, num_groups=2, track_running_stats=True)

    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class OursMasked(nk.BatchNorm):
    def forward(self, x):
        valid = x.abs().sum(-1) > 0
        return super().forward(x.transpose(1, 2), valid).transpose(1, 2)


class OursByFormula(nk.BatchNorm):
    def forward(self, x):
        return x - self.running_mean


class OursInTraining(nk.BatchNorm):
    def forward(self, x):
        x = x.transpose(1, 2)
        return super().forward(x[:2] if self.training else x)


SIZES = (6, 6, 2)


@pytest.fixture
def batches():
    """Sequences of 5 tokens, in each of which the last ones may be padding."""
    torch.manual_seed(4)
    found = []
    for size in SIZES:
        x = torch.randn(size, 5, 4) * torch.tensor([1.0, 2, 3, 4]) + torch.arange(4.0) + 1
        padding = torch.arange(5)[None] >= torch.randint(2, 6, (size,))[:, None]
        found.append(x.masked_fill(padding[..., None], 0.0))
    return found


def every(batches):
    return torch.cat([x.flatten(0, 1) for x in batches]).double()


def valid(batches):
    tokens = every(batches)
    return tokens[tokens.abs().sum(-1) > 0]


MEASURED = {
    Tokens: every,
    Padded: valid,
    Wide: every,
    Pieces: every,
    TwoNorms: every,
    OtherBase: every,
    OursOnTokens: every,
    OursInRows: every,
    OursMasked: valid,
}


@pytest.mark.parametrize("sequential", [False, True], ids=["at once", "in order"])
@pytest.mark.parametrize("kind", MEASURED, ids=lambda kind: kind.__name__)
def test_recalibration_measures_what_is_normalised(kind, sequential, batches):
    model = nn.Sequential(kind(4))
    given = [*batches, torch.zeros(0, 5, 4)] if kind is Wide else batches
    patch = nk.recalibrate(model, given, sequential=sequential)
    values = MEASURED[kind](batches)
    row = patch.layers[0]
    assert row.num_values == len(values)
    assert_close(row.new["running_mean"].double(), values.mean(0), **EXACT)
    assert_close(row.new["running_var"].double(), values.var(0), **EXACT)
    assert patch.left == ()
    assert "forward" not in vars(model[0])


@pytest.mark.parametrize("kind", MEASURED, ids=lambda kind: kind.__name__)
def test_estimation_shift_is_of_what_is_normalised(kind, batches):
    values = MEASURED[kind](batches)
    row = nk.estimation_shift(nn.Sequential(kind(4)), batches).layers[1]
    assert row.num_values == len(values)
    assert row.esm_mean == pytest.approx(float(values.mean(0).norm()))
    assert row.esm_std == pytest.approx(float((1 - values.std(0, correction=0)).norm()))


def test_a_norm_in_a_norm_has_its_own_inputs(batches):
    model = nn.Sequential(TwoNorms(4))
    for sequential in (False, True):
        own, other = nk.recalibrate(model, batches, sequential=sequential).layers
        assert_close(own.new["running_mean"].double(), every(batches).mean(0), **EXACT)
        assert_close(other.new["running_mean"].double(), every(batches).mean(0) * 3 + 1, **EXACT)


def test_what_follows_sees_the_batch_normalised(batches):
    """The norm behind takes what the first one gives when it normalises by the batch."""
    model = nn.Sequential(Padded(4), nn.Flatten(0, 1), nn.BatchNorm1d(4))
    reference = nn.Sequential(Padded(4), nn.Flatten(0, 1)).train()
    with torch.no_grad():
        outputs = torch.cat([reference(x) for x in batches]).double()
    row = nk.recalibrate(model, batches).layers[1]
    assert_close(row.new["running_var"].double(), outputs.var(0), **EXACT)


def test_instance_norms_of_others_average_their_examples(batches):
    model = nn.Sequential(GraphInstanceNorm(4, track_running_stats=True))
    graphs = [x.flatten(0, 1).double() for x in batches]
    for sequential in (False, True):
        (row,) = nk.recalibrate(model, batches, sequential=sequential).layers
        mean = torch.stack([g.mean(0) for g in graphs]).mean(0)
        var = torch.stack([g.var(0) for g in graphs]).mean(0)
        assert row.num_values == len(batches)
        assert_close(row.new["running_mean"].double(), mean, **EXACT)
        assert_close(row.new["running_var"].double(), var, **EXACT)


LEFT = {
    OwnFormula: "without a function of torch",
    OwnInTraining: r"OwnInTraining has a forward of its own, which may normalise something else",
    OursByFormula: "without a function of torch",
    OursInTraining: r"OursInTraining has a forward of its own, which may normalise something else",
    lambda size: GraphByFormula(size, track_running_stats=True): "without a function of torch",
}


@pytest.mark.parametrize("sequential", [False, True], ids=["at once", "in order"])
@pytest.mark.parametrize("make", LEFT, ids=LEFT.values())
def test_what_nobody_can_see_is_left_out_by_name(make, sequential, batches):
    model = nn.Sequential(Tokens(4), make(4))
    patch = nk.recalibrate(model, batches, sequential=sequential)
    assert [row.name for row in patch.layers] == ["0"]
    assert [each.name for each in patch.left] == ["1"]
    assert LEFT[make] in patch.left[0].why
    assert f"left out: 1 ({type(model[1]).__name__})" in str(patch)
    with pytest.raises(nk.NormError, match=LEFT[make]):
        nk.recalibrate(model[1:], batches, sequential=sequential)


@pytest.mark.parametrize("make", [OwnFormula, OursByFormula], ids=["torch's", "ours"])
def test_the_shift_of_what_nobody_can_see_is_left_out_by_name(make, batches):
    found = nk.estimation_shift(nn.Sequential(Tokens(4), make(4)), batches)
    assert [row.name for row in found.layers] == ["input", "0"]
    assert f"left out: 1 ({make.__name__}): " in str(found)
    with pytest.raises(nk.DataError, match=r"no layer .* got an input; 0: "):
        nk.estimation_shift(nn.Sequential(make(4)), batches)


def test_a_replaced_forward_is_what_counts(batches):
    """Tools replace the forward of one module; what is normalised is what reaches torch then."""
    model = nn.Sequential(nn.BatchNorm1d(4), nk.BatchNorm(4))
    for layer in model:
        layer.forward = lambda x, inner=layer.forward: inner(x.transpose(1, 2)).transpose(1, 2)
    before = [layer.forward for layer in model]
    rows = nk.recalibrate(model, batches).layers
    assert_close(rows[0].new["running_mean"].double(), every(batches).mean(0), **EXACT)
    with torch.no_grad():
        y = every([nn.Sequential(nn.BatchNorm1d(4)).train()(x.transpose(1, 2)).transpose(1, 2)
                   for x in batches])  # fmt: skip
    assert_close(rows[1].new["running_var"].double(), y.var(0), **EXACT)
    assert [layer.forward for layer in model] == before


def test_norms_with_fixed_statistics_have_a_shift():
    torch.manual_seed(0)
    images = torch.randn(7, 3, 4, 4) + 2
    values = images.double().transpose(0, 1).flatten(1)
    model = nn.Sequential(FrozenBatchNorm2d(3), nn.BatchNorm2d(3))
    rows = nk.estimation_shift(model, [images]).layers
    assert [row.name for row in rows] == ["input", "0", "1"]
    assert rows[1].esm_mean == pytest.approx(float(values.mean(1).norm()))


def test_timms_norms():
    torch.manual_seed(0)
    images = torch.randn(7, 3, 4, 4) + 2
    values = images.double().transpose(0, 1).flatten(1)
    for sequential in (False, True):
        (row,) = nk.recalibrate(BatchNormAct2d(3), [images], sequential=sequential).layers
        assert_close(row.new["running_mean"].double(), values.mean(1), **EXACT)
    split = nn.Sequential(nn.BatchNorm2d(3), SplitBatchNorm2d(3, num_splits=2))
    patch = nk.recalibrate(split, [images])  # 7 images are not two halves
    assert {each.name for each in patch.left} == {"1", "1.aux_bn.0"}
    with pytest.raises(
        nk.DataError, match=r"to any of the 1 layers.*itself: its class timm.*Split"
    ):
        nk.recalibrate(split[1], [images])
    rows = nk.estimation_shift(split[1], [images]).layers
    assert [row.name for row in rows] == ["input", ""]  # at evaluation all are the main one's
    assert rows[1].esm_mean == pytest.approx(float(values.mean(1).norm()))


class Scaled(nn.LayerNorm):
    """Takes the channels in the second axis, as those of torchvision and timm do."""

    def forward(self, x):
        y = functional.layer_norm(x.movedim(1, -1), self.normalized_shape, self.weight, self.bias)
        return y.movedim(-1, 1)


class Groups(nn.GroupNorm):
    def forward(self, x):
        return super().forward(x.movedim(-1, 1)).movedim(1, -1)


class FormulaOfLayers(nn.LayerNorm):
    def forward(self, x):
        return x - x.mean(-1, keepdim=True)


def test_channel_difference_is_of_the_channels_that_are_pooled():
    torch.manual_seed(0)
    maps = torch.randn(3, 6, 5, 4) * torch.arange(1.0, 7)[:, None, None] + torch.randn(6, 1, 1)
    values = maps.double().transpose(0, 1).flatten(1)
    mean, std = values.mean(1), values.std(1, correction=0)
    for layer, x, groups in (
        (Scaled(6), maps, 1),
        (Groups(2, 6), maps.movedim(1, -1), 2),
        (nn.LayerNorm(6), maps.movedim(1, -1), 1),
    ):
        found = nk.channel_difference(nn.Sequential(layer, FormulaOfLayers(x.shape[-1])), [x])
        expected = mean.view(groups, -1).std(1, correction=0) / std.view(groups, -1).mean(1)
        assert found.mean == pytest.approx(float(expected.mean()), rel=1e-6)
        assert [each.name for each in found.left] == ["1"]
    with pytest.raises(nk.DataError, match="reached a norm that pools channels; 0: it normalises"):
        nk.channel_difference(nn.Sequential(FormulaOfLayers(4)), [maps])


def test_statistics_are_not_accumulated_where_the_input_is_not_known():
    model = nn.Sequential(nn.BatchNorm1d(4), Padded(4), OursOnTokens(4), GraphInstanceNorm(4))
    model[3] = GraphInstanceNorm(4, track_running_stats=True)
    with nk.accumulate_statistics(model, 2) as waiting:
        assert waiting.names == ("0",)
        assert set(waiting.left) == {"1", "2", "3"}
        assert "Padded has a forward of its own" in waiting.left["1"]
    with pytest.raises(nk.OptionError, match=r"accumulated \(0: its class .*Padded has a"):
        nk.accumulate_statistics(nn.Sequential(Padded(4)), 2)
