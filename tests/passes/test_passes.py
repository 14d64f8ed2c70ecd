import random
from collections import UserDict, namedtuple

import numpy as np
import pytest
import torch
from torch import nn

import normkit as nk
from normkit.errors import DataError
from normkit.passes import (
    as_list,
    first_calls,
    forward_batch,
    inputs_of,
    moved,
    num_examples,
    progress,
    untouched,
)


class Named(nn.Module):
    def forward(self, image, *, scale=1.0):
        return image * scale


def test_a_batch_is_inputs_or_a_pair_or_named_arguments():
    x = torch.randn(2, 3)
    assert forward_batch(nn.Identity(), x) is x
    assert forward_batch(nn.Identity(), (x, torch.tensor([0, 1]))) is x
    assert forward_batch(nn.Identity(), [x]) is x
    named = {"image": x, "scale": 2.0, "label": torch.tensor([0, 1])}
    assert torch.equal(forward_batch(Named(), named), 2 * x)


def test_a_model_that_takes_any_name_gets_all():
    class Any(nn.Module):
        def forward(self, **kwargs):
            return sorted(kwargs)

    assert forward_batch(Any(), {"b": 1, "a": 2}) == ["a", "b"]


class Detector(nn.Module):
    """As torchvision's: a list of images of any sizes, in training with their targets."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, images: list[torch.Tensor], targets=None):
        if self.training and targets is None:
            raise ValueError("targets should not be none when in training mode")
        maps = [self.norm(image[None]) for image in images]
        return maps if targets is None else {"loss": sum(m.square().mean() for m in maps)}


def test_lists_of_images_go_to_detectors_as_they_are():
    images = [torch.randn(3, n, 5) for n in (4, 6)]
    targets = [{"boxes": torch.zeros(1, 4)} for _ in images]
    model = Detector().eval()
    for batch in ((images, targets), (tuple(images), targets), [images], images):
        assert [y.shape[2] for y in forward_batch(model, batch)] == [4, 6]
    assert "loss" in forward_batch(model.train(), (images, targets))
    assert num_examples((images, targets)) == 2
    values = torch.cat([image.flatten(1) for image in images], dim=1).double()
    (row,) = nk.recalibrate(model, [(images, targets)]).layers
    torch.testing.assert_close(row.new["running_mean"].double(), values.mean(1))
    assert nk.estimation_shift(model, [(images, targets)]).layers[0].num_values == 0
    found = nk.gradient_landscape(model, [(images, targets)], loss=lambda y, _: y["loss"])
    assert len(found.steps) == 1


def test_nested_batches_are_read_to_the_inputs():
    x = torch.randn(2, 3)
    assert torch.equal(forward_batch(Named(), ({"image": x, "scale": 3.0}, None)), 3 * x)
    pair = namedtuple("Pair", ["inputs", "target"])(x, None)
    assert forward_batch(nn.Identity(), pair) is x
    encoding = UserDict(image=x)  # as tokenizers give, which torch does not look into
    assert torch.equal(forward_batch(Named(), encoding), x)
    assert num_examples(encoding) == num_examples((encoding, None)) == 2


class Boxed:
    """A batch of a class of its own, which moves itself."""

    def __init__(self, x):
        self.x = x

    def to(self, device):
        return Boxed(self.x.to(device))


def test_whatever_holds_tensors_is_moved():
    x, meta = torch.randn(2), torch.device("meta")
    batch = moved([(x, {"a": x}), UserDict(b=[x]), Boxed(x), "text", None], meta)
    (first, named), encoding, boxed, *rest = batch
    for tensor in (first, named["a"], encoding["b"][0], boxed.x):
        assert tensor.device == meta
    assert rest == ["text", None]


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, a, b):
        return self.norm(a + b)


TWO_ARGUMENTS = (
    r"Two would be called with the inputs alone, but its forward takes a, b "
    r"\(missing.*'b'\); pass forw"
)


def test_a_model_of_two_arguments_is_named_with_the_way_out():
    model, pair = Two(), (torch.randn(4, 4), torch.randn(4, 4))
    for call in (
        lambda: nk.recalibrate(model, [pair]),
        lambda: nk.estimation_shift(model, [pair]),
        lambda: nk.tune_example_weight(model, [pair], metric=lambda output, batch: output[:, 0]),
        lambda: nk.diagnose(model, [pair] * 2, [pair] * 2),
    ):
        with pytest.raises(DataError, match=TWO_ARGUMENTS):
            call()
    with pytest.raises(
        DataError, match=r"Two would be called with a, but its forward takes a, b \(missing"
    ):
        forward_batch(model, {"a": pair[0]})
    with pytest.raises(DataError, match="Linear was called with the batch's list of 2 tensors"):
        forward_batch(nn.Linear(4, 4), (list(pair), None))
    found = nk.recalibrate(model, [pair], forward=lambda model, batch: model(*batch))
    assert found.layers[0].num_values == 4


def test_an_error_of_the_model_itself_stays_what_it_is():
    class Wrong(nn.Module):
        def forward(self, x):
            return len(3)

    with pytest.raises(TypeError, match="object of type 'int' has no len"):
        forward_batch(Wrong(), torch.zeros(1))


def test_other_batches_are_refused_with_the_way_out():
    with pytest.raises(DataError, match=r"type str was given.*forward=lambda"):
        forward_batch(nn.Identity(), "batch")
    with pytest.raises(DataError, match=r"entries \['pixels'\].*takes \['image', 'scale'\]"):
        forward_batch(Named(), {"pixels": torch.zeros(1)})
    with pytest.raises(DataError, match=r"Tensor of shape \(2, 3\) was given as batches"):
        as_list(torch.zeros(2, 3))
    with pytest.raises(DataError, match="an iterator that was used up"):
        as_list(iter([]))


class Restless(nn.Module):
    """Changes everything that a forward can change."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("nothing", None)

    def forward(self, x):
        self.calls = self.calls + 1  # another object
        self.late = nn.Buffer(torch.zeros(1))
        noise = torch.rand(1) + random.random() + np.random.rand()  # noqa: NPY002 - what old loaders draw from
        return self.norm(x) + noise


