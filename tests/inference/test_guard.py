"""Batches that are not finite, and what is left of them in running statistics."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import normkit as nk

KINDS = {
    "torch bn": lambda: nn.BatchNorm2d(6),
    "torch bn, momentum None": lambda: nn.BatchNorm2d(6, momentum=None),
    "torch in": lambda: nn.InstanceNorm2d(6, track_running_stats=True),
    "bn": lambda: nk.BatchNorm(6),
    "tracked gn": lambda: nk.GroupNorm(6, num_groups=3, track_running_stats=True),
    "bgn": lambda: nk.BatchGroupNorm(6, num_groups=2),
    "bcn": lambda: nk.BatchChannelNorm(6, num_groups=3),
    "micro bcn": lambda: nk.BatchChannelNorm(6, num_groups=3, micro_batch=True),
    "gnplus": lambda: nk.GroupNormPlus(6, num_groups=3),
    "sn": lambda: nk.SwitchableNorm(6),
    "ibn": lambda: nk.InstanceBatchNorm(6),
}
BAD = {
    "nan": lambda x: x.index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(torch.nan)),
    "inf": lambda x: x.index_put((torch.tensor(1), torch.tensor(0)), torch.tensor(-torch.inf)),
    "too large to square": lambda x: x * 1e30,
}


class Act(nn.BatchNorm2d):
    """As timm's: a forward of its own, with an activation."""

    def forward(self, x):
        return torch.relu(super().forward(x))


def net(kind=KINDS["torch bn"]):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), kind())


def images(seed=0):
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def statistics(model):
    return {n: b.clone() for n, b in model.named_buffers()}


def assert_same(model, other):
    found, expected = statistics(model), statistics(other)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def counts(guard):
    return {(r.num_batches, r.num_refused, r.num_taken_back) for r in guard.layers}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("kind", [*KINDS, "act"])
def test_a_batch_that_is_not_finite_leaves_no_trace(kind, bad):
    make = KINDS.get(kind, lambda: Act(6))
    model, other = net(make), net(make)
    guard = nk.guard_statistics_(model)
    for x in (images(1), images(2)):
        model(x).sum().backward()
        other(x)
    y = model(BAD[bad](images(3)))
    y.sum().backward()  # torch's norms keep their buffers for it
    model(images(4))
    other(images(4))
    assert_same(model, other)
    assert model.state_dict().keys() == other.state_dict().keys()
    assert counts(guard) == {(4, 1, 0)}


def test_what_the_layer_puts_out_is_as_ever():
    model, other = net(), net()
    nk.guard_statistics_(model)
    for x in (images(), BAD["nan"](images())):
        torch.testing.assert_close(model(x), other(x), rtol=0, atol=0, equal_nan=True)
    assert not other[1].running_mean.isfinite().all()  # so it is without the guard


@pytest.mark.parametrize("spec", ["bn", "gn:2", "bcn:2"])
def test_norms_that_take_over_from_guarded_ones_run(spec):
    model = net()
    guard = nk.guard_statistics_(model)
    nk.convert_norm_(model, spec)
    model(images())
    assert counts(guard) == ({(1, 0, 0)} if spec == "bn" else set())
    if spec != "gn:2":
        again = nk.guard_statistics_(model)
        model(BAD["nan"](images()))
        assert all(value.isfinite().all() for value in model.buffers())
        assert [row.num_refused for row in again.layers] == [1]


def test_a_plain_norm_that_takes_over_from_a_guarded_composite_is_guarded():
    model = net(KINDS["bcn"])
    guard = nk.guard_statistics_(model)
    nk.convert_norm_(model, "bn")
    model(BAD["nan"](images()))
    assert model[1].running_mean.isfinite().all()
    assert [row.num_refused for row in guard.layers] == [1]


