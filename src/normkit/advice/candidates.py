"""The norms that are recommended: what each is, why, and what it does not do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from normkit.advice import evidence as known
from normkit.advice.evidence import Evidence, by_batch_size, cifar_by_batch_size, own_runs
from normkit.spec import recommended_bgn_groups

EvidenceOf = Callable[[str, int], Iterator[Evidence]]
"""Says what is known for a task at one of the batch sizes of ``evidence.BATCH_SIZES``, or 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A norm as it may be recommended.

    Args:
        spec: Its spec; ``{groups}`` stands for BGN's groups at the batch size.
        apply: The call that puts it into ``model``; ``{spec}`` stands for the spec.
        why: What speaks for it.
        limits: What speaks against it, or was not measured.
        evidence: The numbers, by task and batch size.
        keeps_function: Whether a trained network predicts as before.
    """

    spec: str
    why: str
    limits: str
    evidence: EvidenceOf
    apply: str = 'nk.convert_norm_(model, "{spec}")'
    keeps_function: bool = False

    def spec_for(self, batch_size: int) -> str:
        """The spec at a batch size, which need not be one of those measured."""
        return self.spec.format(groups=recommended_bgn_groups(batch_size))


def _of_task(name: str, task: str, batch_size: int) -> Iterator[Evidence]:
    """What the tables of a task other than classification say about a norm."""
    if task == "detection" and name in known.COCO_BOXES:
        yield _coco("box AP", known.COCO_BOXES, name)
    if task == "detection" and name in known.COCO_FROM_SCRATCH and batch_size >= 2:
        yield _coco_from_scratch(name, min(batch_size, 8))
    if task == "segmentation":
        if batch_size <= 2 and name in known.COCO_MASKS:
            yield _coco("mask AP", known.COCO_MASKS, name)
        if batch_size > 2 and name in known.VOC:
            setting = "DeepLabV3 with ResNet-101 on Pascal VOC, batches of 16"
            yield _qiao("table 11", setting, "mean IoU, %", known.VOC, name)
    if task == "video" and name in known.VIDEO:
        setting = "TSM with ResNet-50 on Something-Something V1, 8 clips a GPU"
        yield _qiao("table 12", setting, f"top-1 {known.ACCURACY}", known.VIDEO, name)


def _qiao(place: str, setting: str, metric: str, values: Mapping[str, str], name: str) -> Evidence:
    return known.qiao(place, setting, metric, **{name: values[name], **values})


def _coco(metric: str, values: Mapping[str, str], name: str) -> Evidence:
    return _qiao(
        "table 9", "Mask R-CNN with ResNet-50 on COCO, 2 images a GPU", metric, values, name
    )


def _coco_from_scratch(name: str, batch_size: int) -> Evidence:
    columns = {each: column[batch_size] for each, column in known.COCO_FROM_SCRATCH.items()}
    setting = f"Faster R-CNN on COCO from scratch, {batch_size} images a GPU"
    return known.huang("table 6", setting, "box AP", **{name: columns[name], **columns})


def _bn(task: str, batch_size: int) -> Iterator[Evidence]:
    yield from _of_task("BN", task, batch_size)
    if task == "classification":
        yield from by_batch_size("BN", batch_size, ("GN", "BGN"))
        yield from cifar_by_batch_size(batch_size)
        yield from own_runs("bn", batch_size)


def _kept(task: str, batch_size: int) -> Iterator[Evidence]:
    if task == "detection":
        setting = "Faster R-CNN on COCO, fine-tuned, 2fc box head, 2 images a GPU"
        values = {"BN frozen": "36.31", "GN": "36.62", "XBN": "37.17"}
        yield known.huang("table 5", setting, "box AP", **values)
    yield known.summers(
        "section 3.1", "ResNet-152 on ImageNet, example weight tuned", f"top-1 {known.ACCURACY}",
        gain_of_at_most="0.6",
    )  # fmt: skip


def _gn(task: str, batch_size: int) -> Iterator[Evidence]:
    yield from _of_task("GN", task, batch_size)
    if task == "classification":
        yield from by_batch_size("GN", batch_size, ("BN", "BGN"))
        yield known.CHANNELS_IMAGENET
        yield from own_runs("gn:8", batch_size)


def _gn_ws(task: str, batch_size: int) -> Iterator[Evidence]:
    yield from _of_task("GN_WS", task, batch_size)
    if task == "classification":
        yield known.MICRO_IMAGENET
        yield from own_runs("gn:8+ws", batch_size)


def _bgn(task: str, batch_size: int) -> Iterator[Evidence]:
    if task == "classification":
        yield from by_batch_size("BGN", batch_size, ("GN", "BN"))
        yield from known.other_tasks(batch_size)
        yield from own_runs("bgn:auto", batch_size)


def _gbgn(task: str, batch_size: int) -> Iterator[Evidence]:
    if task == "classification":
        yield known.summers(
            "section 3.4", "CIFAR-100, batches of 2, example weight tuned", known.ACCURACY,
            GBGN="74.60", GN="73.91",
        )  # fmt: skip
        yield known.summers(
            "section 3.4", "Caltech-256, batches of 2, example weight tuned", known.ACCURACY,
            GBGN="53.2", GN="48.2",
        )  # fmt: skip


def _micro(task: str, batch_size: int) -> Iterator[Evidence]:
    yield from _of_task("BCN_WS", task, batch_size)
    if task == "classification":
        yield from (known.BCN_CIFAR_MICRO, known.BCN_CIFAR_100_MICRO, known.BCN_SN_MICRO)
        yield from own_runs("bcn:8:micro_batch+ws", batch_size)


def _bcn(task: str, batch_size: int) -> Iterator[Evidence]:
    yield from _of_task("BCN_WS", task, batch_size)
    if task == "classification":
        yield from (known.BCN_IMAGENET, known.BCN_CIFAR)


def _bn_ws(task: str, batch_size: int) -> Iterator[Evidence]:
    yield from _of_task("BN_WS", task, batch_size)
    if task == "classification":
        yield known.BN_WS_IMAGENET


def _xbn(task: str, batch_size: int) -> Iterator[Evidence]:
    yield from _of_task("XBN", task, batch_size)
    if task == "classification":
        setting, metric = "batches of 256", f"top-1 {known.ACCURACY}"
        values = {"XBN": "77.40", "BN": "76.29", "GN": "75.73"}
        yield known.huang("table 2", f"{known.IMAGENET}, {setting}", metric, **values)
        values = {"XBN": "79.84", "BN": "79.17", "GN": "78.02"}
        yield known.huang("table 2", f"ResNeXt-101 on ImageNet, {setting}", metric, **values)


def _ghost(task: str, batch_size: int) -> Iterator[Evidence]:
    if task == "classification":
        for data, gain in (("CIFAR-100", "0.84"), ("Caltech-256", "5.8")):
            setting = f"{data}, size of the runs tuned"
            yield known.summers("section 3.2", setting, known.ACCURACY, gain_of_at_most=gain)
        yield from own_runs("ghost:4", batch_size)


CANDIDATES: Mapping[str, Candidate] = {
    "bn": Candidate(
        spec="bn",
        why="enough examples for statistics of each channel; every recipe is made for it",
        limits="evaluation uses other statistics than training: new data and small batches shift "
        "them",
        evidence=_bn,
        keeps_function=True,
    ),
    "bn kept": Candidate(
        spec="bn",
        why="the network predicts as before; a share of the example's own statistics at "
        "evaluation, nk.set_example_weight(model, alpha), may add to it without any training",
        limits="alpha is tuned on held-out data; on other data the statistics move",
        evidence=_kept,
        keeps_function=True,
    ),
    "bn frozen": Candidate(
        spec="bn",
        apply="nk.freeze_statistics(model)",
        why="the network predicts as before, and too few examples move no statistics; a share "
        "of the example's own at evaluation, nk.set_example_weight(model, alpha), may add to it",
        limits="the statistics stay those of the old data; alpha is tuned on held-out data, and "
        'needs nk.convert_norm_(model, "bn") first',
        evidence=_kept,
        keeps_function=True,
    ),
    "bn+ws": Candidate(
        spec="bn+ws",
        why="weight standardization smooths the loss, at no cost at inference",
        limits="one network measured for classification, and only with 64 images a GPU",
        evidence=_bn_ws,
    ),
    "bn+ws kept": Candidate(
        spec="bn+ws",
        apply="nk.standardize_weights_(model, preserve=True)",
        why="weight standardization that starts where the network predicts as before",
        limits="measured only in training from the start; make the optimizer afterwards",
        evidence=_bn_ws,
        keeps_function=True,
    ),
    "gn": Candidate(
        spec="gn:max=32",
        why="statistics of each example alone: the batch size does not matter, and evaluation "
        "is what training was",
        limits="behind BN with enough examples; channels may die without batch knowledge (Qiao "
        "et al., section 6)",
        evidence=_gn,
    ),
    "gn+ws": Candidate(
        spec="gn:max=32+ws",
        why="group norm with standardized weights: with 1 image a GPU ahead of BN with 64",
        limits="weight standardization only serves convolutions that feed a norm; a little time "
        "for each training step",
        evidence=_gn_ws,
    ),
    "bgn": Candidate(
        spec="bgn:max={groups}",
        why="groups chosen so that each has a suitable number of values at this batch size; "
        "ahead of BN and GN at every batch size of its paper",
        limits="one paper, one run each, which takes other groups for other tasks (MANAS 64, "
        "adversarial training 128, Office-31 1 to 512 by task); groups are divisors of the "
        "channels unless the size of the map is known: nk.build(..., num_positions=)",
        evidence=_bgn,
    ),
    "gbgn": Candidate(
        spec="gbgn:max=32",
        why="groups of channels over both examples: more values than BN, batch knowledge that GN "
        "lacks",
        limits="measured with a tuned example weight (nk.set_example_weight); no gain on SVHN; "
        "Zhou et al. find it 4.24 points behind BGN on ImageNet with 2 images",
        evidence=_gbgn,
    ),
    "bcn micro+ws": Candidate(
        spec="bcn:max=32:micro+ws",
        why="normalises by running estimates, then each example's groups: batch knowledge "
        "without a batch",
        limits="call nk.sync_update_rates(model, optimizer) before every step; two stages to "
        "learn; ahead of gn+ws in our runs by 1.4 points, of three seeds and short",
        evidence=_micro,
    ),
    "bcn+ws": Candidate(
        spec="bcn:max=32+ws",
        why="a batch norm and a group norm of its result: less far from dead channels",
        limits="behind BN with weight standardization on video; one paper",
        evidence=_bcn,
    ),
    "xbn": Candidate(
        spec="gn:max=64",
        apply='nk.place_xbn_(model, norm="{spec}")',
        why="one norm of each residual block without batch statistics stops shifts of the "
        "running statistics from adding up",
        limits="residual networks; the others stay batch norms, so not for batches of 1 or 2",
        evidence=_xbn,
    ),
    "ghost": Candidate(
        spec="ghost:16",
        why="statistics of runs of examples regularise; evaluation is batch norm's",
        limits="for networks that overfit: no gain on SVHN, and a loss in our short runs with "
        "runs of 4; tune the size of the runs and the example weight",
        evidence=_ghost,
        keeps_function=True,
    ),
}
"""By the names that the ranking uses."""
