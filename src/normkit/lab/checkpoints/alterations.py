"""What was done to a model's norms before its weights were saved, so that it can be done again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normkit.convert import Conversion, apply_recipe, convert_norm_
from normkit.convert.recipe import ConversionRecipe
from normkit.errors import DataError, NormError
from normkit.lab.changes import reparametrize_layers_, take_out_
from normkit.lab.checkpoints.fitting import EXAMPLE_WEIGHT, load_tensors_, plain_names
from normkit.lab.checkpoints.reading import read_metadata, read_weights
from normkit.layers.base import NormLayer
from normkit.text import printable

LISTS = ("standardized", "preserved", "after_sum", "removed")
MAPS = {
    "changes": "what its norms were converted to",
    "weights": "what its weights are computed by",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Alterations:
    """How the norms and weights of a saved model differ from those of the model that it names.

    Args:
        changes: Specs of the norms that were converted, by name.
        standardized: Names of the layers whose weights are standardised.
        preserved: Layers whose computed weights have a gain and an offset of each filter.
        after_sum: Residual blocks that got a norm after their sum.
        weights: What else is done to weights, by the layers' names: an ending of an arm, as "wn".
        removed: Names of the norms that were taken away.
    """

    changes: Mapping[str, str] = field(default_factory=dict)
    standardized: tuple[str, ...] = ()
    preserved: tuple[str, ...] = ()
    after_sum: tuple[str, ...] = ()
    weights: Mapping[str, str] = field(default_factory=dict)
    removed: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what a checkpoint says of its norms; most say nothing.

        Raises:
            DataError: If the file cannot be read, or what it says is no such thing.
        """
        about = read_metadata(path)
        return cls(
            changes=_texts("changes", about, path),
            weights=_texts("weights", about, path),
            **{name: _names(about.get(name, "")) for name in LISTS},
        )

    @classmethod
    def of(cls, done: Conversion) -> Self:
        """Those of a model that was converted."""
        new = ConversionRecipe.read(done.recipe())
        return cls(
            changes=new.norms,
            standardized=new.standardized,
            preserved=new.preserved,
            after_sum=new.after_sum,
        )

    def then(self, later: Alterations) -> Self:
        """Those of a model to which something more was done."""
        changes = {**self.changes, **later.changes}
        return type(self)(
            changes={at: spec for at, spec in changes.items() if at not in later.removed},
            weights={**self.weights, **later.weights},
            **{name: (*getattr(self, name), *getattr(later, name)) for name in LISTS},
        )

    def metadata(self) -> dict[str, str]:
        """What a file says of itself; ``read`` reads it."""
        texts = {
            "changes": json.dumps(dict(self.changes)) if self.changes else "",
            "weights": json.dumps(dict(self.weights)) if self.weights else "",
            **{name: ",".join(getattr(self, name)) for name in LISTS},
        }
        return {name: text for name, text in texts.items() if text}

    def apply_(self, model: nn.Module) -> nn.Module:
        """Convert a new model as the saved one was.

        Raises:
            NormError: If it has no such norms, or they cannot become what is asked for.
        """
        if self.after_sum:  # these norms may have been converted, too
            apply_recipe(model, ConversionRecipe(after_sum=self.after_sum).as_dict())
        reparametrize_layers_(model, self.weights, self.preserved)
        done = ConversionRecipe(
            norms=self.changes,
            standardized=self.standardized,
            preserved=tuple(name for name in self.standardized if name in self.preserved),
        )
        model = apply_recipe(model, done.as_dict()).model
        take_out_(model, self.removed)
        return model


def restored(model: nn.Module, path: Path) -> nn.Module:
    """Give a new model the norms and the weights of a checkpoint.

    A batch norm of torch becomes ours where the file has an example weight for it.

    Args:
        model: As it is built by its name; changed in place.
        path: A checkpoint.

    Returns:
        The model.

    Raises:
        DataError: If the file cannot be read, or does not fit the model.
    """
    alterations, tensors = Alterations.read(path), read_weights(path)
    try:
        model = _weighed(alterations.apply_(model), tensors)
    except NormError as error:
        raise DataError(
            f"{printable(path)} says that it has other norms, which do not fit the model: {error}; "
            f"check --model, and name norms of your own by --own-norms"
        ) from error
    load_tensors_(model, tensors, path)
    return model


def _weighed(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Make batch norms of other libraries ours where there is an example weight for them."""
    named = plain_names(tensors, model.state_dict())
    found = {
        module
        for name, module in model.named_modules()
        if f"{name}.{EXAMPLE_WEIGHT}" in named
        and isinstance(module, _BatchNorm)
        and not isinstance(module, NormLayer)
    }
    if not found:
        return model
    return convert_norm_(model, "bn", where=lambda module, _: module in found).model


def _texts(key: str, about: Mapping[str, str], path: Path) -> dict[str, str]:
    """Read texts by the names of modules from a file's metadata."""
    try:
        found = json.loads(about.get(key, "{}"))
    except (ValueError, RecursionError) as error:  # also of numbers with thousands of digits
        raise DataError(
            f"{printable(path)} says under {key!r} {MAPS[key]}, but not in JSON; save it again by "
            f"normkit convert or normkit compare"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise DataError(
            f"{printable(path)} says under {key!r} {MAPS[key]}, but not as names with texts; save "
            f"it again by normkit convert or normkit compare"
        )
    return found


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)
