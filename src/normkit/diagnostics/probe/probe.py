"""The probe: open it around a training loop, and call it at every step."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from normkit.core.check import require_choice, require_count
from normkit.diagnostics.probe.gradients import (
    Gradients,
    Params,
    gradients_of,
    lengths,
)
from normkit.diagnostics.probe.lightning import callback_of
from normkit.diagnostics.probe.norms import norms_of
from normkit.diagnostics.probe.outputs import Logger, Outputs, Writer, write_lines
from normkit.diagnostics.probe.record import ProbedStep, ProbeHistory
from normkit.diagnostics.probe.rows import (
    notes_of,
    notes_on_gradients,
    notes_on_numbers,
    rows_of,
)
from normkit.diagnostics.probe.transformers import TransformersCallback
from normkit.diagnostics.probe.watch import Watch, compiled_modules
from normkit.errors import CallbackError, OptionError
from normkit.inference.tracked import Where
from normkit.passes import attempt, call_with_cleanup, run_cleanup, save_grad_mode, unwrap
from normkit.text import module_name


class Probe:
    r"""Record numbers about the norms of a network at every ``every``-th training step.

    A record has for each layer, over all training forwards of the step together:

    .. math::  \lVert \hat\mu - \mu \rVert_2, \quad
               \lVert \sqrt{\hat\sigma^2} - \sqrt{\sigma^2} \rVert_2, \quad
               \mathrm{std}_{c \in g}(\mu_c) / \mathrm{mean}_{c \in g}(\sigma_c), \quad
               \lVert g_t - g_{t-1} \rVert_2

    :math:`\hat\mu, \hat\sigma^2` are the running statistics before the step, :math:`\mu, \sigma^2`
    the mean and biased variance of the input, in float64. A record also has the channels that a
    ReLU sets to zero everywhere in the step, and the L2 norms of weights, biases and gradients at
    the call of ``step``.

    The probe does not change training, to the last bit. The model has hooks only during a recorded
    step, and the gradients of the step before it are copied; at other steps ``step`` only counts.
    Forwards in evaluation mode or without gradients are not recorded. With ``torch.distributed``
    only rank 0 records, and only its own examples.

    Args:
        model: The model that is trained.
        every: Steps ``every``, ``2 * every``, ... are recorded.
        where: ``where(layer, name)`` chooses the norms; by default all.
        params: ``params(name, parameter)`` chooses the parameters whose gradients are recorded; by
            default all.
        path: File to which each record is appended, as a line of JSON.
        log_dir: Folder for TensorBoard.
        writer: A ``SummaryWriter``, or a logger of Fabric or Lightning (TensorBoard, CSV, W&B,
            MLflow), to write to instead of ``log_dir``; it stays open.
        eager: Run a compiled model uncompiled in recorded steps. Without it hooks see nothing in
            compiled code, and the record's ``notes`` say so. With it these steps may round
            differently.

    Raises:
        OptionError: If ``every`` is no positive integer, ``where`` or ``params`` chooses nothing,
            ``writer`` and ``log_dir`` are both given, or ``DataParallel`` runs the model on several
            devices; from ``step``, if the probe is not open or the loss is not one number.
        DataError: When the probe is opened, if ``path`` cannot be written, or TensorBoard is not
            installed.

    Source:
        Huang et al., Delving into the Estimation Shift of Batch Normalization in a Network,
        definitions 1 and 2; Qiao et al., Micro-Batch Training with Batch-Channel Normalization and
        Weight Standardization, eq. 35 and section 6; Gunawan, Yin & Zhang, Understanding and
        Improving Group Normalization, section 3.1.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with Probe(model, every=2) as probe:
        ...     for _ in range(4):
        ...         loss = model(torch.randn(4, 3, 6, 6)).square().mean()
        ...         optimizer.zero_grad()
        ...         loss.backward()
        ...         optimizer.step()
        ...         _ = probe.step(loss)
        >>> [record.step for record in probe.records]
        [2, 4]
        >>> [row.name for row in probe.records[0].layers]
        ['0', '1', '2']
    """

    _outputs: Outputs | None = None
    _watch: Watch | None = None
    _before: Gradients | None = None

    def __init__(  # noqa: PLR0913 - what to record, and where to write it
        self,
        model: nn.Module,
        every: int = 50,
        *,
        where: Where | None = None,
        params: Params | None = None,
        path: str | Path | None = None,
        log_dir: str | Path | None = None,
        writer: Writer | Logger | None = None,
        eager: bool = False,
    ) -> None:
        self.every = require_count("every", every)
        if writer is not None and log_dir is not None:
            raise OptionError("writer= and log_dir= were both given; pass only one of them")
        if len(getattr(model, "device_ids", None) or ()) > 1:
            raise OptionError(
                "the model runs on several devices in one process (DataParallel), where hooks see "
                "copies; use DistributedDataParallel, or give the probe one device"
            )
        self._given, self._model = model, unwrap(model, "probe")
        _require_something(self._model, where, params)
        self._where, self._params, self._eager = where, params, eager
        self._places = path, log_dir, writer
        self.num_steps = 0
        self.records: list[ProbedStep] = []

    def start(self) -> None:
        """Open the probe. ``with`` and the callbacks call this.

        Raises:
            OptionError: If the probe is open already.
        """
        if self._outputs is not None:
            raise OptionError("the probe is open already; a second block needs a second probe")
        try:
            attempt(self._open, self._model)
        except BaseException:
            self.stop()
            raise

    def _open(self) -> None:
        path, log_dir, writer = self._places if _records_here() else (None, None, None)
        self._outputs = Outputs(path, log_dir, writer)
        self._prepare()

    def stop(self) -> None:
        """Remove all hooks and close the files; the records stay."""
        run_cleanup([self._remove_hooks, self._close])

    def _close(self) -> None:
        if self._outputs is not None:
            self._outputs.close()
            self._outputs = None

    def step(self, loss: Tensor | float | None = None) -> ProbedStep | None:
        """End a training step; call this after ``optimizer.step()`` and before ``zero_grad()``.

        Args:
            loss: The step's loss, one number; None if there is none to record.

        Returns:
            The record of the step; None if the step is not recorded.

        Raises:
            OptionError: If the probe is not open, or the loss is not one number.
        """
        outputs = self._require_open()
        _require_number(loss)
        self.num_steps += 1
        record = call_with_cleanup(lambda: self._record(loss), self._remove_hooks, save_grad_mode())
        if record is not None:
            self.records.append(record)
            outputs.write(record)
        self._prepare()
        return record

    @property
    def history(self) -> ProbeHistory:
        """All records."""
        return ProbeHistory(every=self.every, steps=tuple(self.records))

    @property
    def reading(self) -> str:
        """The changes from the first recorded step to the last, in one sentence."""
        return self.history.reading

    def table(self) -> str:
        """A row for each recorded step, as a table of plain text."""
        return self.history.table()

    def to_json(self) -> str:
        """All records as JSON; numbers that are not finite become null."""
        return self.history.to_json()

    def plot(self) -> Any:
        """Plot the recorded numbers over the steps; return a matplotlib ``Figure``.

        Raises:
            PackageError: If matplotlib is not installed.
        """
        return self.history.plot()

    def write(self, path: str | Path) -> None:
        """Write all records to a file, one JSON line each, in the format of ``path=``.

        Raises:
            DataError: If the file cannot be written.
        """
        write_lines(Path(path), self.records)

    def callback(self, of: Literal["lightning", "transformers"] = "lightning") -> Any:
        """Make a callback for a ``Trainer``; Lightning Fabric takes the probe itself.

        Args:
            of: ``"lightning"`` for Lightning's Trainer, which must be installed;
                ``"transformers"`` for Hugging Face's, which passes no losses to callbacks.

        Raises:
            OptionError: If ``of`` is neither, or Lightning is not installed.
        """
        require_choice("of", of, ("lightning", "transformers"))
        if of == "transformers":
            return TransformersCallback(self)
        return callback_of(self)

    def __getattr__(self, name: str) -> Any:
        """Raise an error that says how to give the probe to a ``Trainer``, if one asks for it."""
        if name.startswith("on_") or name in ("setup", "teardown", "state_key"):
            raise CallbackError(
                f"a probe is no callback of a Trainer, which asks for its {name}; give Lightning's "
                f"Trainer probe.callback(), and Hugging Face's probe.callback('transformers')"
            )
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def on_train_start(self) -> None:
        """Open the probe, at ``fabric.call("on_train_start")``."""
        self.start()

    def on_train_batch_end(self, outputs: Any = None, *_given: Any, loss: Any = None) -> None:
        """Count a step, at ``fabric.call("on_train_batch_end", loss=loss)``.

        Args:
            outputs: The loss, or a dict that holds it, if ``loss=`` is not given.
            loss: The loss.
        """
        if loss is None:
            loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        self.step(loss)

    def on_train_end(self) -> None:
        """Close the probe, at ``fabric.call("on_train_end")``."""
        self.stop()

    def __enter__(self) -> Probe:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.stop()
        except BaseException:
            # An interruption may have cut the first call short; the second finishes it.
            self.stop()
            raise

    def __del__(self) -> None:
        # Nobody else can close a probe that was opened by ``start`` and then dropped.
        if not sys.is_finalizing():
            self.stop()

    def __str__(self) -> str:
        return str(self.history)

    def _require_open(self) -> Outputs:
        if self._outputs is None:
            raise OptionError(
                "step() was called on a probe that is not open; train inside "
                "`with nk.Probe(model) as probe:`, or call probe.start() before the loop"
            )
        return self._outputs

    def _prepare(self) -> None:
        """Put hooks into the model if the next step is to be recorded."""
        if (self.num_steps + 1) % self.every or not _records_here():
            return
        if self.num_steps:
            # The next backward pass overwrites the gradients, so these must be copies.
            now = gradients_of(self._model, self._params)
            self._before = {name: grad.clone() for name, grad in now.items()}
        compiled = compiled_modules(self._given)
        self._watch = Watch(self._model, self._where, compiled, self._eager)
        self._watch.open()

    def _remove_hooks(self) -> None:
        if self._watch is not None:
            self._watch.close()
        self._watch = self._before = None

    @torch.no_grad()
    def _record(self, loss: Tensor | float | None) -> ProbedStep | None:
        """Make the record of the step that is over; None if it is not to be recorded."""
        watch, before = self._watch, self._before
        if watch is None:
            return None
        watch.close()
        now = gradients_of(self._model, self._params)
        length, lengths_by_layer = lengths(now)
        change, changes_by_layer = lengths(now, before) if now and before else (None, {})
        groups = [found for norm in watch.norms.values() if (found := norm.stat_diff) is not None]
        rows = rows_of(self._model, watch, lengths_by_layer, changes_by_layer)
        value = loss.item() if isinstance(loss, Tensor) else loss
        step = self.num_steps
        return ProbedStep(
            step=step,
            loss=None if value is None else float(value),
            stat_diff=torch.cat([g.cpu() for g in groups]).mean().item() if groups else None,
            gradient_norm=length,
            gradient_change=change,
            layers=rows,
            notes=(
                *notes_of(watch),
                *notes_on_gradients(length, before, step),
                *notes_on_numbers(value, rows),
            ),
        )


def _records_here() -> bool:
    """Whether this process records: rank 0, or the only process."""
    return not (dist.is_available() and dist.is_initialized() and dist.get_rank() > 0)


def _require_something(model: nn.Module, where: Where | None, params: Params | None) -> None:
    """Check that ``where=`` and ``params=`` choose something.

    Raises:
        OptionError: If one of them chooses nothing.
    """
    if where is not None and not norms_of(model, where):
        known = ", ".join(module_name(norm.name) for norm in norms_of(model, None))
        raise OptionError(
            f"where= chooses no norm with running statistics or groups of channels; "
            f"there are: {known or 'none'}"
        )
    if params is not None and not any(params(n, p) for n, p in model.named_parameters()):
        raise OptionError("params= chooses none of the model's parameters")


def _require_number(loss: Any) -> None:
    """Check that a loss is one number, or None.

    Raises:
        OptionError: If it is anything else.
    """
    is_tensor = isinstance(loss, Tensor)
    if loss is None or (loss.numel() == 1 if is_tensor else isinstance(loss, int | float)):
        return
    given = f"tensor of shape {tuple(loss.shape)}" if is_tensor else type(loss).__name__
    raise OptionError(
        f"a {given} was given as the loss of a step; give one number: a scalar tensor, a float, "
        f"or None"
    )
