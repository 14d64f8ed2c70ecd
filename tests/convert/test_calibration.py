"""Calibrated conversion: each new layer puts out what the old one did, on the batches given."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import normkit as nk
from convert.net import Net
from convert.networks import timm
from convert.test_swap import assert_same, snapshot
from normkit.convert.agreement import agreement
from normkit.errors import DataError, OptionError


@pytest.fixture
def batches():
    torch.manual_seed(1)
    scale = torch.linspace(0.5, 2, 8)[:, None, None]
    return [torch.randn(n, 8, 4, 4) * scale + 0.3 for n in (8, 8, 3)]


def trained_looking(model, seed=0):
    """Give norms the values of a trained network: any sign, statistics that are not 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                tensor.data = torch.randn(tensor.shape, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return model.eval()


def moments(model, names, batches):
    """Mean and standard deviation of each channel of layers' outputs, by definition, in float64."""
    seen = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _m, _x, y, name=name: seen[name].append(y.double().movedim(1, 0).flatten(1))
        )
        for name in names
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    joined = {name: torch.cat(values, dim=1) for name, values in seen.items()}
    means = {name: values.mean(1) for name, values in joined.items()}
    squares = {n: (v - means[n][:, None]).square().mean(1) for n, v in joined.items()}
    return {name: (means[name], squares[name].sqrt()) for name in names}


NORMS = ["layer1.0.bn1", "layer1.0.bn2", "layer2.0.bn1", "layer2.0.bn2"]
MAPS = dict.fromkeys(["layer1.*", "layer2.*"])


@pytest.mark.parametrize(
    "spec",
    [
        "gn:4",
        "in",
        "ln",
        "pn",
        "bgn:2",
        "ghost:2",
        "gbgn:4",
        "gnplus:4",
        "sn",
        "ibn",
        "gw:4",
        "bn",
        "bcn:4:channel_affine=channel",
        "bcn:4:micro:channel_affine=channel",
        "gn:4+ws",
    ],
)
def test_every_channel_has_the_old_mean_and_variance(batches, spec):
    model = trained_looking(Net())
    done = nk.convert_norm(model, dict.fromkeys(MAPS, spec), calibrate=batches)
    expected, found = moments(model, NORMS, batches), moments(done.model, NORMS, batches)
    for name in NORMS:
        for a, b in zip(found[name], expected[name], strict=True):
            assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert done.calibration.num_batches == 3
    assert done.calibration.num_layers == 4
    assert done.calibration.skipped == ()


def test_groups_of_channels_have_the_old_mean_and_variance(batches):
    model = trained_looking(Net())
    done = nk.convert_norm(model, dict.fromkeys(MAPS, "bcn:2"), calibrate=batches)
    expected, found = moments(model, NORMS, batches), moments(done.model, NORMS, batches)
    for name in NORMS:
        for a, b in zip(pooled(*found[name]), pooled(*expected[name]), strict=True):
            assert_close(a, b, rtol=1e-4, atol=1e-4)


def pooled(mean, std):
    """Mean and variance of the two runs of four channels."""
    mean, square = mean.view(2, 4), (std.square() + mean.square()).view(2, 4)
    return mean.mean(1), square.mean(1) - mean.mean(1).square()


def test_running_statistics_are_those_of_the_batches(batches):
    model = nn.Sequential(nn.GroupNorm(4, 8), nn.ReLU(), nn.GroupNorm(4, 8)).eval()
    done = nk.convert_norm(model, {"0": "bgn:2", "2": "bn"}, calibrate=batches)
    first, last = done.model[0], done.model[2]
    x = torch.cat(batches).double()
    runs = x.unflatten(1, (2, 4)).transpose(0, 1).flatten(1)
    with torch.no_grad():
        maps = done.model[:2](x.float()).double().transpose(0, 1).flatten(1)
    for layer, values in ((first, runs), (last, maps)):
        assert_close(layer.running_mean, values.mean(1).float(), rtol=1e-5, atol=1e-6)
        assert_close(layer.running_var, values.var(1).float(), rtol=1e-5, atol=1e-6)
        assert layer.num_batches_tracked == 3


def test_a_scale_keeps_its_sign(batches):
    model = trained_looking(Net())
    signs = model.layer1[0].bn1.weight.sign()
    assert signs.unique().numel() == 2
    done = nk.convert_norm(model, {"layer1.*": "gn:4"}, calibrate=batches)
    assert torch.equal(done.model.layer1[0].bn1.weight.sign(), signs)


