"""A small detector with batches of its own form, for the tests of the library's tools."""

import torch

from normkit.lab.arms import Arm
from normkit.lab.data.scenes import scenes
from normkit.lab.models.build import build_model
from normkit.lab.models.detectors import DetectorOptions, Pictures, detector
from normkit.lab.tasks.detection import Annotations

SCENES = "scenes:items=digits:side=32:most=2:smallest=40:largest=70:test=6"
BACKBONE = "small-resnet:width=4:blocks=1:stages=3"
NARROW = {"channels": 8, "hidden": 16, "anchor": 4, "proposals": 20, "rois": 8, "detections": 5}


class WithMasks(DetectorOptions):
    masks = True


def backbone(norm):
    return build_model(BACKBONE, num_classes=10, input_shape=(1, 32, 32), norm=norm, batch_size=2)


def built(norm="bn", kind=DetectorOptions, batch_size=2, **options):
    pictures = Pictures(shape=(1, 32, 32), largest=32, num_classes=10)
    torch.manual_seed(0)
    given = kind(**(NARROW | options))
    return detector(backbone(norm), Arm.parse(norm), given, pictures, batch_size)


def batches(number=2, size=2, masks=False):
    examples = Annotations(scenes(SCENES).train, masks)
    parts = torch.arange(number * size).split(size)
    found = [examples.take(part) for part in parts]
    return [(batch.images, batch.targets) for batch in found]
