"""What recalibration found: old and new statistics, put in and taken out as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from normkit.text import module_name, table_lines

MEAN, VAR = BUFFERS
FORMAT = "normkit.StatisticsPatch 1"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PatchedLayer:
    """One layer's statistics, as they were and as they were measured.

    Args:
        name: Its name in the model; the first one of a shared layer.
        kind: Its class.
        eps: What it adds to the variance.
        num_values: Values behind each new mean; examples, for torch's instance norms.
        old: Buffers by name when they were measured.
        new: Buffers by name that were found.
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

        with old ``m, v`` and new :math:`\mu`: what the layer's output moves by, before its affine.
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
    """New running statistics for a model, not in it before ``apply``; prints as a table.

    Args:
        model: The model whose statistics these are.
        layers: Those that were measured, with old and new values, in the order of the model.
        left: All others with running statistics, with the reason.
        num_batches: How many batches were measured, on all ranks.
        max_batches: How many a rank would have measured at most.
        sequential: Whether each layer was measured behind settled ones.
        applied: Whether the new values are in the model.
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

        ``num_batches_tracked`` becomes the number of inputs that the layer has seen while it was
        measured. A second time changes nothing.

        Raises:
            OptionError: If the model's statistics are neither the old ones nor the new: somebody
                has changed them, or it is another model; nothing is changed then.
        """
        return attempt(self._apply, self.model, self)

    def _apply(self) -> Self:
        targets = self._targets()
        moved = [row.name for row in self.layers if not _is_either(targets[row.name], row)]
        if moved:
            raise OptionError(
                f"the statistics of {_listed(moved)} are not those that this patch was measured "
                f"on; they have moved since, or belong to another model; recalibrate this one"
            )
        for row in self.layers:
            _fill(targets[row.name], row.new)
        self.applied = True
        return self

    def undo(self) -> Self:
        """Put the statistics from before ``apply`` back, bit for bit; return the patch.

        That is so whatever the applied statistics have become since; without ``apply`` nothing
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
        """Write the patch into a file of tensors, without the model; ``load`` reads it."""
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
        """Read a patch for a model, which is not changed.

        It counts as applied if the model has the new statistics.

        Args:
            path: A file that ``save`` has written.
            model: The model that was measured, or a copy of it.

        Raises:
            DataError: If the file is missing or is no patch.
            OptionError: If the model lacks a layer of the patch, or it has another size.
        """
        read = _read(Path(path))
        rows = tuple(PatchedLayer(**row) for row in read.pop("layers"))
        left = tuple(Unmeasured(name=n, kind=k, why=w) for n, k, w in read.pop("left"))
        patch = cls(model=unwrap(model, "patch"), layers=rows, left=left, **read)
        targets = patch._targets()
        patch.applied = all(_has(targets[row.name], row.new) for row in rows)
        return patch

    def _targets(self) -> dict[str, nn.Module]:
        """The layers by name, as they are in the model now."""
        modules = dict(self.model.named_modules())
        lost = [row.name for row in self.layers if not _fits(modules.get(row.name), row)]
        if lost:
            raise OptionError(
                f"the model has no layer {_listed(lost)} with statistics of the patch's sizes; "
                f"give the model that was measured, or a copy of it"
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
                _range(*r.std_ratio),
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


def values_now(layer: nn.Module) -> dict[str, Tensor]:
    """Copies of a layer's running statistics."""
    return {name: buffer.detach().clone() for name, buffer in statistics_of(layer).items()}


def _saved(row: PatchedLayer) -> dict[str, Any]:
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


def _is_either(layer: nn.Module, row: PatchedLayer) -> bool:
    return _has(layer, row.old) or _has(layer, row.new)


def _has(layer: nn.Module, values: Mapping[str, Tensor]) -> bool:
    return all(_equal(b, values[name].to(b)) for name, b in statistics_of(layer).items())


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether all values are the same, NaN being itself."""
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


@torch.no_grad()
def _fill(layer: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, buffer in statistics_of(layer).items():
        buffer.copy_(values[name])


def _listed(names: Sequence[str], at_most: int = 5) -> str:
    shown = ", ".join(repr(name) for name in names[:at_most])
    return shown + (f" and {len(names) - at_most} others" if len(names) > at_most else "")


def _range(low: float, high: float) -> str:
    return f"{low:.3g} to {high:.3g}"


def _plural(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
