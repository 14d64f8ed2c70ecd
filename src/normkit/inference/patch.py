"""The result of a recalibration: old and new statistics, to be applied or undone all at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from normkit.errors import DataError, OptionError
from normkit.inference.tracked import Unmeasured, statistics_of
from normkit.layers.base import BUFFERS
from normkit.passes import attempt, unwrap
from normkit.text import listed, module_name, table_lines

MEAN, VAR = BUFFERS
FORMAT = "normkit.StatisticsPatch 1"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PatchedLayer:
    """One layer's old statistics and the newly measured ones.

    Args:
        name: Its name in the model; of a shared layer, the first name.
        kind: The name of its class.
        eps: Added to the variance.
        num_values: Number of values that each new mean was computed from; for torch's instance
            norms, number of examples.
        old: The buffers by name, as they were during the measurement.
        new: The measured buffers by name.
    """

    name: str
    kind: str
    eps: float
    num_values: int
    old: Mapping[str, Tensor]
    new: Mapping[str, Tensor]

    @property
    def mean_shift(self) -> float:
        r"""How far the means moved, in old standard deviations.

        .. math::  \sqrt{\tfrac{1}{C} \sum_c (\mu_c - m_c)^2 / (v_c + \epsilon)}

        :math:`m, v` are the old mean and variance, and :math:`\mu` is the new mean. The layer's
        output moves by this much, before its scale and shift.
        """
        step = self.new[MEAN].double() - self.old[MEAN].double()
        return (step.square() / self._var(self.old)).mean().sqrt().item()

    @property
    def std_ratio(self) -> tuple[float, float]:
        """Smallest and largest ratio of the new standard deviation to the old one."""
        ratio = (self._var(self.new) / self._var(self.old)).sqrt()
        return ratio.min().item(), ratio.max().item()

    def _var(self, values: Mapping[str, Tensor]) -> Tensor:
        return values[VAR].double() + self.eps


@dataclass(kw_only=True, eq=False, repr=False)
class StatisticsPatch:
    """New running statistics for a model, which ``apply`` writes into it; prints as a table.

    Args:
        model: The model that was measured.
        layers: The measured layers with old and new values, in the order of the model.
        left: All other layers with running statistics, with the reason.
        num_batches: How many batches were measured, on all ranks together.
        max_batches: The limit on the batches of each rank; None without a limit.
        sequential: Whether the layers were measured one after the other, each behind layers with
            their new statistics.
        applied: Whether the model has the new values.
    """

    model: nn.Module = field(repr=False)
    layers: tuple[PatchedLayer, ...]
    left: tuple[Unmeasured, ...] = ()
    num_batches: int
    max_batches: int | None = None
    sequential: bool = False
    applied: bool = False

    def apply(self) -> Self:
        """Write the new statistics into the model's buffers, all or none; return the patch.

        ``num_batches_tracked`` becomes the number of inputs that the layer got in the measurement.
        A second call changes nothing.

        Raises:
            OptionError: If the model's statistics are neither the old ones nor the new ones: they
                have changed since, or belong to another model. Then nothing is changed.
        """
        return attempt(self._apply, self.model, self)

    def _apply(self) -> Self:
        targets = self._targets()
        changed = [
            row.name
            for row in self.layers
            if not (_has(targets[row.name], row.old) or _has(targets[row.name], row.new))
        ]
        if changed:
            raise OptionError(
                f"the statistics of {listed(map(repr, changed))} are not those that this patch was "
                f"measured on; they have changed since, or belong to another model; recalibrate "
                f"this one"
            )
        for row in self.layers:
            _fill(targets[row.name], row.new)
        self.applied = True
        return self

    def undo(self) -> Self:
        """Restore the statistics from before ``apply``, bit for bit; return the patch.

        Changes that the applied statistics have had since are lost. Without ``apply`` nothing
        happens.

        Raises:
            OptionError: If a layer is no longer in the model, or has another size.
        """
        return attempt(self._undo, self.model, self)

    def _undo(self) -> Self:
        if self.applied:
            targets = self._targets()
            for row in self.layers:
                _fill(targets[row.name], row.old)
            self.applied = False
        return self

    def save(self, path: str | PathLike[str]) -> None:
        """Save the patch without the model; ``load`` reads the file."""
        kept = ("num_batches", "max_batches", "sequential")
        torch.save(
            {
                "format": FORMAT,
                "layers": [_saved(row) for row in self.layers],
                "left": [[left.name, left.kind, left.why] for left in self.left],
                **{name: getattr(self, name) for name in kept},
            },
            Path(path),
        )

    @classmethod
    def load(cls, path: str | PathLike[str], model: nn.Module) -> Self:
        """Read a patch for a model; the model is not changed.

        The patch counts as applied if the model has the new statistics.

        Args:
            path: A file that ``save`` wrote.
            model: The model that was measured, or a copy of it.

        Raises:
            DataError: If the file is missing or is no patch.
            OptionError: If the model lacks a layer of the patch, or the layer has another size.
        """
        read = _read(Path(path))
        rows = tuple(PatchedLayer(**row) for row in read.pop("layers"))
        left = tuple(Unmeasured(name=n, kind=k, why=w) for n, k, w in read.pop("left"))
        patch = cls(model=unwrap(model, "patch"), layers=rows, left=left, **read)
        targets = patch._targets()
        patch.applied = all(_has(targets[row.name], row.new) for row in rows)
        return patch

    def _targets(self) -> dict[str, nn.Module]:
        """Find the patch's layers in the model, by name."""
        modules = dict(self.model.named_modules())
        lost = [row.name for row in self.layers if not _fits(modules.get(row.name), row)]
        if lost:
            raise OptionError(
                f"the model has no layer {listed(map(repr, lost))} with statistics of the patch's "
                f"sizes; give the model that was measured, or a copy of it"
            )
        return {row.name: modules[row.name] for row in self.layers}

    def __repr__(self) -> str:
        return f"<StatisticsPatch: {self._summary()}>"

    def __str__(self) -> str:
        head = ("name", "layer", "values", "mean shift", "std ratio")
        rows = [
            (
                module_name(r.name),
                r.kind,
                f"{r.num_values:,}",
                f"{r.mean_shift:.3g}",
                "{:.3g} to {:.3g}".format(*r.std_ratio),
            )
            for r in self.layers
        ]
        lines = [self._summary(), *table_lines([head, *rows])]
        return "\n".join([*lines, *map(str, self.left)])

    def _summary(self) -> str:
        most = self.max_batches
        fewer = f" (at most {most} a rank)" if most and self.num_batches != most else ""
        how = "one layer after the other" if self.sequential else "in one pass"
        state = "applied" if self.applied else "not applied"
        batches = _plural(self.num_batches, "batch", "batches")
        layers = _plural(len(self.layers), "layer", "layers")
        return f"statistics of {layers} from {batches}{fewer}, {how}, {state}"


