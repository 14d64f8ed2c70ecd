"""The probe: opened around a training loop, told of every step."""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from normkit.core.check import require_choice, require_count
from normkit.diagnostics.probe.gradients import (
    Gradients,
    Params,
    gradients_of,
    kept,
    lengths,
)
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
    r"""Record every so many training steps what the norms of a network do.

    In a recorded step, for each layer, over all of the step's training forwards together:

    .. math::  \lVert \hat\mu - \mu \rVert_2, \quad
               \lVert \sqrt{\hat\sigma^2} - \sqrt{\sigma^2} \rVert_2, \quad
               \mathrm{std}_{c \in g}(\mu_c) / \mathrm{mean}_{c \in g}(\sigma_c), \quad
               \lVert g_t - g_{t-1} \rVert_2

    with the running statistics :math:`\hat\mu, \hat\sigma^2` before the step and the input's mean
    and biased variance, in float64; channels that a ReLU switches off in the step; the lengths of
    the norms' weights and biases and of the gradients, as they are when ``step`` is called.

    Training goes on as without it, to the last bit. Hooks are in the model from the call of
    ``step`` before a recorded step until the one that records it; the gradients of the step before
    are copied. At other steps ``step`` only counts. Forwards at evaluation or without gradients
    are not looked at. With ``torch.distributed`` rank 0 records, its own examples.

    Args:
        model: What is trained.
        every: Records steps ``every``, ``2 * every``, ...
        where: ``where(layer, name)`` says which norms are meant; by default all.
        params: ``params(name, parameter)`` says whose gradients are; by default all.
        path: File to which each record is appended, as a line of JSON.
        log_dir: Folder for TensorBoard.
        writer: A ``SummaryWriter``, or a logger of Fabric or Lightning (TensorBoard, CSV, W&B,
            MLflow), to write to instead of ``log_dir``; it stays open.
        eager: Run a compiled model uncompiled in recorded steps; otherwise hooks see nothing in
            compiled code, which the record's ``notes`` say. Rounding of these steps may differ.

    Raises:
        OptionError: If ``every`` is not a number of steps, ``where`` or ``params`` choose nothing,
            ``writer`` and ``log_dir`` are both given, or several devices share the model by
            ``DataParallel``; from ``step``, if the probe is not open or the loss is not one number.
        DataError: When it is opened, if ``path`` cannot be written, or TensorBoard is not
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

    def __init__(  # noqa: PLR0913 - what is recorded, and where it goes
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
            raise OptionError("writer= and log_dir= were given; one of them says where scalars go")
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
        """Open the probe; ``with`` does it, and so do the callbacks.

        Raises:
            OptionError: If it is open already.
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
        """Take all hooks out and close the files; what was recorded stays."""
        run_cleanup([self._let_go, self._close])

    def _close(self) -> None:
        if self._outputs is not None:
            self._outputs.close()
            self._outputs = None

    def step(self, loss: Tensor | float | None = None) -> ProbedStep | None:
        """Say that a training step is over: after the optimizer's, before its ``zero_grad``.

        Args:
            loss: Its loss, one number; None if there is none to record.

        Returns:
            The record, if this step is one of those that are recorded.

        Raises:
            OptionError: If the probe is not open, or the loss is not one number.
        """
        outputs = self._require_open()
        _require_number(loss)
        self.num_steps += 1
        record = call_with_cleanup(lambda: self._record(loss), self._let_go, save_grad_mode())
        if record is not None:
            self.records.append(record)
            outputs.write(record)
        self._prepare()
        return record

    @property
    def history(self) -> ProbeHistory:
        """Everything that was recorded."""
        return ProbeHistory(every=self.every, steps=tuple(self.records))

    @property
    def reading(self) -> str:
        """What has changed from the first recorded step to the last, in one sentence."""
        return self.history.reading

    def table(self) -> str:
        """A row for each recorded step, as a table of plain text."""
        return self.history.table()

    def to_json(self) -> str:
        """All records as JSON; what is not finite is null."""
        return self.history.to_json()

    def plot(self) -> Any:  # noqa: ANN401 - a matplotlib figure, which need not be installed
        """Draw what was recorded over the steps; returns a matplotlib ``Figure``.

        Raises:
            PackageError: If matplotlib is not installed.
        """
        return self.history.plot()

    def write(self, path: str | Path) -> None:
        """Write all records to a file, one a line, as ``path=`` does while training runs.

        Raises:
            DataError: If the file cannot be written.
        """
        write_lines(Path(path), self.records)

    def callback(self, of: Literal["lightning", "transformers"] = "lightning") -> Any:  # noqa: ANN401
        """Make a callback for a ``Trainer``; Fabric takes the probe itself.

        Args:
            of: ``"lightning"``: Lightning's, which has to be installed; ``"transformers"``: Hugging
                Face's, which gives no losses to its callbacks.

        Raises:
            OptionError: If it is neither, or Lightning is not installed.
        """
        require_choice("of", of, ("lightning", "transformers"))
        if of == "transformers":
            return TransformersCallback(self)
        from normkit.diagnostics.probe.lightning import callback_of  # noqa: PLC0415 - needs Probe

        return callback_of(self)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        """Nothing; what a ``Trainer`` asks of its callbacks is told the way out."""
        if name.startswith("on_") or name in ("setup", "teardown", "state_key"):
            raise CallbackError(
                f"a probe is no callback of a Trainer, which asks for its {name}; give Lightning's "
                f"probe.callback(), and Hugging Face's probe.callback('transformers')"
            )
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def on_train_start(self) -> None:
        """Open the probe, at ``fabric.call("on_train_start")``."""
        self.start()

    def on_train_batch_end(self, outputs: Any = None, *_given: Any, loss: Any = None) -> None:  # noqa: ANN401
        """Count a step, at ``fabric.call("on_train_batch_end", loss=loss)``.

        Args:
            outputs: A loss, or a dict with one, if it is not named.
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.stop()
        except BaseException:  # also where that was interrupted
            self.stop()
            raise

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self.stop()  # where nobody else can any more

    def __str__(self) -> str:
        return str(self.history)

    def _require_open(self) -> Outputs:
        if self._outputs is None:
            raise OptionError(
                "step() was called of a probe that is not open; train inside of "
                "`with nk.Probe(model) as probe:`, or call probe.start() before the loop"
            )
        return self._outputs

    def _prepare(self) -> None:
        """Get ready for the next step, if it is recorded."""
        if (self.num_steps + 1) % self.every or not _records_here():
            return
        if self.num_steps:
            self._before = kept(gradients_of(self._model, self._params))
        compiled = compiled_modules(self._given)
        self._watch = Watch(self._model, self._where, compiled, self._eager)
        self._watch.open()

    def _let_go(self) -> None:
        if self._watch is not None:
            self._watch.close()
        self._watch = self._before = None

    @torch.no_grad()
    def _record(self, loss: Tensor | float | None) -> ProbedStep | None:
        """Look at the step that is over, if it is one that is recorded."""
        watch, before = self._watch, self._before
        if watch is None:
            return None
        watch.close()
        now = gradients_of(self._model, self._params)
        length, lengths_by_layer = lengths(now)
        moved, moved_by_layer = lengths(now, before) if now and before else (None, {})
        groups = [found for norm in watch.norms.values() if (found := norm.stat_diff) is not None]
        rows = rows_of(self._model, watch, lengths_by_layer, moved_by_layer)
        value = loss.item() if isinstance(loss, Tensor) else loss
        step = self.num_steps
        return ProbedStep(
            step=step,
            loss=None if value is None else float(value),
            stat_diff=torch.cat([g.cpu() for g in groups]).mean().item() if groups else None,
            gradient_norm=length,
            gradient_change=moved,
            layers=rows,
            notes=(
                *notes_of(watch),
                *notes_on_gradients(length, before, step),
                *notes_on_numbers(value, rows),
            ),
        )


def _records_here() -> bool:
    """Whether this process is the one that records."""
    return not (dist.is_available() and dist.is_initialized() and dist.get_rank() > 0)


def _require_something(model: nn.Module, where: Where | None, params: Params | None) -> None:
    """Refuse filters that leave nothing over.

    Raises:
        OptionError: With what there is to choose from.
    """
    if where is not None and not norms_of(model, where):
        known = ", ".join(module_name(norm.name) for norm in norms_of(model, None))
        raise OptionError(
            f"where= chooses no norm with running statistics or groups of channels; "
            f"there are: {known or 'none'}"
        )
    if params is not None and not any(params(n, p) for n, p in model.named_parameters()):
        raise OptionError("params= chooses none of the model's parameters")


def _require_number(loss: Any) -> None:  # noqa: ANN401 - whatever was given
    """Refuse what is not one number.

    Raises:
        OptionError: With what was given.
    """
    if isinstance(loss, Tensor):
        if loss.numel() == 1:
            return
        given = f"a tensor of shape {tuple(loss.shape)}"
    elif loss is None or isinstance(loss, int | float):
        return
    else:
        given = f"a {type(loss).__name__}"
    raise OptionError(
        f"{given} was given as the loss of a step; it is one number: a scalar tensor, a float, or "
        f"None"
    )
