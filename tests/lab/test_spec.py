import pytest
from hypothesis import given
from hypothesis import strategies as st

from normkit.errors import SpecError
from normkit.lab.spec import Protocol, SweepSpec, TrainingSpec


def test_equal_specs_have_equal_keys_and_different_ones_do_not():
    spec = TrainingSpec(norm="gn:8", batch_size=8, seed=1)
    assert spec.key == TrainingSpec(norm="gn:8", batch_size=8, seed=1).key
    others = [
        TrainingSpec(norm="gn:4", batch_size=8, seed=1),
        TrainingSpec(norm="gn:8", batch_size=4, seed=1),
        TrainingSpec(norm="gn:8", batch_size=8, seed=2),
        TrainingSpec(norm="gn:8", batch_size=8, seed=1, protocol=Protocol(weight_decay=0.0)),
        TrainingSpec(norm="gn:8", batch_size=8, seed=1, protocol=Protocol(threads=2)),
    ]
    assert len({spec.key, *(other.key for other in others)}) == 6


def test_norms_are_written_one_way():
    spelled = TrainingSpec(norm="gbgn:2:examples=4", batch_size=8)
    assert spelled == TrainingSpec(norm="gbgn:2:examples_per_group=4", batch_size=8)


@given(batch_size=st.integers(1, 1024), base_lr=st.floats(1e-4, 10))
def test_learning_rate_is_proportional_to_the_batch_size(batch_size, base_lr):
    protocol = Protocol(base_lr=base_lr)
    assert protocol.first_rate(batch_size) == pytest.approx(base_lr * batch_size / 128)


def test_a_step_sees_the_batches_of_all_processes():
    protocol = Protocol(accumulate=3, processes=2)
    assert protocol.step_examples(8) == 48


def test_a_sweep_runs_every_cell_with_every_seed_once(sweep):
    cells = {(run.norm, run.batch_size, run.seed) for run in sweep.runs()}
    assert cells == {(n, b, s) for n in ("bn", "ln") for b in (10, 20) for s in (1, 2)}
    assert len(sweep.runs()) == 8


def test_the_first_seed_of_every_cell_comes_before_the_second_of_any(sweep):
    assert [run.seed for run in sweep.runs()] == [1] * 4 + [2] * 4


BAD = [
    ({"batch_sizes": (0,)}, r"batch_sizes was given 0: input should be greater than or equal to 1"),
    ({"batch_sizes": ()}, r"batch_sizes was given \(\).*give one batch size or more"),
    ({"seeds": (1, 1)}, r"name 1 more than once; name each one once"),
    ({"norms": ("bn", "bn")}, r"norms name bn more than once; name each one once"),
    ({"norms": ("nope",)}, r"nope"),
    ({"colour": 1}, r"'colour' is no field; known are protocol, norms, batch_sizes, seeds"),
]


@pytest.mark.parametrize(("change", "text"), BAD, ids=str)
def test_a_bad_sweep_says_what_was_given_and_the_rule(change, text):
    good = {"norms": ("bn",), "batch_sizes": (2,), "seeds": (1,)}
    SweepSpec.checked(good)
    with pytest.raises(SpecError, match=text):
        SweepSpec.checked(good | change)


def test_everything_that_is_wrong_is_said_at_once():
    with pytest.raises(SpecError, match=r"epochs was given 0.*; base_lr was given -1"):
        Protocol.checked({"epochs": 0, "base_lr": -1})


def test_a_spec_cannot_change():
    with pytest.raises(ValueError, match="frozen"):
        Protocol().epochs = 3
