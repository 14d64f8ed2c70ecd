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
from normkit.lab.checkpoints.fitting import EXAMPLE_WEIGHT, load_tensors_, plain_names
from normkit.lab.checkpoints.reading import read_metadata, read_weights
from normkit.layers.base import NormLayer
from normkit.text import printable


@dataclass(frozen=True, slots=True, kw_only=True)
class Alterations:
    """How the norms and weights of a saved model differ from those of the model that it names.

    Args:
        changes: Specs of the norms that were converted, by name.
        standardized: Names of the layers whose weights are standardised.
        preserved: Those of them that have a gain and an offset of each filter.
        after_sum: Residual blocks that got a norm after their sum.
    """

    changes: Mapping[str, str] = field(default_factory=dict)
    standardized: tuple[str, ...] = ()
    preserved: tuple[str, ...] = ()
    after_sum: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what a checkpoint says of its norms; most say nothing.

        Raises:
            DataError: If the file cannot be read, or what it says is no such thing.
        """
        about = read_metadata(path)
        return cls(
            changes=_changes(about.get("changes", "{}"), path),
            standardized=_names(about.get("standardized", "")),
            preserved=_names(about.get("preserved", "")),
            after_sum=_names(about.get("after_sum", "")),
        )

    def after(self, done: Conversion) -> Self:
        """Those of a model that was converted once more."""
        new = ConversionRecipe.read(done.recipe())
        return type(self)(
            changes={**self.changes, **new.norms},
            standardized=(*self.standardized, *new.standardized),
            preserved=(*self.preserved, *new.preserved),
            after_sum=(*self.after_sum, *new.after_sum),
        )

    def metadata(self) -> dict[str, str]:
        """What a file says of itself; ``read`` reads it."""
        texts = {
            "changes": json.dumps(dict(self.changes)) if self.changes else "",
            "standardized": ",".join(self.standardized),
            "preserved": ",".join(self.preserved),
            "after_sum": ",".join(self.after_sum),
        }
        return {name: text for name, text in texts.items() if text}

    def apply_(self, model: nn.Module) -> nn.Module:
        """Convert a new model as the saved one was.

        Raises:
            NormError: If it has no such norms, or they cannot become what is asked for.
        """
        done = ConversionRecipe(
            norms=self.changes,
            after_sum=self.after_sum,
            standardized=self.standardized,
            preserved=self.preserved,
        )
        return apply_recipe(model, done.as_dict()).model


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
            f"check --model"
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


def _changes(text: str, path: Path) -> dict[str, str]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:  # also of numbers with thousands of digits
        raise DataError(
            f"{printable(path)} says under 'changes' what its norms were converted to, but not in "
            f"JSON; save it again by normkit convert"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise DataError(
            f"{printable(path)} says under 'changes' what its norms were converted to, but not as "
            f"names with specs; save it again by normkit convert"
        )
    return found


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)
