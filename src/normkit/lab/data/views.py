"""Preparation of pictures for a network: resizing, and augmentation in training."""

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from normkit.lab.torchvision_ops import register_missing_operators

PADDING_SHARE = 8  # a picture is padded by an eighth of its side before cropping: 4 of 32
CUTOUT_SHARE = 2  # the side of a cutout is half that of the picture: 16 of 32
EVALUATION_SHARE = 0.875  # share of the shorter side that a network gets: 224 of 256


def _transforms() -> Any:
    register_missing_operators()
    return importlib.import_module("torchvision.transforms.v2")


def at_size(picture: Shaped[Tensor, "c h w"], size: tuple[int, int]) -> Shaped[Tensor, "c a b"]:
    """Bring a picture to the size of the network's inputs, as at evaluation.

    As is usual on ImageNet, a picture of another size is resized so that its shorter side is
    ``1 / 0.875`` of the network's input, and then cropped to the centre.
    """
    if tuple(picture.shape[1:]) == size:
        return picture
    transforms = _transforms()
    share = max(side / own for side, own in zip(size, picture.shape[1:], strict=True))
    scaled = [round(own * share / EVALUATION_SHARE) for own in picture.shape[1:]]
    resized = transforms.functional.resize(picture, scaled, antialias=True)
    return transforms.functional.center_crop(resized, list(size))


class Augmentation:
    """Random augmentation of one picture by torchvision, drawn from torch's random state.

    ========  =====================================================================
    imagenet  crop of a random 8 to 100 % of the picture, resized
    crop      shift by up to an eighth of the side, with zeros beyond the border
    flip      horizontal flip with probability 1/2
    cutout    a square of half the side is set to zero; it may cross the border
    ========  =====================================================================

    Source:
        DeVries & Taylor 2017, "Improved Regularization of Convolutional Neural Networks with
        Cutout", for the last.
    """

    def __init__(self, names: Sequence[str], size: tuple[int, int]) -> None:
        transforms = _transforms()
        steps = []
        if "imagenet" in names:
            steps.append(transforms.RandomResizedCrop(size, antialias=True))
        if "crop" in names:
            padding = [max(1, side // PADDING_SHARE) for side in reversed(size)]
            steps.append(transforms.RandomCrop(size, padding=padding))
        if "flip" in names:
            steps.append(transforms.RandomHorizontalFlip())
        self._steps = transforms.Compose(steps) if steps else lambda picture: picture
        self._cuts = "cutout" in names
        self._resizes = "imagenet" in names
        self._size = size

    def __call__(self, picture: Shaped[Tensor, "c h w"]) -> Shaped[Tensor, "c a b"]:
        """Augment a picture."""
        if not self._resizes:
            picture = at_size(picture, self._size)
        picture = self._steps(picture)
        return cutout(picture) if self._cuts else picture


def cutout(picture: Shaped[Tensor, "c h w"]) -> Shaped[Tensor, "c h w"]:
    """Set a square around a random pixel to zero."""
    height, width = picture.shape[1:]
    half = max(1, min(height, width) // CUTOUT_SHARE // 2)
    y, x = (int(torch.randint(side, ())) for side in (height, width))
    picture = picture.clone()
    picture[:, max(0, y - half) : y + half, max(0, x - half) : x + half] = 0
    return picture
