"""One trial of a layer: all its settings, drawn from a seed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf, nan, prod

import torch

import normkit as nk

LAYERS = {
    "bn": nk.BatchNorm,
    "in": nk.InstanceNorm,
    "ln": nk.LayerNorm,
    "gn": nk.GroupNorm,
    "pn": nk.PositionalNorm,
    "bgn": nk.BatchGroupNorm,
    "ghost": nk.GhostBatchNorm,
    "gbgn": nk.GeneralBatchGroupNorm,
    "gnplus": nk.GroupNormPlus,
    "bcn": nk.BatchChannelNorm,
    "sn": nk.SwitchableNorm,
    "ibn": nk.InstanceBatchNorm,
    "gw": nk.GroupWhitening,
}
TRACKED = ("bn", "bgn", "ghost", "gbgn", "gnplus", "bcn", "sn", "ibn", "in", "ln", "gn")
OWN_EXAMPLE = ("in", "ln", "gn")  # that track only if asked to
DTYPES = ("float32", "float32", "float32", "float64", "bfloat16", "float16")
USUAL, LARGEST = 3000, 20_000  # elements of a map
SCALES = (1.0, 1.0, 1.0, 1e-6, 1e-3, 1e3, 1e6)
OFFSETS = (0.0, 0.0, 1.0, 30.0, 1e3, 1e6)
PATTERNS = (
    "normal",
    "normal",
    "normal",
    "normal",
    "constant",
    "constant channels",
    "zeros",
    "outlier",
    "first apart",
    "few values",
)
LAYOUTS = (
    "contiguous",
    "contiguous",
    "channels_last",
    "sliced",
    "stepped",
    "transposed",
    "expanded",
    "windows",
    "unaligned",
)
OVERLAPPING = ("expanded", "windows")  # several elements are one


@dataclass(frozen=True)
class Step:
    """One call of the layer.

    Args:
        mode: ``"train"``, ``"eval"``, ``"frozen"``: trained with frozen statistics, or
            ``"off"`` and ``"off-eval"``: after ``track_running_stats`` was switched off.
        bad: Positions in the flattened map, and what is put there.
        mask: ``""``: none; ``"positions"``: of which about half are valid; ``"lengths"`` along the
            last axis. What is not valid holds values that must not matter.
    """

    mode: str
    num_examples: int
    pattern: str
    offset: float
    channel_offset: float
    scale: float
    layout: str
    grad_layout: str
    bad: tuple[tuple[int, float], ...]
    seed: int
    mask: str = ""


@dataclass(frozen=True)
class Trial:
    """A layer, its parameters and buffers, and the batches that it is given in turn."""

    kind: str
    num_features: int
    spatial: tuple[int, ...]
    options: tuple[tuple[str, object], ...]
    dtype: str
    parameters: str
    statistics: str  # what the buffers hold at first
    wants: tuple[str, ...]
    kernels: str
    threads: int
    steps: tuple[Step, ...]
    seed: int

    @property
    def tracks(self):
        """Whether the layer is built with running statistics."""
        options = dict(self.options)
        if self.kind == "sn" and not options.get("use_batch", True):
            return False
        return self.kind in TRACKED and options.get(
            "track_running_stats", self.kind not in OWN_EXAMPLE
        )


def draw(kind, random):
    """A trial of a layer of this kind."""
    num_features = random.choice((1, 2, 3, 4, 6, 8, 12, 16))
    if kind == "ibn":
        num_features = max(num_features, 2)
    spatial = tuple(
        random.choice((1, 2, 3, 4, 5, 7, 8, 9, 16)) for _ in range(random.choice((0, 1, 2, 2, 3)))
    )
    if random.random() < 0.03:
        spatial = (random.choice((257, 1000, 4099, 20000)), *spatial[:1])
    while num_features * prod(spatial) > LARGEST:
        spatial = tuple(max(1, size // 2) for size in spatial)
    dtype = random.choice(DTYPES)
    tracks = random.random() < 0.6
    options = draw_options(kind, num_features, spatial, tracks, random)
    trial = Trial(
        kind=kind,
        num_features=num_features,
        spatial=spatial,
        options=options,
        dtype=dtype,
        parameters=random.choice(parameter_dtypes(dtype)),
        statistics=random.choice(("fresh", "drawn", "drawn", "drawn", "far", "bad")),
        wants=random.choice((("x", "parameters"), ("x", "parameters"), ("x",), ("parameters",))),
        kernels=random.choice(("cpu", "cpu", "reference")),
        threads=random.choice((1, 1, 1, 2)),
        steps=(),
        seed=random.randrange(2**31),
    )
    steps = tuple(draw_step(trial, random) for _ in range(random.choice((1, 1, 2, 3))))
    return replace(trial, steps=steps)


def parameter_dtypes(dtype):
    """Possible dtypes of a layer's parameters, for the dtype of its input."""
    if dtype == "float64":
        return ("float64", "float64", "float32")
    if dtype == "float32":
        return ("float32", "float32", "float32", "float64", "bfloat16")
    return ("float32", dtype, "bfloat16", "float16", "float64")


