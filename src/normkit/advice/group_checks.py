"""Checks of statistics groups: whether they divide the input, and how many values they hold."""

from __future__ import annotations

import math
from collections.abc import Iterator

from normkit.advice.finding import Finding
from normkit.advice.fixes import (
    RECALIBRATE,
    conversion_fix,
    equivalent_call,
    freeze_call,
    trackers,
)
from normkit.advice.pools import Pool
from normkit.advice.registry import check
from normkit.advice.situation import CheckedNorm, Situation
from normkit.core.partition import Partition, largest_divisor
from normkit.layers.base import BUFFERS, NormLayer
from normkit.layers.over_batch import BatchGroupNorm
from normkit.spec import recommended_bgn_groups

FEW_EXAMPLES = 8
"""With fewer examples per worker batch norm loses accuracy (Zhou et al., table 2)."""
FEW_OF_BATCH = 32
"""With fewer values of a batch in a group, the standard deviation is off by more than an eighth.

The relative error of a standard deviation of n values is 1/sqrt(2n).
"""
FEW_OF_EXAMPLE = 8
"""With fewer values of an example in a group, results are below 2.7 standard deviations.

The largest of n normalised values is at most sqrt(n-1).
"""


@check("groups that do not fit")
def groups_that_do_not_fit(situation: Situation) -> Iterator[Finding]:
    """Find groups that do not divide the norm's input, and inputs that a norm refuses."""
    for norm in situation.norms:
        misfit = next((pool for pool in norm.pools or () if pool.refusal), None)
        if misfit is not None:
            yield Finding(
                name=norm.name,
                what=str(misfit.refusal),
                why="the layer refuses such inputs",
                fix=_fix_groups(situation, norm, misfit),
                severity="error",
            )
        # Norms ask for "more than 1" value in a group, which ``single_values`` reports.
        elif norm.refusal is not None and "more than 1" not in norm.refusal:
            yield Finding(
                name=norm.name,
                what=f"it refuses its input: {norm.refusal}",
                why="a forward fails",
                fix="build it for the input that it gets here",
                severity="error",
            )


def _fix_groups(situation: Situation, norm: CheckedNorm, misfit: Pool) -> str:
    if not isinstance(norm.module, BatchGroupNorm):
        return "a number of groups that divides"
    size = math.prod(misfit.shape[1:])
    return conversion_fix(situation, norm, f"bgn:{largest_divisor(size, norm.module.num_groups)}")


@check("single values")
def single_values(situation: Situation) -> Iterator[Finding]:
    """Find statistics groups of a single value."""
    for norm in situation.norms:
        single = next((p for p in norm.usable if p.of_input and p.num_values == 1), None)
        if single is not None:
            yield Finding(
                name=norm.name,
                what=f"{_describe_count(single)}: {_describe_group(single)}",
                why=_why_single(norm, single),
                fix=_fix_size(situation, norm, single),
                severity="error",
            )


def _why_single(norm: CheckedNorm, pool: Pool) -> str:
    refuses = norm.trains and (pool.over_batch or isinstance(norm.module, NormLayer))
    if refuses or norm.refusal:
        return "one value has no variance; the layer refuses such batches" + (
            " in training" if norm.trains else ""
        )
    return (
        "one value minus its mean is 0: the result is the bias, and the layers before get no "
        "gradient"
    )


def _fix_size(situation: Situation, norm: CheckedNorm, pool: Pool) -> str:
    """Say how to get more values into a group."""
    larger = f"{_larger_batch(pool)}, or " if pool.over_batch else ""
    if _may_be_frozen(situation, norm, pool):
        return f"{larger}{freeze_call()}, with which it predicts as before"
    values = math.prod(pool.shape[1:])
    if values < 2:
        return f"{larger}no norm here: an example has one value"
    if pool.num_values > 1 and values < FEW_OF_EXAMPLE:
        return f"{larger}a larger map: an example has {values} values"
    return f"{larger}{conversion_fix(situation, norm, 'ln')}"


def _larger_batch(pool: Pool) -> str:
    """Say which batch sizes give the smallest group more values."""
    run = pool.part.partition.examples_per_group if pool.part.partition else None
    if run is not None and pool.shape[0] > run:
        return f"a batch size whose remainder by {run} is larger or 0"
    return "a larger batch"


def _may_be_frozen(situation: Situation, norm: CheckedNorm, pool: Pool) -> bool:
    """Whether a trained network can be trained on with its running statistics frozen."""
    return situation.trained and norm.trains and pool.over_batch and any(trackers(norm))


def _describe_count(pool: Pool) -> str:
    count = pool.num_values
    return f"a group has {count} value{'' if count == 1 else 's'} for input {pool.shape}"


def _describe_group(pool: Pool) -> str:
    partition = pool.part.partition or Partition(1, 1)
    return partition.describe_group(pool.shape).removeprefix("a group of ")


