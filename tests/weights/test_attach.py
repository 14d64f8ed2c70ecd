import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.testing import assert_close

import normkit as nk
from normkit import weights
from normkit.lab.torchvision_ops import register_missing_operators
from weights import definition

register_missing_operators()
import timm  # noqa: E402 - its operators must be there first
from torchvision import models  # noqa: E402
from torchvision.ops import FrozenBatchNorm2d  # noqa: E402

LAYERS = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), groups=2), (2, 4, 5, 6)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (2, 4, 5, 6)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2), (2, 4, 3, 3, 4)),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 6, 3), (2, 4, 5)),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 4)),
    "transposed3d": (lambda: nn.ConvTranspose3d(4, 8, 2, groups=4), (2, 4, 3, 2, 3)),
    "linear": (lambda: nn.Linear(4, 6), (2, 4)),
}
ATTACH = {
    "ws": nk.standardize_weights_,
    "wn": weights.weight_norm_,
    "cwn": weights.centered_weight_norm_,
}
EVERY = lambda module, name: True  # noqa: E731


def layout(layer):
    transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    return {"channel_axis": 1, "groups": layer.groups} if transposed else {}


def normed(num_out=8):
    return nn.Sequential(nn.Conv2d(3, num_out, 3), nn.BatchNorm2d(num_out), nn.ReLU())


@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=list(LAYERS))
def test_every_kind_of_layer_computes_with_its_definition(make, shape):
    layer, x = make().double(), torch.randn(shape, dtype=torch.float64)
    raw, number = layer.weight, layer.weight.detach().clone()
    for name, attach in ATTACH.items():
        touched = copy.deepcopy(layer)
        attach(touched, EVERY)
        gain = torch.full((99,), 1.414, dtype=torch.float64)
        at = layout(layer)
        expected = {
            "ws": lambda: definition.standardized(number, **at),  # noqa: B023
            "wn": lambda: number,
            "cwn": lambda: definition.unit_length(number, gain, True, **at),  # noqa: B023
        }[name]()
        plain = copy.deepcopy(layer)
        plain.weight.data = expected
        assert_close(touched(x), plain(x), rtol=1e-7, atol=1e-9)
        touched(x).square().sum().backward()
        assert touched.parametrizations.weight.original.grad.isfinite().all()
    assert layer.weight is raw


@pytest.mark.parametrize("name", ["resnet18", "googlenet"])
def test_every_convolution_of_these_feeds_a_norm(name):
    options = {"init_weights": False} if name == "googlenet" else {}
    model = models.get_model(name, weights=None, **options)
    convolutions = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    report = nk.standardize_weights_(model)
    assert set(report.changed) == convolutions
    assert set(report.skipped) == {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}


def test_a_pool_in_between_is_another_layer():
    report = nk.standardize_weights_(models.densenet121(weights=None))
    assert len(report.changed) == 117
    assert report.skipped["features.transition1.conv"] == (
        "its output goes into features.transition1.pool, not into a norm"
    )


def test_a_convolution_that_feeds_no_norm_is_left_alone():
    model = timm.create_model("resnetv2_50", num_classes=10)  # norm before convolution
    report = nk.standardize_weights_(model)
    assert "stages.0.blocks.0.conv1" in report.changed
    assert "stages.0.blocks.0.conv3" not in report.changed
    assert report.skipped["stages.0.blocks.0.conv3"] == "its output goes into add, not into a norm"


def test_convolutions_that_standardise_themselves_are_left_alone():
    model = timm.create_model("resnetv2_50x1_bit", num_classes=10)
    report = nk.standardize_weights_(model)
    assert report.changed == ()
    assert "StdConv2d standardises its weight itself" in report.skipped.values()


@pytest.mark.parametrize(
    "norm", [FrozenBatchNorm2d(4), nn.GroupNorm(2, 4), nk.BatchGroupNorm(4), nn.InstanceNorm2d(4)]
)
def test_norms_of_any_library_count(norm):
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Identity(), norm, nn.Conv2d(4, 4, 3))
    assert nk.standardize_weights_(model).changed == ("0",)


def test_where_decides_alone():
    model = nn.Sequential(normed(), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(4, 6))
    seen = []

    def where(module, name):
        seen.append((type(module), name))
        return name != "0.0"

    report = nk.standardize_weights_(model, where)
    assert report.changed == ("1", "3")
    assert report.skipped == {"0.0": "where= leaves it out"}
    assert seen == [(nn.Conv2d, "0.0"), (nn.Conv2d, "1"), (nn.Linear, "3")]


