"""One step of training and one pass of evaluation: accumulation, clipping, several processes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normkit import decay_gamma_to_one, synchronize_
from normkit.convert.target import pools_examples
from normkit.lab.fabric import make_fabric
from normkit.lab.loading import Loading, loaded_batches
from normkit.lab.recipe import Recipe
from normkit.lab.spec import Protocol
from normkit.lab.task import Batch, Held, TaskRun


def make_optimizer(
    params: Any,
    recipe: Recipe,
    rate: float,
    *,
    fused: bool = False,
) -> torch.optim.Optimizer:
    """The recipe's optimizer.

    Args:
        params: Parameters, or groups of them.
        recipe: Says which, and how.
        rate: Learning rate.
        fused: Whether it takes one pass over all weights.
    """
    options: dict[str, Any] = {"lr": rate, "weight_decay": recipe.weight_decay}
    options |= {"fused": True} if fused else {}
    kind: type[torch.optim.Optimizer]
    if recipe.optimizer in ("sgd", "nesterov"):
        kind = torch.optim.SGD
        options |= {"momentum": recipe.momentum, "nesterov": recipe.optimizer == "nesterov"}
    else:
        kind = torch.optim.AdamW if recipe.optimizer == "adamw" else torch.optim.Adam
    optimizer = kind(params, **options)
    if recipe.decay_gamma_to:
        decay_gamma_to_one(optimizer)
    return optimizer


@dataclass(frozen=True, slots=True)
class Step:
    """What one step of the optimizer found before it changed the weights.

    Args:
        loss: Mean over the examples.
        num_right: Examples that were classified rightly; NaN if the task does not count them.
        num_examples: Of all processes.
        is_due: Whether a process wants a checkpoint after it.
    """

    loss: float
    num_right: float
    num_examples: int
    is_due: bool = False


@dataclass(slots=True)
class Loop:
    """A network, its optimizer, and what a step and an evaluation are.

    Args:
        network: Trained in place.
        protocol: The recipe, and where it computes.
        rate: Learning rate of the first step.
        device: Where the network goes.
        task: Gives the loss of a batch, and judges the network.
    """

    network: nn.Module
    protocol: Protocol
    rate: float
    device: torch.device
    task: TaskRun
    fabric: Any = field(init=False)
    model: Any = field(init=False)
    optimizer: Any = field(init=False)

    def __post_init__(self) -> None:
        protocol = self.protocol
        self.fabric = make_fabric(protocol, self.device)
        self.device = self.fabric.device
        if protocol.channels_last and not self._is_sharded:  # FSDP2 takes contiguous weights only
            self.network = self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.network = self.network.to(self.device)
        if protocol.synchronize_statistics and protocol.processes > 1:
            _synchronize_(self.network)
        if protocol.processes > 1:  # the weights are drawn: from here on masks and the like differ
            torch.manual_seed(torch.initial_seed() + self.fabric.global_rank)
        model = torch.compile(self.network) if protocol.compile else self.network
        if self._is_sharded:
            self.model = self.fabric.setup_module(model)
            groups = self.task.parameters(self.model, protocol)
            optimizer = make_optimizer(groups, protocol, self.rate)
            self.optimizer = self.fabric.setup_optimizers(optimizer)
        else:
            groups = self.task.parameters(self.network, protocol)
            fused = protocol.precision != "16-mixed"
            optimizer = make_optimizer(groups, protocol, self.rate, fused=fused)
            self.model, self.optimizer = self.fabric.setup(model, optimizer)

    @property
    def _is_sharded(self) -> bool:
        return self.protocol.strategy == "fsdp"

    def set_rate(self, rate: float) -> None:
        """Take a learning rate for the next step."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)

    def step(self, parts: Sequence[Batch], *, is_due: bool = False) -> Step:
        """Add the gradients of batches, each weighted by its examples, and update the weights.

        Args:
            parts: Batches, on the device; a norm sees one at a time.
            is_due: Whether this process wants a checkpoint, which all write after the same step.
        """
        self.optimizer.zero_grad(set_to_none=True)
        num_examples = sum(map(len, parts))
        total = num_right = 0.0
        for at, part in enumerate(parts):
            waits = self.protocol.processes > 1 and at + 1 < len(parts)
            with self.fabric.no_backward_sync(self.model, enabled=waits):
                found = self.task.loss(self.model, part)
                share = len(part) / num_examples
                self.fabric.backward(found.loss if share == 1 else found.loss * share)
            total += found.loss.item() * share
            num_right += found.num_right
        if self.protocol.clip is not None:
            # A loss that is not finite ends the run elsewhere; scaled gradients overflow by design.
            self.fabric.clip_gradients(
                self.model, self.optimizer, max_norm=self.protocol.clip, error_if_nonfinite=False
            )
        self.optimizer.step()
        return self._together(Step(total, num_right, num_examples, is_due))

    def _together(self, step: Step) -> Step:
        """What the step of all processes found."""
        if self.protocol.processes == 1:
            return step
        values = [step.loss * step.num_examples, step.num_right, step.num_examples, step.is_due]
        sums = self.fabric.all_reduce(
            torch.tensor(values, dtype=torch.float64, device=self.device), reduce_op="sum"
        ).tolist()
        return Step(sums[0] / sums[2], sums[1], int(sums[2]), sums[3] > 0)

    @property
    def share(self) -> tuple[int, int]:
        """This process's number, and the number of processes that share an evaluation."""
        return self.fabric.global_rank, self.protocol.processes

    def evaluate(self, held: Held) -> dict[str, float]:
        """The task's scores in evaluation mode, by the statistics of the first process."""
        was_training = self.model.training
        self.model.eval()
        if self.protocol.processes > 1:
            for buffer in self.network.buffers():
                torch.distributed.broadcast(buffer, 0)
        found = self.task.evaluate(self, held)
        self.model.train(was_training)
        return found

    def scaler_state(self) -> dict[str, float]:
        """How float16 gradients are scaled; nothing in other precisions."""
        if self.protocol.precision != "16-mixed":
            return {}
        return self.fabric.strategy.precision.state_dict()

    def load_scaler_state(self, state: Mapping[str, float]) -> None:
        """Scale as :meth:`scaler_state` said."""
        if state:
            self.fabric.strategy.precision.load_state_dict(dict(state))

    def state(self) -> dict[str, Tensor]:
        """Weights and buffers, whole; where processes hold parts of them, all have to call it."""
        return {
            name: value.full_tensor() if hasattr(value, "full_tensor") else value
            for name, value in self.network.state_dict().items()
        }

    def epoch(
        self, examples: Any, order: Int[Tensor, " n"], batch_size: int, loading: Loading, skip: int
    ) -> Iterator[list[Any]]:
        """The batches of each step of an epoch, on the device.

        A step takes the next ``batch_size * accumulate`` examples for each process, in turn.

        Args:
            examples: Training examples.
            order: Positions of all of them.
            batch_size: Examples of a batch on one process.
            loading: How they are read and augmented.
            skip: Steps that were done before.
        """
        parts = own_parts(order, batch_size, self.fabric.global_rank, self.protocol.processes)
        steps = grouped(parts, self.protocol.accumulate)[skip:]
        loaded = loaded_batches(examples, [part for step in steps for part in step], loading)
        for step in steps:
            yield [next(loaded).to(self.device) for _ in step]


