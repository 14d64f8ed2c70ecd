"""Values that are moved between a layer and its norm, or only asked for their shape."""

import pytest
import torch
from torch import nn

import normkit as nk
from fold.trained import model_of, randn, trained
from normkit.folding.labels import follow_channels


class Tokens(nn.Module):
    """A linear layer over tokens and its norm; subclasses say how the map goes through it."""

    def __init__(self, num_in=6, num_out=8):
        super().__init__()
        self.layer = nn.Linear(num_in, num_out, bias=False)
        self.norm = nn.BatchNorm1d(num_out)


class ReshapeAs(Tokens):
    """As LeViT does it."""

    def forward(self, x):
        x = self.layer(x)
        return self.norm(x.flatten(0, 1)).reshape_as(x)


class ViewAs(Tokens):
    def forward(self, x):
        x = self.layer(x)
        return self.norm(x.view(-1, 8)).view_as(x)


class ShapeOf(Tokens):
    def forward(self, x):
        x = self.layer(x)
        return self.norm(x.flatten(0, 1)).reshape(x.shape[0], x.size(1), -1)


class Transposed(Tokens):
    def forward(self, x):
        return self.norm(self.layer(x).transpose(1, 2)).transpose(1, 2)


class Attribute(Tokens):
    def forward(self, x):
        return self.norm(self.layer(x).mT).mT


class Permuted(Tokens):
    def forward(self, x):
        n, length = x.shape[:2]
        x = self.layer(x).view(n, length, 4, 2).permute(0, 2, 3, 1)
        return self.norm(x.reshape(n, 8, length))


class Filled(Tokens):
    """Makes a tensor of the layer's shape, and uses none of its values."""

    def forward(self, x):
        x = self.layer(x)
        return self.norm(x.mT).mT + torch.ones_like(x) * x.new_full((), 2.0)


class ByRunning(Transposed):
    def forward(self, x):
        return super().forward(x if x.sum() > -1e9 else -x)


KINDS = [ReshapeAs, ViewAs, ShapeOf, Transposed, Attribute, Permuted, Filled, ByRunning]


def exact(model, x, into):
    before = model(x)
    done = nk.fold(model, x)
    assert [(row.name, row.into) for row in done.folded] == into
    assert done.left == ()
    torch.testing.assert_close(done.model(x), before, rtol=1e-11, atol=1e-11)
    return done


@pytest.mark.parametrize("kind", KINDS)
def test_a_norm_of_tokens_folds(kind):
    model = trained(kind().double())
    done = exact(model, randn(3, 5, 6), [("norm", ("layer",))])
    other = randn(2, 9, 6)
    torch.testing.assert_close(done.model(other), model(other), rtol=1e-11, atol=1e-11)


class Behind(Tokens):
    """The norm comes first, and the layer gets its output transposed."""

    def __init__(self):
        super().__init__(8, 4)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x):
        return self.layer(self.norm(x).transpose(1, 2).flip(1))


def test_a_norm_folds_into_the_layer_behind_a_turn():
    exact(trained(Behind().double()), randn(3, 8, 5), [("norm", ("layer",))])


@pytest.mark.parametrize(
    "between", [nn.ChannelShuffle(2), nn.PixelShuffle(2), nn.Unflatten(1, (4, 2))]
)
def test_channels_may_change_places(between):
    channels = {nn.PixelShuffle: 2, nn.Unflatten: 4}.get(type(between), 8)
    norm = (nn.BatchNorm3d if isinstance(between, nn.Unflatten) else nn.BatchNorm2d)(channels)
    model = model_of(nn.Conv2d(6, 8, 1), between, norm, nk.BatchNorm(channels))
    exact(model, randn(2, 6, 7, 5), [("2", ("0",)), ("3", ("0",))])


def test_channels_are_told_apart_in_16_bits():
    model = model_of(nn.Conv2d(6, 300, 1), nn.ChannelShuffle(10), nn.BatchNorm2d(300))
    x = randn(2, 6, 3, 3)
    expected = nk.fold(model, x).model[0].weight
    narrow = nk.fold(model.bfloat16(), x.bfloat16())
    torch.testing.assert_close(narrow.model[0].weight.double(), expected, rtol=0.02, atol=0.02)
    assert narrow.left == ()


class Crossed(Tokens):
    """Every channel of the norm has values of several channels of the layer."""

    def forward(self, x):
        return self.norm(self.layer(x).flatten(1).view(-1, 8, x.shape[1]))


def test_channels_that_a_reshape_mixes_stay():
    (left,) = nk.fold(trained(Crossed().double()), randn(3, 5, 6)).left
    assert "its channels do not match those of 'layer'" in left.why


class Elsewhere(Tokens):
    """The layer's output is also used transposed."""

    def forward(self, x):
        x = self.layer(x)
        return self.norm(x.flatten(0, 1)).reshape_as(x) @ x.mT


def test_an_attribute_that_has_the_values_is_a_use_of_them():
    (left,) = nk.fold(trained(Elsewhere().double()), randn(3, 5, 6)).left
    assert left.why.startswith("'layer' (Linear) feeds 'mT' as well")


class OwnPadding(nn.Conv2d):
    """Pads by itself, as EfficientNets of several libraries do."""

    def forward(self, x):
        x = nn.functional.pad(x, (1, 0, 1, 0))
        return nn.functional.conv2d(x, self.weight, self.bias, self.stride)


