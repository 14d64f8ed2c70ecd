"""Backbones that have learned before: from single objects, or from weights of other runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normkit.errors import DataError
from normkit.lab.arms import FROZEN, Arm
from normkit.lab.changes import BuiltModel
from normkit.lab.checkpoints.reading import read_metadata, read_weights
from normkit.lab.data import Dataset, Examples
from normkit.lab.data.annotated import Parts
from normkit.lab.data.scenes import single_items
from normkit.lab.device import CPU, seeded
from normkit.lab.loop import Loop, make_optimizer
from normkit.lab.models.build import build_model
from normkit.lab.models.detectors import scaled
from normkit.lab.recipe import Recipe, Timetable
from normkit.lab.spec import Protocol, TrainingSpec
from normkit.lab.tasks.classification import ClassificationRun
from normkit.text import listed, printable

NUM_ITEMS, BATCH_SIZE = 1000, 32  # pictures of single objects, and how many of them at a time
RECIPE = Recipe(
    base_lr=0.05, lr_batch_size=None, momentum=0.9, weight_decay=1e-4, schedule="cosine"
)


def learned_norm(arm: Arm) -> str:
    """The norm that a backbone learns with before its statistics are frozen."""
    return "bn" if arm.placement == FROZEN else str(arm)


def classifier(spec: TrainingSpec, data: Any, norm: str | None = None) -> BuiltModel:
    """The run's backbone, as a network that classifies.

    Args:
        spec: Says the model, the norm and the seed.
        data: Says the classes and the shape of a picture.
        norm: What stands in it, if not the run's norm.
    """
    protocol = spec.protocol
    return build_model(
        protocol.model,
        num_classes=data.num_classes,
        input_shape=data.input_shape,
        norm=norm or spec.norm,
        batch_size=spec.batch_size,
        seed=spec.seed,
        drop_path=protocol.drop_path,
    )


def learned_on_items(spec: TrainingSpec, data: Parts[Any], num_epochs: int) -> dict[str, Tensor]:
    """Weights and buffers of a backbone that has learned to classify single objects.

    The engine's steps, by ``RECIPE``; a last batch that is not full is left out. Nothing of torch's
    random state is used up.

    Args:
        spec: Says the model, the norm and the seed.
        data: Scenes, whose objects are shown one by one.
        num_epochs: Passes over 1000 pictures.
    """
    pictures, classes = single_items(data.name, NUM_ITEMS)
    with seeded(spec.seed):
        model = classifier(spec, data, learned_norm(Arm.parse(spec.norm))).model
        orders = torch.Generator().manual_seed(spec.seed)
        num_batches = NUM_ITEMS // BATCH_SIZE
        protocol = Protocol(**RECIPE.model_copy(update={"epochs": num_epochs}).model_dump())
        rate = Timetable(protocol, num_batches, BATCH_SIZE).rate
        items = Examples(inputs=scaled(pictures), targets=classes)
        told_apart = Dataset(
            name=data.name, num_classes=data.num_classes, train=items, validation=items, test=items
        )
        loop = Loop(model, protocol, rate(0), CPU, ClassificationRun(model, protocol, told_apart))
        # The engine's fused optimizer rounds differently, and would give other weights than before.
        loop.optimizer = make_optimizer(model.parameters(), protocol, rate(0))
        for epoch in range(num_epochs):
            parts = torch.randperm(NUM_ITEMS, generator=orders).split(BATCH_SIZE)[:num_batches]
            for at, part in enumerate(parts, epoch * num_batches):
                loop.set_rate(rate(at))
                loop.step([items.take(part)])
    return model.state_dict()


def weights_in(folder: str | None) -> tuple[Path, ...]:
    """The files of weights in a folder that an option names; none without it."""
    if folder is None:
        return ()
    return tuple(sorted(Path(folder).expanduser().glob("*.safetensors")))


def kept_weights(folder: Path, norm: str) -> Path:
    """The file of a folder whose network has a norm.

    Args:
        folder: Holds what ``normkit compare --save-weights`` wrote.
        norm: An arm; of ``frozen-bn`` that of ``bn``.

    Raises:
        DataError: If there is none.
    """
    if not folder.is_dir():
        raise DataError(
            f"{printable(folder)} is no folder; give the folder weights of normkit compare "
            f"--save-weights, or leave backbones out"
        )
    wanted = learned_norm(Arm.parse(norm))
    found = {path: read_metadata(path).get("norm") for path in sorted(folder.glob("*.safetensors"))}
    for path, own in found.items():
        if own == wanted:
            return path
    raise DataError(
        f"{printable(folder)} has no weights of a network with {wanted}, only with "
        f"{listed(sorted({str(own) for own in found.values()})) or 'nothing'}; train one by "
        f"normkit compare --save-weights"
    )


def load_backbone_(body: nn.Module, tensors: dict[str, Tensor], name: str) -> None:
    """Give a backbone the weights of a classifier that it is a part of.

    Raises:
        DataError: If some are missing, or have other shapes.
    """
    own = body.state_dict()
    wrong = [
        at for at, value in own.items() if at not in tensors or tensors[at].shape != value.shape
    ]
    if wrong:
        raise DataError(
            f"{printable(name)} has no weights of these shapes for {listed(wrong)}; check --model"
        )
    body.load_state_dict({at: tensors[at] for at in own})


def start_backbone_(
    body: nn.Module, spec: TrainingSpec, data: Any, pretrain: int, backbones: str | None
) -> None:
    """Give a backbone what it has learned before, if anything.

    Args:
        body: The backbone.
        spec: Of the run.
        data: What the run trains on.
        pretrain: Epochs on single objects.
        backbones: A folder of weights.
    """
    if backbones is not None:
        path = kept_weights(Path(backbones).expanduser(), spec.norm)
        load_backbone_(body, read_weights(path), str(path))
    elif pretrain:
        load_backbone_(body, learned_on_items(spec, data, pretrain), "the backbone")
