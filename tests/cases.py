"""One row a layer; the contract tests follow by themselves."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

import normkit as nk

TOLERANCE = {
    torch.float64: {"atol": 1e-10, "rtol": 1e-10},
    torch.float32: {"atol": 2e-5, "rtol": 2e-5},
    torch.bfloat16: {"atol": 2e-2, "rtol": 2e-2},  # 8 bits of mantissa
    torch.float16: {"atol": 3e-3, "rtol": 3e-3},  # 11 bits
}

SHAPES = {
    "odd": (4, 6, 5, 7),  # no spatial axis is a power of two
    "dense": (5, 6),  # no positions at all
    "line": (3, 6, 9),
    "volume": (3, 6, 2, 3, 5),
    "pixel": (7, 6, 1, 1),  # 1x1 maps, and a last ghost batch that is smaller
    "one": (1, 6, 5, 3),  # a single example
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layer, its oracle, the shapes it takes in training, and its counterpart in torch."""

    name: str
    layer: type[nn.Module]
    kind: str
    options: dict = field(default_factory=dict)
    shapes: tuple[str, ...] = tuple(SHAPES)
    tracks: bool = True
    twin: Callable[[int], nn.Module] | None = None

    def make(self, num_features=6, **options):
        """Build the layer for the case, with other than trivial parameters."""
        layer = self.layer(num_features, **self.options, **options)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in layer.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(noise.to(parameter.dtype), alpha=0.3)
        return layer

    def __str__(self):
        return self.name


def without_bias(layer):
    """What ``bias=False`` builds, which torch's batch and group norms take since 2.13."""
    layer.bias = None
    return layer


SMALL = ("odd", "line")
NOT_SINGLE = ("odd", "line", "volume", "one")  # an example's channel has more than one value

CASES = (
    Case(name="bn", layer=nk.BatchNorm, kind="bn", twin=nn.BatchNorm2d,
         shapes=tuple(SHAPES)),
    Case(name="in", layer=nk.InstanceNorm, kind="in", shapes=NOT_SINGLE, tracks=False,
         twin=lambda c: nn.InstanceNorm2d(c, affine=True)),
    Case(name="ln", layer=nk.LayerNorm, kind="ln", tracks=False,
         twin=lambda c: nn.GroupNorm(1, c)),
    Case(name="gn", layer=nk.GroupNorm, kind="gn", options={"num_groups": 3}, tracks=False,
         twin=lambda c: nn.GroupNorm(3, c)),
    Case(name="pn", layer=nk.PositionalNorm, kind="pn", tracks=False),
    Case(name="bgn", layer=nk.BatchGroupNorm, kind="bgn", options={"num_groups": 2}),
    Case(name="bgn-cuts", layer=nk.BatchGroupNorm, kind="bgn", options={"num_groups": 9},
         shapes=("line", "volume", "one")),
    Case(name="ghost", layer=nk.GhostBatchNorm, kind="ghost", options={"ghost_batch_size": 2},
         shapes=("odd", "line", "volume", "one"), twin=nn.BatchNorm2d),
    Case(name="ghost-rest", layer=nk.GhostBatchNorm, kind="ghost",
         options={"ghost_batch_size": 5}, shapes=("odd", "dense", "line", "pixel")),
    Case(name="gbgn", layer=nk.GeneralBatchGroupNorm, kind="gbgn",
         options={"num_groups": 3, "examples_per_group": 2}, twin=nn.BatchNorm2d),
    Case(name="gbgn-whole", layer=nk.GeneralBatchGroupNorm, kind="gbgn",
         options={"num_groups": 2}),
    Case(name="in-tracked", layer=nk.InstanceNorm, kind="in", shapes=NOT_SINGLE,
         options={"track_running_stats": True, "example_weight": 0.25}),
    Case(name="ln-tracked", layer=nk.LayerNorm, kind="ln",
         options={"track_running_stats": True, "example_weight": 0.25}),
    Case(name="gn-tracked", layer=nk.GroupNorm, kind="gn",
         options={"num_groups": 3, "track_running_stats": True, "example_weight": 0.25}),
    Case(name="bn-weighed", layer=nk.BatchNorm, kind="bn", options={"example_weight": 0.25}),
    Case(name="bgn-weighed", layer=nk.BatchGroupNorm, kind="bgn",
         options={"num_groups": 9, "example_weight": 0.5}, shapes=("line", "one")),
    Case(name="gbgn-weighed", layer=nk.GeneralBatchGroupNorm, kind="gbgn",
         options={"num_groups": 3, "example_weight": 0.5}),
    Case(name="bn-scale", layer=nk.BatchNorm, kind="bn", options={"bias": False}, shapes=SMALL,
         twin=lambda c: without_bias(nn.BatchNorm2d(c))),
    Case(name="gn-scale", layer=nk.GroupNorm, kind="gn", shapes=SMALL, tracks=False,
         options={"num_groups": 3, "bias": False}, twin=lambda c: without_bias(nn.GroupNorm(3, c))),
    Case(name="pn-scale", layer=nk.PositionalNorm, kind="pn", shapes=SMALL, tracks=False,
         options={"bias": False}),
)  # fmt: skip

