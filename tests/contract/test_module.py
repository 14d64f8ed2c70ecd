"""Every layer as a torch module: repr, copies, checkpoints, dtypes, modes."""

import copy
import pickle

import pytest
import torch
import torch.nn.utils.parametrize
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import normkit as nk
from cases import CASES, EVERY, MAIN, PLAIN, TOLERANCE, randn, statistics

pytestmark = pytest.mark.usefixtures("kernels")
TWINS = tuple(case for case in CASES if case.twin)
TRACKED = tuple(case for case in EVERY if case.tracks)
SINGLE = tuple(case for case in CASES if case.tracks)
X = randn(4, 6, 5, 3, dtype=torch.float32, mean=1.0)


def stepped(case):
    """The layer after one training step, so that its buffers are not the initial ones."""
    layer = case.make()
    layer(X)
    return layer


def same_state(first, second):
    """Compare keys and values of two state dicts, bit by bit."""
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_repr_rebuilds_the_layer(case):
    layer = case.make(eps=1e-3)
    again = eval(f"nk.{layer!r}", {"nk": nk})
    assert repr(again) == repr(layer)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(X), layer(X))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_copies_are_equal_and_independent(case, copied):
    layer = stepped(case)
    again = copied(layer)
    assert same_state(again, layer)
    assert torch.equal(again(X), layer(X))
    for ours, theirs in zip(again.parameters(), layer.parameters(), strict=True):
        ours.data.add_(1)
        assert not torch.equal(ours, theirs)


@pytest.mark.parametrize("case", TWINS, ids=str)
def test_checkpoints_load_from_torch_and_back(case):
    twin, layer = case.twin(6), case.make()
    nn.init.normal_(twin.weight)
    if hasattr(twin, "running_mean") and twin.running_mean is not None:
        twin(X + 1)
    layer.load_state_dict(twin.state_dict())
    assert same_state(layer, twin)
    layer(X)
    twin.load_state_dict(layer.state_dict())
    assert same_state(layer, twin)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", [c for c in TWINS if "g" not in c.name or c.name == "gn"], ids=str)
def test_the_result_is_that_of_torchs_layer(case, training):
    layer = stepped(case).train(training)
    twin = case.twin(6)
    twin.load_state_dict(layer.state_dict())
    twin.train(training)
    assert_close(layer(X), twin(X), **TOLERANCE[torch.float32])


def test_a_checkpoint_without_a_count_loads():
    old = nn.BatchNorm2d(6).state_dict()
    del old["num_batches_tracked"]
    old._metadata[""]["version"] = 1
    layer = nk.BatchNorm(6)
    layer.load_state_dict(old)
    assert layer.num_batches_tracked == 0


def test_a_modern_checkpoint_without_a_count_is_refused():
    state = nn.BatchNorm2d(6).state_dict()
    del state["num_batches_tracked"]
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        nk.BatchNorm(6).load_state_dict(state)


@pytest.mark.parametrize("assign", [False, True])
def test_a_16_bit_checkpoint_does_not_narrow_the_buffers(assign):
    state = nn.BatchNorm2d(6).bfloat16().state_dict()
    layer = nk.BatchNorm(6)
    layer.load_state_dict(state, assign=assign)
    assert layer.running_mean.dtype == torch.float32
    assert state["running_mean"].dtype == torch.bfloat16


@pytest.mark.parametrize("case", SINGLE, ids=str)
def test_example_weight_is_in_the_state_dict_only_when_it_is_not_the_default(case):
    layer = case.layer(6, **{k: v for k, v in case.options.items() if k != "example_weight"})
    keys = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    if case.options.get("bias") is False:
        keys.remove("bias")
    assert list(layer.state_dict()) == keys
    layer.example_weight = 0.125
    assert list(layer.state_dict()) == [*keys, "example_weight"]
    other = copy.deepcopy(layer)
    other.example_weight = 0.5
    other.load_state_dict(layer.state_dict())
    assert other.example_weight == 0.125