def draw_options(kind, num_features, spatial, tracks, random):
    """Arguments of the constructor beside ``num_features``."""
    options = {"eps": random.choice((1e-5, 1e-5, 1e-5, 1e-3, 1e-8))}
    if random.random() < 0.3:
        options[random.choice(("affine", "bias"))] = False
    if kind in OWN_OPTIONS:
        options |= OWN_OPTIONS[kind](random, num_features, num_features * prod(spatial))
    if kind in ("bn", "bgn", "ghost", "gbgn") and random.random() < 0.1:
        options["track_running_stats"] = False
    if kind in OWN_EXAMPLE and tracks:
        options["track_running_stats"] = True
    if kind in TRACKED:
        options["momentum"] = random.choice((0.1, 0.1, None, 0.0, 1.0, 0.7))
        options["example_weight"] = random.choice((0.0, 0.0, 1.0, 0.3))
    return tuple(options.items())


def divisor(random, number, at_most=64):
    """One of a number's divisors."""
    return random.choice([d for d in range(1, min(number, at_most) + 1) if number % d == 0])


OWN_OPTIONS = {
    "gn": lambda random, num_features, size: {"num_groups": divisor(random, num_features)},
    "bgn": lambda random, num_features, size: {"num_groups": divisor(random, size)},
    "ghost": lambda random, num_features, size: {
        "ghost_batch_size": random.choice((1, 2, 3, 4, 32)),
    },
    "gbgn": lambda random, num_features, size: {
        "num_groups": divisor(random, num_features),
        "examples_per_group": random.choice((None, 1, 2, 3)),
    },
    "gnplus": lambda random, num_features, size: {
        "num_groups": divisor(random, num_features),
        "order": random.choice(("group-first", "batch-first", "parallel")),
    },
    "bcn": lambda random, num_features, size: {
        "num_groups": divisor(random, num_features),
        "channel_affine": random.choice(("group", "channel")),
        "micro_batch": random.random() < 0.5,
        "update_rate": random.choice((0.1, 0.5, 1.0, 1e-3)),
    },
    "sn": lambda random, num_features, size: {"use_batch": random.random() < 0.7},
    "gw": lambda random, num_features, size: {
        "num_groups": divisor(random, num_features),
        "iterations": random.choice((1, 3, 5)),
    },
}
"""What each kind has beside the options of all."""


def draw_step(trial, random):
    """One batch of a trial, and the mode of the layer."""
    num_examples = random.choice((1, 2, 2, 3, 4, 5, 7, 8, 16))
    per_example = trial.num_features * prod(trial.spatial)
    if random.random() < 0.03:
        num_examples = random.choice((0, 64, 300, 1025))
    most = LARGEST if random.random() < 0.02 else USUAL
    while num_examples > 1 and num_examples * per_example > most:
        num_examples //= 2
    numel, modes = num_examples * per_example, ["train", "train", "train"]
    if trial.tracks:
        modes += ["eval", "eval", "frozen"]
        micro = dict(trial.options).get("micro_batch", False)
        modes += [] if micro else ["off", "off-eval"]
    narrow = trial.dtype == "float16"  # up to 65504
    bad = ()
    if numel and random.random() < 0.12:
        values = random.choices((nan, inf, -inf), k=random.choice((1, 1, 2)))
        bad = tuple((random.randrange(numel), value) for value in values)
    return Step(
        mode=random.choice(modes),
        num_examples=num_examples,
        pattern=random.choice(PATTERNS),
        offset=random.choice(OFFSETS[:5] if narrow else OFFSETS),
        channel_offset=random.choice((0.0, 0.0, 0.0, 3.0, 1e2) + (() if narrow else (1e4, 1e6))),
        scale=random.choice(SCALES[:5] if narrow else SCALES),
        layout=random.choice(LAYOUTS),
        grad_layout=random.choice((*LAYOUTS, "one")),
        bad=bad,
        seed=random.randrange(2**31),
        mask=random.choice(("positions", "lengths")) if random.random() < 0.15 else "",
    )


def shape_of(trial, step):
    """Shape of the step's map."""
    return (step.num_examples, trial.num_features, *trial.spatial)


