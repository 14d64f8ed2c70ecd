import gc
import math
import os
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from normkit import BatchChannelNorm
from normkit.errors import SpecError
from normkit.lab import start, train
from normkit.lab.data import Examples
from normkit.lab.device import parse_device
from normkit.lab.evaluation import evaluate, shared_out
from normkit.lab.loop import Loop, num_steps_per_epoch, own_parts
from normkit.lab.measure import peak_step_bytes
from normkit.lab.spec import TrainingSpec
from normkit.lab.train import run


def spec_of(protocol, norm="bn", batch_size=10, seed=1, **changes):
    changed = protocol.model_copy(update=changes)
    return TrainingSpec(protocol=changed, norm=norm, batch_size=batch_size, seed=seed)


def test_equal_specs_give_equal_outcomes_and_other_seeds_do_not(protocol):
    spec = spec_of(protocol, epochs=2)
    assert run(spec).outcome == run(spec).outcome
    assert run(spec).outcome != run(spec_of(protocol, epochs=2, seed=2)).outcome


def test_the_global_random_state_neither_matters_nor_changes(protocol):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one = run(spec_of(protocol)).outcome
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(1)
    assert run(spec_of(protocol)).outcome == one


def test_dropout_repeats_with_the_seed(protocol, monkeypatch):
    build_model = start.build_model

    def with_dropout(*arguments, **options):
        built = build_model(*arguments, **options)
        return replace(built, model=nn.Sequential(built.model, nn.Dropout(0.5)))

    plain = run(spec_of(protocol)).outcome
    monkeypatch.setattr(start, "build_model", with_dropout)
    one, other = run(spec_of(protocol)).outcome, run(spec_of(protocol)).outcome
    assert one == other
    assert one.epochs[0].train_loss != plain.epochs[0].train_loss


def test_the_number_of_threads_is_put_back(protocol, monkeypatch):
    before = torch.get_num_threads()

    def interrupted(*_):
        assert torch.get_num_threads() == before + 1
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "_outcome", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(spec_of(protocol, threads=before + 1))
    assert torch.get_num_threads() == before


def test_training_learns(protocol):
    spec = spec_of(protocol, limit=600, epochs=6, model="mlp:depth=2:width=64", base_lr=1.0)
    epochs = run(spec).outcome.epochs
    assert epochs[-1].train_loss < 0.5 * epochs[0].train_loss
    assert epochs[-1].validation_scores["accuracy"] > 0.8


def test_a_record_says_what_happened_in_each_epoch(protocol):
    record = run(spec_of(protocol, epochs=3))
    outcome = record.outcome
    assert outcome.status == "finished"
    assert outcome.num_steps == 12
    assert [e.learning_rate for e in outcome.epochs] == pytest.approx(
        [0.1 * 10 / 128, 0.1 * 10 / 128, 0.01 * 10 / 128]
    )
    assert [e.test_scores == {} for e in outcome.epochs] == [True, True, False]
    assert outcome.scores == outcome.epochs[-1].test_scores
    assert next(iter(outcome.scores)) == "accuracy"
    assert outcome.median_of_5 is None
    assert record.step_time_s > 0
    assert record.environment.torch == torch.__version__


def test_with_five_epochs_the_median_of_the_last_five_is_there_too(protocol):
    outcome = run(spec_of(protocol, epochs=7, base_lr=1.0)).outcome
    tested = [e.test_scores["accuracy"] for e in outcome.epochs if e.test_scores]
    assert len(tested) == 5
    assert outcome.median_of_5 == sorted(tested)[2]


def test_a_diverged_run_is_recorded_with_its_step(protocol):
    outcome = run(spec_of(protocol, norm="ln", base_lr=1e30, epochs=3)).outcome
    assert outcome.status == "diverged"
    assert 2 <= outcome.diverged_step == outcome.num_steps < 12
    assert f"at step {outcome.diverged_step}; lower --base-lr" in outcome.message
    assert outcome.scores == {}