def test_the_report_says_everything():
    model = nn.Sequential(normed(), nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4, 6))
    assert str(nk.standardize_weights_(model)) == (
        "standardized 1 layer (traced by torch.fx)\n"
        "  0.0\n"
        "left alone 2 layers\n"
        "  its output goes into 2, not into a norm: 1\n"
        "  a linear layer, which only where= includes: 4"
    )


@pytest.mark.parametrize("attach", ATTACH.values(), ids=list(ATTACH))
def test_twice_is_once(attach):
    model, x = nn.Sequential(normed()), torch.randn(2, 3, 6, 6)
    attach(model)
    once = model(x)
    keys = list(model.state_dict())
    report = attach(model)
    assert report.changed == ()
    assert report.skipped == {"0.0": "its weight is reparametrised already"}
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x), once)


def test_the_raw_weight_stays_the_parameter_and_an_assigned_one_becomes_raw():
    model = normed()
    raw = model[0].weight
    nk.standardize_weights_(model)
    assert dict(model.named_parameters())["0.parametrizations.weight.original"] is raw
    assert len(list(model.parameters())) == 4
    values = torch.randn_like(raw)
    model[0].weight = values
    assert torch.equal(raw, values)
    assert_close(model[0].weight, weights.standardize(values))


OPTIONS = [
    {},
    {"center": False},
    {"scale": False},
    {"unbiased": True, "eps_to": "std"},
    {"eps": 1e-2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_preserve_leaves_the_function(options):
    model, x = models.resnet18(weights=None, num_classes=10).eval(), torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        model.conv1.weight[3] = 0.1  # a constant filter
    before = model(x)
    nk.standardize_weights_(model, preserve=True, **options)
    assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    rule = model.conv1.parametrizations.weight[0]
    learned = dict(rule.named_parameters())
    assert learned.keys() == {"length" if rule.scale else "gain", "shift"}
    assert all(parameter.shape == (64,) for parameter in learned.values())
    model(x).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in learned.values())
    assert model.conv1.parametrizations.weight.original.grad.isfinite().all()


def test_a_step_of_sgd_changes_a_preserved_weight_as_it_changes_a_plain_one():
    """Gradients of a gain and an offset are sums over a filter: a step of these would not."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(8, 6, 3, bias=False), nk.GroupNorm(6, num_groups=2)).double()
    kept, x = copy.deepcopy(plain), torch.rand(2, 8, 5, 5).double()
    nk.standardize_weights_(kept, preserve=True, eps=0)
    before = plain[0].weight.detach().clone()
    for model in (plain, kept):
        model(x).pow(3).sum().backward()
        torch.optim.SGD(model.parameters(), 1e-6).step()
    moved = plain[0].weight - before
    assert moved.sum((1, 2, 3)).abs().min() > 100 * moved.std() * 1e-3  # along the offset, too
    assert_close(kept[0].weight - before, moved, rtol=1e-3, atol=1e-3 * moved.abs().max().item())


def test_gains_and_offsets_of_earlier_versions_are_read():
    model, x = normed().eval(), torch.randn(2, 3, 6, 6)
    nk.standardize_weights_(model, preserve=True)
    expected, rule = model(x), model[0].parametrizations.weight[0]
    (gain, offset), start = rule.gain_and_offset(), "0.parametrizations.weight.0"
    old = dict(model.state_dict(), **{f"{start}.gain": gain, f"{start}.offset": offset})
    del old[f"{start}.length"], old[f"{start}.shift"]
    torch.nn.init.ones_(rule.length)
    torch.nn.init.ones_(rule.shift)
    model.load_state_dict(old)
    assert_close(model(x), expected)
    assert f"{start}.gain" in old  # the caller's dict is left as it is


def test_weight_norm_leaves_the_function_and_is_torchs():
    model, x = normed(), torch.randn(2, 3, 6, 6)
    theirs = copy.deepcopy(model)
    parametrizations.weight_norm(theirs[0])
    before = model(x)
    weights.weight_norm_(model)
    assert_close(model(x), before)
    for each in (model, theirs):
        each(x).square().sum().backward()
    ours = model[0].parametrizations.weight
    assert_close(ours.original.grad, theirs[0].parametrizations.weight.original1.grad)
    gains = theirs[0].parametrizations.weight.original0.grad.flatten()
    assert_close(ours[0].gain.grad, gains, rtol=1e-3, atol=1e-4)


def test_a_gain_starts_at_one_and_frozen_layers_stay_frozen():
    model = normed()
    model[0].weight.requires_grad_(False)
    nk.standardize_weights_(model, gain=True)
    gain = model[0].parametrizations.weight[0].gain
    assert torch.equal(gain, torch.ones(8))
    assert not gain.requires_grad


@pytest.mark.parametrize("attach", ATTACH.values(), ids=list(ATTACH))
def test_baking_leaves_plain_layers_with_equal_outputs(attach):
    model = nn.Sequential(normed(), nn.ConvTranspose2d(8, 8, 3, groups=2), nn.BatchNorm2d(8))
    plain = copy.deepcopy(model)
    raw = model[0][0].weight
    model.eval()
    attach(model)
    x = torch.randn(2, 3, 6, 6)
    before = model(x)
    report = nk.bake_weights_(model)
    assert str(report) == "baked 2 layers\n  0.0\n  1"
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert torch.equal(model(x), before)
    assert model[0][0].weight is raw
    assert nk.bake_weights_(model).changed == ()


def test_baking_a_copy_leaves_the_original():
    model, x = normed().eval(), torch.randn(2, 3, 6, 6)
    nk.standardize_weights_(model)
    baked = copy.deepcopy(model)
    nk.bake_weights_(baked)
    assert_close(model(x), baked(x))
    assert parametrize.is_parametrized(model[0])
    nk.bake_weights_(model)
    assert_close(model(x), baked(x))


def test_copies_and_state_dicts():
    model, x = normed().eval(), torch.randn(2, 3, 6, 6)
    nk.standardize_weights_(model, preserve=True)
    with torch.no_grad():
        model[0].parametrizations.weight[0].length.mul_(2)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    with torch.no_grad():
        twin[0].parametrizations.weight.original.mul_(-1)
    assert not torch.allclose(twin(x), model(x))
    fresh = normed().eval()
    nk.standardize_weights_(fresh, preserve=True)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))


LOADED = """
import sys, torch
model, x = torch.load(sys.argv[1], weights_only=False)
y = model(x)
y.square().sum().backward()
raw = model[0].parametrizations.weight.original
assert raw.grad is not None
torch.save((y.detach(), list(model.state_dict())), sys.argv[1])
"""


@pytest.mark.parametrize("attach", [weights.standardize_weights_, weights.weight_norm_])
def test_a_model_pickles_for_another_process(attach, tmp_path):
    model, x = normed().eval(), torch.randn(2, 3, 6, 6)
    attach(model)
    path = tmp_path / "model.pt"
    torch.save((model, x), path)
    subprocess.run([sys.executable, "-c", LOADED, str(path)], check=True)
    y, keys = torch.load(path, weights_only=False)
    assert_close(y, model(x))
    assert keys == list(model.state_dict())


def test_an_unpickled_model_is_changed_as_any_other():
    model, x = normed().eval(), torch.randn(2, 3, 6, 6)
    nk.standardize_weights_(model)
    twin = copy.copy(pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(model)))))
    assert nk.standardize_weights_(twin).changed == ()
    with torch.no_grad():
        twin[0].weight = 3 * twin[0].parametrizations.weight.original
    assert_close(twin(x), model(x), rtol=1e-3, atol=1e-3)
    nk.bake_weights_(twin)
    assert type(twin[0]) is nn.Conv2d
    assert_close(pickle.loads(pickle.dumps(twin))(x), twin(x))
    assert_close(model(x), pickle.loads(pickle.dumps(model))(x))


class Twice(nn.Module):
    """Calls everything twice."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        """Compute the output."""
        return self.norm(self.conv(self.norm(self.conv(x))))


def test_a_layer_that_is_used_twice_pickles():
    model, x = Twice().eval(), torch.randn(2, 3, 6, 6)
    nk.standardize_weights_(model)
    assert model.conv.parametrizations.weight[0].cache is not None
    assert_close(pickle.loads(pickle.dumps(model))(x), model(x))


def test_autocast_and_16_bits():
    model = normed().eval()
    nk.standardize_weights_(model)
    x = torch.randn(2, 3, 6, 6)
    expected = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(model(x).float(), expected, rtol=5e-2, atol=5e-2)
    assert model.bfloat16()[0].weight.dtype == torch.bfloat16
    assert_close(model(x.bfloat16()).float(), expected, rtol=5e-2, atol=5e-2)


def test_compiled_and_exported():
    model = nn.Sequential(normed(), nn.Conv2d(8, 4, 1), nn.GroupNorm(2, 4))
    nk.standardize_weights_(model, preserve=True)
    x = torch.randn(2, 3, 6, 6)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True)
    expected, found = model(x), compiled(x)
    assert_close(found, expected, rtol=1e-4, atol=1e-4)
    expected.square().sum().backward()
    found.square().sum().backward()
    for one, other in zip(model.parameters(), compiled.parameters(), strict=True):
        assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-3)
    exported = torch.export.export(model.eval(), (x,))
    assert_close(exported.module()(x), model(x))


@pytest.mark.parametrize(
    ("layer", "options", "error", "text"),
    [
        (
            nn.Conv2d(4, 4, 1, groups=4),
            {},
            nk.WeightError,
            r"'2' \(Conv2d\): the filters have a fan",
        ),
        (
            parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)),
            {},
            nk.WeightError,
            r"'2' \(ParametrizedConv2d\) is not a plain parameter: .* leave the layer out with",
        ),
        (nn.LazyConv2d(4, 3), {}, nk.WeightError, r"layer '2' .*not initialised yet"),
        (nn.Conv2d(4, 4, 3), {"eps": -1.0}, nk.OptionError, r"layer '0' .*eps=-1.0"),
        (nn.Conv2d(4, 4, 3, dtype=torch.complex64), {}, nk.InputTypeError, r"'2' .*complex64"),
    ],
    ids=["fan_in", "spectral", "lazy", "eps", "complex"],
)
def test_what_cannot_be_standardised_is_refused_before_anything_changes(
    layer, options, error, text
):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), layer, nn.BatchNorm2d(4))
    types = [type(m) for m in model.modules()]
    with pytest.raises(error, match=text):
        nk.standardize_weights_(model, **options)
    assert [type(m) for m in model.modules()] == types
    assert not model._forward_hooks


@pytest.mark.parametrize(
    ("wrap", "says"),
    [
        (torch.compile, r"is compiled \(OptimizedModule\).*reparametrise the model first and comp"),
        (nn.DataParallel, "inside DataParallel.*reparametrise the model first and wrap it afterw"),
    ],
)
def test_wrapped_models_are_refused(wrap, says):
    with pytest.raises(nk.OptionError, match=says):
        nk.standardize_weights_(wrap(normed()))


def test_baking_refuses_what_others_added():
    model = normed()
    nk.standardize_weights_(model)
    parametrizations.spectral_norm(model[0])
    with pytest.raises(
        nk.WeightError, match=r"'0' is parametrised by WeightStand.*, _SpectralNorm"
    ):
        nk.bake_weights_(model)
    assert parametrize.is_parametrized(model[0])


class Twisted(nn.Module):
    """Its way depends on its input's values."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.plain = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        """One way or the other."""
        return self.norm(self.conv(x)) if x.sum() > 0 else self.plain(x)


def test_models_that_do_not_trace_need_an_example_or_a_choice():
    with pytest.raises(nk.TraceError, match=r"cannot trace Twisted .*example_input=.*where="):
        nk.standardize_weights_(Twisted())
    model = Twisted()
    report = nk.standardize_weights_(model, example_input=torch.ones(1, 3, 4, 4))
    assert report.changed == ("conv",)
    assert report.skipped == {"plain": "the forward does not call it"}
    assert "traced by the example input" in str(report)
    assert nk.standardize_weights_(Twisted(), lambda m, n: n == "plain").changed == ("plain",)


def tied(preserve):
    """Two convolutions of one weight, the first before a norm."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.ReLU())
    model[2].weight = model[0].weight
    if preserve is not None:
        model[3] = nn.BatchNorm2d(3)
    return model.eval()


def test_a_shared_weight_is_not_baked_for_one_layer_alone():
    model, x = tied(None), torch.randn(2, 3, 6, 6)
    nk.standardize_weights_(model)
    before = model(x)
    with pytest.raises(
        nk.WeightError, match="weight of layer '0' is shared with '2', which computes"
    ):
        nk.bake_weights_(model)
    assert torch.equal(model(x), before)


def test_a_shared_weight_of_which_all_make_the_same_is_baked():
    model, x = tied(False), torch.randn(2, 3, 6, 6)
    nk.standardize_weights_(model)
    before = model(x)
    nk.bake_weights_(model)
    assert model[0].weight is model[2].weight
    assert_close(model(x), before)
    model = tied(True)
    nk.standardize_weights_(model, preserve=True)
    with torch.no_grad():
        model[2].parametrizations.weight[0].length.mul_(2)
    with pytest.raises(nk.WeightError, match="give one of them a parameter of its own first"):
        nk.bake_weights_(model)