def noise(shape, seed):
    """Normal values in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def values_of(trial, step):
    """The map that the layer is given, in its dtype and memory."""
    shape = shape_of(trial, step)
    across = (1, -1, *(1,) * len(trial.spatial))
    x = patterned(noise(shape, step.seed), step.pattern)
    apart = noise((trial.num_features,), step.seed + 1).reshape(across) * step.channel_offset
    x = ((x + apart + step.offset) * step.scale).to(getattr(torch, trial.dtype))
    flat = x.flatten()
    for position, value in step.bad:
        flat[position % flat.numel()] = value
    x = flat.reshape(shape)
    if step.mask and step.layout not in OVERLAPPING:
        x = torch.where(valid_in(trial, step), x, junk_like(x))
    return arranged(x, step.layout)


def junk_like(x):
    """Values for the padding."""
    junk = torch.tensor([nan, inf, -1e4, 3.0], dtype=x.dtype)
    return junk.repeat(x.numel() // 4 + 1)[: x.numel()].reshape(x.shape)


def mask_of(trial, step):
    """The layer's argument ``mask``."""
    if not step.mask:
        return None
    shape = (step.num_examples, *trial.spatial)
    if step.mask == "lengths" and trial.spatial:
        lengths = noise(shape[:1], step.seed + 3).abs() * trial.spatial[-1]
        return lengths.ceil().clamp(max=trial.spatial[-1]).long()
    return noise(shape, step.seed + 3) > 0


def valid_in(trial, step):
    """The valid positions, ``(N, 1, *S)``."""
    mask = mask_of(trial, step)
    if mask is None:
        mask = torch.ones(step.num_examples, *trial.spatial, dtype=torch.bool)
    if mask.dtype != torch.bool:
        mask = torch.arange(trial.spatial[-1]) < mask.reshape(-1, *(1,) * len(trial.spatial))
    return mask.expand(step.num_examples, *trial.spatial).unsqueeze(1)


def patterned(x, pattern):
    """Normal values with special ones among them."""
    if not x.numel() or pattern == "normal":
        return x
    if pattern == "constant":
        return x.flatten()[0].expand(x.shape).clone()
    if pattern == "constant channels":
        first = x.reshape(*x.shape[:2], -1)[:1, :, 0]
        return first.reshape(1, -1, *(1,) * (x.ndim - 2)).expand(x.shape).clone()
    if pattern == "zeros":
        return torch.zeros_like(x)
    if pattern == "few values":
        return x.round()
    flat = x.flatten().clone()
    flat[0 if pattern == "first apart" else flat.numel() // 2] += 1e3
    return flat.reshape(x.shape)


def gradient_of(trial, step):
    """The gradient of the step's result."""
    shape, dtype = shape_of(trial, step), getattr(torch, trial.dtype)
    if step.grad_layout == "one":
        return torch.ones((), dtype=dtype).expand(shape)
    return arranged(noise(shape, step.seed + 2).to(dtype), step.grad_layout)


def arranged(x, layout):  # noqa: PLR0911 - a line a layout
    """``x`` with other strides; overlapping elements take the first of their values."""
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "sliced":
        return torch.stack([x, x + 1], dim=-1)[..., 0]
    if layout == "stepped":
        return torch.stack([x, x + 1], dim=1).flatten(0, 1)[::2]
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "expanded":
        return x[:1].expand(x.shape)
    if layout == "windows" and x.numel():
        high, wide = x.shape[-2:]
        line = x.flatten(-2)[..., : high + wide - 1].contiguous()
        return line.unfold(-1, wide, 1)
    if layout == "unaligned":
        memory = torch.empty(x.numel() + 1, dtype=x.dtype)
        return memory[1:].view(x.shape).copy_(x)
    return x.contiguous()


def layer_of(trial):
    """The layer as it is before the first step."""
    options = dict(trial.options)
    dtype = getattr(torch, trial.parameters)
    layer = LAYERS[trial.kind](trial.num_features, **options, dtype=dtype)
    with torch.no_grad():
        for index, parameter in enumerate(layer.parameters()):
            values = noise(parameter.shape, trial.seed + index)
            parameter.add_(values.to(parameter.dtype), alpha=0.5)
    for parameter in layer.parameters():
        parameter.requires_grad_("parameters" in trial.wants)
    if trial.tracks:
        fill(statistics(layer), trial)
    return layer


def statistics(layer):
    """The module that has the running statistics."""
    return next(m for m in layer.modules() if getattr(m, "running_mean", None) is not None)


def fill(holder, trial):
    """Give the buffers what the trial starts with."""
    if trial.statistics == "fresh":
        return
    step = trial.steps[0]
    mean, var = (noise(holder.running_mean.shape, trial.seed + 100 + i) for i in range(2))
    mean, var = (mean + step.offset) * step.scale, var.square() * step.scale**2
    if trial.statistics == "far":
        mean = mean + 1e7
    if trial.statistics == "bad":
        mean[0], var[-1] = nan, inf
    with torch.no_grad():
        holder.running_mean.copy_(mean)
        holder.running_var.copy_(var)
        holder.num_batches_tracked.fill_(3)
