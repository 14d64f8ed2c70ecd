"""A probe as a callback of Lightning's Trainer."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from normkit.errors import OptionError

if TYPE_CHECKING:
    from normkit.diagnostics.probe.probe import Probe

PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def callback_of(probe: Probe) -> Any:
    """Make a ``Callback`` that keeps the probe open during ``Trainer.fit``.

    Raises:
        OptionError: If Lightning is not installed.
    """

    # A Trainer calls all methods of ``Callback``, so this must be a subclass.
    class ProbeCallback(_base()):
        """Opens a probe, tells it of every optimizer step, and closes it."""

        def __init__(self) -> None:
            self._last_step = 0

        def on_train_start(self, trainer: Any, _module: Any) -> None:
            """Open the probe."""
            self._last_step = trainer.global_step
            probe.start()

        def on_train_batch_end(self, trainer: Any, _module: Any, outputs: Any, *_: Any) -> None:
            """Count a step, unless the optimizer only accumulates gradients."""
            if trainer.global_step != self._last_step:
                self._last_step = trainer.global_step
                probe.on_train_batch_end(outputs)

        def on_train_end(self, *_: Any) -> None:
            """Close the probe."""
            probe.stop()

        def on_exception(self, *_: Any) -> None:
            """Close the probe after an error or an interruption."""
            probe.stop()

    return ProbeCallback()


def _base() -> Any:
    for package in PACKAGES:
        try:
            return importlib.import_module(package).Callback
        except ImportError:
            continue
    raise OptionError(
        f"neither {' nor '.join(PACKAGES)} is installed; install one (pip install lightning), or "
        f"call probe.step(loss) in the loop"
    )
