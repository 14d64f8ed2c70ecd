"""Scores of every example under given example weights, in as few forwards as the model allows."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from normkit.errors import DataError
from normkit.kernels.select import use_kernels
from normkit.passes import Forward, device_of, moved, progress, untouched
from normkit.tune.layers import WeighedLayers, Weights
from normkit.tune.metrics import Metric
from normkit.tune.several import agree, repeated, split, weighed_by_copy

How = Literal["from the first norm on", "from the input on", "one by one"]
WAYS: tuple[How, ...] = ("from the first norm on", "from the input on", "one by one")
CPU_BYTES = 24 * 2**20  # of the largest map that a norm sees, in all copies: larger ones are slower
GPU_BYTES = 2**29  # where more copies only get faster; what does not fit is halved


class Sweep:
    """Evaluates a model on kept batches; everything of the model but the weights stays as it is.

    Several weights share a forward where the model treats examples one by one, which the first
    batch shows: copies of it must give what plain forwards give. Before its first norm a model
    does not know of weights, so the batch is repeated there, or, where a branch passes that norm by
    and no longer fits, at the input.

    Args:
        layers: Those of a model that are weighed; all of them ours.
        metric: What every example is scored by.
        forward: How a batch is sent through the model.
        batches: The data.
    """

    def __init__(
        self,
        layers: WeighedLayers,
        metric: Metric,
        forward: Forward,
        batches: Sequence[Any],
    ) -> None:
        self.model, self.layers, self.metric = layers.model, layers, metric
        self.forward, self.batches = forward, batches
        self.how: How | None = None  # not tried yet
        self.at_once: int | None = None

    def scores(self, alphas: Sequence[float]) -> Tensor:
        """Score of every example under every weight, ``(A, n)``."""
        return self._over_batches(lambda batch: self._of_several(batch, tuple(alphas)))

    def scores_of(self, weights: Weights) -> Tensor:
        """Score of every example under the layers' own weights, ``(n,)``."""
        return self._over_batches(lambda batch: self._plain(batch, weights))

    def _over_batches(self, score: Callable[[Any], Tensor]) -> Tensor:
        device = device_of(self.model)
        batches = (moved(batch, device) for batch in self.batches)
        total = len(self.batches)
        with self.undisturbed(), torch.no_grad():
            found = [score(b) for b in progress(batches, "tuning example weights", total)]
        return torch.cat(found, dim=-1).cpu()

    @contextmanager
    def undisturbed(self) -> Generator[None]:
        """Evaluation mode, with everything put back when the block ends."""
        composites = self.layers.has_composites  # their operators take a number
        kernels = use_kernels("reference") if composites else nullcontext()
        with kernels, untouched(self.model, training=False):
            yield

    def _plain(self, batch: Any, weights: Weights) -> Tensor:  # noqa: ANN401 - see passes.batches
        return self.metric.of(self._output(batch, weights), batch)

    def _output(self, batch: Any, weights: Weights) -> Any:  # noqa: ANN401
        self.layers.set_(weights)
        return self.forward(self.model, batch)

    def _of_several(self, batch: Any, alphas: tuple[float, ...]) -> Tensor:  # noqa: ANN401
        if len(alphas) > 1 and self.how is None:
            self.how, self.at_once = self._settled(batch, alphas)
        while len(alphas) > 1 and self.how != WAYS[-1]:
            try:
                return torch.cat([self._together(batch, p) for p in self._parts(alphas)])
            except torch.OutOfMemoryError:
                self._use_less_memory()
            except Exception:  # noqa: BLE001 - of a batch unlike the first; a plain forward tells
                self.how = WAYS[-1]
        return torch.stack([self._plain(batch, alpha) for alpha in alphas])

    def _parts(self, alphas: tuple[float, ...]) -> Iterator[tuple[float, ...]]:
        """Cut the weights into equal parts for as many forwards as memory makes necessary."""
        num_parts = -(-len(alphas) // (self.at_once or len(alphas)))
        size = -(-len(alphas) // num_parts)
        return (alphas[start : start + size] for start in range(0, len(alphas), size))

    def _together(self, batch: Any, alphas: tuple[float, ...]) -> Tensor:  # noqa: ANN401
        outputs = self._outputs(batch, alphas, self.how)
        return torch.stack([self.metric.of(output, batch) for output in outputs])

    def _outputs(self, batch: Any, alphas: tuple[float, ...], how: How | None) -> list[Any]:  # noqa: ANN401
        at_norm = how == WAYS[0]
        given = batch if at_norm else repeated(batch, len(alphas))
        with weighed_by_copy(self.layers, alphas, repeat=at_norm):
            return split(self.forward(self.model, given), len(alphas))

    def _use_less_memory(self) -> None:
        if self.at_once == 1:
            self.how = WAYS[-1]
        self.at_once = max(1, (self.at_once or 1) // 2)

    def _settled(self, batch: Any, alphas: tuple[float, ...]) -> tuple[How, int]:  # noqa: ANN401
        """Find the first way that agrees with plain forwards on this batch, and its size.

        Raises:
            DataError: If the batch reaches no layer.
        """
        ends = (alphas[0], alphas[-1])
        largest = LargestInput()
        with largest.watch(self.layers.callers):
            expected = [self._output(batch, alpha) for alpha in ends]
        if not largest.num_bytes:
            raise DataError(
                f"the first batch has reached none of the {len(self.layers.named)} layers with "
                f"running statistics; it is empty, or forward= goes past them"
            )
        limit = CPU_BYTES if largest.on_cpu else GPU_BYTES
        at_once = min(len(alphas), max(1, limit // largest.num_bytes))
        for how in WAYS[:-1]:
            try:
                found = self._outputs(batch, ends, how)
            except Exception:  # noqa: BLE001 - it does not take copies; the next way may do
                continue
            if all(agree(*pair) for pair in zip(found, expected, strict=True)):
                return how, at_once
        return WAYS[-1], 1


class LargestInput:
    """Size of the largest map that goes into one of some layers."""

    def __init__(self) -> None:
        self.num_bytes, self.on_cpu = 0, True

    def watch(self, layers: Sequence[nn.Module] | dict[nn.Module, Any]) -> ExitStack:
        """Look at the inputs of layers until the block ends."""
        stack = ExitStack()
        for layer in layers:
            handle = layer.register_forward_pre_hook(self._see, with_kwargs=True)
            stack.callback(handle.remove)
        return stack

    def _see(self, _: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(named.values()))
        self.num_bytes, self.on_cpu = max(self.num_bytes, x.nbytes), x.is_cpu