KEYS = {
    "gnplus": "weight bias mix_logit running_mean running_var num_batches_tracked",
    "bcn": "batch.weight batch.bias batch.running_mean batch.running_var "
    "batch.num_batches_tracked channel.weight channel.bias",
    "sn": "weight bias mean_logits var_logits running_mean running_var num_batches_tracked",
    "sn-two": "weight bias mean_logits var_logits",
    "ibn": "instance.weight instance.bias batch.weight batch.bias batch.running_mean "
    "batch.running_var batch.num_batches_tracked",
    "gw": "weight bias",
}


@pytest.mark.parametrize("case", [c for c in EVERY if c.name in KEYS], ids=str)
def test_keys_of_composites(case):
    layer = case.make()
    keys = KEYS[case.name].split()
    assert list(layer.state_dict()) == keys
    if case.tracks:
        layer.example_weight = 0.125
        (added,) = set(layer.state_dict()) - set(keys)
        assert added in {"example_weight", "batch.example_weight"}
        other = case.make()
        other.load_state_dict(layer.state_dict())
        assert other.example_weight == 0.125


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_a_misspelt_key_is_refused(case):
    state = case.make().state_dict() | {"gamma": torch.ones(6)}
    with pytest.raises(RuntimeError, match="gamma"):
        case.make().load_state_dict(state)


@pytest.mark.parametrize("cast", ["half", "bfloat16"])
@pytest.mark.parametrize("case", TRACKED, ids=str)
def test_casting_to_16_bits_keeps_the_statistics(case, cast):
    layer = stepped(case)
    holder = statistics(layer)
    before = holder.running_mean.clone()
    getattr(layer, cast)()
    assert {p.dtype.itemsize for p in layer.parameters()} == {2}
    assert holder.running_mean.dtype == holder.running_var.dtype == torch.float32
    assert torch.equal(holder.running_mean, before)
    layer.double()
    assert holder.running_mean.dtype == torch.float64


def test_a_bfloat16_model_does_not_stall():
    """Torch's own layer stops at 6.7 on the way to 10: its buffer is bfloat16."""
    torch.manual_seed(0)
    ours = nk.BatchNorm(1, momentum=0.01).bfloat16()
    theirs = nn.BatchNorm2d(1, momentum=0.01).bfloat16()
    for _ in range(1000):
        x = torch.randn(64, 1, 1, 1).add_(10).bfloat16()
        ours(x)
        theirs(x)
    assert abs(ours.running_mean.item() - 10) < 0.1
    assert theirs.running_mean.item() < 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", MAIN, ids=str)
def test_every_pair_of_input_and_parameter_dtype(case, parameters, dtype):
    layer = case.make(dtype=parameters)
    exact = case.make(dtype=parameters).double()
    x = X.to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert_close(y.double(), exact(x.double()), **TOLERANCE[dtype])
    y.sum().backward()
    assert {p.grad.dtype for p in layer.parameters()} == {parameters}


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_meta_device_then_real(case):
    layer = case.layer(6, **case.options, device="meta")
    assert layer(X.to("meta")).shape == X.shape
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    fresh = case.layer(6, **case.options)
    assert same_state(layer, fresh)


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_autocast_keeps_16_bit_maps_and_wide_statistics(case):
    layer = case.make()
    x = X.bfloat16()
    expected = copy.deepcopy(layer)(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, expected)
        assert layer(X).dtype == torch.float32


@pytest.mark.parametrize("case", TRACKED, ids=str)
def test_evaluation_leaves_the_buffers_alone(case):
    layer = stepped(case).eval()
    before = copy.deepcopy(layer)
    layer(X + 3)
    assert same_state(layer, before)


@pytest.mark.parametrize("case", [c for c in PLAIN if c.tracks], ids=str)
def test_without_tracking_evaluation_uses_the_batch(case):
    layer = case.make(track_running_stats=False)
    assert layer.running_mean is None
    assert torch.equal(layer(X), layer.eval()(X))


def test_momentum_none_averages_all_batches():
    ours, theirs = nk.BatchNorm(6, momentum=None), nn.BatchNorm2d(6, momentum=None)
    for step in range(4):
        ours(X * step + step)
        theirs(X * step + step)
    assert_close(ours.running_mean, theirs.running_mean)
    assert_close(ours.running_var, theirs.running_var)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("case", TRACKED, ids=str)