def test_a_run_whose_groups_do_not_fit_is_recorded_as_failed(protocol):
    outcome = run(spec_of(protocol, norm="gn:3")).outcome
    assert outcome.status == "failed"
    assert "3 groups" in outcome.message
    assert "[1, 2, 4, 8]" in outcome.message


def test_an_unexpected_error_is_recorded_with_its_type(protocol, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(Loop, "step", broken)
    outcome = run(spec_of(protocol)).outcome
    assert outcome.status == "failed"
    assert re.fullmatch(r"ZeroDivisionError: by zero \(test_train.py, line \d+\)", outcome.message)


@pytest.mark.parametrize(
    ("num_examples", "batch_size", "steps", "dropped"),
    [
        (40, 10, 4, 0),
        (40, 16, 3, 0),  # a last batch of 8
        (40, 39, 1, 1),  # a last batch of one is left out
        (40, 64, 1, 0),
        (40, 1, 40, 0),  # batches of one were asked for
        (1, 4, 1, 0),  # one example is all there is
    ],
)
def test_the_last_batch_is_kept_unless_it_is_a_single_example(
    num_examples, batch_size, steps, dropped
):
    assert num_steps_per_epoch(num_examples, batch_size) == steps
    kept = sum(map(len, own_parts(torch.arange(num_examples), batch_size, 0, 1)))
    assert num_examples - kept == dropped


def test_examples_that_are_left_out_are_counted_in_the_record(protocol):
    outcome = run(spec_of(protocol, batch_size=39)).outcome
    assert (outcome.num_dropped, outcome.num_steps) == (1, 1)


def test_the_order_of_examples_is_the_seeds_and_not_the_norms(protocol, monkeypatch):
    step = Loop.step

    def order(norm, seed):
        seen = []

        def noting(loop, parts, **given):
            seen.extend(part.targets for part in parts)
            return step(loop, parts, **given)

        monkeypatch.setattr(Loop, "step", noting)
        run(spec_of(protocol, norm=norm, seed=seed))
        return torch.cat(seen).tolist()

    assert order("bn", 1) == order("ln", 1)
    assert order("bn", 1) != order("bn", 2)


def test_evaluation_matches_its_definition_and_restores_the_mode():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(703, 3, 1, 1, generator=generator)  # not a multiple of the batch
    examples = Examples(inputs=inputs, targets=torch.arange(703) % 3)
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5))
    found = evaluate(model, examples)
    assert model.training
    rows = inputs.flatten(1).double().tolist()
    losses = [math.log(sum(map(math.exp, row))) - row[i % 3] for i, row in enumerate(rows)]
    assert found["loss"] == pytest.approx(sum(losses) / 703, rel=1e-5)
    right = sum(max(row) == row[i % 3] for i, row in enumerate(rows))
    assert found["accuracy"] == pytest.approx(right / 703, rel=1e-6)
    assert "top5_accuracy" not in found  # of three classes


def test_an_example_is_among_the_top_five_if_four_scores_are_higher():
    scores = torch.tensor([[9.0, 8, 7, 6, 5, 4, 3]] * 7)
    examples = Examples(inputs=scores.view(7, 7, 1, 1), targets=torch.arange(7))
    found = evaluate(nn.Flatten(), examples)
    assert found["accuracy"] == pytest.approx(1 / 7)
    assert found["top5_accuracy"] == pytest.approx(5 / 7)


def test_peak_memory_counts_what_a_step_holds_at_once():
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(1000))
    optimizer = torch.optim.SGD([model.weight], lr=0.1, momentum=0.9)

    def step():
        for _ in range(3):
            torch.zeros(5000)  # freed at once, so only one of the three is alive at a time
        model.weight.grad = torch.zeros(1000)
        optimizer.step()

    weight_and_momentum = 1000 + 1000
    assert peak_step_bytes(step, model, optimizer) == 4 * (weight_and_momentum + 5000)