@check("few values")
def few_values(situation: Situation) -> Iterator[Finding]:
    """Find statistics groups with too few values for reliable statistics."""
    for norm in situation.norms:
        pool = min(
            (p for p in norm.usable if p.of_input and p.num_values > 1 and not _is_scarce(norm, p)),
            key=lambda p: p.num_values / _enough(p),
            default=None,
        )
        if pool is not None and pool.num_values < _enough(pool):
            yield Finding(
                name=norm.name,
                what=f"{_describe_count(pool)}: {_consequence(pool)}",
                why=_why_few(pool),
                fix=_fix_size(situation, norm, pool),
                severity="warning",
            )


def _enough(pool: Pool) -> int:
    return FEW_OF_BATCH if pool.over_batch else FEW_OF_EXAMPLE


def _consequence(pool: Pool) -> str:
    count = pool.num_values
    if pool.over_batch:
        return f"the deviation is off by {1 / math.sqrt(2 * count):.0%} at best"
    return f"results lie within ±{math.sqrt(count - 1):.3g}"


def _why_few(pool: Pool) -> str:
    if pool.over_batch:
        return (
            "a deviation estimated from n values has a relative error of 1/sqrt(2n) even if they "
            "are independent, and neighbours in a map are not"
        )
    return "n normalised values lie within ±sqrt(n-1), so that strong features are cut off"


@check("few examples")
def few_examples(situation: Situation) -> Iterator[Finding]:
    """Find statistics of the batch, for each channel, from very few examples."""
    for norm in situation.norms:
        pool = next((p for p in norm.usable if norm.trains and _is_scarce(norm, p)), None)
        if pool is not None:
            yield Finding(
                name=norm.name,
                what=f"training takes its statistics over {_examples(pool)}",
                why=(
                    "statistics of few examples vary from batch to batch, and evaluation uses "
                    "others; on ImageNet batch norm fell from 76.8 % at 64 examples to 72.8 % at "
                    "4 and 66.5 % at 2 (Zhou et al., table 2)"
                ),
                fix=_fix_few_examples(situation, norm, pool),
                severity="warning",
            )


def _fix_few_examples(situation: Situation, norm: CheckedNorm, pool: Pool) -> str:
    """Say how to train without statistics of the batch, as ``recommend`` does."""
    size = situation.batch_size
    if _may_be_frozen(situation, norm, pool):
        return (
            f"{freeze_call()}, with which it predicts as before; "
            f"nk.recommend({size}, pretrained=True) names more"
        )
    # With fewer values an example cannot fill the 32 groups of a group norm.
    enough = pool.num_values_per_example * pool.shape[1] >= FEW_OF_EXAMPLE * 32
    found = conversion_fix(situation, norm, "gn:max=32" if enough else "ln", everywhere=enough)
    more = ", pretrained=True" if situation.trained else ""
    return f"{found}; nk.recommend({size}{more}) names more"


def _examples(pool: Pool) -> str:
    count = pool.shape[0]
    off = f": {_consequence(pool)}" if pool.num_values < FEW_OF_BATCH else ""
    return f"{count} example{'' if count == 1 else 's'}, {pool.num_values} values a group{off}"


def _is_scarce(norm: CheckedNorm, pool: Pool) -> bool:
    """Whether a group has one channel (or BGN too many groups) of too few examples."""
    num_examples, partition = pool.shape[0], pool.part.partition
    if partition is None or not (pool.of_input and pool.over_batch) or pool.num_values < 2:
        return False
    is_bgn = isinstance(norm.module, BatchGroupNorm)
    too_many = is_bgn and partition.num_groups > recommended_bgn_groups(num_examples)
    return num_examples < FEW_EXAMPLES and (too_many or partition.num_groups >= pool.shape[1])


@check("last batch of one")
def last_batch_of_one(situation: Situation) -> Iterator[Finding]:
    """Find norms that refuse a batch of one example, which can be the last batch of an epoch."""
    for norm in situation.norms:
        pools = (p for p in norm.usable if p.of_input and p.over_batch and norm.trains)
        if any(p.num_values > 1 and p.num_values_per_example == 1 for p in pools):
            yield Finding(
                name=norm.name,
                what="a batch of one example has one value in a group",
                why="training refuses it if an epoch's last batch is one example",
                fix="pass drop_last=True to the DataLoader",
                severity="note",
            )


@check("statistics of the test batch")
def statistics_of_the_test_batch(situation: Situation) -> Iterator[Finding]:
    """Find norms that compute statistics over the batch at evaluation."""
    for norm in situation.norms:
        over_batch = any(pool.of_input and pool.over_batch for pool in norm.usable)
        if over_batch and getattr(norm.module, BUFFERS[0], BUFFERS) is None:
            yield Finding(
                name=norm.name,
                what="it keeps no running statistics (track_running_stats=False)",
                why="evaluation normalises by the test batch: a prediction depends on the others",
                fix=_fix_tracking(situation, norm),
                severity="warning",
            )


def _fix_tracking(situation: Situation, norm: CheckedNorm) -> str:
    """Say how to give a norm running statistics without another change."""
    found = equivalent_call(situation, norm, ":track_running_stats")
    if found is None:
        return "build it with track_running_stats=True"
    return f"{found}; {RECALIBRATE} measures them" if situation.trained else found