def test_checkpointing_counts_one_step(case, reentrant):
    plain, layer = case.make(), case.make()
    x = X.clone().requires_grad_()
    plain(x).sum().backward()
    checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
    assert same_state(layer, plain)
    assert statistics(layer).num_batches_tracked == 1


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_two_forwards_before_one_backward(case):
    layer, apart = case.make(dtype=torch.float64), case.make(dtype=torch.float64)
    batches = (X.double(), X.double().flip(0) * 2)
    together, alone = ([x.clone().requires_grad_() for x in batches] for _ in range(2))
    sum(layer(x).pow(3).sum() for x in together).backward()
    for x in alone:
        apart(x).pow(3).sum().backward()
    ours, theirs = (*layer.parameters(), *together), (*apart.parameters(), *alone)
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one.grad, other.grad)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_the_result_may_be_changed_in_place(case, training):
    """Every torchvision ResNet does: ``nn.ReLU(inplace=True)`` follows its norms."""
    layer = stepped(case).train(training)
    x = X.clone().requires_grad_()
    y = copy.deepcopy(layer)(x)
    (expected,) = torch.autograd.grad(y.relu().sum(), x)
    (found,) = torch.autograd.grad(layer(x).relu_().sum(), x)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_parameters_may_be_parametrised(case):
    class Double(nn.Module):
        def forward(self, weight):
            return weight * 2

    layer, expected = case.make(), case.make()
    name = next(name for name, _ in layer.named_parameters())
    expected.get_parameter(name).data.mul_(2)
    part, _, last = name.rpartition(".")
    nn.utils.parametrize.register_parametrization(layer.get_submodule(part), last, Double())
    assert torch.equal(layer(X), expected(X))


@pytest.mark.parametrize("case", TRACKED, ids=str)
def test_buffers_may_change_between_an_evaluation_and_its_backward(case):
    layer = stepped(case).eval()
    x = X.clone().requires_grad_()
    y = layer(x)
    statistics(layer).reset_running_stats()
    y.sum().backward()
    again = stepped(case).eval()
    x2 = X.clone().requires_grad_()
    again(x2).sum().backward()
    assert_close(x.grad, x2.grad)


def test_batch_norm_is_torchs_through_100_training_steps():
    torch.manual_seed(0)
    ours = small_network(nk.BatchNorm).double()
    theirs = small_network(nn.BatchNorm2d).double()
    theirs.load_state_dict(ours.state_dict())
    optimizers = [
        torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9) for model in (ours, theirs)
    ]
    for step in range(100):
        x, target = randn(8, 3, 9, 9, seed=step, mean=0.3), torch.arange(8) % 4
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), target).backward()
            optimizer.step()
    for name, value in theirs.state_dict().items():
        assert_close(ours.state_dict()[name], value, atol=1e-9, rtol=1e-9, msg=name)


def small_network(norm):
    """Two convolutions with norms, pooled to four classes."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), norm(8), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=2), norm(6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("layer", "option", "value"),
    [
        (nk.BatchChannelNorm(6, num_groups=3), "eps", 0.5),
        (nk.BatchChannelNorm(6, num_groups=3), "momentum", 0.9),
        (nk.BatchChannelNorm(6, num_groups=3, micro_batch=True), "update_rate", 0.9),
        (nk.BatchChannelNorm(6, num_groups=3), "example_weight", 0.5),
        (nk.InstanceBatchNorm(6), "eps", 0.5),
        (nk.InstanceBatchNorm(6), "momentum", 0.9),
        (nk.InstanceBatchNorm(6), "example_weight", 0.5),
    ],
    ids=str,
)
def test_an_option_that_is_set_later_acts_as_if_built_with_it(layer, option, value):
    later = copy.deepcopy(layer)
    setattr(later, option, value)
    built = eval(f"nk.{later!r}")
    assert repr(later) == repr(built)
    assert repr(later) != repr(layer)
    results = []
    for each in (later, built, copy.deepcopy(layer)):
        each(randn(4, 6, 5, 3, dtype=torch.float32, mean=2.0))
        results.append(each.eval()(randn(4, 6, 5, 3, seed=1, dtype=torch.float32)))
    assert torch.equal(results[0], results[1])
    assert not torch.allclose(results[0], results[2])