def generators():
    legacy = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().numpy(), np.array(random.getstate()[1]), legacy[1].copy()


def test_a_block_leaves_the_model_and_the_generators_as_they_were():
    model = Restless()
    model.norm.eval()
    model.norm.weight.grad = torch.ones(3)
    grad, calls, mean = model.norm.weight.grad, model.calls, model.norm.running_mean
    before = {k: v.clone() for k, v in model.state_dict().items()}
    states = generators()

    def interrupted():
        with untouched(model, training=True):
            assert model.norm.training
            model(torch.randn(4, 3)).sum().backward(inputs=[model.norm.bias])
            assert model.norm.num_batches_tracked == 1
            assert not all(map(np.array_equal, generators(), states))
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        interrupted()
    assert model.training
    assert not model.norm.training
    assert model.calls is calls
    assert model.norm.running_mean is mean
    assert model.norm.weight.grad is grad
    assert model.norm.bias.grad is None
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(map(np.array_equal, generators(), states))


def test_a_mode_is_set_without_calling_train():
    class Merging(nn.Identity):
        def train(self, mode=True):
            raise AssertionError("merges weights")

    model = Merging()
    with untouched(model, training=False):
        assert not model.training
    assert model.training


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.last, self.shared, self.unused = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.last(self.shared(self.shared(x)))


def test_calls_are_counted_in_the_order_of_the_forward():
    model = Twice()
    calls = first_calls(model, [model.last, model.shared, model.unused], torch.randn(2, 3))
    assert list(calls.items()) == [(model.shared, 2), (model.last, 1)]
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_inputs_are_those_of_every_call_and_the_rest_is_left_out():
    model = Twice()
    ran = []
    model.last.register_forward_hook(lambda *_: ran.append(1))
    batches = [torch.randn(2, 3), torch.randn(1, 3)]
    found = list(inputs_of(model, model.shared, batches, 2))
    with torch.no_grad():
        expected = [t for x in batches for t in (x, model.shared(x))]
    assert [t.shape[0] for t in found] == [2, 2, 1, 1]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not ran
    assert not model.shared._forward_pre_hooks


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(3)

    def forward(self, x):
        x = x * 1
        y = self.norm(input=x)
        return self.norm(y + x.zero_())


@pytest.mark.parametrize("num_calls", [2, 0], ids=["known", "varying"])
def test_inputs_are_those_of_their_time_and_after_other_hooks(num_calls):
    model, x = InPlace(), torch.randn(2, 3)
    seen = []
    model.norm.register_forward_pre_hook(
        lambda _, args, named: (args, {k: v + 1 for k, v in named.items()}), with_kwargs=True
    )
    model.norm.register_forward_hook(lambda _, args, y: seen.append(y))
    first, _ = inputs_of(model, model.norm, [x], num_calls)
    assert torch.equal(first, x + 1)
    assert len(seen) == (1 if num_calls else 2)


def test_an_error_in_the_forward_takes_the_hook_away():
    model = Twice()
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        list(inputs_of(model, model.last, [torch.randn(2, 5)], 1))
    assert not model.last._forward_pre_hooks


def test_progress_gives_a_file_nothing_and_a_terminal_a_line(capsys, monkeypatch):
    assert list(progress([1, 2], "counting")) == [1, 2]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    clock = iter(range(0, 100, 3))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    assert list(progress(iter([1, 2]), "counting", total=4)) == [1, 2]
    said = capsys.readouterr().err
    assert "counting: 0 of 4" in said
    assert "counting: 1 of 4, about 18 s left" in said
    assert said.endswith("\r\x1b[K")
    assert list(progress(iter([1]), "counting")) == [1]
    assert "counting: 0 in 3 s" in capsys.readouterr().err