class OfItsOwn(nn.Module):
    """A norm of no library, whose buffers have the shape of maps."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(1, 6, 1, 1))
        self.register_buffer("running_var", torch.ones(1, 6, 1, 1))

    def forward(self, x):
        if self.training:
            self.running_mean.lerp_(x.detach().mean((0, 2, 3), keepdim=True), 0.1)
        return (x - self.running_mean) / self.running_var.sqrt()


def test_norms_of_no_library_are_guarded_as_well():
    model, other = net(OfItsOwn), net(OfItsOwn)
    guard = nk.guard_statistics_(model)
    for x in (images(1), BAD["inf"](images(2)), images(3)):
        model(x)
    other(images(1))
    other(images(3))
    assert_same(model, other)
    assert counts(guard) == {(3, 1, 0)}


class NoScalars(TorchDispatchMode):
    """Refuses to bring a value to the host, which would wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(func)
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device():
    model = net(lambda: nn.Sequential(nn.BatchNorm2d(6), nk.BatchNorm(6)))
    guard = nk.guard_statistics_(model)
    with NoScalars():
        model(BAD["nan"](images())).sum().backward()
        with pytest.raises(AssertionError):
            guard.layers[0].num_batches.bit_length()
    assert counts(guard) == {(1, 1, 0)}


def test_at_evaluation_frozen_or_not_tracking_nothing_is_counted():
    model = nn.Sequential(*(nn.BatchNorm2d(3) for _ in range(3)), nk.BatchNorm(3))
    nk.freeze_statistics(model, lambda _, name: name == "0")
    model[1].track_running_stats = False
    model[2].eval()
    guard = nk.guard_statistics_(model)
    model(images())
    assert [row.num_batches for row in guard.layers] == [0, 0, 0, 1]
    model.eval()(images())
    assert [row.num_batches for row in guard.layers] == [0, 0, 0, 1]


def test_statistics_that_were_broken_before_do_not_stop_the_others():
    model = nn.Sequential(nn.BatchNorm2d(3))
    model[0].running_mean[1] = torch.nan
    guard = nk.guard_statistics_(model)
    model(images())
    assert model[0].running_mean.isfinite().tolist() == [True, False, True]
    assert model[0].num_batches_tracked == 1
    assert counts(guard) == {(1, 0, 0)}


def test_twice_is_once_and_removing_takes_everything_out():
    model = net(KINDS["bcn"])
    guard, again = nk.guard_statistics_(model), nk.guard_statistics_(model)
    model(BAD["nan"](images()))
    assert guard.layers == again.layers
    assert counts(guard) == {(1, 1, 0)}
    seen = []
    model[1].register_forward_hook(lambda *_: seen.append(1))
    guard.remove()
    again.remove()
    assert again.layers == ()
    assert str(again) == "the guard was removed"
    model(BAD["nan"](images()))
    assert seen == [1]
    assert not model[1]._forward_pre_hooks
    assert model[1].batch.running_mean.isnan().any()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles_are_guarded_and_count_for_themselves(copied):
    model = net(KINDS["bcn"])
    guard = nk.guard_statistics_(model)
    model(images())
    other = copied(model)
    other(BAD["inf"](images()))
    assert_same(other, model)
    assert counts(nk.guard_statistics_(other)) == {(2, 1, 0)}
    assert counts(guard) == {(1, 0, 0)}
    nk.guard_statistics_(other).remove()
    other(BAD["inf"](images()))
    assert not other[1].batch.running_mean.isfinite().all()


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not"])
@pytest.mark.parametrize("kind", ["torch bn", "bn", "bcn"])
def test_a_checkpoints_second_look_is_no_second_batch(kind, reentrant):
    model = net(KINDS[kind])
    guard = nk.guard_statistics_(model)
    before = statistics(model)
    x = BAD["nan"](images()).requires_grad_()
    checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in statistics(model).items())
    assert counts(guard) == {(1, 1, 0)}
    checkpoint(model, images().requires_grad_(), use_reentrant=reentrant).sum().backward()
    assert counts(guard) == {(2, 1, 0)}


def test_a_16_bit_overflow_is_refused():
    model, other = net(), net()
    guard = nk.guard_statistics_(model)
    with torch.autocast("cpu", torch.float16):
        model(images())
        other(images())
        y = model(images() * 1e5)  # beyond the largest float16
    assert not y.isfinite().all()
    assert_same(model, other)
    assert counts(guard) == {(2, 1, 0)}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_code_is_guarded_without_a_break(backend):
    torch.compiler.reset()
    model = nn.Sequential(*net(), nk.BatchChannelNorm(6, num_groups=3), nk.BatchNorm(6))
    other = copy.deepcopy(model)
    guard = nk.guard_statistics_(model)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for x in (images(1), BAD["nan"](images(2)), images(3)):
        loss = compiled(x).square().sum()
        if loss.isfinite():
            other(x)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        guard.update(scaler)
        optimizer.zero_grad()
    for name, value in statistics(other).items():
        torch.testing.assert_close(statistics(model)[name], value, rtol=1e-6, atol=1e-6)
    assert counts(guard) == {(3, 1, 0)}
    with pytest.raises(nk.OptionError, match="is compiled, and compiled code does not run hooks"):
        nk.guard_statistics_(torch.compile(net(), backend=backend))


