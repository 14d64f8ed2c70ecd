"""A run's network before its first step, and what is said of it when it is saved."""

import copy
from pathlib import Path
from typing import Any

from normkit.convert.calibration import calibrate_like_
from normkit.lab.arms import FROZEN, NONE, Arm
from normkit.lab.changes import BuiltModel
from normkit.lab.checkpoints import Alterations, restored
from normkit.lab.data import Dataset, Split, open_data, stratified_order
from normkit.lab.data.dataset import SPLIT_SEED
from normkit.lab.models.build import apply_arm, build_model
from normkit.lab.spec import Protocol, TrainingSpec

NUM_CALIBRATION_EXAMPLES = 1000  # a pretrained network's new norms are fitted on so many
CALIBRATION_BATCH_SIZE = 100
UNCALIBRATED = (NONE, FROZEN)
FROZEN_AS = "bn"  # what the layer is whose statistics stand still


def data_of(protocol: Protocol) -> Dataset[Split]:
    """The data set of a protocol.

    Raises:
        NormError: If it is unknown or cannot be read.
    """
    return open_data(protocol.data, protocol.limit, protocol.image_size, protocol.hold_out)


def built(spec: TrainingSpec, dataset: Dataset[Split]) -> BuiltModel:
    """The run's network before its first step.

    Pretrained weights are loaded before the norms are replaced.

    Raises:
        NormError: If it cannot be built.
    """
    protocol = spec.protocol
    options: dict[str, Any] = {
        "num_classes": dataset.num_classes,
        "input_shape": dataset.input_shape,
        "batch_size": spec.batch_size,
    }
    if protocol.weights is None:
        return build_model(
            protocol.model, norm=spec.norm, seed=spec.seed, drop_path=protocol.drop_path, **options
        )
    return pretrained(spec, dataset)


def pretrained(spec: TrainingSpec, dataset: Dataset[Split]) -> BuiltModel:
    """A network with the weights of a file, changed by the run's arm.

    Norms are calibrated: in the order of the forward, running statistics, scales and shifts are set
    so that the outputs of each norm have the mean and variance that they had in the file's network.
    ``+ws`` gives filters a learned gain and offset with which they are the file's. Norms that an
    arm adds after sums are not calibrated, nor is ``frozen-bn``, which has the file's statistics.
    """
    protocol, shape = spec.protocol, dataset.input_shape
    original = build_model(
        protocol.model,
        num_classes=dataset.num_classes,
        input_shape=shape,
        seed=spec.seed,
        drop_path=protocol.drop_path,
    ).model
    original = restored(original, Path(protocol.weights or ""))
    found = apply_arm(
        copy.deepcopy(original),
        spec.norm,
        batch_size=spec.batch_size,
        input_shape=shape,
        name=protocol.model,
        preserve=True,
    )
    if Arm.parse(spec.norm).placement in UNCALIBRATED:
        return found
    order = stratified_order(dataset.train.targets, SPLIT_SEED)
    parts = order[:NUM_CALIBRATION_EXAMPLES].split(CALIBRATION_BATCH_SIZE)
    batches = [dataset.train.take(part).inputs for part in parts]
    calibrate_like_(found.model, original, [place.name for place in found.norms], batches)
    return found


def alterations_of(built: BuiltModel, protocol: Protocol) -> Alterations:
    """What ``--checkpoint`` of the other commands has to do before it loads the weights.

    Args:
        built: The run's network.
        protocol: Names the file that the run started from, if there was one.
    """
    specs = {place.name: place.norm.partition("+")[0] for place in built.norms}
    changes = {at: FROZEN_AS if spec == FROZEN else spec for at, spec in specs.items()}
    endings = {place.norm.partition("+")[2] for place in built.norms} - {""}
    before = Alterations() if protocol.weights is None else Alterations.read(Path(protocol.weights))
    return before.then(
        Alterations(
            changes={at: spec for at, spec in changes.items() if spec != NONE},
            removed=tuple(at for at, spec in specs.items() if spec == NONE),
            weights={at: ending for ending in endings for at in built.standardized},
            preserved=built.preserved,
            after_sum=built.after_sum,
        )
    )
