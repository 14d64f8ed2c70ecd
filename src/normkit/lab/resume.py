"""The state of a run in flight, on the disk: where a run that was killed goes on."""

import json
import math
import random
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, distributed, nn

from normkit.lab.files import whole_file

FOLDER = "checkpoints"
SECONDS = 60.0  # between two checkpoints of a run
SUFFIX = ".safetensors"
LOCAL = "to_local"  # a method of distributed tensors, whose import takes a second
MODEL, OPTIMIZER, RANDOM, EXTRA = "model.", "optimizer.", "random.", "extra."


class Saved(NamedTuple):
    """What a checkpoint holds besides what it puts back itself."""

    about: dict[str, Any]
    extra: dict[str, Tensor]


class Periodic:
    """What is written from time to time."""

    __slots__ = ()
    seconds: float
    written_at: float

    @property
    def is_due(self) -> bool:
        """Whether this process finds it time to write again."""
        return time.monotonic() - self.written_at >= self.seconds


@dataclass(slots=True)
class Checkpoint(Periodic):
    """One file that holds the last state of one run; gone when the run has ended.

    Args:
        path: The file.
        seconds: Least time between two writes.
    """

    path: Path
    seconds: float = SECONDS
    written_at: float = field(default_factory=time.monotonic)

    def write(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        about: Mapping[str, Any],
        extra: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        """Write weights, buffers, the optimizer's state, all random states, and what is said.

        Args:
            model: The network.
            optimizer: Its optimizer.
            about: What JSON can hold.
            extra: Further tensors by name.

        Raises:
            DataError: If it cannot be written.
        """
        weights = {name: _own_part(value) for name, value in model.state_dict().items()}
        if not all(isinstance(value, Tensor) for value in weights.values()):
            self.seconds = math.inf  # a state of the model's own, which no such file holds
            return
        tensors = {f"{MODEL}{name}": value for name, value in weights.items()}
        for index, state in optimizer.state_dict()["state"].items():
            kept = {k: _own_part(v) for k, v in state.items() if v is not None}
            tensors |= {f"{OPTIMIZER}{index}.{k}": v for k, v in kept.items()}
        tensors |= {f"{RANDOM}{name}": value for name, value in _random_states().items()}
        tensors |= {f"{EXTRA}{name}": value for name, value in extra.items()}
        plain = {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(self.path) as draft:
            save_file(plain, draft, metadata={"about": json.dumps(dict(about))})
        self.written_at = time.monotonic()

    def read(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Saved | None:
        """Put everything back.

        Returns:
            What was said; None, with nothing changed, if there is no file or it is broken.
        """
        about = _about(self.path)
        if about is None:
            return None
        with safe_open(self.path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        weights = model.state_dict()
        model.load_state_dict(
            {name: _like(weights[name], part) for name, part in _under(tensors, MODEL).items()}
        )
        params = [p for group in optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in _under(tensors, OPTIMIZER).items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = _like(params[int(index)], value)
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
        _put_back(_under(tensors, RANDOM))
        return Saved(about, _under(tensors, EXTRA))

    def remove(self) -> None:
        """The run has ended."""
        self.path.unlink(missing_ok=True)
        with suppress(OSError):  # others are in the folder, or it never was
            self.path.parent.rmdir()


@dataclass(slots=True)
class SharedCheckpoint(Periodic):
    """The states of the processes that train together, all from one step.

    Each process has files of its own, with the number of steps in their names. The states of the
    step before are removed when all have written, so that a kill leaves one that all have.

    Args:
        folder: Of the files; each machine may have its own.
        name: Of the run.
        seconds: Least time between two writes.
    """

    folder: Path
    name: str
    seconds: float = SECONDS
    written_at: float = field(default_factory=time.monotonic)

    def write(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        about: Mapping[str, Any],
        extra: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        """Write this process's state; all have to call it after the same step.

        Args:
            model: The network.
            optimizer: Its optimizer.
            about: What JSON can hold, ``num_steps`` with it.
            extra: Further tensors by name.

        Raises:
            DataError: If it cannot be written.
        """
        before = self._files()
        self._at(about["num_steps"]).write(model, optimizer, about, extra)
        distributed.barrier()
        for num_steps, path in before.items():
            if num_steps != about["num_steps"]:
                path.unlink(missing_ok=True)
        self.written_at = time.monotonic()

    def read(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Saved | None:
        """Put back the last state that all processes have; all have to call it.

        Returns:
            What was said; ``None``, with nothing changed, if there is no such state.
        """
        own = {steps for steps, path in self._files().items() if _about(path) is not None}
        every: list[set[int]] = [set() for _ in range(distributed.get_world_size())]
        distributed.all_gather_object(every, own)
        common = set.intersection(*every)
        return self._at(max(common)).read(model, optimizer) if common else None

    def remove(self) -> None:
        """The run has ended for all."""
        distributed.barrier()
        for path in self._files().values():
            path.unlink(missing_ok=True)
        with suppress(OSError):  # as above
            self.folder.rmdir()

    def _at(self, num_steps: int) -> Checkpoint:
        path = self.folder / f"{self.name}-{distributed.get_rank()}-{num_steps}{SUFFIX}"
        return Checkpoint(path)

    def _files(self) -> dict[int, Path]:
        """This process's files, by the number of steps."""
        beginning = f"{self.name}-{distributed.get_rank()}-"
        found = self.folder.glob(f"{beginning}*{SUFFIX}")
        return {int(path.stem.removeprefix(beginning)): path for path in found}


def _about(path: Path) -> dict[str, Any] | None:
    """What a checkpoint says of itself; None if it is broken or not there."""
    try:
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["about"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None


def _own_part(value: Any) -> Any:
    """This process's part of a tensor that FSDP shares out; anything else as it is."""
    return value.to_local() if hasattr(value, LOCAL) else value


def _like(whole: Any, part: Tensor) -> Tensor:
    """A process's part as the tensor that it is a part of; a step count is no part."""
    if not hasattr(whole, LOCAL) or part.dim() != whole.dim():
        return part
    spread: dict[str, Any] = {"shape": whole.shape, "stride": whole.stride()}
    return type(whole).from_local(
        part, whole.device_mesh, whole.placements, run_check=False, **spread
    )


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