def test_blocks_that_were_there_before_a_step_do_not_count():
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    seen, unseen = [], []

    def replace():
        if not unseen:  # not measured yet: at addresses of blocks that the profiler remembers
            unseen.extend(torch.zeros(1000) for _ in range(50))
        else:
            unseen.clear()
            torch.zeros(7)

    peak_step_bytes(lambda: seen.extend(torch.zeros(1000) for _ in range(50)), model, optimizer)
    seen.clear()
    assert peak_step_bytes(replace, model, optimizer) == 4 + 4 * 7


def test_peak_memory_grows_with_the_batch_and_repeats_exactly(protocol):
    peaks = [run(spec_of(protocol, batch_size=b)).outcome.peak_bytes for b in (10, 10, 40)]
    assert peaks[0] == peaks[1] < peaks[2]


def test_measuring_writes_nothing_and_restores_the_environment(protocol, capfd, monkeypatch):
    monkeypatch.setenv("KINETO_LOG_LEVEL", "7")
    run(spec_of(protocol))
    assert capfd.readouterr() == ("", "")
    assert os.environ["KINETO_LOG_LEVEL"] == "7"


def test_an_unknown_device_lists_those_that_are_there():
    assert parse_device("cpu") == torch.device("cpu")
    assert parse_device("auto").type in ("cpu", "cuda")
    with pytest.raises(SpecError, match=r"no device 'tpu' here; choose auto or cpu"):
        parse_device("tpu")


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        ("bcn:2:micro", [0.1 * 16 / 128, 0.1 * 16 / 1280]),  # the learning rate, which has dropped
        ("bcn:2:micro:rate=0.02", [0.02, 0.02]),
    ],
)
def test_estimates_of_micro_batches_move_by_the_learning_rate(
    protocol, monkeypatch, norm, expected
):
    rates = []
    step = Loop.step

    def noted(loop, parts, **given):
        layers = [m for m in loop.network.modules() if isinstance(m, BatchChannelNorm)]
        rates.append({layer.update_rate for layer in layers})
        before = [layer.batch.running_mean.clone() for layer in layers]
        means = []
        hook = layers[0].register_forward_pre_hook(lambda _, x: means.append(x[0].mean(0).detach()))
        result = step(loop, parts, **given)
        hook.remove()
        moved = before[0] + layers[0].update_rate * (means[0] - before[0])
        torch.testing.assert_close(layers[0].batch.running_mean, moved)
        return result

    monkeypatch.setattr(Loop, "step", noted)
    outcome = run(spec_of(protocol, norm, batch_size=16, epochs=2, limit=32)).outcome
    assert outcome.status == "finished", outcome.message
    num_for_memory = 2  # steps on a copy
    assert [sorted(found) for found in rates[num_for_memory:]] == [
        pytest.approx([rate]) for rate in expected for _ in range(2)
    ]


@pytest.mark.parametrize("ending", ["ws", "ws:center"])
def test_what_is_done_to_weights_is_saved_by_its_name(protocol, ending):
    spec = spec_of(protocol, norm=f"bn+{ending}", model="small-resnet:width=4:blocks=1")
    found = start.built(spec, start.data_of(spec.protocol))
    said = start.alterations_of(found, spec.protocol).weights
    assert said == dict.fromkeys(found.standardized, ending)
    assert len(said) == 5


def test_garbage_of_others_is_not_collected_in_the_measured_step():
    model = nn.Linear(10, 10)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    found = []
    peak_step_bytes(lambda: found.append(gc.isenabled()), model, optimizer)
    assert found == [True, False]
    assert gc.isenabled()


@pytest.mark.parametrize(("number", "size", "most"), [(7, 1, 3), (7, 2, 2), (7, 3, 1), (1, 2, 2)])
def test_examples_are_shared_out_in_equally_many_batches(number, size, most):
    shares = [shared_out(number, rank, size, most) for rank in range(size)]
    assert len({len(share) for share in shares}) == 1
    assert all(len(batch) > 0 for share in shares for batch in share)
    seen = sorted(torch.cat([batch for share in shares for batch in share]).tolist())
    assert seen == (list(range(number)) if number >= size else sorted(list(range(number)) * size))
