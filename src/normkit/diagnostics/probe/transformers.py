"""A probe as a callback of Hugging Face's Trainer; transformers is not imported."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from normkit.diagnostics.probe.probe import Probe


class TransformersCallback:
    """Opens a probe, tells it of every optimizer step, and closes it; ignores all other events.

    Args:
        probe: The probe. These events carry no losses, so it records none.
    """

    def __init__(self, probe: Probe) -> None:
        self._probe, self._is_counted = probe, False

    def on_train_begin(self, *_given: Any, **_named: Any) -> None:
        """Open the probe; an interrupted training may have left it open, so close it first."""
        self._probe.stop()
        self._probe.start()
        self._is_counted = False

    def on_optimizer_step(self, *_given: Any, **_named: Any) -> None:
        """Count a step before the Trainer clears its gradients."""
        self._probe.step()
        self._is_counted = True

    def on_step_end(self, *_given: Any, **_named: Any) -> None:
        """Count a step in old versions of transformers, which lack ``on_optimizer_step``."""
        if not self._is_counted:
            self._probe.step()
        self._is_counted = False

    def on_train_end(self, *_given: Any, **_named: Any) -> None:
        """Close the probe."""
        self._probe.stop()

    def __getattr__(self, name: str) -> Callable[..., None]:
        if not name.startswith("on_"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return _ignore


def _ignore(*_given: Any, **_named: Any) -> None:
    """Do nothing."""
