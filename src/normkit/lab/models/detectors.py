"""Faster and Mask R-CNN with a feature pyramid on any backbone: torchvision's, put together."""

import importlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from normkit import freeze_statistics
from normkit.lab.arms import FROZEN, NONE, Arm
from normkit.lab.changes import BuiltModel
from normkit.lab.frozen import Frozen
from normkit.lab.models.features import Level, chosen_levels, levels_of, require_same_maps
from normkit.lab.slots import PROBE_SIZE, is_batch_norm
from normkit.lab.torchvision_ops import serve_detection

BoxHead = Literal["2fc", "4conv1fc"]
Outside = Literal["backbone", "heads", "fpn+heads"]
Size = Annotated[int, Field(ge=1, le=2**16)]
LEAST_STRIDE = 4  # of the pyramid's first map
BOX_SIDE, MASK_SIDE = 7, 14  # of what is cut out for the heads
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
GREY_MEAN, GREY_STD = [0.2], [0.2]


class DetectorOptions(Frozen):
    """What decides a detector besides its backbone and its norm."""

    masks: ClassVar[bool] = False
    """Whether it is a Mask R-CNN."""

    head: BoxHead = Field(default="2fc", description="2fc or 4conv1fc: the head of boxes")
    norms: Outside = Field(
        default="backbone",
        description="backbone, heads (and backbone) or fpn+heads: where norms stand",
    )
    freeze: bool = Field(
        default=False,
        description="yes or no: running statistics of the backbone's batch norms stand still",
    )
    channels: Size = Field(default=256, description="channels of pyramid and heads, 1 or more")
    hidden: Size = Field(default=1024, description="features of a box head, 1 or more")
    anchor: Size = Field(default=8, description="side of an anchor, times the map's stride")
    proposals: Size = Field(default=2000, description="proposals of a picture, 1 or more")
    detections: Size = Field(default=100, description="objects found in a picture, at most")
    rois: Size = Field(default=512, description="regions that heads are trained on, a picture")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures:
    """What a detector gets.

    Args:
        shape: Channels, height and width.
        largest: Longest side of a picture; the height is its shorter one.
        num_classes: Classes of objects.
    """

    shape: tuple[int, int, int]
    largest: int
    num_classes: int


def outside_arm(arm: Arm) -> Arm | None:
    """What stands outside of the backbone: the norm itself, wherever the arm puts it inside.

    None where the arm says no norm, or one whose statistics stand still: a new one has none.

    Example:
        >>> [str(outside_arm(Arm.parse(text))) for text in ("gn:32+ws", "xbn/gn:64", "frozen-bn")]
        ['gn:32+ws', 'gn:64', 'None']
    """
    if arm.placement in (FROZEN, NONE) or arm.norm is None:
        return None
    return Arm("", arm.norm, arm.weights)


def detector(
    backbone: BuiltModel, arm: Arm, options: DetectorOptions, pictures: Pictures, batch_size: int
) -> BuiltModel:
    """Put a detector on a classifier whose norms are in place, and the arm's norm into the rest.

    Args:
        backbone: A classifier; its parts become the detector's.
        arm: What stands in it.
        options: Heads, sizes, and where norms stand.
        pictures: What it gets.
        batch_size: Pictures that it is trained on at a time.

    Raises:
        NormError: If the classifier gives no pyramid of maps, or the norm does not fit.
    """
    serve_detection()
    name = type(backbone.model).__name__
    levels = chosen_levels(levels_of(backbone.model, pictures.shape, name), LEAST_STRIDE, name)
    names = require_same_maps(backbone.model, levels, pictures.shape, name)
    outer = outside_arm(arm) if options.norms != "backbone" else None
    model = _assembled(backbone.model, levels, names, outer is not None, options, pictures)
    norms = tuple(replace(p, name=f"backbone.body.{p.name}") for p in backbone.norms)
    kept = {at for at, _ in model.named_modules()}
    built = BuiltModel(
        model=model,
        norms=tuple(p for p in norms if p.name in kept),
        standardized=tuple(
            name for at in backbone.standardized if (name := f"backbone.body.{at}") in kept
        ),
    )
    if options.freeze:
        freeze_batch_norms_(model.backbone.body)
    return built if outer is None else _with_outer_norms(built, outer, levels, options, batch_size)