def _synchronize_(network: nn.Module) -> None:
    """Let norms share their statistics over the processes; a network may have none that could."""
    if any(isinstance(m, _BatchNorm) or pools_examples(m) for m in network.modules()):
        synchronize_(network)


def own_parts(
    order: Int[Tensor, " n"], batch_size: int, rank: int, world_size: int
) -> list[Int[Tensor, " b"]]:
    """Positions of the batches of one process: its equal share of each batch of all processes.

    A last batch is left out if a process would get one example of it, or none.
    """
    whole = order.split(batch_size * world_size)
    if world_size == 1:
        return list(whole[: num_steps_per_epoch(len(order), batch_size)])
    sizes = [len(part) // world_size for part in whole]
    return [
        part[rank * size : (rank + 1) * size]
        for part, size in zip(whole, sizes, strict=True)
        if size > 1 or (size == 1 and batch_size == 1)
    ]


def num_steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Batches of an epoch: the last one may be smaller, but not a single example."""
    full, rest = divmod(num_examples, batch_size)
    return full + (rest > 1 or (rest == 1 and full == 0))


def num_updates(num_examples: int, batch_size: int, protocol: Protocol) -> int:
    """Steps of the optimizer in an epoch."""
    parts = own_parts(torch.arange(num_examples), batch_size, 0, protocol.processes)
    return -(-len(parts) // protocol.accumulate)


def grouped(parts: Sequence[Tensor], size: int) -> list[Sequence[Tensor]]:
    """So many parts together each; the last ones may be fewer."""
    return [parts[at : at + size] for at in range(0, len(parts), size)]