COMPOSITES = (
    Case(name="gnplus", layer=nk.GroupNormPlus, kind="gnplus", options={"num_groups": 3},
         shapes=NOT_SINGLE),
    Case(name="gnplus-batch", layer=nk.GroupNormPlus, kind="gnplus", shapes=SMALL,
         options={"num_groups": 3, "order": "batch-first"}),
    Case(name="gnplus-parallel", layer=nk.GroupNormPlus, kind="gnplus", shapes=SMALL,
         options={"num_groups": 2, "order": "parallel", "example_weight": 0.25}),
    Case(name="bcn", layer=nk.BatchChannelNorm, kind="bcn", options={"num_groups": 3},
         shapes=NOT_SINGLE),
    Case(name="bcn-channel", layer=nk.BatchChannelNorm, kind="bcn", shapes=SMALL,
         options={"num_groups": 2, "channel_affine": "channel", "example_weight": 0.25}),
    Case(name="bcn-micro", layer=nk.BatchChannelNorm, kind="bcn-micro",  # never 2 values a group:
         options={"num_groups": 2, "micro_batch": True}),  # their gradient is all rounding
    Case(name="sn", layer=nk.SwitchableNorm, kind="sn"),
    Case(name="sn-two", layer=nk.SwitchableNorm, kind="sn", options={"use_batch": False},
         tracks=False, shapes=SMALL),
    Case(name="sn-weighed", layer=nk.SwitchableNorm, kind="sn",
         options={"example_weight": 0.25}, shapes=SMALL),
    Case(name="ibn", layer=nk.InstanceBatchNorm, kind="ibn", shapes=NOT_SINGLE),
    Case(name="bcn-scale", layer=nk.BatchChannelNorm, kind="bcn", shapes=SMALL,
         options={"num_groups": 3, "bias": False}),
    Case(name="sn-scale", layer=nk.SwitchableNorm, kind="sn", shapes=SMALL,
         options={"bias": False}),
    Case(name="gw", layer=nk.GroupWhitening, kind="gw", options={"num_groups": 3}, tracks=False,
         shapes=NOT_SINGLE),
)  # fmt: skip

EVERY = CASES + COMPOSITES

PLAIN = tuple(case for case in CASES if "-" not in case.name)
"""One row for each of the eight layers."""

NOT_PARTITION = ("track_running_stats", "example_weight", "micro_batch", "bias")


MAIN = tuple(case for case in EVERY if "-" not in case.name or case.name == "bcn-micro")
"""One row for each method."""


def statistics(layer):
    """The module that has the running statistics: the layer, or its batch stage."""
    return next(m for m in layer.modules() if getattr(m, "running_mean", None) is not None)


def groups(case):
    """Options of the case that say which elements share statistics."""
    return {k: v for k, v in case.options.items() if k not in NOT_PARTITION}


def case_shapes(cases=CASES):
    """Every case with each of its shapes, and the words that name them in a report."""
    rows = [(case, SHAPES[shape]) for case in cases for shape in case.shapes]
    return {
        "argvalues": rows,
        "ids": [f"{case}-{'x'.join(map(str, shape))}" for case, shape in rows],
    }


def randn(*shape, seed=0, dtype=torch.float64, mean=0.0, std=1.0):
    """Reproducible normal values of any dtype."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * std + mean).to(dtype)
