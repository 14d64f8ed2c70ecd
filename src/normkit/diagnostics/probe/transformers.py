"""A probe as a callback of Hugging Face's Trainer, which is not imported."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from normkit.diagnostics.probe.probe import Probe


class TransformersCallback:
    """Opens a probe, tells it of every optimizer step, and closes it; all other events pass by.

    Args:
        probe: The probe; losses do not come with these events, so it records none.
    """

    def __init__(self, probe: Probe) -> None:
        self._probe, self._told = probe, False

    def on_train_begin(self, *_given: Any, **_named: Any) -> None:  # noqa: ANN401
        """Open the probe, also after a training that was interrupted."""
        self._probe.stop()
        self._probe.start()
        self._told = False

    def on_optimizer_step(self, *_given: Any, **_named: Any) -> None:  # noqa: ANN401
        """Count a step while its gradients are there."""
        self._probe.step()
        self._told = True

    def on_step_end(self, *_given: Any, **_named: Any) -> None:  # noqa: ANN401
        """Count a step of a version that does not tell of the optimizer's."""
        if not self._told:
            self._probe.step()
        self._told = False

    def on_train_end(self, *_given: Any, **_named: Any) -> None:  # noqa: ANN401
        """Close the probe."""
        self._probe.stop()

    def __getattr__(self, name: str) -> Callable[..., None]:
        if not name.startswith("on_"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return _pass_by


def _pass_by(*_given: Any, **_named: Any) -> None:  # noqa: ANN401
    """Do nothing."""
