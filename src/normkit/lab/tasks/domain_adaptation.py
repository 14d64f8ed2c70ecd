"""Adaptation to a domain without labels: CAN, and what it is compared with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from normkit import StatisticsPatch, recalibrate
from normkit.errors import SpecError
from normkit.inference.tracked import keeps_statistics
from normkit.lab.changes import BuiltModel
from normkit.lab.check import check_pictures
from normkit.lab.data import Dataset, Split
from normkit.lab.data.known import KNOWN, Sample, data_text, random_dataset
from normkit.lab.evaluation import ACCURACY, require_scores, scores_of, shared_out
from normkit.lab.frozen import WrittenCount
from normkit.lab.models.build import build_model
from normkit.lab.recipe import Recipe
from normkit.lab.spec import Protocol, SweepSpec, TrainingSpec
from normkit.lab.start import built
from normkit.lab.task import Found, Held, PartName, Source, Task, TaskRun
from normkit.lab.tasks.clustering import class_centers, spherical_clusters
from normkit.lab.tasks.contrastive import contrastive_discrepancy
from normkit.lab.tasks.domain_norms import (
    Domain,
    separate_norms_,
    start_momentum_of_target,
    start_target_from_source,
    use_domain,
)
from normkit.lab.tasks.domains import (
    Aligned,
    ClassAware,
    DomainBatch,
    Domains,
    every_picture,
    open_domains,
)

if TYPE_CHECKING:
    from normkit.lab.loop import Loop

Method = Literal["can", "adabn", "source"]
CALIBRATION_BATCH_SIZE = 100
NOT_A_MEMBER = -1


class DomainAdaptation(Task):
    """Learn the classes of a source with labels, and be right on a target without.

    Source:
        Kang, Jiang, Yang & Hauptmann 2019, Contrastive Adaptation Network for Unsupervised Domain
        Adaptation. Li et al. 2016, Revisiting Batch Normalization for Practical Domain Adaptation.
    """

    name: ClassVar = "domain-adaptation"
    scores: ClassVar = ("target", "source")
    costless: ClassVar = frozenset({"target", "weight", "distance", "fewest", "stop", "head_rate"})

    target: str = Field(
        default="rotated",
        min_length=1,
        description="a folder of pictures, a data set, FILE.py:FUNCTION, or inverted, rotated, "
        "blurred, textured: the source's pictures changed, several with + between",
    )
    method: Method = Field(
        default="can",
        description="can, or adabn: trained on the source, and statistics measured on the target; "
        "or source: nothing is done for the target",
    )
    weight: float = Field(
        default=0.3,
        ge=0,
        description="what the contrastive discrepancy is multiplied by, 0 or more",
    )
    source_epochs: int = Field(
        default=0, ge=0, description="epochs on the source alone, before the first clustering"
    )
    distance: float = Field(
        default=1.0,
        gt=0,
        description="the distance (1 - cos) / 2 from its cluster's centre up to which a target "
        "example is trained on; above 0, and 1 for all of them",
    )
    fewest: WrittenCount = Field(
        default=3, description="target examples that a class needs to be trained on, 1 or more"
    )
    per_class: WrittenCount = Field(
        default=3, description="examples of each class in a batch, for each domain, 1 or more"
    )
    stop: float = Field(
        default=1e-3,
        ge=0,
        description="the mean distance of source and target centres below which training ends",
    )
    head_rate: float = Field(
        default=1.0, gt=0, description="what the last layer's learning rate is multiplied by"
    )
    whole: bool = Field(
        default=False,
        description="yes: all pictures of both domains are trained on, and all of the target are "
        "judged, as papers do on Office-31; or no",
    )

    def data(self, protocol: Protocol) -> Domains:
        """Both domains."""
        return open_domains(protocol, self.target, whole=self.whole)

    def examples(self, data: Domains, part: PartName) -> Source:
        """Refuse: there are two domains, whose statistics differ.

        Raises:
            SpecError: Always.
        """
        raise SpecError(
            f"{self} has two domains, and no statistics for both; take method=adabn to measure "
            f"those of the target anew, or leave the reading out"
        )

    def sample(self, protocol: Protocol) -> Sample:
        """Random pictures in place of data sets that papers name; others as they are."""
        target = data_text(self.target)
        if protocol.data not in KNOWN or target not in KNOWN:
            return Sample(self.data(protocol))
        hold_out = protocol.hold_out or self.whole
        pair = [
            random_dataset(name, protocol.limit, hold_out, protocol.image_size)
            for name in (protocol.data, target)
        ]
        pair = [every_picture(dataset) for dataset in pair] if self.whole else pair
        missing = [KNOWN[name].missing() for name in (protocol.data, target)]
        return Sample(Domains(*pair), "; ".join(filter(None, missing)) or None)

    def build(self, spec: TrainingSpec, data: Domains) -> BuiltModel:
        """The network; by ``can`` with norms for each domain."""
        found = built(spec, data.source)
        if self.method == "can":
            separate_norms_(found.model)
        return found

    def start(self, spec: TrainingSpec, data: Domains, network: nn.Module) -> AdaptationRun:
        """Begin the training of a network."""
        return AdaptationRun(network, self, data, spec.protocol)

    def check(self, sweep: SweepSpec, data: Domains) -> None:
        """Find bad input before the first run."""
        protocol = sweep.protocol
        if protocol.mixup:
            raise SpecError("--mixup was given, which this task does not do; leave it out")
        check_pictures(sweep, data.source)
        network = build_model(
            protocol.model, num_classes=data.num_classes, input_shape=data.input_shape
        ).model
        classifier_of(network, data.num_classes, protocol.model)
        smallest = min(sweep.batch_sizes)
        if self.method == "can" and smallest < 2 * self.per_class:
            raise SpecError(
                f"--batch-sizes was given {smallest}, and {self.per_class} examples of each of two "
                f"classes are {2 * self.per_class}; give a larger batch or a smaller per_class"
            )
        if self.method == "can" and protocol.processes > 1:
            raise SpecError(
                f"--processes was given {protocol.processes}, and can clusters the whole target in "
                f"one process; leave it out"
            )


def classifier_of(network: nn.Module, num_classes: int, name: str) -> nn.Linear:
    """The layer that gives the scores; its input are the features.

    Raises:
        SpecError: If the network has none that could be.
    """
    found = [
        module
        for module in network.modules()
        if isinstance(module, nn.Linear) and module.out_features == num_classes
    ]
    if not found:
        raise SpecError(
            f"model {name!r} has no linear layer that gives {num_classes} scores, so its features "
            f"are not known; let it end with nn.Linear(..., {num_classes})"
        )
    return found[-1]


class AdaptationRun(TaskRun):
    """The training of a network on a labelled source, and by ``can`` on a clustered target.

    Args:
        network: The network.
        task: The options.
        data: Both domains.
        protocol: Its label smoothing and memory format.
    """

    network: nn.Module
    examples: ClassAware

    def __init__(
        self, network: nn.Module, task: DomainAdaptation, data: Domains, protocol: Protocol
    ) -> None:
        members = {} if task.method == "can" else None
        target = data.target.train
        super().__init__(network, ClassAware(data.source.train, target, task.per_class, members))
        self._task, self._data, self._protocol = task, data, protocol
        self._classifier = classifier_of(network, data.num_classes, protocol.model)
        self._kept: list[Tensor] = []
        kept = self._kept

        def keep(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            kept[:] = [inputs[0].flatten(1)]

        self._classifier.register_forward_pre_hook(keep)  # a copy of the network has it, too
        self._has_clusters = False
        self._center_distance = 1.0
        self._members = torch.full((len(target),), NOT_A_MEMBER)

    def parameters(self, network: nn.Module, recipe: Recipe) -> Any:
        """All parameters; those of the last layer may have a rate of their own."""
        groups = super().parameters(network, recipe)
        if self._task.head_rate == 1:
            return groups
        head = classifier_of(network, self._data.num_classes, self._protocol.model)
        return list(_with_rate(groups, {*head.parameters()}, self._task.head_rate))

    def begin_epoch(self, loop: Loop, num_epochs: int) -> None:
        """Cluster the target for the first time."""
        if self._task.method == "can" and num_epochs == self._task.source_epochs:
            if num_epochs:
                start_target_from_source(loop.network)
                with _domain(loop.network, "target"):
                    self._measured_on_target(loop, only_target=True)
            self._cluster(loop)

    def begin_step(self, loop: Loop, num_steps: int, parts: Any) -> None:
        """Let the optimizer take the target's norms, too."""
        if num_steps and any(part.aligned is not None for part in parts):
            start_momentum_of_target(loop.network, loop.optimizer)

    def loss(self, model: nn.Module, part: DomainBatch) -> Found:
        """Cross-entropy on the source, and the contrastive discrepancy of both domains."""
        scores, _ = self._forward(model, part.labelled.inputs, "source")
        targets, smoothing = part.labelled.targets, self._protocol.label_smoothing
        loss = functional.cross_entropy(scores, targets, label_smoothing=smoothing)
        if part.aligned is not None:
            loss = loss + self._task.weight * self._discrepancy(model, part.aligned)
        return Found(loss, int((scores.argmax(1) == targets).sum()))

    def _discrepancy(self, model: nn.Module, aligned: Aligned) -> Float[Tensor, ""]:
        """Of the features, and of the shares that the scores give to the classes."""
        source = self._forward(model, aligned.source.inputs, "source")
        target = self._forward(model, aligned.target.inputs, "target")
        layers = zip(
            (source[1], source[0].softmax(1)), (target[1], target[0].softmax(1)), strict=True
        )
        return contrastive_discrepancy(
            (aligned.by_class(ours), aligned.by_class(theirs)) for ours, theirs in layers
        )

    def _forward(
        self, model: nn.Module, inputs: Tensor, domain: Domain
    ) -> tuple[Float[Tensor, "n k"], Float[Tensor, "n d"]]:
        """Scores and features, by the norms of a domain."""
        if self._protocol.channels_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        with _domain(model, domain):
            scores = model(inputs)
        require_scores(scores, len(inputs), self._data.num_classes)
        return scores, self._kept.pop()

    def evaluate(self, loop: Loop, held: Held) -> dict[str, float]:
        """Shares that are right in the target and in the source; by ``can`` clusters anew."""
        found = {}
        clusters = self._task.method == "can" and held == "validation"
        if clusters and self._has_clusters:
            self._cluster(loop)
        domains: dict[Domain, Dataset[Split]] = {
            "target": self._data.target,
            "source": self._data.source,
        }
        for domain, dataset in domains.items():
            split = dataset.validation if held == "validation" else dataset.test
            found[domain] = self._accuracy(loop, split, domain)
        if self._task.method == "can":
            found["center_distance"] = self._center_distance
            found["clustered"] = float((self._members != NOT_A_MEMBER).float().mean())
        return found

    def _accuracy(self, loop: Loop, split: Split, domain: Domain) -> float:
        patch = None
        if domain == "target" and self._task.method == "adabn":
            patch = self._measured_on_target(loop, only_target=False)
        with _domain(loop.network, domain):
            found = scores_of(loop.model, split, loop.device, loop.share)[ACCURACY]
        if patch is not None:
            patch.undo()
        return found

    def _measured_on_target(self, loop: Loop, *, only_target: bool) -> StatisticsPatch | None:
        """Put the target's statistics into the norms that keep any."""
        if not any(map(keeps_statistics, loop.network.modules())):
            return None
        split = self._data.target.train
        parts = torch.arange(len(split)).split(CALIBRATION_BATCH_SIZE)
        batches = (split.take(part).inputs for part in parts if len(part) > 1)
        patch = recalibrate(
            loop.network,
            batches,
            where=(lambda _, name: ".target" in name) if only_target else None,
        )
        patch.apply()
        return patch

    def _cluster(self, loop: Loop) -> None:
        """Name the target's examples by clusters that start from the source's classes."""
        source, target = self._data.source.train, self._data.target.train
        was_training = loop.model.training
        loop.model.eval()
        centers = class_centers(
            self._features(loop, source, "source"), source.targets.cpu(), self._data.num_classes
        )
        found = spherical_clusters(self._features(loop, target, "target"), centers)
        loop.model.train(was_training)
        self._has_clusters, self._center_distance = True, found.center_distance
        self.is_done = found.center_distance < self._task.stop
        members = found.certain(self._task.distance, self._task.fewest)
        self._members.fill_(NOT_A_MEMBER)
        for label, positions in members.items():
            self._members[positions] = label
        self.examples.members = members

    @torch.no_grad()
    def _features(self, loop: Loop, split: Split, domain: Domain) -> Float[Tensor, "n d"]:
        found = [
            self._forward(loop.model, split.take(index).to(loop.device).inputs, domain)[1]
            for index in shared_out(len(split), 0, 1)
        ]
        return torch.cat(found).float().cpu()

    def state(self) -> dict[str, Tensor]:
        """The classes of the target's examples."""
        return {"members": self._members, "has_clusters": torch.tensor(self._has_clusters)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on with these classes."""
        self._members.copy_(state["members"])
        self._has_clusters = bool(state["has_clusters"])
        labels = self._members.unique().tolist()
        self.examples.members = {
            label: (self._members == label).nonzero()[:, 0]
            for label in labels
            if label != NOT_A_MEMBER
        }


@contextmanager
def _domain(model: nn.Module, domain: Domain) -> Iterator[None]:
    """Normalise by the norms of a domain in a block, and by the source's afterwards."""
    use_domain(model, domain)
    try:
        yield
    finally:
        use_domain(model, "source")


def _with_rate(groups: Any, head: set[nn.Parameter], rate: float) -> Iterable[dict[str, Any]]:
    """Groups of parameters, those of the head apart."""
    listed = list(groups)
    if listed and isinstance(listed[0], Tensor):
        listed = [{"params": listed}]
    for group in listed:
        for params, scale in (
            ([p for p in group["params"] if p not in head], 1.0),
            ([p for p in group["params"] if p in head], rate),
        ):
            if params:
                yield {**group, "params": params, "lr_scale": scale}