def test_the_same_norm_stays_the_same_function_and_another_comes_nearer(batches):
    model = trained_looking(Net())
    same = nk.convert_norm(model, "bn", calibrate=batches).calibration
    assert same.original.relative_error == 0
    assert same.plain.relative_error < 1e-6
    assert same.calibrated.relative_error < 1e-5
    other = nk.convert_norm(model, {"layer*": "gn:8"}, calibrate=batches).calibration
    assert other.calibrated.relative_error < 0.5 * other.plain.relative_error
    assert other.calibrated.top1 > other.plain.top1


def test_the_report_compares_with_the_original(batches):
    model = trained_looking(Net())
    done = nk.convert_norm(model, {"layer*": "gn:8"}, calibrate=batches)
    with torch.no_grad():
        expected, found = (torch.cat([m(x) for x in batches]).double() for m in (model, done.model))
    result = done.calibration.calibrated
    assert result.relative_error == pytest.approx(
        float((found - expected).norm() / expected.norm())
    )
    assert result.top1 == float((found.argmax(1) == expected.argmax(1)).double().mean())
    spread = (expected - expected.mean()).square().sum()
    assert result.r2 == pytest.approx(float(1 - (found - expected).square().sum() / spread))
    assert "calibrated 4 norms on 3 batches" in str(done)
    assert f"calibrated  {100 * result.top1:.1f} %" in str(done)


def test_outputs_that_cannot_be_compared_are_not():
    a, b = torch.randn(4, 1), torch.randn(4, 1)
    assert agreement([[a]], [[a]]).top1 is None
    assert agreement([[a]], [[a]]).r2 == 1
    assert agreement([[a]], [[b[:2]]]) is None
    assert agreement([[]], [[]]) is None
    assert agreement([[a], [a, a]], [[a], [a, a]]) is None
    zeros = torch.zeros(4, 2)
    assert agreement([[zeros]], [[zeros]]).relative_error == 0
    assert agreement([[zeros + 1]], [[zeros]]).relative_error == float("inf")


class Activated(nn.Module):
    """A norm with its activation, one with channels last, and one that is never called."""

    def __init__(self):
        super().__init__()
        self.act = timm.layers.BatchNormAct2d(8)
        self.last = nn.LayerNorm(8)
        self.unused = nn.BatchNorm2d(8)

    def forward(self, x):
        return self.last(self.act(x).movedim(1, -1))


def test_what_is_matched_comes_before_the_activation_and_channels_may_be_last(batches):
    model = trained_looking(Activated())
    with torch.no_grad():
        model.last.weight.normal_()
        model.act.weight.normal_()
    done = nk.convert_norm(model, "gn:4", calibrate=batches)
    assert done.calibration.skipped == (("unused", "not called"),)
    x = torch.cat(batches)
    plain = nn.functional.batch_norm
    bn = model.act
    expected = plain(x, bn.running_mean, bn.running_var, bn.weight, bn.bias).double()
    gn = done.model.act
    found = nn.functional.group_norm(x, 4, gn.weight, gn.bias).double()
    for statistic in (torch.mean, torch.std):
        assert_close(
            statistic(found, (0, 2, 3)), statistic(expected, (0, 2, 3)), rtol=1e-4, atol=1e-4
        )
    with torch.no_grad():
        last = [m(x).double().flatten(0, 2) for m in (done.model, model)]
    assert_close(last[0].mean(0), last[1].mean(0), rtol=1e-4, atol=1e-4)
    assert_close(last[0].std(0), last[1].std(0), rtol=1e-4, atol=1e-4)


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(8)
        self.again = self.norm

    def forward(self, x):
        return self.again(self.norm(x) * 2 + 1)


