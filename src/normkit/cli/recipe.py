"""Options that describe a training; an option that was not given is None."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro

from normkit.cli.shared import decimals, flag, whole_numbers
from normkit.errors import SpecError
from normkit.lab.config import ALSO, KNOWN, NOTHING, known_options, merged
from normkit.lab.recipe import Augmentation
from normkit.text import parts_of

Switch = Annotated[bool | None, tyro.conf.FlagConversionOff]
Given = Annotated[bool, tyro.conf.FlagCreatePairsOff]
NUMBERS_OR_NONE = ("lr_batch_size", "norm_weight_decay", "clip")
SWITCHES = ("compile", "channels_last", "synchronize_statistics", "save_weights")


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """Options that decide a training; they replace values of the file given by --config."""

    config: Path | None = None
    """TOML file with any of these options by name, such as experiment.toml beside the records."""
    data: str | None = None
    """Data set: digits, fashion-mnist, cifar10, cifar100, svhn, ./PATH with a folder for each
    class, or FILE.py:FUNCTION that gives data sets (default: digits)."""
    model: str | None = None
    """Network: small-resnet, mlp, vgg11, any name of torchvision's or timm's, or FILE.py:FUNCTION
    that makes one (default: small-resnet)."""
    task: str | None = None
    """What the network is trained for: one of the tasks of normkit list, with options as in
    NAME:option=value (default: classification)."""
    train: str | None = None
    """FILE.py:FUNCTION that trains in place of model, data and recipe."""
    better: Literal["higher", "lower"] | None = None
    """Whether higher or lower scores of --train are better (default: higher)."""
    own_norms: str | None = None
    """Norms of your own, NAME=FILE.py:CLASS with commas between, which arms then name."""
    weights: str | None = None
    """File of weights (.safetensors) that every run starts from; new norms are calibrated."""
    image_size: int | None = None
    """Height and width of the network's input, for folders and functions."""
    limit: int | None = None
    """Number of training examples to use (default: all)."""
    hold_out: Switch = None
    """Whether validation examples are kept out of training (default: they are)."""
    epochs: int | None = None
    """Passes over the training data (default: 4)."""
    steps: int | None = None
    """Steps of the optimizer, in place of epochs."""
    optimizer: Literal["sgd", "nesterov", "adam", "adamw"] | None = None
    """Optimizer (default: sgd)."""
    base_lr: float | None = None
    """Learning rate for steps of --lr-batch-size examples (default: 0.1)."""
    lr_batch_size: str | None = None
    """Number of examples in a step that --base-lr is for; the rate is scaled with the actual
    number. none does not scale (default: 128)."""
    momentum: float | None = None
    """Momentum of SGD (default: 0.9)."""
    weight_decay: float | None = None
    """Weight decay (default: 0.0001)."""
    norm_weight_decay: str | None = None
    """Weight decay of the norms' parameters; none uses --weight-decay (default: none)."""
    decay_gamma_to: Literal[0, 1] | None = None
    """What the norms' scales decay towards (default: 0)."""
    schedule: Literal["list", "step", "cosine", "polynomial", "exponential", "constant"] | None = (
        None
    )
    """Schedule of the learning rate (default: list)."""
    lr_drops: str | None = None
    """Schedule list: shares of the training after which the rate drops (default: 81/164 and
    122/164)."""
    lr_values: str | None = None
    """With schedule list: shares of the first rate after each drop, separated by commas (default:
    lr-factor at each)."""
    lr_every: float | None = None
    """Schedule step: epochs between two drops (default: 30)."""
    lr_factor: float | None = None
    """Factor of the rate at a drop; schedule exponential: at the end of training (default: 0.1)."""
    lr_power: float | None = None
    """Schedule polynomial: its power (default: 0.9)."""
    warmup: float | None = None
    """Epochs (steps with --steps) in which the rate grows from 0 (default: 0)."""
    accumulate: int | None = None
    """Number of batches whose gradients are added for one step (default: 1)."""
    clip: str | None = None
    """Largest norm of the gradient; none does not clip (default: none)."""
    augment: str | None = None
    """Augmentations of training pictures, separated by commas: crop, flip, cutout, imagenet."""
    label_smoothing: float | None = None
    """Label smoothing (default: 0)."""
    mixup: float | None = None
    """Alpha of mixup; 0 switches it off (default: 0)."""
    drop_path: float | None = None
    """Share of residual branches that training drops, in timm's networks (default: 0)."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] | None = None
    """Precision of the training (default: 32-true)."""
    compile: Given = False
    """Compile the network by torch.compile."""
    no_compile: Given = False
    """Do not compile, even if the file given by --config says so."""
    channels_last: Given = False
    """Keep maps and weights in channels_last."""
    no_channels_last: Given = False
    """Do not use channels_last, even if the file given by --config says so."""
    threads: int | None = None
    """CPU threads of one run (default: 1)."""
    strategy: Literal["auto", "ddp", "fsdp"] | None = None
    """How the processes that torchrun started train one network together (default: ddp)."""
    synchronize_statistics: Given = False
    """Compute the norms' statistics over the batches of all processes."""
    no_synchronize_statistics: Given = False
    """Do not synchronize, even if the file given by --config says so."""

    def values(self) -> dict[str, Any]:
        """The given options by name; those of the command line replace those of the file.

        Raises:
            SpecError: If a list or a number cannot be read.
            DataError: If the file cannot be read.
        """
        names = [n for n in (*KNOWN, *ALSO) if hasattr(self, n) and n not in SWITCHES]
        given = {name: getattr(self, name) for name in names}
        values = {k: v for k, v in given.items() if v is not None} | self._switched()
        return merged(self.config, known_options(_read(values), "the command line"))

    def _switched(self) -> dict[str, bool]:
        """The switches that were given, on or off."""
        switches = [name for name in SWITCHES if hasattr(self, name)]
        on = {name for name in switches if getattr(self, name)}
        off = {name for name in switches if getattr(self, f"no_{name}")}
        if on & off:
            name = sorted(on & off)[0]
            raise SpecError(f"{flag(name)} and {flag(f'no_{name}')} were both given; give one")
        return dict.fromkeys(on, True) | dict.fromkeys(off, False)


def _read(values: Mapping[str, Any]) -> dict[str, Any]:
    """Parse the options that are lists, or a number or ``none``."""
    found = dict(values)
    for name in sorted({"lr_drops", "lr_values", "tune_lr"} & set(found)):
        found[name] = decimals(flag(name), found[name])
    for name in sorted({"batch_sizes", "seeds"} & set(found)):
        found[name] = whole_numbers(flag(name), found[name])
    if "out" in found:
        found["out"] = str(found["out"])
    if "augment" in found:
        found["augment"] = _augmentations(found["augment"])
    for name in NUMBERS_OR_NONE:
        if name in found:
            text = found[name]
            found[name] = None if text == NOTHING else _single(flag(name), text)
    if isinstance(found.get("lr_batch_size"), float):
        found["lr_batch_size"] = whole_numbers("--lr-batch-size", values["lr_batch_size"])[0]
    return found


def _single(option: str, text: str) -> float:
    numbers = decimals(option, text)
    if len(numbers) != 1:
        raise SpecError(f"{option} was given {text!r}; give one number, or {NOTHING}")
    return numbers[0]


def _augmentations(text: str) -> tuple[str, ...]:
    names = parts_of(text)
    wrong = [name for name in names if name not in get_args(Augmentation)]
    if wrong:
        raise SpecError(
            f"--augment was given {', '.join(map(repr, wrong))}; known are "
            f"{', '.join(get_args(Augmentation))}"
        )
    return names
