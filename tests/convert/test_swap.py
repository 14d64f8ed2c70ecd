"""The change itself: what stays, what comes back, and what an interruption leaves."""

import copy
import pickle
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.testing import assert_close

import normkit as nk
from convert.net import Net
from convert.networks import build
from normkit.convert import optimizer as edits
from normkit.convert import swap


def snapshot(model, optimizer=None):
    """Everything that must be as before: modules, their insides, tensors, optimizer, outputs."""
    found = {}
    for name, module in model.named_modules():
        found[name] = (module, type(module), module.training)
        for kind in ("_parameters", "_buffers", "_modules"):
            for key, value in vars(module)[kind].items():
                found[name, kind, key] = value
        found[name, "order"] = [list(vars(module)[k]) for k in ("_parameters", "_modules")]
        found[name, "hooks"] = list(module._forward_hooks), list(module._forward_pre_hooks)
    found["values"] = [value.clone() for value in model.state_dict().values()]
    found["keys"] = list(model.state_dict())
    if optimizer is not None:
        found["groups"] = [dict(g, params=list(g["params"])) for g in optimizer.param_groups]
        found["state"] = {p: dict(state) for p, state in optimizer.state.items()}
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    values = zip(found.pop("values"), expected.pop("values"), strict=True)
    assert all(torch.equal(a, b) for a, b in values)
    for key, value in expected.items():
        assert is_same(found[key], value), key


def is_same(a, b):
    if isinstance(a, torch.Tensor):
        return a is b
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(is_same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(is_same, a, b))
    return a == b


def trained(model, make=lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9)):
    optimizer = make(model.parameters())
    steps(model, optimizer)
    return optimizer


