"""The norms that can be recommended, each with its reasons, limits and evidence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from normkit.advice import evidence as known
from normkit.advice.evidence import Evidence, by_batch_size, cifar_by_batch_size, own_runs
from normkit.spec import recommended_bgn_groups


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A norm that can be recommended.

    Args:
        spec: Its spec; ``{groups}`` stands for BGN's number of groups at the batch size.
        why: Reasons for the norm.
        limits: Reasons against it, and gaps in the measurements.
        apply: The call that puts it into ``model``; ``{spec}`` stands for the spec.
        keeps_function: Whether a trained network predicts as before.
        title: Its name in the tables of the papers.
        compared: Titles of the norms that table 2 of Zhou et al. compares it with; empty if that
            table does not have it.
        numbers: Further numbers, for classification.
        own_spec: Its spec in this project's own runs.
    """

    spec: str
    why: str
    limits: str
    apply: str = 'nk.convert_norm_(model, "{spec}")'
    keeps_function: bool = False
    title: str = ""
    compared: tuple[str, ...] = ()
    numbers: tuple[Evidence, ...] = ()
    own_spec: str = ""

    def spec_for(self, batch_size: int) -> str:
        """The spec at a batch size, which need not be one that was measured."""
        return self.spec.format(groups=recommended_bgn_groups(batch_size))

    def evidence(self, task: str, batch_size: int) -> Iterator[Evidence]:
        """The numbers for a task at one of the batch sizes of ``evidence.BATCH_SIZES``, or 1."""
        yield from _of_task(self.title, task, batch_size)
        if self.title == PRETRAINED_BN:
            yield from (known.FINE_TUNED_COCO,) if task == "detection" else ()
            yield known.TUNED_WEIGHT_IMAGENET
        if task == "classification":
            if self.compared:
                yield from by_batch_size(self.title, batch_size, self.compared)
            if self.title == "BN":
                yield from cifar_by_batch_size(batch_size)
            if self.title == "BGN":
                yield from known.other_tasks(batch_size)
            yield from self.numbers
            yield from own_runs(self.own_spec, batch_size)


def _of_task(title: str, task: str, batch_size: int) -> Iterator[Evidence]:
    """Numbers for a norm from the tables of a task other than classification."""
    if task == "detection" and title in known.COCO_BOXES:
        yield _coco("box AP", known.COCO_BOXES, title)
    if task == "detection" and title in known.COCO_FROM_SCRATCH and batch_size >= 2:
        yield _coco_from_scratch(title, min(batch_size, 8))
    if task == "segmentation":
        if batch_size <= 2 and title in known.COCO_MASKS:
            yield _coco("mask AP", known.COCO_MASKS, title)
        if batch_size > 2 and title in known.VOC:
            setting = "DeepLabV3 with ResNet-101 on Pascal VOC, batches of 16"
            yield _qiao("table 11", setting, "mean IoU, %", known.VOC, title)
    if task == "video" and title in known.VIDEO:
        setting = "TSM with ResNet-50 on Something-Something V1, 8 clips a GPU"
        yield _qiao("table 12", setting, f"top-1 {known.ACCURACY}", known.VIDEO, title)


def _qiao(place: str, setting: str, metric: str, values: Mapping[str, str], title: str) -> Evidence:
    return known.qiao(place, setting, metric, **{title: values[title], **values})


def _coco(metric: str, values: Mapping[str, str], title: str) -> Evidence:
    setting = "Mask R-CNN with ResNet-50 on COCO, 2 images a GPU"
    return _qiao("table 9", setting, metric, values, title)


def _coco_from_scratch(title: str, batch_size: int) -> Evidence:
    columns = {each: column[batch_size] for each, column in known.COCO_FROM_SCRATCH.items()}
    setting = f"Faster R-CNN on COCO from scratch, {batch_size} images a GPU"
    return known.huang("table 6", setting, "box AP", **{title: columns[title], **columns})


PRETRAINED_BN = "pretrained BN"

