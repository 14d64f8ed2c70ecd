"""Running a benchmark: every norm on every map, against its peers."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normkit import explain
from normkit.errors import SpecError
from normkit.lab.bench.composites import is_composite
from normkit.lab.bench.peers import Peer, peers_of
from normkit.lab.bench.records import (
    BATCH_NORM,
    CONTIGUOUS,
    COPY,
    OUR_BATCH_NORM,
    OURS,
    BenchRecord,
    Entry,
    Row,
)
from normkit.lab.bench.spec import TINY_SHAPE, Against, BenchSpec, Shape, build_norm
from normkit.lab.bench.subject import Subject, Timed, require_agreement
from normkit.lab.bench.timing import Budget, Call, Times, time_in_turns
from normkit.lab.device import parse_device, seeded, threads_of
from normkit.lab.environment import code_hash, describe_environment
from normkit.layers.base import NormLayer, SegmentLayer
from normkit.layers.over_batch import BatchNorm

SCREENING = Budget(seconds=0.0, repeats=3)

OnRow = Callable[["Job"], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One row to measure."""

    norm: str
    batch_size: int
    shape: Shape

    def __str__(self) -> str:
        return f"{self.norm} on {(self.batch_size, *self.shape)}"

    @property
    def cost(self) -> float:
        """Estimated time of the job, in an arbitrary unit."""
        channels, height, width = self.shape
        return 4e6 + self.batch_size * channels * height * width


def jobs_of(spec: BenchSpec) -> list[Job]:
    """The rows that a benchmark measures; each is checked before the first is measured.

    Raises:
        SpecError: If a norm cannot be built, or has no peer of the requested kinds.
        PartitionError: If a norm's groups do not fit a shape.
    """
    jobs = [
        Job(norm=norm, batch_size=size, shape=shape)
        for norm in spec.norms
        for size, shape in spec.inputs()
    ]
    for job in jobs:
        _check(job, spec)
    return jobs


def _check(job: Job, spec: BenchSpec) -> None:
    with torch.device("meta"):
        layer = build_norm(job.norm, job.batch_size, job.shape)
    affine = any(name.endswith("weight") for name, _ in layer.named_parameters())
    if not isinstance(layer, NormLayer) or not affine:
        raise SpecError(f"{job.norm} has no weight and bias; bench measures layers with both")
    if isinstance(layer, SegmentLayer):
        layer.partition.segment_size((job.batch_size, *job.shape))
    if not any(_has_peer(layer, kind, job.batch_size) for kind in spec.against):
        raise SpecError(
            f"{job.norm} has no peer of the kind {', '.join(spec.against)}; add torch, "
            f"composition or compile to --against"
        )


def _has_peer(layer: nn.Module, against: Against, batch_size: int) -> bool:
    return against == "compile" or bool(peers_of(layer, against, batch_size))


def run_bench(spec: BenchSpec, on_row: OnRow = lambda job: None) -> BenchRecord:
    """Run the benchmark that a spec describes.

    Args:
        spec: The spec, which decides everything but the times.
        on_row: Called after each row.

    Raises:
        BenchError: If a layer and a peer differ in outputs or input gradients.
        SpecError: If a norm, a peer or the device is unknown.
        PartitionError: If a norm's groups do not fit a shape.
    """
    device = parse_device(spec.device)
    jobs = jobs_of(spec)
    load, started = os.getloadavg()[0], time.perf_counter()
    environment = describe_environment(device, spec.threads)
    rows = []
    with threads_of(spec.threads), seeded(0, device):
        for job in jobs:
            rows.append(_Measurement(job, spec, device).row())
            on_row(job)
    return BenchRecord(
        spec=spec,
        rows=tuple(rows),
        environment=environment,
        code_hash=code_hash("lab/bench/"),
        duration_s=time.perf_counter() - started,
        load_average=load,
    )


