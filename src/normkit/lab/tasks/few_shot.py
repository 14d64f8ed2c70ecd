"""Few-shot learning: classes that a network has never seen, by a few pictures of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from normkit import recalibrate
from normkit.errors import DataError, SpecError
from normkit.inference.tracked import tracked
from normkit.lab.changes import BuiltModel
from normkit.lab.check import check_pictures
from normkit.lab.data import Dataset, Examples, Split, open_data
from normkit.lab.data.folder import PREFIX
from normkit.lab.data.known import KNOWN, Sample, random_dataset
from normkit.lab.data.opening import opened_once
from normkit.lab.data.sources import FOLDER_VARIABLE, data_folder
from normkit.lab.evaluation import ACCURACY, EVALUATION_BATCH_SIZE, require_scores, scores_of
from normkit.lab.spec import Protocol, SweepSpec, TrainingSpec
from normkit.lab.start import built
from normkit.lab.task import Found, Held, Task, TaskRun
from normkit.lab.tasks.attack import autocast_of, buffers_kept
from normkit.lab.tasks.class_split import (
    ClassSplit,
    FewShotData,
    Pool,
    chosen_classes,
    divided,
    read_class_folders,
    split_of_folders,
)
from normkit.lab.tasks.cosine import CosineClassifier, features_of, with_cosines_
from normkit.lab.tasks.episodes import Episode, accuracy, draw_episodes, mean_and_interval
from normkit.text import printable

if TYPE_CHECKING:
    from normkit.lab.loop import Loop

SHOTS: Mapping[str, int] = MappingProxyType({"one_shot": 1, "five_shot": 5})
MINI_IMAGENET = "mini-imagenet"
VALIDATION_SHARE = 6  # in validation there are a sixth as many episodes as in the test
SEEDS: Mapping[str, int] = MappingProxyType({"test": 0, "validation": 1})
"""Of the episodes, which are the same ones for all norms and runs."""


class FewShot(Task):
    """Imprinted weights: a classifier by cosines is learnt on base classes and judged on others.

    In an episode the weights of new classes are the means of the normalised features of a few
    pictures, and other pictures of these classes are to be recognised. Judged are the mean
    accuracies of episodes with one picture of each class, ``one_shot``, and with five,
    ``five_shot``, and the accuracy on held-out pictures of the base classes, ``base``.

    Source:
        Qi, Brown & Lowe 2018, arXiv:1712.07136.
    """

    name: ClassVar = "few-shot"
    scores: ClassVar = ("one_shot", "five_shot", "base")

    statistics: Literal["base", "support", "episode"] = Field(
        default="base",
        description="base, support or episode: the pictures whose statistics normalise novel ones",
    )
    novel: int = Field(default=5, ge=2, description="the classes that test episodes draw from")
    validation: int = Field(
        default=0,
        ge=0,
        description="the classes that validation episodes draw from, or 0: from base classes",
    )
    split_seed: int = Field(
        default=0, ge=0, lt=2**63, description="the seed that decides which classes are novel"
    )
    ways: int = Field(default=5, ge=2, description="the classes of an episode, 2 or more")
    queries: int = Field(
        default=15, ge=1, description="the pictures of each class to be recognised, 1 or more"
    )
    episodes: int = Field(default=600, ge=2, description="the test episodes, 2 or more")
    per_class: int = Field(
        default=600, ge=2, description="the pictures of a class to draw episodes from, at most"
    )

    @property
    def num_needed(self) -> int:
        """Pictures that validation episodes need of each class: five and a query."""
        return max(SHOTS.values()) + 1

    @property
    def sentences(self) -> tuple[str, ...]:
        """Which classes are novel, and which statistics normalise their pictures."""
        by = {
            "base": "the running statistics that the base classes left",
            "support": "statistics that are measured anew on each episode's labelled pictures",
            "episode": "statistics that are measured anew on each episode's labelled pictures and "
            "queries together",
        }[self.statistics]
        which = (
            f"novel are the classes of the folder test, where it has others than train, else "
            f"{self.novel} that are drawn by seed {self.split_seed}"
        )
        return which, f"their pictures are normalised by {by}"

    def data(self, protocol: Protocol) -> FewShotData:
        """The data set of a protocol, divided into classes to learn and to be judged on."""
        dataset, classes = self._opened(protocol)
        if len(classes.novel) < self.ways:
            raise SpecError(
                f"{self.ways}-way episodes take {self.ways} novel classes, and {dataset.name} was "
                f"given {len(classes.novel)}; give few-shot:novel={self.ways} or more, or fewer "
                f"ways"
            )
        return self._divided(dataset, classes, protocol.limit)

    def _opened(self, protocol: Protocol) -> tuple[Dataset[Split], ClassSplit]:
        text, side = protocol.data, protocol.image_size
        folder = data_folder() / MINI_IMAGENET if text == MINI_IMAGENET else None
        if text.startswith(PREFIX):
            folder = Path(text.removeprefix(PREFIX))
        classes = None if folder is None else split_of_folders(folder)
        if folder is not None and classes is not None:
            key = (f"classes of {folder}", None, side)
            dataset = opened_once(key, lambda: read_class_folders(folder, side))
            if not protocol.hold_out:
                dataset = replace(dataset, train=dataset.train.joined(dataset.validation))
            return dataset, classes
        if text == MINI_IMAGENET:
            raise DataError(
                f"{printable(data_folder() / MINI_IMAGENET)} does not have "
                f"{KNOWN[MINI_IMAGENET].holds}; put them there, or set {FOLDER_VARIABLE} to the "
                f"folder above"
            )
        dataset = open_data(text, None, side, protocol.hold_out)
        return dataset, chosen_classes(dataset, self.novel, self.validation, self.split_seed)

    def _divided(
        self, dataset: Dataset[Split], classes: ClassSplit, limit: int | None
    ) -> FewShotData:
        return divided(
            dataset, classes, per_class=self.per_class, num_needed=self.num_needed, limit=limit
        )

    def sample(self, protocol: Protocol) -> Sample:
        """Random pictures in place of a data set that papers name; others as they are."""
        if protocol.data not in KNOWN:
            return Sample(self.data(protocol))
        dataset = random_dataset(protocol.data, None, protocol.hold_out, protocol.image_size)
        classes = chosen_classes(dataset, self.novel, self.validation, self.split_seed)
        found = self._divided(dataset, classes, protocol.limit)
        return Sample(found, KNOWN[protocol.data].missing())

    def build(self, spec: TrainingSpec, data: FewShotData) -> BuiltModel:
        """The network of a run, whose last linear layer is a classifier by cosines."""
        found = built(spec, data)
        with_cosines_(
            found.model,
            num_classes=data.num_classes,
            example=torch.zeros(2, *data.input_shape),
            seed=spec.seed,
            name=spec.protocol.model,
        )
        return found

    def check(self, sweep: SweepSpec, data: FewShotData) -> None:
        """Find bad input before the first run."""
        if sweep.protocol.processes > 1 and self.statistics != "base":
            raise SpecError(
                f"few-shot:statistics={self.statistics} measures statistics on one process, and "
                f"{sweep.protocol.processes} were asked for; give one"
            )
        if sweep.protocol.mixup:
            raise SpecError(
                f"--mixup was given {sweep.protocol.mixup:g}, which {self.name} does not do; leave "
                f"it out"
            )
        check_pictures(sweep, data, self.build)
        for held in ("validation", "test"):
            self.drawn(data, held, max(SHOTS.values()), 1)

    def drawn(self, data: FewShotData, held: Held, shots: int, number: int) -> list[Episode]:
        """Draw episodes; those of validation are smaller where the pool is.

        Raises:
            DataError: If there are too few pictures of a class.
        """
        targets, queries, ways = data.pools[held].targets, self.queries, self.ways
        if held == "validation":
            queries = min(queries, data.fewest(held) - max(SHOTS.values()))
            ways = min(ways, len(targets.unique()))
        return draw_episodes(
            targets,
            ways=ways,
            shots=shots,
            queries=max(queries, 1),
            number=number,
            seed=SEEDS[held],
        )

    def start(self, spec: TrainingSpec, data: FewShotData, network: nn.Module) -> FewShotRun:
        """Begin the training of a network."""
        return FewShotRun(self, spec.protocol, data, network)


class FewShotRun(TaskRun):
    """The training of a network with a classifier by cosines.

    Args:
        task: Its options.
        protocol: Its label smoothing, precision and memory format.
        data: Base classes, and pictures to draw episodes from.
        network: The network.
    """

    def __init__(
        self, task: FewShot, protocol: Protocol, data: FewShotData, network: nn.Module
    ) -> None:
        super().__init__(network, data.train)
        self._task, self._protocol, self._data = task, protocol, data
        self._classifier = next(
            name for name, m in network.named_modules() if isinstance(m, CosineClassifier)
        )

    def loss(self, model: nn.Module, part: Examples) -> Found:
        """The cross-entropy of a batch of base classes."""
        inputs = part.inputs
        if self._protocol.channels_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        scores = model(inputs)
        require_scores(scores, len(part), self._data.num_classes)
        smoothing = self._protocol.label_smoothing
        loss = functional.cross_entropy(scores, part.targets, label_smoothing=smoothing)
        return Found(loss, int((scores.argmax(1) == part.targets).sum()))

    def evaluate(self, loop: Loop, held: Held) -> dict[str, float]:
        """Mean accuracies of episodes with halves of their 95 % intervals, and that of the base."""
        number = self._task.episodes
        number = max(number // VALIDATION_SHARE, 2) if held == "validation" else number
        means, intervals = dict[str, float](), dict[str, float]()
        for name, shots in SHOTS.items():
            episodes = self._task.drawn(self._data, held, shots, number)
            found = self._accuracies(episodes, self._data.pools[held], loop.device)
            means[name], intervals[f"{name}_interval"] = mean_and_interval(found)
        split = self._data.validation if held == "validation" else self._data.test
        base = scores_of(loop.model, split, loop.device, loop.share)[ACCURACY]
        return {**means, "base": base, **intervals}

    @torch.no_grad()
    def _accuracies(
        self, episodes: Sequence[Episode], pool: Pool, device: torch.device
    ) -> list[float]:
        if self._task.statistics == "base" or not tracked(self.network):
            positions = torch.cat([episode.positions for episode in episodes]).unique()
            parts = positions.split(EVALUATION_BATCH_SIZE)
            features = torch.cat([self._features(pool.inputs(p).to(device)) for p in parts])
            return [
                _accuracy(features[torch.searchsorted(positions, episode.positions)], episode)
                for episode in episodes
            ]
        return [self._by_own_statistics(episode, pool, device) for episode in episodes]

    def _by_own_statistics(self, episode: Episode, pool: Pool, device: torch.device) -> float:
        """The accuracy of an episode whose statistics are measured on its own pictures."""
        inputs = pool.inputs(episode.positions).to(device)
        num_measured = len(inputs)
        if self._task.statistics == "support":
            num_measured = episode.support.numel()
        with buffers_kept(self.network):
            recalibrate(self.network, [inputs[:num_measured]]).apply()
            return _accuracy(self._features(inputs), episode)

    def _features(self, inputs: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
        with autocast_of(self._protocol.precision, inputs.device):
            return features_of(self.network, self._classifier, inputs).float()


def _accuracy(features: Float[Tensor, "n d"], episode: Episode) -> float:
    """The accuracy of an episode by the features of its pictures, the support first."""
    ways, shots = episode.support.shape
    support, queries = features[: ways * shots], features[ways * shots :]
    return accuracy(support.unflatten(0, (ways, shots)), queries.unflatten(0, (ways, -1)))