class Standardized(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / weight.std((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight, self.bias)


class Activated(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).relu()


class Biased(nn.Conv2d):
    """Adds something that no bias replaces."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.more = nn.Parameter(torch.ones(self.out_channels, 1, 1))

    def forward(self, x):
        return nn.functional.conv2d(x, self.weight, self.bias) + self.more


@pytest.mark.parametrize("bias", [True, False])
def test_a_forward_of_its_own_that_is_linear_takes_the_norm(bias):
    model = model_of(OwnPadding(6, 8, 2, bias=bias), nn.BatchNorm2d(8))
    exact(model, randn(2, 6, 7, 5), [("1", ("0",))])


@pytest.mark.parametrize("kind", [Standardized, Activated, Biased])
def test_a_forward_of_its_own_that_is_not_linear_stays(kind):
    model = model_of(kind(6, 8, 2), nn.BatchNorm2d(8))
    (left,) = nk.fold(model, randn(2, 6, 7, 5)).left
    assert left.why.startswith("'0' cannot absorb it: it has its own forward")
    assert f".{kind.__name__})" in left.why


def test_a_forward_of_its_own_does_what_it_likes_to_its_input():
    model = model_of(nn.BatchNorm2d(6), OwnPadding(6, 8, 2))
    (left,) = nk.fold(model, randn(2, 6, 7, 5)).left
    assert "'1' cannot absorb it: it has its own forward" in left.why


def test_hooks_see_no_numbers_of_channels():
    model, seen = model_of(nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8), nn.ReLU()), []
    x = randn(2, 6, 4, 4)
    y = model(x)
    model[2].register_forward_hook(lambda module, given, output: seen.append(output))
    nk.fold(model, x)
    for output in seen:
        torch.testing.assert_close(output, y, rtol=1e-9, atol=1e-9)


def test_a_forward_that_fails_on_numbers_still_folds_what_it_reached():
    class Strict(nn.Sequential):
        def forward(self, x):
            y = self[1](self[0](x))
            if float(y[0, 1, 0, 0]) == 2.0:  # the number of the second channel
                raise RuntimeError("no such value")
            return self[3](self[2](y))

    parts = (nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4))
    done = nk.fold(trained(Strict(*parts).double()), randn(2, 6, 4, 4))
    assert [row.name for row in done.folded] == ["1"]
    assert [row.name for row in done.left] == ["3"]


def test_a_model_that_writes_into_its_input_is_compared_with_itself():
    model = model_of(nn.ReLU(inplace=True), nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8))
    x = randn(2, 6, 4, 4)
    before = x.clone()
    assert nk.fold(model, x).difference < 1e-11
    assert torch.equal(x, before)


def test_a_folded_model_made_in_inference_mode_runs_outside():
    model, x = model_of(nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8)), randn(2, 6, 4, 4)
    with torch.inference_mode():
        done = nk.fold(model, x)
    done.model(x).sum().backward()
    assert done.model[0].bias.grad is not None


class Fluctuating(nn.Sequential):
    """How many positions the norm is given depends on the values."""

    def forward(self, x):
        y = self[0](x)
        return self[1](y[:, :, : 1 + int(y[0, 126, 0] > 100)])


def test_shapes_that_depend_on_the_values_are_no_way_to_follow_channels():
    model = Fluctuating(nn.Conv1d(6, 200, 1), nn.BatchNorm1d(200)).double().eval()
    axes = {model[0]: -2, model[1]: 1}
    labels = follow_channels(model, axes, randn(2, 6, 9))
    assert model[1] not in labels  # the last digit of 127 is above 100, and the one before is 0
    assert labels[model[0]].shape == (2, 6, 9)


def test_a_norm_that_is_a_function_is_said():
    class Function(nn.Sequential):
        def forward(self, x):
            x = self[1](self[0](x))
            return nn.functional.layer_norm(x, x.shape[-1:])

    model = trained(Function(nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8)).double())
    done = nk.fold(model, randn(2, 6, 4, 4))
    assert [row.name for row in done.folded] == ["1"]
    assert [(row.name, row.old) for row in done.left] == [("layer_norm", "a function")]


@pytest.mark.parametrize("inside", [True, False])
def test_an_exported_model_is_refused(inside):
    x = torch.randn(2, 6, 4, 4)
    model = nn.Sequential(nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8)).eval()
    exported = torch.export.export(model, (x,)).module()
    given = nn.Sequential(exported) if inside else exported
    for verb, call in (
        ("fold", lambda: nk.fold(given, x)),
        ("convert", lambda: nk.convert_norm_(given, "gn:4")),
        ("reparametrise", lambda: nk.standardize_weights_(given)),
        ("validate", lambda: nk.validate(given, batch_size=2, example_input=x)),
    ):
        with pytest.raises(nk.OptionError, match=f"is exported: .* {verb} the model that it was"):
            call()


def test_a_traced_model_folds():
    x = torch.randn(2, 6, 4, 4)
    model = trained(nn.Sequential(nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8)))
    assert [row.name for row in nk.fold(torch.fx.symbolic_trace(model), x).folded] == ["1"]


class Batched(nn.Sequential):
    """Copies images into a batch that is made of the shape of one, as detectors do."""

    def forward(self, images):
        batch = images[0].new_full((len(images), *images[0].shape), 0.0)
        for image, place in zip(images, batch, strict=True):
            place.copy_(image)
        return super().forward(batch)


def test_a_tensor_that_is_made_of_a_shape_and_filled_has_values():
    model = trained(Batched(nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8)).double())
    done = nk.fold(model, ([randn(6, 4, 4), randn(6, 4, 4)],))
    assert [row.name for row in done.folded] == ["1"]