class _Measurement:
    """The layer, its peers and their inputs, for one row."""

    def __init__(self, job: Job, spec: BenchSpec, device: torch.device) -> None:
        self.job, self.spec, self.device = job, spec, device
        self.x, self.grad = self._map(mean=0.5), self._map(mean=0.0)
        self.layer = _with_parameters(build_norm(job.norm, job.batch_size, job.shape), self.x)
        self.ours = Subject.of(Peer(name="ours", module=self.layer), self.x, self.grad)

    def row(self) -> Row:
        """Check that results agree, then measure."""
        names, subjects = {OURS: type(self.layer).__name__}, {OURS: self.ours}
        for kind in self.spec.against:
            peers = peers_of(self.layer, kind, self.job.batch_size)
            if peers:
                peer = self._fastest(peers)
                names[kind], subjects[kind] = peer.name, self._subject(peer)
        memories = {kind: subject.memory() for kind, subject in subjects.items()}
        names, subjects = names | self._reference_names(), subjects | self._references()
        forward = self._time(subjects, "forward")
        both = self._time(subjects, "forward_backward")
        entries = {
            key: Entry(
                name=names.get(key, key),
                forward=times,
                forward_backward=both.get(key),
                memory=memories.get(key),
            )
            for key, times in forward.items()
        }
        why = explain(self.layer, self.x)
        return Row(
            norm=self.job.norm,
            batch_size=self.job.batch_size,
            shape=self.job.shape,
            map_bytes=self.x.nbytes,
            kernels=f"{why.kernels}: {why.reason}",
            entries=entries,
        )

    def _map(self, mean: float) -> Tensor:
        shape = (self.job.batch_size, *self.job.shape)
        wide = torch.randn(shape, device=self.device).add_(mean)
        return wide.to(self.spec.torch_dtype, memory_format=self.spec.torch_memory_format)

    def _subject(self, peer: Peer) -> Subject:
        return Subject.of(peer, self.x, self.grad)

    def _fastest(self, peers: list[Peer]) -> Peer:
        """The fastest peer, after a check that all compute the same as the layer."""
        for peer in peers:
            require_agreement(self.ours, self._subject(peer), peer, str(self.job))
        if len(peers) == 1:
            return peers[0]
        calls = {p.name: self._subject(p).call("forward_backward") for p in peers}
        times = time_in_turns(calls, SCREENING, self.device)
        return min(peers, key=lambda peer: times[peer.name].median_s)

    def _reference_names(self) -> dict[str, str]:
        return {
            COPY: "x.clone()",
            BATCH_NORM: "nn.BatchNorm2d",
            CONTIGUOUS: "ours, contiguous",
            OUR_BATCH_NORM: "normkit.BatchNorm",
        }

    def _references(self) -> dict[str, Subject]:
        """Calls that are timed for reference beside the peers."""
        found = {}
        dtype = next(self.layer.parameters()).dtype
        options = {"device": self.x.device, "dtype": dtype}
        if self.job.shape == TINY_SHAPE:
            batch_norm = nn.BatchNorm2d(self.job.shape[0], **options)
            found[BATCH_NORM] = self._subject(Peer(name="nn.BatchNorm2d", module=batch_norm))
        if is_composite(self.layer):
            batch_norm = BatchNorm(self.job.shape[0], **options)
            found[OUR_BATCH_NORM] = self._subject(Peer(name="BatchNorm", module=batch_norm))
        if self.spec.memory_format == "channels_last":
            found[CONTIGUOUS] = Subject.of(
                Peer(name="ours", module=self.layer), self.x.contiguous(), self.grad.contiguous()
            )
        return found

    def _time(self, subjects: dict[str, Subject], timed: Timed) -> dict[str, Times]:
        calls = {key: subject.call(timed) for key, subject in subjects.items()}
        if timed == "forward":
            calls[COPY] = Call(run=self.x.clone)
        budget = Budget(seconds=self.spec.budget_s, repeats=self.spec.repeats)
        return time_in_turns(calls, budget, self.device)


@torch.no_grad()
def _with_parameters(layer: nn.Module, x: Tensor) -> nn.Module:
    """Put the layer into training mode, and give it random parameters of at least 32 bits."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    layer = layer.to(x.device, dtype).train()
    for parameter in layer.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return layer