CANDIDATES: Mapping[str, Candidate] = {
    "bn": Candidate(
        spec="bn",
        why="enough examples for the statistics of each channel; most training recipes assume it",
        limits="evaluation uses other statistics than training: new data and small batches shift "
        "them",
        title="BN",
        compared=("GN", "BGN"),
        own_spec="bn",
        keeps_function=True,
    ),
    "bn kept": Candidate(
        spec="bn",
        why="the network predicts as before; a share of the example's own statistics at "
        "evaluation, nk.set_example_weight(model, alpha), may improve it without any training",
        limits="alpha is tuned on held-out data; training on other data changes the statistics",
        title=PRETRAINED_BN,
        keeps_function=True,
    ),
    "bn frozen": Candidate(
        spec="bn",
        apply="nk.freeze_statistics(model)",
        why="the network predicts as before, and batches of few examples do not change its "
        "statistics; a share of the example's own at evaluation, nk.set_example_weight(model, "
        "alpha), may improve it",
        limits="the statistics stay those of the old data; alpha is tuned on held-out data, and "
        'needs nk.convert_norm_(model, "bn") first',
        title=PRETRAINED_BN,
        keeps_function=True,
    ),
    "bn+ws": Candidate(
        spec="bn+ws",
        why="weight standardization smooths the loss, at no cost at inference",
        limits="one network measured for classification, and only with 64 images a GPU",
        title="BN_WS",
        numbers=(known.BN_WS_IMAGENET,),
    ),
    "bn+ws kept": Candidate(
        spec="bn+ws",
        apply="nk.standardize_weights_(model, preserve=True)",
        why="weight standardization; at first the network predicts as before",
        limits="measured only in training from the start; make the optimizer after this call",
        title="BN_WS",
        numbers=(known.BN_WS_IMAGENET,),
        keeps_function=True,
    ),
    "gn": Candidate(
        spec="gn:max=32",
        why="statistics of each example alone: the batch size does not matter, and evaluation "
        "computes the same as training",
        limits="behind BN with enough examples; channels may die without batch knowledge (Qiao "
        "et al., section 6)",
        title="GN",
        compared=("BN", "BGN"),
        numbers=(known.CHANNELS_IMAGENET,),
        own_spec="gn:8",
    ),
    "gn+ws": Candidate(
        spec="gn:max=32+ws",
        why="group norm with standardized weights: with 1 image a GPU ahead of BN with 64",
        limits="weight standardization helps only convolutions that feed a norm, and costs a "
        "little time in each training step",
        title="GN_WS",
        numbers=(known.MICRO_IMAGENET,),
        own_spec="gn:8+ws",
    ),
    "bgn": Candidate(
        spec="bgn:max={groups}",
        why="groups chosen so that each has a suitable number of values at this batch size; "
        "ahead of BN and GN at every batch size of its paper",
        limits="one paper, one run each, and other groups for its other tasks (MANAS 64, "
        "adversarial training 128, Office-31 1 to 512 by task); groups are divisors of the "
        "channels unless the size of the map is known: nk.build(..., num_positions=)",
        title="BGN",
        compared=("GN", "BN"),
        own_spec="bgn:auto",
    ),
    "gbgn": Candidate(
        spec="gbgn:max=32",
        why="groups of channels over both examples: more values than BN, batch knowledge that GN "
        "lacks",
        limits="measured with a tuned example weight (nk.set_example_weight); no gain on SVHN; "
        "Zhou et al. find it 4.24 points behind BGN on ImageNet with 2 images",
        numbers=(known.GBGN_CIFAR_100, known.GBGN_CALTECH),
    ),
    "bcn micro+ws": Candidate(
        spec="bcn:max=32:micro+ws",
        why="normalises by running estimates, then each example's groups: batch knowledge "
        "without a batch",
        limits="call nk.sync_update_rates(model, optimizer) before every step; two stages to "
        "learn; ahead of gn+ws by 1.4 points in our runs, which were short and had three seeds",
        title="BCN_WS",
        numbers=(known.BCN_CIFAR_MICRO, known.BCN_CIFAR_100_MICRO, known.BCN_SN_MICRO),
        own_spec="bcn:8:micro_batch+ws",
    ),
    "bcn+ws": Candidate(
        spec="bcn:max=32+ws",
        why="a group norm behind a batch norm: keeps channels farther from dying",
        limits="behind BN with weight standardization on video; one paper",
        title="BCN_WS",
        numbers=(known.BCN_IMAGENET, known.BCN_CIFAR),
    ),
    "xbn": Candidate(
        spec="gn:max=64",
        apply='nk.place_xbn_(model, norm="{spec}")',
        why="one norm without batch statistics in each residual block keeps shifts of the "
        "running statistics from adding up",
        limits="only for residual networks; the other norms stay batch norms, so not for batches "
        "of 1 or 2",
        title="XBN",
        numbers=(known.XBN_IMAGENET, known.XBN_RESNEXT),
    ),
    "ghost": Candidate(
        spec="ghost:16",
        why="statistics of runs of examples regularise; evaluation is batch norm's",
        limits="for networks that overfit: no gain on SVHN, and a loss in our short runs with "
        "runs of 4; tune the size of the runs and the example weight",
        numbers=(known.GHOST_CIFAR_100, known.GHOST_CALTECH),
        own_spec="ghost:4",
        keeps_function=True,
    ),
}
"""The candidates by the names that the ranking uses."""
