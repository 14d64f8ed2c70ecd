"""Bad input of a sweep, found before its first run."""

import itertools
import os
from collections.abc import Callable
from typing import Any

import torch

from normkit.errors import KernelError, SpecError
from normkit.kernels.select import ENVIRONMENT_VARIABLE, require_kernels
from normkit.lab.arms import Arm
from normkit.lab.changes import BuiltModel
from normkit.lab.data import Dataset, Split
from normkit.lab.device import parse_device
from normkit.lab.evaluation import require_scores
from normkit.lab.fabric import require_precision
from normkit.lab.launch import require_processes
from normkit.lab.loop import num_updates, own_parts
from normkit.lab.models.build import NormSlots, norm_slots
from normkit.lab.own_training import training_function
from normkit.lab.recipe import Timetable
from normkit.lab.spec import CLASSIFICATION, Protocol, SweepSpec, TrainingSpec
from normkit.lab.start import built
from normkit.lab.task import TaskData, parse_task, require_batches
from normkit.lab.user_code import users_errors


def check(sweep: SweepSpec) -> TaskData | None:
    """Find bad input before the first run; nothing is trained or written.

    Returns:
        The data; None where a user's function trains.

    Raises:
        SpecError: If the kernels, the device, the precision, the task, the data or the model is
            unknown, there are too few examples, or a norm does not fit a layer at one of the batch
            sizes.
        DataError: If the data's files are missing.
    """
    protocol = sweep.protocol
    task = parse_task(protocol.task)
    check_kernels()
    _refuse_useless(sweep)
    device = parse_device(protocol.device)
    require_precision(protocol.precision, device)
    require_processes(protocol.processes, protocol.strategy, device)
    if protocol.train is not None:
        training_function(protocol.train)
        return None
    data = task.data(protocol)
    _check_update_rates(sweep)
    task.check(sweep, data)
    return data


def check_pictures(
    sweep: SweepSpec,
    dataset: Dataset[Split],
    build: Callable[[TrainingSpec, Any], BuiltModel] = built,
) -> None:
    """The checks of a task whose network gives a score for each class of a picture.

    Args:
        sweep: What is asked for.
        dataset: Its data.
        build: Makes a run's network.

    Raises:
        NormError: If there are too few examples, a norm does not fit, or the network gives
            something else.
    """
    protocol = sweep.protocol
    check_sizes(sweep, dataset)
    slots = norm_slots(protocol.model, dataset.num_classes, dataset.input_shape)
    check_norms(sweep, slots, len(dataset.train))
    arms = [Arm.parse(norm) for norm in sweep.norms]
    for at, arm in enumerate(arms):
        if at == 0 or not arm.is_plain:  # whether a model has what it asks for shows in the model
            spec = TrainingSpec(
                protocol=protocol, norm=str(arm), batch_size=sweep.batch_sizes[0], seed=0
            )
            network = build(spec, dataset)
            if at == 0:
                _check_outputs(network, dataset, protocol.model)


def check_norms(sweep: SweepSpec, slots: NormSlots, num_examples: int) -> None:
    """Refuse norms that do not fit a network at one of the batch sizes.

    Raises:
        SpecError: Naming the norm, the layer and the batch size.
    """
    arms = [Arm.parse(norm) for norm in sweep.norms]
    for arm, batch_size in itertools.product(arms, sweep.batch_sizes):
        for length in _batch_lengths(sweep.protocol, num_examples, batch_size):
            slots.check(arm, batch_size, length)


