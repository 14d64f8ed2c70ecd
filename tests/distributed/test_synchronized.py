"""Processes with parts of a batch against one process with the whole of it."""

from functools import partial

import pytest
import torch
from torch.testing import assert_close

from cases import EVERY, MAIN
from distributed.processes import kill, results, start, wait_for
from distributed.worker import (
    COMPILED,
    SIZES,
    _through,
    dtypes,
    make,
    mask_of,
    rows,
    through_an_ending,
    train,
    whole,
)

pytestmark = [
    pytest.mark.xdist_group("distributed"),  # the processes are started once
    pytest.mark.timeout(600),  # they compute everything before the first test
]
JOBS = {
    2: ("equality", "masked", "ended", "checkpointed", "wrapped", "compiled", "refused"),
    4: ("equality",),
}
TOLERANCE = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-9},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
}
COMBINED = [
    pytest.param(case, size, sizes, dtype, id=f"{case}-{'+'.join(map(str, sizes))}-{dtype}")
    for size, several in SIZES.items()
    for case in rows(size)
    for sizes in several
    for dtype in dtypes(sizes)
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of two and of four processes found."""
    return {
        size: results("distributed.worker", size, tmp_path_factory.mktemp(f"of{size}"), *jobs)
        for size, jobs in JOBS.items()
    }


def assert_parts_make(parts, expected, sizes, tolerance):
    """Outputs and input gradients are parts, parameter gradients summands, buffers everybody's."""
    for name, value in expected.items():
        several = [each[name] for each in parts]
        if name in ("y", "x.grad"):
            assert_close(torch.cat(several), value, **tolerance, msg=lambda m, n=name: f"{n}: {m}")
        elif name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            for each in several:
                assert_close(each, value, **tolerance, msg=lambda m, n=name: f"{n}: {m}")
        else:
            total = torch.stack(several).sum(0)
            scale = max(1.0, float(value.abs().max()))
            assert_close(
                total / scale, value / scale, **tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize(("case", "size", "sizes", "dtype"), COMBINED)
def test_parts_are_normalised_as_the_whole(case, size, sizes, dtype, found):
    layer = make(case, dtype, None)
    for seed in (0, 1):
        layer.zero_grad()
        expected = train(layer, *whole(case, sizes, dtype, seed))
    expected |= dict(layer.named_buffers())
    parts = [each["equality"][case.name, sizes, dtype] for each in found[size]]
    assert_parts_make(parts, expected, sizes, TOLERANCE[dtype])


@pytest.mark.parametrize("way", ["mask", "maps of different sizes"])
@pytest.mark.parametrize("case", MAIN, ids=str)
def test_parts_with_fewer_positions_are_the_whole_with_a_mask(case, way, found):
    sizes, layer = SIZES[2][0], make(case, torch.float64, None)
    call = partial(layer, mask=mask_of(sizes))
    expected = _through(layer, call, *whole(case, sizes, torch.float64))
    parts = [each["masked"][case.name, way] for each in found[2]]
    assert_parts_make(parts, expected, sizes, TOLERANCE[torch.float64])


@pytest.mark.parametrize("case", MAIN, ids=str)
def test_parts_that_go_on_to_a_sum_and_an_activation_make_the_whole(case, found):
    sizes, layer = SIZES[2][0], make(case, torch.float64, None)
    expected = through_an_ending(layer, *whole(case, sizes, torch.float64))
    parts = [each["ended"][case.name] for each in found[2]]
    assert_parts_make(parts, expected, sizes, TOLERANCE[torch.float64])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("case", MAIN, ids=str)
def test_a_checkpoint_changes_nothing(case, reentrant, found):
    sizes, layer = SIZES[2][0], make(case, torch.float64, None)
    expected = _through(layer, layer, *whole(case, sizes, torch.float64))
    parts = [each["checkpointed"][case.name, reentrant] for each in found[2]]
    assert_parts_make(parts, expected, sizes, TOLERANCE[torch.float64])


@pytest.mark.parametrize("broadcast", [True, False])
@pytest.mark.parametrize("case", MAIN, ids=str)
def test_two_forwards_in_ddp_have_the_mean_of_the_gradients(case, broadcast, found):
    sizes, layer = SIZES[2][0], make(case, torch.float64, None)
    x, weights = whole(case, sizes, torch.float64)
    ((layer(x).pow(2) + layer(x + 1).pow(3)) * weights).sum().backward()
    for each in found[2]:
        for name, parameter in layer.named_parameters():
            got = each["wrapped"][case.name, broadcast][name]
            assert_close(got, parameter.grad / 2, rtol=1e-8, atol=1e-8)


def test_compiled_in_one_graph_it_is_the_same(found):
    assert found[2][0]["compiled"].keys() == set(COMPILED)
    for case in EVERY:
        if case.name in COMPILED:
            layer = make(case, torch.float64, None)
            expected = _through(layer, layer, *whole(case, SIZES[2][0], torch.float64))
            parts = [each["compiled"][case.name] for each in found[2]]
            assert_parts_make(parts, expected, SIZES[2][0], TOLERANCE[torch.float64])


def test_what_cannot_be_is_refused_in_words(found):
    for rank, each in enumerate(found[2]):
        said = each["refused"]
        assert "more than 1 value per statistics group" in said["single"]
        assert "cannot exchange them; set process_group=None or call .eval()" in said["transform"]
        assert said["first"]
        assert "a second derivative of statistics over several processes" in said["second"]
        assert said["evaluates alone"] == rank


def test_a_group_of_one_is_alone(found):
    case = EVERY[0]
    expected = train(make(case, torch.float64, None), *whole(case, (4,), torch.float64))
    for each in found[2]:
        for name, value in expected.items():
            assert_close(each["refused"]["alone"][name], value)


def test_a_killed_process_ends_in_an_error_not_a_hang(tmp_path):
    processes = start("distributed.endless", 2, tmp_path)
    wait_for(tmp_path / "running")
    kill(processes[1])
    _, errors = processes[0].communicate(timeout=60)
    assert processes[0].returncode != 0
    assert "Error" in errors
    processes[1].communicate()
