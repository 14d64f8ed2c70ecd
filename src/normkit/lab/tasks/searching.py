"""The search for cells: a supernet in training, and where what it finds is kept."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from normkit.lab.course import Course, EpochSoFar, Hooks, check_finite, nothing
from normkit.lab.data import Dataset, Examples, Split
from normkit.lab.evaluation import ACCURACY, require_scores, scores_of
from normkit.lab.files import write_whole
from normkit.lab.frozen import Frozen
from normkit.lab.loading import Loading, loaded_batches
from normkit.lab.loop import Step
from normkit.lab.models.darts import Supernet
from normkit.lab.models.genotype import Genotype, read_genotype
from normkit.lab.recipe import Recipe
from normkit.lab.records import sources_of
from normkit.lab.resume import Checkpoint
from normkit.lab.spec import TrainingSpec
from normkit.lab.task import Found, Held, TaskRun
from normkit.lab.tasks.attack import buffers_kept
from normkit.lab.tasks.bilevel import (
    ArchitectureOptimizer,
    gradients_of,
    second_order_gradients,
    weight_step_of,
)
from normkit.lab.tasks.cell_figure import draw_genotype

if TYPE_CHECKING:
    from normkit.lab.loop import Loop

Order = Literal["first", "second"]
FOLDER_VARIABLE = "NORMKIT_SEARCHED"
DEFAULT_FOLDER = "~/.cache/normkit/searched"


def searched_folder() -> Path:
    """Where genotypes are kept: ``$NORMKIT_SEARCHED``, or a folder in the user's cache."""
    return Path(os.environ.get(FOLDER_VARIABLE, DEFAULT_FOLDER)).expanduser()


class SearchedEpoch(Frozen):
    """What an epoch of a search came to.

    Args:
        epoch: Its number, from 1.
        train_loss: Mean loss of the supernet.
        accuracy: Of the supernet on validation examples.
        genotype: The strongest cells after it.
    """

    epoch: int
    train_loss: float
    accuracy: float
    genotype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchitectureSteps:
    """How the architecture parameters move.

    Args:
        order: Whether a step of the weights is looked ahead.
        rate: Learning rate of Adam.
        weight_decay: Of these parameters.
    """

    order: Order = "first"
    rate: float = 3e-4
    weight_decay: float = 1e-3


