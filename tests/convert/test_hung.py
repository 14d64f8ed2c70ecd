"""Hooks and attributes that were added to a norm are transferred, or refused by name."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.ao import quantization

import normkit as nk


def net():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())


class Norm(nn.Module):
    """A norm after its activation, so that quantization does not fuse it."""

    def __init__(self):
        super().__init__()
        self.conv, self.act, self.norm = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8)

    def forward(self, x):
        """Compute the output."""
        return self.norm(self.act(self.conv(x)))


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*reduce_range", "ignore:.*quant")
@pytest.mark.parametrize("change", ["bn", "gn:4", "bcn:2", "synchronize"])
def test_a_model_prepared_for_quantization_goes_on_being_observed(change):
    model = Norm().train()
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    quantization.prepare_qat(model, inplace=True)
    model(X)
    observer, config = model.norm.activation_post_process, model.norm.qconfig
    if change == "synchronize":
        nk.synchronize_(model)
    else:
        nk.convert_norm_(model, change)
    assert isinstance(model.norm, nk.layers.base.NormLayer)
    assert model.norm.qconfig is config
    before = observer.activation_post_process.max_val.clone()
    y = model(100 * X)
    assert model.norm.activation_post_process is observer
    assert len(y.unique()) <= 256  # what it puts out is still rounded to 8 bits
    assert not torch.equal(before, observer.activation_post_process.max_val)


def test_attributes_modules_parameters_and_buffers_go_along():
    model = net()
    norm = model[1]
    norm.label, norm.inner = "first", nn.Linear(2, 2)
    norm.register_parameter("extra", nn.Parameter(torch.ones(1)))
    norm.register_buffer("kept", torch.ones(2))
    norm.register_buffer("passing", torch.ones(3), persistent=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parameters, keys = list(model.parameters()), set(model.state_dict())
    done = nk.convert_norm_(model, "gn:4", optimizer=optimizer)
    statistics = {f"1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert keys - set(model.state_dict()) == statistics
    assert set(model.state_dict()) < keys
    assert (model[1].label, model[1].inner) == ("first", norm.inner)
    assert {*optimizer.param_groups[0]["params"]} == set(parameters) == set(model.parameters())
    assert done.changes[0].carried == (
        "weight", "bias", "label", "extra", "kept", "passing", "inner"
    )  # fmt: skip
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(done)).model):
        assert (twin[1].label, twin[1].passing.shape) == ("first", (3,))
    assert done.revert()[1] is norm


def test_what_the_class_itself_has_is_not_carried():
    done = nk.convert_norm(net(), "gn:4")
    assert done.changes[0].carried == ("weight", "bias")
    extra = vars(done.model[1]).keys() - vars(nk.GroupNorm(8, num_groups=4)).keys()
    assert extra == set()


def named(norm):
    norm.num_groups = 3


def method(norm):
    norm.shown = norm.extra_repr


def listed(norm):
    norm.path = ["a", {"b": norm.forward}]


def hooked(norm):
    norm.register_forward_hook(norm.register_buffer)


def loading(norm):
    norm.register_load_state_dict_pre_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("hang", "why"),
    [
        (named, "added num_groups to it, which means something else in GroupNorm"),
        (method, "1.shown refers to it too, through a tuple, a set or a bound method"),
        (listed, "1.path refers to it too"),
        (hooked, "something in its _forward_hooks is bound to this layer"),
        (loading, "something in its _load_state_dict_pre_hooks is bound to this layer"),
    ],
)
def test_what_cannot_be_carried_is_refused_by_name(hang, why):
    model = net()
    hang(model[1])
    with pytest.raises(nk.ConversionError, match=f"1 to gn:4: .*{why}.* leave the layer out|it in"):
        nk.convert_norm_(model, "gn:4")
    assert type(model[1]) is nn.BatchNorm2d


class Holding(nn.Module):
    """A norm that is called where torch does not look."""

    def __init__(self, how):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        held = {"tuple": (self.norm,), "method": self.norm.forward, "list": [[self.norm]]}
        self.held = {"key": {"inner": self.norm}} if how == "dict" else held.get(how)
        if how == "attribute":
            vars(self)["held"] = self.norm

    def forward(self, x):
        """Compute the output."""
        held = self.held
        while not callable(held):
            held = next(iter(held.values() if isinstance(held, dict) else held))
        return held(x)


@pytest.mark.parametrize("how", ["list", "dict", "attribute"])
def test_a_norm_is_exchanged_in_lists_dicts_and_plain_attributes_too(how):
    model = nn.Sequential(Holding(how))
    x = torch.randn(2, 3, 4, 4)
    done = nk.convert_norm_(model, "gn:1", example_input=x)
    assert done.left == ()
    assert torch.allclose(model(x).mean((1, 2, 3)), torch.zeros(2), atol=1e-5)
    done.revert()
    assert model[0].norm.num_batches_tracked == 0
    model(x)
    assert model[0].norm.num_batches_tracked == 1


@pytest.mark.parametrize("how", ["tuple", "method"])
def test_a_norm_that_goes_on_being_called_is_refused(how):
    model = nn.Sequential(Holding(how))
    with pytest.raises(nk.ConversionError, match=r"0.held refers to it too, through a tuple"):
        nk.convert_norm_(model, "gn:1")


def test_norms_in_modules_that_are_not_registered_are_named():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Identity())
    model[1].blocks = [nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))]
    (left,) = nk.convert_norm_(model, "gn:1").left
    assert (left.name, left.old) == ("1.blocks", "BatchNorm2d(3)")


def test_what_hangs_on_parameters_goes_along_or_is_said():
    model = net()
    model[1].weight.label = "w"
    model[1].bias.register_hook(lambda gradient: gradient)
    (change,) = nk.convert_norm_(model, "ibn").changes
    assert model[1].instance.weight.label == model[1].batch.weight.label == "w"
    assert change.warnings == ("its bias is a copy now, without the hooks of the old one",)


def test_parameters_that_were_shared_and_are_not_any_more_are_said():
    model = nn.Sequential(nn.BatchNorm2d(8), nn.BatchNorm2d(8))
    model[1].weight = model[0].weight
    first, second = nk.convert_norm(model, "ibn").changes
    assert first.warnings == ("its weight was shared with another layer and is a copy now",)
    assert second.warnings == first.warnings
    assert nk.convert_norm(model, "gn:2").changes[0].warnings == ()


def test_a_layer_that_was_compiled_alone_loses_that_by_name():
    model = net()
    model[1].compile(backend="eager")
    assert nk.convert_norm_(model, "bn").changes[0].lost == ("compile()",)
    assert torch.isfinite(model(X)).all()
