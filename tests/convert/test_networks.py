"""Conversion of real networks."""

import copy

import pytest
import torch
from torch import nn

import normkit as nk
from convert.networks import WITH_BATCH_NORM, WITHOUT_BATCH_NORM, build, images
from normkit.convert.selection import find_lookalikes, find_norms
from normkit.layers.base import NormLayer

SPECS = ["gn:max=8", "bgn:1", "ghost:2", "bcn:max=8", "in"]


@pytest.fixture(scope="module")
def network(request):
    name = request.param
    model = build(name)
    return model, images(name, 4), one_value(model, images(name, 2))


def one_value(model, x):
    """Names of norms that see one value of a channel: they stand behind a global pool."""
    seen, handles = {}, []
    for norm, (name, *_) in find_norms(model).items():

        def note(module, inputs, output, name=name):
            channels = next(module.parameters()).numel()
            seen[name] = inputs[0].numel() == inputs[0].shape[0] * channels

        handles.append(norm.register_forward_hook(note))
    with torch.no_grad():
        model.eval()(x)
    for handle in handles:
        handle.remove()
    return {name: None for name, narrow in seen.items() if narrow}


def train(model, x, count, optimizer=None):
    """Outputs of a few training steps."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    outputs = []
    model.train()
    for seed in range(count):
        torch.manual_seed(seed)  # dropout
        y = model(x)
        optimizer.zero_grad()
        y.square().mean().backward()
        optimizer.step()
        outputs.append(y.detach())
    return torch.stack(outputs)


def same(model, spec, x):
    """The conversion changes neither outputs nor training, in float64: float32 is too chaotic."""
    model, x = copy.deepcopy(model).double(), x.double()
    done = nk.convert_norm(model, spec)
    assert (model.eval()(x) - done.model.eval()(x)).abs().max() < 1e-5
    assert (train(model, x, 3) - train(done.model, x, 3)).abs().max() < 1e-5
    return done


def is_batch_norm(module):
    torchs = isinstance(module, nn.modules.batchnorm._BatchNorm)
    return torchs and not isinstance(module, nk.BatchNorm)


def test_there_are_forty():
    assert len(set(WITH_BATCH_NORM)) == len(WITH_BATCH_NORM) >= 40


@pytest.mark.parametrize("network", WITH_BATCH_NORM, indirect=True)
def test_our_batch_norm_changes_nothing(network):
    model, x, _ = network
    names = [names[0] for m, names in find_norms(model).items() if is_batch_norm(m)]
    done = same(model, dict.fromkeys(names, "bn"), x[:2])
    assert [change.name for change in done.changes] == names
    assert all(change.lost == () for change in done.changes)
    assert not any(map(is_batch_norm, done.model.modules()))
    assert list(done.model.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("network", WITHOUT_BATCH_NORM, indirect=True)
def test_our_norms_change_nothing_where_there_is_no_batch_norm(network):
    model, x, _ = network
    found = {names[0]: module for module, names in find_norms(model).items()}
    groups = {n: f"gn:{m.num_groups}" for n, m in found.items() if isinstance(m, nn.GroupNorm)}
    spec = groups | dict.fromkeys(found.keys() - groups.keys(), "pn")
    done = same(model, spec, x[:2])
    assert len(done.changes) == len(found)
    assert list(done.model.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("network", WITH_BATCH_NORM + WITHOUT_BATCH_NORM, indirect=True)
def test_other_norms_build_train_report_and_revert(network, spec):
    model, x, narrow = network
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    modules, keys = dict(model.named_modules()), list(model.state_dict())
    held = list(optimizer.param_groups[0]["params"])
    names = [names[0] for names in find_norms(model).values()]
    left = {} if spec in ("bgn:1", "ghost:2") else narrow  # their groups are of several examples
    done = nk.convert_norm_(model, {**left, "*": spec}, optimizer=optimizer)
    assert {*names} == {row.name for row in (*done.changes, *done.left)} - lookalikes(model)
    assert {row.name for row in done.left} == {*left} | lookalikes(model)
    assert all(isinstance(m, NormLayer) for m, n in find_norms(model).items() if n[0] not in left)
    assert train(model, x, 1, optimizer).isfinite().all()
    assert done.revert() is model
    assert all(modules[name] is module for name, module in model.named_modules())
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(held, optimizer.param_groups[0]["params"], strict=True))


def lookalikes(model):
    return {*find_lookalikes(model)}
