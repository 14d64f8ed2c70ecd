"""The state of a run in flight, on the disk: where a run that was killed goes on."""

import json
import math
import random
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from normkit.lab.files import whole_file

FOLDER = "checkpoints"
SECONDS = 60.0  # between two checkpoints of a run
MODEL, OPTIMIZER, RANDOM = "model.", "optimizer.", "random."


@dataclass(slots=True)
class Checkpoint:
    """One file that holds the last state of one run; gone when the run has ended.

    Args:
        path: The file.
        seconds: Least time between two writes.
    """

    path: Path
    seconds: float = SECONDS
    written_at: float = field(default_factory=time.monotonic)

    @property
    def is_due(self) -> bool:
        """Whether it is time to write again."""
        return time.monotonic() - self.written_at >= self.seconds

    def write(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, about: Mapping[str, Any]
    ) -> None:
        """Write weights, buffers, the optimizer's state, all random states, and what is said.

        Args:
            model: The network.
            optimizer: Its optimizer.
            about: What JSON can hold.

        Raises:
            DataError: If it cannot be written.
        """
        weights = model.state_dict()
        if not all(isinstance(value, Tensor) for value in weights.values()):
            self.seconds = math.inf  # a state of the model's own, which no such file holds
            return
        tensors = {f"{MODEL}{name}": value for name, value in weights.items()}
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"{OPTIMIZER}{index}.{k}": v for k, v in state.items() if v is not None}
        tensors |= {f"{RANDOM}{name}": value for name, value in _random_states().items()}
        plain = {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(self.path) as draft:
            save_file(plain, draft, metadata={"about": json.dumps(dict(about))})
        self.written_at = time.monotonic()

    def read(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """Put everything back.

        Returns:
            What was said; ``None``, with nothing changed, if there is no file or it is broken.
        """
        try:
            with safe_open(self.path, "pt") as file:
                about = json.loads(file.metadata()["about"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return None
        model.load_state_dict(_under(tensors, MODEL))
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in _under(tensors, OPTIMIZER).items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = value
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
        _put_back(_under(tensors, RANDOM))
        return about

    def remove(self) -> None:
        """The run has ended."""
        self.path.unlink(missing_ok=True)
        with suppress(OSError):  # others are in the folder, or it never was
            self.path.parent.rmdir()


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _random_states() -> dict[str, Tensor]:
    """Random states of torch, Python and NumPy, as tensors."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - the global one
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([*keys, position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        states |= {f"cuda{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _put_back(states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["torch"])
    version, *words = states["python"].tolist()
    gauss = states["python_gauss"].tolist()
    random.setstate((version, tuple(words), gauss[0] if gauss else None))
    *keys, position, has_gauss = states["numpy"].tolist()
    cached = states["numpy_gauss"].item()
    np.random.set_state(  # noqa: NPY002 - the global one
        ("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached)
    )
    for name, state in states.items():
        if name.startswith("cuda"):
            torch.cuda.set_rng_state(state, int(name.removeprefix("cuda")))