class SearchRun(TaskRun):
    """A supernet whose weights learn from one half of the training examples.

    Before each step of the weights the architecture parameters take one, by the loss on a batch of
    the other half. Norms are in training mode in both; running statistics move in the weights'
    steps only.

    Args:
        network: The supernet.
        dataset: Its training examples are halved: every second one is for the architecture.
        spec: Batch size, seed and augmentation.
        steps: How the architecture parameters move.
    """

    network: Supernet

    def __init__(
        self,
        network: Supernet,
        dataset: Dataset[Split],
        spec: TrainingSpec,
        steps: ArchitectureSteps,
    ) -> None:
        positions = torch.arange(len(dataset.train))
        super().__init__(network, dataset.train.keep(positions[::2]))
        self._others = dataset.train.keep(positions[1::2])
        self._dataset, self._spec, self._steps = dataset, spec, steps
        self._optimizer = ArchitectureOptimizer(
            [*network.architecture.parameters()], steps.rate, steps.weight_decay
        )

    def parameters(self, network: nn.Module, recipe: Recipe) -> Any:
        """All weights; the architecture has an optimizer of its own."""
        return [p for name, p in network.named_parameters() if not name.startswith("architecture.")]

    def loss(self, model: nn.Module, part: Examples) -> Found:
        """The cross-entropy of a batch."""
        scores = model(part.inputs)
        require_scores(scores, len(part), self._dataset.num_classes)
        loss = functional.cross_entropy(scores, part.targets)
        return Found(loss, int((scores.argmax(1) == part.targets).sum()))

    def begin_step(self, loop: Loop, num_steps: int, parts: Any) -> None:
        """Move the architecture parameters."""
        held = self._drawn(num_steps).to(loop.device)
        self.move_architecture(loop, parts[0], held)

    def move_architecture(self, loop: Loop, part: Examples, held: Examples) -> None:
        """Take a step of the architecture parameters.

        Args:
            loop: Has the model, and the optimizer of the weights.
            part: The batch that the weights learn from next.
            held: A batch of the other half.
        """
        architecture = self._optimizer.architecture

        def validation_loss() -> Float[Tensor, ""]:
            return self.loss(loop.model, held).loss

        with buffers_kept(loop.network):
            if self._steps.order == "first":
                gradients = gradients_of(validation_loss(), architecture)
            else:
                recipe = loop.protocol
                rate = float(loop.optimizer.param_groups[0]["lr"])
                gradients = second_order_gradients(
                    lambda: self.loss(loop.model, part).loss,
                    validation_loss,
                    architecture,
                    self.parameters(loop.network, recipe),
                    weight_step_of(loop.optimizer, rate, recipe.momentum, recipe.weight_decay),
                )
        self._optimizer.step(gradients)

    def _drawn(self, num_steps: int) -> Examples:
        """The batch of the other half for a step, the same one each time."""
        seed = (self._spec.seed * 1_000_003 + num_steps) % 2**63
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self._others), generator=generator)
        loading = Loading(self._spec.protocol.augment, seed)
        return next(loaded_batches(self._others, [order[: self._spec.batch_size]], loading))

    def evaluate(self, loop: Loop, held: Held) -> dict[str, float]:
        """Accuracy of the supernet."""
        split = self._dataset.validation if held == "validation" else self._dataset.test
        return scores_of(loop.model, split, loop.device, loop.share)

    def state(self) -> dict[str, Tensor]:
        """The state of the architecture's optimizer."""
        return self._optimizer.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from this state."""
        self._optimizer.load_state(state)


@dataclass(slots=True, kw_only=True)
class CellSearch:
    """A search from its first step, or its checkpoint, to a genotype that is kept.

    Args:
        run: The supernet in training.
        spec: Decides the search: equal specs find equal cells on one machine.
        dataset: The data.
        path: Of the genotype; None if neither it nor a checkpoint is kept.
        on_step: Called after each step.
    """

    run: SearchRun
    spec: TrainingSpec
    dataset: Dataset[Split]
    path: Path | None
    on_step: Callable[[], object] = nothing
    _course: Course = field(init=False)

    def __post_init__(self) -> None:
        path = self.path
        self._course = Course(
            task=self.run,
            protocol=self.spec.protocol,
            batch_size=self.spec.batch_size,
            seed=self.spec.seed,
            hooks=Hooks(
                after_step=self._after_step,
                after_epoch=self._note,
            ),
            checkpoint=path and Checkpoint(path.with_suffix(".safetensors")),
        )

    def genotype(self) -> Genotype:
        """Search, and keep what was found with a picture of it beside."""
        course = self._course
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        course.resume()
        course.train()
        found = self.run.network.architecture.genotype()
        if self.path is not None:
            draw_genotype(found, self.path.with_suffix(".svg"))
            found.write(self.path)
        if course.checkpoint is not None:
            course.checkpoint.remove()
        return found

    def _after_step(self, num_steps: int, step: Step) -> None:
        self.on_step()
        check_finite(step.loss, num_steps)

    def _note(self, epoch: EpochSoFar) -> None:
        """Write down what an epoch of the search came to, for who waits."""
        if self.path is None:
            return
        line = SearchedEpoch(
            epoch=self._course.num_epochs + 1,
            train_loss=epoch.loss,
            accuracy=self._course.loop.evaluate("validation")[ACCURACY],
            genotype=str(self.run.network.architecture.genotype()),
        )
        lines = self._course.hooks.notes.setdefault("epochs", [])  # as those of a killed search
        lines.append(line.model_dump_json())
        write_whole(self.path.with_suffix(".jsonl"), "\n".join(lines) + "\n")


def kept_at(spec: TrainingSpec, dataset: Dataset[Split]) -> Path:
    """Where the genotype of a search is kept; the name says norm, batch size and seed."""
    sources = sources_of(spec.protocol, dataset.fingerprint)
    return searched_folder() / f"{spec.file_name}-{sources.key}.json"


def kept(path: Path) -> Genotype | None:
    """A genotype that was found before; None if there is none."""
    return read_genotype(str(path)) if path.exists() else None