def copy_statistics(layer: nn.Module) -> dict[str, Tensor]:
    """Copy a layer's running statistics, by name."""
    return {name: buffer.detach().clone() for name, buffer in statistics_of(layer).items()}


def _saved(row: PatchedLayer) -> dict[str, Any]:
    """One layer as plain values and CPU tensors."""
    values = {w: {n: t.cpu() for n, t in getattr(row, w).items()} for w in ("old", "new")}
    plain = {name: getattr(row, name) for name in ("name", "kind", "eps", "num_values")}
    return plain | values


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DataError(f"{path} is no file; write one with patch.save(path)")
    try:
        read = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise DataError(f"{path} cannot be read as a patch: {error}") from error
    if not isinstance(read, dict) or read.pop("format", None) != FORMAT:
        raise DataError(f"{path} is no file of the format {FORMAT!r}; patch.save(path) writes one")
    return read


def _fits(layer: nn.Module | None, row: PatchedLayer) -> bool:
    buffers = {} if layer is None else statistics_of(layer)
    return {n: b.shape for n, b in buffers.items()} == {n: b.shape for n, b in row.old.items()}


def _has(layer: nn.Module, values: Mapping[str, Tensor]) -> bool:
    """Whether a layer has exactly these statistics."""
    return all(_equal(b, values[name].to(b)) for name, b in statistics_of(layer).items())


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether all values are the same; NaN equals NaN."""
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


@torch.no_grad()
def _fill(layer: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, buffer in statistics_of(layer).items():
        buffer.copy_(values[name])


def _plural(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