def step(model, scaler, guard, parts, factor=1.0):
    """One step of the optimizer, whose gradients overflow if the factor does."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer.zero_grad()
    for x in parts:
        scaler.scale(model(x).square().mean() * factor).backward()
    scaler.step(optimizer)
    guard.update(scaler)


def test_a_step_that_the_scaler_skips_takes_its_batches_back():
    model = net(lambda: nn.Sequential(nn.BatchNorm2d(6), nk.BatchChannelNorm(6, num_groups=3)))
    guard = nk.guard_statistics_(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    step(model, scaler, guard, [images(1)])
    before, weight = statistics(model), model[0].weight.clone()
    step(model, scaler, guard, [images(2), BAD["nan"](images(3)), images(4)])  # finite but one
    step(model, scaler, guard, [images(2), images(4)], factor=torch.inf)
    assert torch.equal(model[0].weight, weight)
    assert all(torch.equal(value, before[name]) for name, value in statistics(model).items())
    assert counts(guard) == {(6, 1, 4)}
    assert scaler.get_scale() == 2.0
    moved = copy.deepcopy(model)
    nk.guard_statistics_(moved).remove()
    moved(images(5))
    step(model, scaler, guard, [images(5)])
    assert_same(model, moved)
    assert counts(guard) == {(7, 1, 4)}


def test_a_scaler_that_is_off_takes_nothing_back():
    model = net()
    guard = nk.guard_statistics_(model)
    step(model, torch.amp.GradScaler("cpu", enabled=False), guard, [images()])
    assert counts(guard) == {(1, 0, 0)}
    assert model[1].num_batches_tracked == 1


def test_inside_distributed_data_parallel():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model, other = net(), net()
        wrapped = DistributedDataParallel(model)
        guard = nk.guard_statistics_(wrapped)
        for x in (images(1), BAD["nan"](images(2)), images(3)):
            wrapped(x).sum().backward()
        other(images(1))
        other(images(3))
    finally:
        dist.destroy_process_group()
    assert_same(model, other)
    assert [row.name for row in guard.layers] == ["1"]


def test_an_empty_batch_and_an_exception_leave_no_trace():
    class Interrupted(nn.BatchNorm2d):
        def forward(self, x):
            y = super().forward(x)
            if not y.isfinite().all():
                raise FloatingPointError("a value that is not finite")
            return y

    model = nn.Sequential(Interrupted(3))
    nk.guard_statistics_(model)
    before = statistics(model)
    with pytest.raises(FloatingPointError, match="not finite"):
        model(BAD["nan"](images()))
    assert all(torch.equal(value, before[name]) for name, value in statistics(model).items())
    plain = nn.Sequential(nn.BatchNorm2d(3))
    guard = nk.guard_statistics_(plain)
    plain(images()[:0])
    assert plain[0].running_mean.isfinite().all()
    assert counts(guard) == {(1, 0, 0)}


def test_the_report_names_the_layer_with_most():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    guard = nk.guard_statistics_(model)
    assert guard.reading == "all of 0 batches were finite"
    model(images())
    model[1](BAD["nan"](images()))
    assert str(guard).splitlines() == [
        "1 of 2 batches was not finite and did not change the statistics of 1",
        "  name  layer        batches  refused  taken back",
        "  0     BatchNorm2d  1        0        0",
        "  1     BatchNorm2d  2        1        0",
    ]


def test_statistics_that_are_accumulated_are_not_guarded_as_well():
    model = net()
    with (
        nk.accumulate_statistics(model, 2),
        pytest.raises(nk.OptionError, match="end the accumulation first"),
    ):
        nk.guard_statistics_(model)
    guard = nk.guard_statistics_(model)
    with pytest.raises(nk.OptionError, match=r"at every forward; .* guard.remove\(\) first"):
        nk.accumulate_statistics(model, 2)
    guard.remove()
    with nk.accumulate_statistics(model, 2):
        pass


def test_a_model_without_running_statistics_is_refused():
    with pytest.raises(nk.OptionError, match="no layer with running statistics, so there is nothi"):
        nk.guard_statistics_(nn.GroupNorm(1, 3))
