"""Score every example for given example weights, in as few forwards as the model allows."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from normkit.errors import DataError
from normkit.kernels.select import use_kernels
from normkit.passes import Forward, device_of, moved, progress, untouched
from normkit.passes.inputs import first_argument
from normkit.tune.batch_copies import agree, repeated, split, weighed_by_copy
from normkit.tune.layers import WeighedLayers, Weights
from normkit.tune.metrics import Metric

How = Literal["from the first norm on", "from the input on", "one by one"]
WAYS: tuple[How, ...] = ("from the first norm on", "from the input on", "one by one")
"""Ways to compute several weights, the fastest first."""
CPU_BYTES = 24 * 2**20
"""Largest input of a norm, over all copies, on a CPU; larger ones are slower than more forwards."""
GPU_BYTES = 2**29
"""The same on a GPU, where more copies are always faster; out of memory halves their number."""


class Sweep:
    """Evaluates a model on kept batches; of the model only the example weights change.

    Several weights share one forward if the model treats examples independently. The first batch
    tells: the outputs for its copies must equal those of plain forwards. Layers before the first
    norm do not depend on the weights, so the first norm repeats its input. If a branch around that
    norm then does not fit, the batch is repeated at the model's input.

    Args:
        layers: The layers whose weights are set, all of normkit.
        metric: Scores every example.
        forward: ``forward(model, batch)`` calls the model.
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
        self.how: How | None = None  # None until the first batch has been tried
        self.max_copies: int | None = None

    def scores(self, alphas: Sequence[float]) -> Tensor:
        """Score every example for each common weight, ``(A, n)``."""
        return self._over_batches(lambda batch: self._score_batch(batch, tuple(alphas)))

    def scores_of(self, weights: Weights) -> Tensor:
        """Score every example for one setting of the weights, ``(n,)``."""
        return self._over_batches(lambda batch: self._plain(batch, weights))

    def _over_batches(self, score: Callable[[Any], Tensor]) -> Tensor:
        device = device_of(self.model)
        batches = (moved(batch, device) for batch in self.batches)
        total = len(self.batches)
        with self.evaluation_mode(), torch.no_grad():
            found = [score(b) for b in progress(batches, "tuning example weights", total)]
        return torch.cat(found, dim=-1).cpu()

    @contextmanager
    def evaluation_mode(self) -> Generator[None]:
        """Run the block in evaluation mode, then restore the model."""
        # The operators of composites take a number as weight, not one for each example.
        kernels = use_kernels("reference") if self.layers.has_composites else nullcontext()
        with kernels, untouched(self.model, training=False):
            yield

    def _plain(self, batch: Any, weights: Weights) -> Tensor:
        return self.metric.of(self._output(batch, weights), batch)

    def _output(self, batch: Any, weights: Weights) -> Any:
        self.layers.set_(weights)
        return self.forward(self.model, batch)

    def _score_batch(self, batch: Any, alphas: tuple[float, ...]) -> Tensor:
        if len(alphas) > 1 and self.how is None:
            self.how, self.max_copies = self._find_way(batch, alphas)
        while len(alphas) > 1 and self.how != WAYS[-1]:
            try:
                return torch.cat(
                    [self._score_in_one_forward(batch, p) for p in self._parts(alphas)]
                )
            except torch.OutOfMemoryError:
                self._use_less_memory()
            except Exception:  # noqa: BLE001 - no copies of this batch; plain forwards say why
                self.how = WAYS[-1]
        return torch.stack([self._plain(batch, alpha) for alpha in alphas])

    def _parts(self, alphas: tuple[float, ...]) -> Iterator[tuple[float, ...]]:
        """Cut the weights into equal parts, one for each forward, as memory requires."""
        num_parts = -(-len(alphas) // (self.max_copies or len(alphas)))
        size = -(-len(alphas) // num_parts)
        return (alphas[start : start + size] for start in range(0, len(alphas), size))

    def _score_in_one_forward(self, batch: Any, alphas: tuple[float, ...]) -> Tensor:
        outputs = self._outputs(batch, alphas, self.how)
        return torch.stack([self.metric.of(output, batch) for output in outputs])

    def _outputs(self, batch: Any, alphas: tuple[float, ...], how: How | None) -> list[Any]:
        at_norm = how == WAYS[0]
        given = batch if at_norm else repeated(batch, len(alphas))
        with weighed_by_copy(self.layers, alphas, repeat=at_norm):
            return split(self.forward(self.model, given), len(alphas))

    def _use_less_memory(self) -> None:
        """Halve the number of copies; if one copy is too many, use plain forwards."""
        if self.max_copies == 1:
            self.how = WAYS[-1]
        self.max_copies = max(1, (self.max_copies or 1) // 2)

    def _find_way(self, batch: Any, alphas: tuple[float, ...]) -> tuple[How, int]:
        """Find the first way that agrees with plain forwards on this batch.

        Returns:
            The way, and the largest number of copies in one forward.

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
                f"running statistics; it is empty, or forward= does not call them"
            )
        limit = CPU_BYTES if largest.on_cpu else GPU_BYTES
        max_copies = min(len(alphas), max(1, limit // largest.num_bytes))
        for how in WAYS[:-1]:
            try:
                found = self._outputs(batch, ends, how)
            except Exception:  # noqa: BLE001 - the model takes no such copies; try the next way
                continue
            if all(agree(*pair) for pair in zip(found, expected, strict=True)):
                return how, max_copies
        return WAYS[-1], 1


class LargestInput:
    """The size of the largest input of some layers."""

    def __init__(self) -> None:
        self.num_bytes, self.on_cpu = 0, True

    def watch(self, layers: Sequence[nn.Module] | dict[nn.Module, Any]) -> ExitStack:
        """Watch the inputs of layers until the block ends."""
        stack = ExitStack()
        for layer in layers:
            handle = layer.register_forward_pre_hook(self._see, with_kwargs=True)
            stack.callback(handle.remove)
        return stack

    def _see(self, _: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        x = first_argument(args, named)
        self.num_bytes, self.on_cpu = max(self.num_bytes, x.nbytes), x.is_cpu