class CalledTwice(nn.Module):
    """One norm for two inputs that do not depend on it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x):
        x = self.conv(x)
        return self.norm(x) + self.norm(x.square())


def test_all_calls_of_a_shared_norm_count(batches):
    model = trained_looking(CalledTwice())
    done = nk.convert_norm(model, "gn:2", calibrate=batches)
    found, expected = (moments(m, ["norm"], batches)["norm"] for m in (done.model, model))
    assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert done.calibration.num_layers == 1


def test_a_norm_of_two_names_stays_one(batches):
    model = trained_looking(Shared())
    done = nk.convert_norm(model, "gn:8", calibrate=batches)
    assert done.model.norm is done.model.again


def test_constant_channels_and_layers_without_scale_are_said(batches):
    model = nn.Sequential(nn.BatchNorm2d(8), nn.BatchNorm2d(8, affine=False)).eval()
    with torch.no_grad():
        model[0].weight[3] = 0
        model[0].bias[3] = 5
    done = nk.convert_norm(model, "gn:8", calibrate=batches)
    assert done.calibration.skipped == (("1", "it has no scale"),)
    assert done.model[0].weight[3] == 0
    assert_close(done.model[0].bias[3], torch.tensor(5.0))
    assert "not calibrated: 1: it has no scale" in str(done)


def test_pairs_dicts_and_forward_are_taken(batches):
    model = trained_looking(Net())
    pairs = [(x, torch.zeros(len(x))) for x in batches]
    named = [{"image": x} for x in batches]
    forward = lambda model, batch: model(batch["image"])  # noqa: E731
    results = [
        nk.convert_norm(model, {"layer*": "gn:4"}, calibrate=b, forward=f).calibration
        for b, f in [(iter(batches), None), (pairs, None), (named, forward)]
    ]
    assert results[0] == results[1] == results[2]


def test_misuse_is_refused_before_anything_changes(batches):
    model = Net()
    before = snapshot(model)
    with pytest.raises(OptionError, match="forward= was given without calibrate="):
        nk.convert_norm_(model, "gn:4", forward=lambda m, b: m(b))
    with pytest.raises(DataError, match="gave no batch"):
        nk.convert_norm_(model, "gn:4", calibrate=[])
    with pytest.raises(DataError, match=r"no value of the .* any of the \d+ norms; pass batches"):
        nk.convert_norm_(model, "gn:4", calibrate=[batches[0][:0]])
    with pytest.raises(DataError, match="Tensor of shape"):
        nk.convert_norm_(model, "gn:4", calibrate=batches[0])
    with pytest.raises(DataError, match=r"entries \['image'\].*takes \['x'\]"):
        nk.convert_norm_(model, "gn:4", calibrate=[{"image": batches[0]}])
    with pytest.raises(DataError, match="of the original model outputs NaN or infinity"):
        nk.convert_norm_(model, "gn:4", calibrate=[batches[0] * float("nan")])
    with pytest.raises(DataError, match="on the meta device and has no values to calibrate"):
        nk.convert_norm_(copy.deepcopy(model).to("meta"), "gn:4", calibrate=batches)
    assert nk.convert_norm_(model, "gn:4", calibrate=batches, dry_run=True).calibration is None
    assert_same(snapshot(model), before)


def test_values_that_overflow_after_the_swap_alone_are_refused(batches):
    def forward(model, batch):
        return model(batch * (1e30 if isinstance(model[1], nk.GroupNorm) else 1))

    model = nn.Sequential(nn.Conv2d(8, 8, 1).double(), nn.BatchNorm2d(8)).eval()
    model[0].forward = lambda x: x.double().square().float()  # 1e60 is beyond float32
    before = snapshot(model)
    with pytest.raises(DataError, match="on these batches 1 of the converted model outputs"):
        nk.convert_norm_(model, "gn:4", calibrate=batches, forward=forward)
    assert_same(snapshot(model), before)


@pytest.mark.parametrize("spec", ["gn:4", "bcn:4+ws"])
def test_revert_brings_the_old_values_back(batches, spec):
    model = trained_looking(Net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(batches[0]).sum().backward()
    optimizer.step()
    before = snapshot(model, optimizer)
    done = nk.convert_norm_(model, {"layer*": spec}, optimizer=optimizer, calibrate=batches)
    held = {p for group in optimizer.param_groups for p in group["params"]}
    assert held == set(model.parameters())
    model(batches[0]).sum().backward()
    optimizer.step()
    done.revert()
    after = snapshot(model, optimizer)
    names = [n for n in before["keys"] if ".bn" in n]
    for name in names:
        i = before["keys"].index(name)
        assert torch.equal(after["values"][i], before["values"][i]), name


@pytest.mark.parametrize("at", [1, 4, 7, 9, 12, 20])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interruption_leaves_the_model_as_it_was(batches, at, error):
    model = trained_looking(Net())
    model.layer1[0].bn1.train()
    before, state = snapshot(model), torch.get_rng_state()
    calls = []

    def forward(model, batch):
        calls.append(1)
        torch.rand(1)
        if len(calls) == at:
            raise error("interrupted")
        return model(batch)

    with pytest.raises(error, match="interrupted"):
        nk.convert_norm_(model, {"layer*": "bcn:4+ws"}, calibrate=batches, forward=forward)
    assert_same(snapshot(model), before)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_calibrated_model_keeps_its_modes_and_no_hooks(batches):
    model = trained_looking(Net()).train()
    model.layer2.eval()
    before = copy.deepcopy({n: m.training for n, m in model.named_modules()})
    nk.convert_norm_(model, {"layer*": "gn:4"}, calibrate=batches)
    assert {n: m.training for n, m in model.named_modules()} == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