def scaled(pictures: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """Pictures with values in [0, 1], minus ImageNet's mean, by its standard deviation."""
    grey = pictures.shape[1] == 1
    mean, std = (GREY_MEAN, GREY_STD) if grey else (IMAGENET_MEAN, IMAGENET_STD)
    shape = (1, -1, 1, 1)
    return (pictures - pictures.new_tensor(mean).view(shape)) / pictures.new_tensor(std).view(shape)


def freeze_batch_norms_(model: nn.Module) -> None:
    """Let the running statistics of batch norms stand still, if a network has any."""
    if any(map(is_batch_norm, model.modules())):
        freeze_statistics(model, lambda norm, _: is_batch_norm(norm))


def _assembled(
    body: nn.Module,
    levels: tuple[Level, ...],
    names: dict[str, str],
    has_norms: bool,
    options: DetectorOptions,
    pictures: Pictures,
) -> Any:
    library = importlib.import_module("torchvision.models.detection")
    faster, mask = (
        importlib.import_module(f"{library.__name__}.{name}")
        for name in ("faster_rcnn", "mask_rcnn")
    )
    in_heads = nn.BatchNorm2d if has_norms else None
    in_pyramid = in_heads if options.norms == "fpn+heads" else None
    channels, hidden = options.channels, options.hidden
    backbone = library.backbone_utils.BackboneWithFPN(
        body, names, [level.shape[0] for level in levels], channels, norm_layer=in_pyramid
    )
    if options.head == "2fc":
        head = faster.TwoMLPHead(channels * BOX_SIDE**2, hidden)
    else:
        size = (channels, BOX_SIDE, BOX_SIDE)
        head = faster.FastRCNNConvFCHead(size, [channels] * 4, [hidden], norm_layer=in_heads)
    num_classes = pictures.num_classes + 1
    common = {
        "box_roi_pool": _pooled(levels, BOX_SIDE, options),
        "box_head": head,
        "box_predictor": faster.FastRCNNPredictor(hidden, num_classes),
        **_proposing(levels, options),
        **_reading(pictures),
    }
    if not options.masks:
        return library.FasterRCNN(backbone, **common)
    return library.MaskRCNN(
        backbone,
        mask_roi_pool=_pooled(levels, MASK_SIDE, options),
        mask_head=mask.MaskRCNNHeads(channels, [channels] * 4, 1, norm_layer=in_heads),
        mask_predictor=mask.MaskRCNNPredictor(channels, channels, num_classes),
        **common,
    )


def _pooled(levels: tuple[Level, ...], side: int, options: DetectorOptions) -> nn.Module:
    """Cuts regions out of the map whose stride fits their size."""
    pooling = importlib.import_module("torchvision.ops").MultiScaleRoIAlign
    return pooling(
        [str(at) for at in range(len(levels))],
        output_size=side,
        sampling_ratio=2,
        canonical_scale=28 * options.anchor,  # 224 for anchors of 8, as in the paper
    )


def _proposing(levels: tuple[Level, ...], options: DetectorOptions) -> dict[str, Any]:
    """What proposes regions; the pyramid has one more map, of twice the last stride."""
    rpn = importlib.import_module("torchvision.models.detection.rpn")
    strides = [level.stride for level in levels]
    strides.append(2 * strides[-1])
    anchors = rpn.AnchorGenerator(
        sizes=tuple((options.anchor * stride,) for stride in strides),
        aspect_ratios=((0.5, 1.0, 2.0),) * len(strides),
    )
    return {
        "rpn_anchor_generator": anchors,
        "rpn_pre_nms_top_n_train": options.proposals,
        "rpn_post_nms_top_n_train": options.proposals,
        "rpn_pre_nms_top_n_test": max(1, options.proposals // 2),
        "rpn_post_nms_top_n_test": max(1, options.proposals // 2),
        "box_batch_size_per_image": options.rois,
        "box_detections_per_img": options.detections,
    }


def _reading(pictures: Pictures) -> dict[str, Any]:
    grey = pictures.shape[0] == 1
    return {
        "min_size": pictures.shape[1],
        "max_size": pictures.largest,
        "image_mean": GREY_MEAN if grey else IMAGENET_MEAN,
        "image_std": GREY_STD if grey else IMAGENET_STD,
    }


def _with_outer_norms(
    built: BuiltModel,
    arm: Arm,
    levels: tuple[Level, ...],
    options: DetectorOptions,
    batch_size: int,
) -> BuiltModel:
    """Put a norm into the places of pyramid and heads; each sees maps of its own kind."""
    norms, standardized = list(built.norms), list(built.standardized)
    for name, example, examples in _outer_parts(built.model, levels, options, batch_size):
        part = built.model.get_submodule(name)
        done = arm.apply_(part, example_input=(example,), batch_size=examples, name=name)
        norms += [replace(place, name=f"{name}.{place.name}") for place in done.norms]
        standardized += [f"{name}.{at}" for at in done.standardized]
    return replace(built, norms=tuple(norms), standardized=tuple(standardized))


def _outer_parts(
    model: nn.Module, levels: tuple[Level, ...], options: DetectorOptions, batch_size: int
) -> Iterator[tuple[str, Any, int]]:
    """Name, an example of what it gets, and how many examples a batch has."""
    if options.norms == "fpn+heads":
        maps = ((str(at), torch.zeros(PROBE_SIZE, *level.shape)) for at, level in enumerate(levels))
        yield "backbone.fpn", OrderedDict(maps), batch_size
    if options.head == "4conv1fc":
        example = torch.zeros(PROBE_SIZE, options.channels, BOX_SIDE, BOX_SIDE)
        yield "roi_heads.box_head", example, batch_size * options.rois
    if options.masks:
        example = torch.zeros(PROBE_SIZE, options.channels, MASK_SIDE, MASK_SIDE)
        yield "roi_heads.mask_head", example, batch_size * options.rois // 4