def steps(model, optimizer, count=2):
    for seed in range(count):
        x = torch.randn(4, 8, 4, 4, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


class Shared(nn.Module):
    """One convolution and one norm, called twice."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.again = self.norm

    def forward(self, x):
        """Compute the output."""
        return self.again(self.conv(self.norm(self.conv(x))))


@pytest.mark.parametrize("make", [Net, Shared])
@pytest.mark.parametrize("spec", ["bn", "gn:2", "bcn:4+ws", "ibn", "gnplus:4", "bgn:1+ws"])
def test_revert_is_exact(make, spec):
    model = make()
    optimizer = trained(model)
    before = snapshot(model, optimizer)
    done = nk.convert_norm_(model, spec, optimizer=optimizer)
    assert list(model.state_dict()) != before["keys"] or spec == "bn"
    assert done.revert() is model
    assert_same(snapshot(model, optimizer), before)
    assert done.revert() is model


@pytest.mark.parametrize("spec", ["gn:2", "bcn:4+ws", "ibn"])
def test_revert_after_training_undoes_the_conversion_alone(spec):
    model = Net()
    optimizer = trained(model)
    before = snapshot(model, optimizer)
    done = nk.convert_norm_(model, {"layer*": spec}, optimizer=optimizer)
    steps(model, optimizer)
    done.revert()
    after = snapshot(model, optimizer)
    gone, found = before.pop("values"), after.pop("values")
    pairs = zip(before["keys"], gone, found, strict=True)
    changed = {key for key, old, new in pairs if not torch.equal(old, new)}
    assert "layer1.0.conv1.weight" in changed
    assert not any("running" in n for n in changed if n.startswith("layer"))  # the old layers'
    states = before.pop("state"), after.pop("state")
    assert states[0].keys() == states[1].keys()
    for key, value in before.items():
        assert is_same(after[key], value), key
    steps(model, optimizer)


@pytest.mark.parametrize("spec", ["gn:2", "in:affine=false", "bcn:4"])
def test_revert_follows_the_mode_and_the_dtype_that_the_model_has_now(spec):
    model = Net()
    model.layer1[0].bn1.eval()
    x = torch.randn(2, 8, 4, 4).double()
    done = nk.convert_norm_(model, spec)
    model.train()  # thaws all of them
    model.layer2[0].bn1.eval()
    model.double()
    old = done.revert()
    assert [m.training for m in (old.layer1[0].bn1, old.layer2[0].bn1)] == [True, False]
    dtypes = {v.dtype for v in old.state_dict().values() if v.is_floating_point()}
    assert dtypes == {torch.float64}
    expected = Net().double()
    expected.load_state_dict(old.state_dict())
    assert_close(old.eval()(x), expected.eval()(x))


def test_revert_leaves_the_modes_of_parts_that_nobody_has_changed():
    model = nn.Sequential(build("timm:test_efficientnet"))
    act = next(m for m in model.modules() if type(m).__name__ == "BatchNormAct2d")
    act.drop.train(False)
    act.eval().act.train()
    done = nk.convert_norm_(model, "gn:max=8")
    done.revert()
    assert [m.training for m in (act, act.drop, act.act)] == [False, False, True]


def test_revert_refuses_what_somebody_else_has_replaced():
    model = Net()
    first = nk.convert_norm_(model, "gn:2")
    second = nk.convert_norm_(model, "in")
    with pytest.raises(
        nk.OptionError, match=r"'bn1', .* were replaced .* revert the later conversion first"
    ):
        first.revert()
    second.revert()
    first.revert()
    assert isinstance(model.layer1[0].bn1, nn.BatchNorm2d)


def test_a_conversion_pickles_and_reverts_there():
    model = Net().eval()
    x = torch.randn(2, 8, 4, 4)
    y = model(x)
    done = nk.convert_norm_(model, "gnplus:4", optimizer=trained(Net()) and None)
    twin = pickle.loads(pickle.dumps(done))
    assert str(twin) == str(done)
    assert_close(twin.model(x), model(x))
    assert_close(twin.revert()(x), y)
    assert isinstance(model.layer1[0].bn1, nk.GroupNormPlus)


@pytest.mark.parametrize("calibrated", [True, False])
def test_a_conversion_with_standardized_weights_pickles_and_reverts_there(calibrated):
    x, model = torch.randn(2, 8, 4, 4), Net().eval()
    before = model(x)
    done = nk.convert_norm(model, "gn:2+ws", calibrate=[x] if calibrated else None)
    twin = pickle.loads(pickle.dumps(done))
    assert_close(twin.model(x), done.model(x))
    weight = twin.model.layer1[0].conv1.parametrizations.weight.original
    twin.model(x).sum().backward()
    assert weight.grad is not None
    assert_close(twin.revert()(x), before)
    assert type(twin.model.layer1[0].conv1) is nn.Conv2d


def test_the_copying_twin_leaves_the_model_alone():
    model = Net()
    before = snapshot(model)
    done = nk.convert_norm(model, "bcn:4+ws")
    assert_same(snapshot(model), before)
    assert not {*model.parameters()} & {*done.model.parameters()}
    assert isinstance(done.revert().layer1[0].bn1, nn.BatchNorm2d)


class Interrupter:
    """Raises in the n-th line that the machinery of the change runs."""

    FILES = (
        "convert/swap.py",
        "convert/optimizer.py",
        "weights/attach.py",
        "convert/execute.py",
        "passes/rollback.py",
    )

    def __init__(self, at):
        self.left = at
        self.applying = False

    def __call__(self, frame, event, arg):
        """Count a line."""
        name = frame.f_code.co_name
        if name == "apply" and frame.f_code.co_filename.endswith("swap.py"):
            self.applying = True
        ours = frame.f_code.co_filename.endswith(self.FILES)
        if event == "line" and self.applying and ours:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self if ours or event != "call" else None


def test_an_interruption_anywhere_leaves_everything_as_it_was():
    model = Shared()
    optimizer = trained(model, torch.optim.AdamW)
    before = snapshot(model, optimizer)
    interrupted = 0
    for at in range(1, 10_000, 5):
        tracer = sys.gettrace()
        sys.settrace(Interrupter(at))
        try:
            done = nk.convert_norm_(model, "bcn:4+ws", optimizer=optimizer)
        except KeyboardInterrupt:
            interrupted += 1
            sys.settrace(tracer)
            assert_same(snapshot(model, optimizer), copy.copy(before))
        else:
            break
        finally:
            sys.settrace(tracer)
    assert interrupted > 40  # lines: this looked at more than the beginning
    assert isinstance(model.norm, nk.BatchChannelNorm)
    assert parametrize.is_parametrized(model.conv)
    done.revert()
    assert_same(snapshot(model, optimizer), before)


@pytest.mark.parametrize("step", ["standardize_weights_", "_write"])
def test_an_error_in_a_step_is_passed_on_after_putting_back(step, monkeypatch):
    def fails(*arguments, **options):
        raise RuntimeError("no")

    model = Net()
    optimizer = trained(model)
    before = snapshot(model, optimizer)
    if step == "_write":
        original = edits._write
        calls = []

        def second_fails(group, lists):
            calls.append(group)
            return fails() if len(calls) == 1 else original(group, lists)

        monkeypatch.setattr(edits, step, second_fails)
    else:
        monkeypatch.setattr(swap, step, fails)
    with pytest.raises(RuntimeError, match="no"):
        nk.convert_norm_(model, "gnplus:4+ws", optimizer=optimizer)
    assert_same(snapshot(model, optimizer), before)


def test_a_shared_layer_stays_shared():
    model = Shared()
    done = nk.convert_norm_(model, {"again": "gn:2"})
    assert model.norm is model.again
    assert isinstance(model.norm, nk.GroupNorm)
    (change,) = done.changes
    assert (change.name, change.warnings) == ("norm", ("shared, also named again",))


def test_a_module_that_holds_its_holder_is_no_endless_search():
    model = Net()
    model.layer1[0].network = model
    done = nk.convert_norm_(model, "gn:2")
    assert len(done.changes) == 5


def test_tied_parameters_stay_tied():
    model = Net()
    model.layer2[0].bn1.weight = model.layer1[0].bn1.weight
    nk.convert_norm_(model, "gn:2")
    assert model.layer2[0].bn1.weight is model.layer1[0].bn1.weight


def test_hooks_stay_and_their_handles_remove_them():
    model, seen = Net(), []
    layer = model.layer1[0].bn1
    handles = [
        layer.register_forward_hook(lambda m, i, o: seen.append((m, "forward"))),
        layer.register_forward_pre_hook(lambda m, i, k: seen.append((m, "pre")), with_kwargs=True),
        layer.register_full_backward_hook(lambda m, i, o: seen.append((m, "backward"))),
    ]
    done = nk.convert_norm_(model, "gn:2")
    new = model.layer1[0].bn1
    x = torch.randn(4, 8, 4, 4)
    model(x).sum().backward()
    assert seen == [(new, "pre"), (new, "forward"), (new, "backward")]
    done.revert()
    handles[0].remove()
    nk.convert_norm_(model, "gn:2")
    seen.clear()
    model(x).sum().backward()
    assert [what for _, what in seen] == ["pre", "backward"]
    for handle in handles[1:]:
        handle.remove()
    seen.clear()
    model(x).sum().backward()
    assert seen == []


def test_modes_and_requires_grad_stay():
    model = Net()
    frozen = model.layer1[0].bn1.eval().requires_grad_(False)
    half = model.layer1[0].bn2
    half.bias.requires_grad_(False)
    nk.convert_norm_(model, "bcn:4")
    new = model.layer1[0].bn1
    assert not any(m.training for m in new.modules())
    assert all(m.training for m in model.layer1[0].bn2.modules())
    assert not any(p.requires_grad for p in new.parameters())
    assert new.batch.weight is frozen.weight
    learns = {n: p.requires_grad for n, p in model.layer1[0].bn2.named_parameters()}
    assert [name for name, value in learns.items() if not value] == ["batch.bias"]


def feeders(model, names):
    return {name for name, m in model.named_modules() if parametrize.is_parametrized(m)} == names


def test_ws_standardizes_what_feeds_the_converted_norms():
    model = Net()
    raw = model.layer1[0].conv1.weight
    done = nk.convert_norm_(model, {"layer1": "gn:2+ws", "layer2": "gn:2"})
    assert done.standardized == ("layer1.0.conv1", "layer1.0.conv2")
    assert feeders(model, {*done.standardized})
    weight = model.layer1[0].conv1.weight
    assert_close(weight.mean((1, 2, 3)), torch.zeros(8), atol=1e-6, rtol=0)
    assert "weights standardised: layer1.0.conv1, layer1.0.conv2" in str(done)
    again = nk.convert_norm_(model, {"layer1": "gn:2+ws", "layer2": "gn:2"})
    assert (again.changes, again.standardized) == ((), ())
    done.revert()
    assert model.layer1[0].conv1.weight is raw
    assert feeders(model, set())


def test_ws_on_norms_that_are_right_already():
    model = nk.convert_norm(Net(), "gn:2").model
    before = snapshot(model)
    done = nk.convert_norm_(model, "gn:2+ws")
    assert (len(done.changes), len(done.standardized)) == (0, 4)
    done.revert()
    assert_same(snapshot(model), before)


def test_ws_without_a_convolution_is_refused():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    with pytest.raises(nk.OptionError, match=r"\+ws has nothing to standardise: no convolution"):
        nk.convert_norm_(model, "ln+ws")
    assert isinstance(model[1], nn.BatchNorm1d)


def test_ws_that_cannot_be_is_refused_before_anything_changes():
    model = nn.Sequential(nn.Conv2d(8, 8, 1, groups=8), nn.BatchNorm2d(8))
    with pytest.raises(nk.WeightError, match="layer '0'"):
        nk.convert_norm_(model, "gn:2+ws")
    assert isinstance(model[1], nn.BatchNorm2d)


class Branching(Net):
    """Asks its input for values, which torch.fx cannot follow."""

    def forward(self, x):
        """Compute the output."""
        return super().forward(x if x.sum() > 0 else -x)


def test_ws_follows_an_example_where_it_must():
    with pytest.raises(nk.TraceError, match="example_input="):
        nk.convert_norm_(Branching(), "gn:2+ws")
    done = nk.convert_norm_(Branching(), "gn:2+ws", example_input=torch.randn(2, 8, 4, 4))
    assert len(done.standardized) == 4


def test_ws_leaves_convolutions_that_standardise_themselves():
    model = build("timm:resnetv2_50x1_bit")
    with pytest.raises(nk.OptionError, match="nothing to standardise"):
        nk.convert_norm_(model, "gn:8+ws")


class LightningModule(nn.Module):
    """Has a forward of its own that refuses, as Lightning's does."""

    def forward(self, *args, **kwargs):
        """Refuse."""
        return super().forward(*args, **kwargs)


class Wrapping(LightningModule):
    """Trains a network in a step of its own."""

    def __init__(self):
        super().__init__()
        self.network = Net()

    def training_step(self, x):
        """Compute the loss."""
        return self.network(x).sum()


@pytest.mark.parametrize("options", [{}, {"example_input": torch.randn(2, 8, 4, 4)}])
@pytest.mark.parametrize("holder", [Wrapping, lambda: nn.ModuleDict({"network": Net()})])
def test_ws_on_what_has_no_forward_says_which_part_to_pass(holder, options):
    model = holder()
    says = r"no forward of its own; pass the part that has one, such as model\.network$"
    with pytest.raises(nk.TraceError, match=says):
        nk.convert_norm_(model, "gn:2+ws", **options)
    if options:
        with pytest.raises(nk.TraceError, match=rf"takes no example input: it has {says}"):
            nk.convert_norm_(model, "gn:2", **options)
    done = nk.convert_norm_(model, "gn:2")
    assert done.unchecked == ("Net", "Block")
    assert len(nk.convert_norm_(eval("model.network"), "gn:2+ws").standardized) == 4


class Named(Net):
    """Takes a named argument that may be missing, as models of Hugging Face do."""

    def forward(self, pixel_values=None, scale=None):
        """Compute the output."""
        if pixel_values is None:
            raise ValueError("no values")
        return {"logits": super().forward(pixel_values)}


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x,), lambda x: {"pixel_values": x}])
def test_ws_on_named_arguments_goes_by_the_example(wrap):
    with pytest.raises(
        nk.TraceError, match=r"pass example_input=, a tuple of arguments, a dict of"
    ):
        nk.convert_norm_(Named(), "gn:2+ws")
    done = nk.convert_norm_(Named(), "gn:2+ws", example_input=wrap(torch.randn(2, 8, 4, 4)))
    assert len(done.standardized) == 4


@pytest.mark.parametrize("by", ["weight norm", "pruning"])
def test_a_weight_that_others_compute_is_refused_with_the_way_out(by):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    if by == "pruning":
        prune.random_unstructured(model[0], "weight", 0.5)
    else:
        parametrizations.weight_norm(model[0])
    says = r"the weight of layer '0' .* convert_norm_ give the norm behind it a spec without \+ws"
    with pytest.raises(nk.WeightError, match=says):
        nk.convert_norm_(model, "gn:2+ws")
    nk.convert_norm_(model, "gn:2")
