"""Forwards that use a norm in another way than by calling it."""

import sys

import pytest
import torch
from torch import nn
from torch.ao import quantization

import normkit as nk
from convert.networks import WITH_BATCH_NORM, build, images
from normkit.convert.forward_reads import find_reads

X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Reader(nn.Module):
    """Has a norm; subclasses use it."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.bns = nn.ModuleList([self.bn])

    @property
    def alias(self):
        """The norm by another name."""
        return self.bn


def normalized(bn, x):
    return nn.functional.batch_norm(
        x, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.training
    )


class Directly(Reader):
    def forward(self, x):
        return x - self.bn.running_mean.view(1, -1, 1, 1)


class ByLocalName(Reader):
    def forward(self, x):
        norm = self.bn
        return x - norm.running_mean.view(1, -1, 1, 1)


class ByMethod(Reader):
    def forward(self, x):
        return self.shifted(x)

    def shifted(self, x):
        return x - self.bn.running_mean.view(1, -1, 1, 1)


class ByProperty(Reader):
    def forward(self, x):
        return x - self.alias.running_mean.view(1, -1, 1, 1)


class ByIndex(Reader):
    def forward(self, x):
        return x - self.bns[0].running_mean.view(1, -1, 1, 1)


class InALoop(Reader):
    def forward(self, x):
        for norm in self.bns:
            x = x - norm.running_mean.view(1, -1, 1, 1)
        return x


class ByText(Reader):
    def forward(self, x):
        return x - getattr(self.bn, "running_mean").view(1, -1, 1, 1)  # noqa: B009


class InALambda(Reader):
    def forward(self, x):
        shifted = lambda: x - self.bn.running_mean.view(1, -1, 1, 1)  # noqa: E731 - what is tested
        return shifted()


class Elsewhere(Reader):
    """The code of the class does not show which attribute is read."""

    def forward(self, x):
        return normalized(self.bn, x)


class ByClass(Reader):
    def forward(self, x):
        return self.bn(x) if isinstance(self.bn, nn.BatchNorm2d) else x


class ByClassElsewhere(Reader):
    def forward(self, x):
        return called(self.bn, x)


def called(norm, x):
    return norm(x) if type(norm) is nn.BatchNorm2d else x


class Scaling(Reader):
    def forward(self, x):
        return self.bn(x) * self.bn.weight.view(1, -1, 1, 1)

    def reset(self):
        """Nobody calls this in a forward."""
        self.bn.running_mean.zero_()


READERS = [Directly, ByLocalName, ByMethod, ByProperty, ByIndex, InALoop, ByText, InALambda]


@pytest.mark.parametrize("kind", READERS)
def test_a_field_that_the_new_norm_lacks_is_refused_with_its_reader(kind):
    model = nn.Sequential(kind())
    why = rf"the forward of 0 \({kind.__name__}\) reads its running_mean, which GroupNorm does not"
    with pytest.raises(nk.ConversionError, match=rf"0.bn to gn:3: {why}"):
        nk.convert_norm_(model, "gn:3")
    assert isinstance(model[0].bn, nn.BatchNorm2d)
    (change,) = nk.convert_norm_(model, "bn").changes
    assert change.warnings[0] == f"the forward of 0 ({kind.__name__}) reads its running_mean itself"
    model(X)


def test_statistics_of_another_size_are_not_the_field_that_was_read():
    with pytest.raises(nk.ConversionError, match="which BatchGroupNorm does not have"):
        nk.convert_norm_(Directly(), "bgn:1")
    assert nk.convert_norm_(Directly(), "bgn:3").changes


def test_reading_what_the_new_norm_has_is_told():
    done = nk.convert_norm_(Scaling(), "gn:3")
    assert "the forward of the model (Scaling) reads its weight itself" in done.changes[0].warnings
    done.model(X)


def test_asking_for_the_class_is_told():
    done = nk.convert_norm_(ByClass(), "gn:3")
    assert "the forward of the model (ByClass) checks its class" in done.changes[0].warnings


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*reduce_range", "ignore:.*quant")
def test_a_block_that_torch_has_fused_for_quantization_is_refused():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()

        def forward(self, x):
            return self.relu(self.bn(self.conv(x)))

    model = quantization.fuse_modules_qat(Net().train(), [["conv", "bn", "relu"]])
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    quantization.prepare_qat(model, inplace=True)
    model(X)
    with pytest.raises(nk.ConversionError, match=r"conv \(ConvBnReLU2d\) reads its running_mean"):
        nk.convert_norm_(model, "gn:4")
    model(X)


@pytest.mark.parametrize("name", ["timm:test_efficientnet", "torchvision:resnet18", "timm:dla46_c"])
def test_networks_that_call_their_norms_are_not_suspected(name):
    assert name in WITH_BATCH_NORM
    assert find_reads(build(name)) == {}


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Elsewhere, r"fails on the example input \(\w+: .*\), but the original does not"),
        (ByClass, "bn was called 1 times on the example input, but is called 0 times after"),
        (
            ByClassElsewhere,
            "bn was called 1 times on the example input, but is called 0 times after",
        ),
    ],
)
@pytest.mark.parametrize("place", [nk.convert_norm_, nk.convert_norm])
def test_an_example_shows_what_the_code_does_not(kind, why, place):
    model = nn.Sequential(kind())
    keys = list(model.state_dict())
    with pytest.raises(nk.ConversionError, match=f"{why}.*othing was changed"):
        place(model, "gn:3", example_input=X)
    assert list(model.state_dict()) == keys
    assert type(model[0].bn) is nn.BatchNorm2d
    assert vars(model[0].bn).get("forward") is None


def test_an_example_shows_what_is_not_called():
    (change,) = nk.convert_norm_(Elsewhere(), "bn", example_input=X).changes
    assert "the forward does not call it on the example input" in change.warnings
    (change,) = nk.convert_norm_(Scaling(), "bn", example_input=X).changes
    assert "the forward does not call it on the example input" not in change.warnings


def test_an_example_leaves_the_model_as_it_was():
    model = build("torchvision:resnet18").train()
    x = images("torchvision:resnet18", 2)
    expected = nk.convert_norm(model, "bn").model.state_dict()
    before = x.clone()
    done = nk.convert_norm_(model, "bn", example_input=x)
    assert done.unchecked == ()
    assert torch.equal(x, before)
    assert all(torch.equal(v, expected[n]) for n, v in model.state_dict().items())
    assert all("forward" not in vars(m) and m.training for m in model.modules())


def test_what_was_not_run_is_said():
    done = nk.convert_norm(build("torchvision:resnet18"), "gn:8")
    assert done.unchecked == ("ResNet", "BasicBlock")
    last = "not checked: the forward of ResNet, BasicBlock; with example_input= it is run before"
    assert str(done).splitlines()[-1] == f"{last} and after"
    plain = nk.convert_norm(nn.Sequential(nn.Sequential(nn.BatchNorm2d(3))), "gn:3")
    assert plain.unchecked == ()


def test_a_norm_that_refuses_what_the_old_one_took_is_told():
    model = nn.Sequential(nn.GroupNorm(8, 8))
    x = torch.randn(4, 8, 1, 1)
    model(x)
    (change,) = nk.convert_norm_(model, "gn:8", example_input=x).changes
    told = (
        "in training it refuses the example input, which the old layer accepts: GroupNorm expected"
    )
    assert any(warning.startswith(told) for warning in change.warnings)
    with pytest.raises(nk.PartitionError, match="more than 1 value"):
        model(x)


def test_a_batch_that_training_refuses_anyway_is_tried_at_evaluation():
    model = nn.Sequential(nn.BatchNorm1d(4)).train()
    done = nk.convert_norm_(model, "bn", example_input=torch.randn(1, 4))
    assert done.changes[0].warnings == ()


def test_an_example_that_the_model_does_not_take_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    with pytest.raises(
        nk.TraceError, match="Sequential itself does not accept the example input: Ru"
    ):
        nk.convert_norm_(model, "gn:4", example_input=torch.randn(2, 5, 8, 8))
    assert isinstance(model[1], nn.BatchNorm2d)


def test_a_lazy_layer_elsewhere_is_not_filled_by_the_example():
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.BatchNorm2d(8))
    with pytest.raises(
        nk.ConversionError, match=r"0\.weight does not know its shape yet; send one"
    ):
        nk.convert_norm_(model, "gn:4", example_input=X)
    assert isinstance(model[0].weight, nn.UninitializedParameter)


def test_every_placement_runs_the_example():
    model = build("torchvision:resnet18")
    x = images("torchvision:resnet18", 2)
    for place in (nk.place_xbn_, nk.place_gnbn_, nk.place_ibn_):
        done = place(model, example_input=x)
        assert done.unchecked == ()
        done.revert()


def test_code_is_read_without_its_source():
    assert sys.version_info >= (3, 11)  # the bytecode of these versions is known
    namespace = {"Reader": Reader}
    exec("class Typed(Reader):\n  def forward(self, x): return self.bn.eps + x", namespace)
    assert [*find_reads(namespace["Typed"]()).values()] == [
        {"eps": "the forward of the model (Typed)"}
    ]


class Functional(nn.Sequential):
    """Normalises by a function at the end."""

    def forward(self, x):
        return nn.functional.layer_norm(super().forward(x), x.shape[-1:])


def test_norms_that_are_functions_are_said():
    model = Functional(nn.BatchNorm2d(3), nn.GroupNorm(1, 3))
    done = nk.convert_norm_(model, {"0": "gn:3"}, example_input=X)
    why = "the forward calls it as a function, so there is no module to replace"
    assert [(left.name, left.why) for left in done.left][1:] == [("layer_norm", why)]
    assert "layer_norm (a function)" in str(done)