def _refuse_useless(sweep: SweepSpec) -> None:
    """Refuse options that would be without effect."""
    protocol = sweep.protocol
    if protocol.train is None and protocol.better == "lower":
        raise SpecError(
            "--better lower was given without --train, but the scores of tasks are better when "
            "higher; leave it out"
        )
    if protocol.train is not None and protocol.task != CLASSIFICATION:
        raise SpecError(
            f"--task {protocol.task} was given with --train, a function that trains in its place; "
            f"leave one of them out"
        )
    if protocol.train is not None and sweep.learning_rates:
        raise SpecError(
            "--tune-lr was given with --train, which chooses its own rates; leave one of them out"
        )
    if sweep.tune_seeds is not None and not sweep.learning_rates:
        raise SpecError(
            "--tune-seeds was given without --tune-lr, and there are no learning rates to choose "
            "from; give both, or none"
        )
    if sweep.tune_seeds is not None and sweep.tune_seeds > len(sweep.seeds):
        raise SpecError(
            f"--tune-seeds was given {sweep.tune_seeds}, but there are {len(sweep.seeds)} seeds; "
            f"give at most as many"
        )
    if sweep.learning_rates and not protocol.hold_out:
        raise SpecError(
            "learning rates are chosen by validation examples, and without --hold-out these are "
            "trained on; leave one of the two out"
        )


def _check_outputs(built: BuiltModel, dataset: Dataset[Split], name: str) -> None:
    """Refuse a network that does not give a row of scores for each example."""
    zeros = torch.zeros(2, *dataset.input_shape)
    with torch.no_grad(), users_errors(name):
        require_scores(built.model.eval()(zeros), 2, dataset.num_classes)


def _batch_lengths(protocol: Protocol, num_examples: int, batch_size: int) -> set[int]:
    order = torch.arange(num_examples)
    return {len(part) for part in own_parts(order, batch_size, 0, protocol.processes)}


def check_sizes(sweep: SweepSpec, dataset: Dataset[Split]) -> None:
    """Refuse too few examples for the classes, or for a batch that was asked for.

    Raises:
        SpecError: With the numbers.
    """
    limit, num_examples = sweep.protocol.limit, len(dataset.train)
    if limit is not None and limit < dataset.num_classes:
        raise SpecError(
            f"--limit was given {limit}, but {dataset.name} has {dataset.num_classes} classes; "
            f"give {dataset.num_classes} or more"
        )
    require_batches(sweep, dataset.name, num_examples)
    for name, part in (("validation", dataset.validation), ("test", dataset.test)):
        if not len(part):
            raise SpecError(
                f"{dataset.name} has {num_examples} training examples and no {name} examples; "
                f"give more examples, ten for each class or more"
            )


def _check_update_rates(sweep: SweepSpec) -> None:
    """Refuse a learning rate that estimates of micro-batches cannot move by."""
    for spec in sweep.runs():
        examples = spec.protocol.step_examples(spec.batch_size)
        rate = spec.protocol.first_rate(examples)
        if rate > 1 and spec.has_learning_rate_as_update_rate:
            raise SpecError(
                f"{spec.norm} takes the learning rate as its update rate, which is {rate:g} at "
                f"batch size {spec.batch_size}, and above 1; give a lower --base-lr, or name a "
                f"rate: {Arm.parse(spec.norm).norm}:rate=0.1"
            )


def check_kernels() -> None:
    """Refuse kernels of the environment variable that are unknown or not there.

    Raises:
        SpecError: With what is known.
    """
    name = os.environ.get(ENVIRONMENT_VARIABLE)
    if name is not None:
        try:
            require_kernels(name)
        except KernelError as error:
            raise SpecError(f"{ENVIRONMENT_VARIABLE} is {name!r}: {error}") from error


def num_steps(spec: TrainingSpec, num_examples: int) -> int:
    """Steps of a run that neither diverges nor fails; 1 where a user's function trains.

    Steps that a task takes before the training, such as a search, are counted as well.
    """
    if spec.protocol.train is not None:
        return 1
    per_epoch = num_updates(num_examples, spec.batch_size, spec.protocol)
    prior = parse_task(spec.protocol.task).num_prior_steps(spec, num_examples)
    return prior + Timetable(spec.protocol, per_epoch, spec.batch_size).num_steps
