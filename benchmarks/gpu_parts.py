"""The parts of the measurement on a GPU, each of which adds rows to the record."""

from dataclasses import dataclass, field
from functools import partial

import torch
from gpu_budget import Budget, Part
from gpu_contract import check, run_contract
from gpu_device import Rounds, graphed, host_us, times_us
from gpu_peers import cast_, liger_group_norm, norms_of, peers_of, resnet50
from torch import nn
from torch.nn import functional

import normkit as nk
from normkit.kernels import select

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
CHECKED = (
    "bn", "gn:4", "in", "ln", "bgn:8", "bgn:12", "ghost:2", "gbgn:8", "bcn:4", "gnplus:4", "sn",
    "ibn", "pn",
)  # fmt: skip
MIB = 2**20
ROUNDS, ROUNDS_OF_STEPS = Rounds(), Rounds(10, 3)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large everything is: as wanted on a GPU, or as little as goes through every line."""

    checked: tuple = ((4, 96, 14, 14), (3, 96, 57, 56))
    step_batches: tuple = (2, 32, 128)
    compiled_batch: int = 32
    image: int = 224
    depths: tuple = (3, 4, 6, 3)
    width: int = 64
    shapes: tuple = ((256, 56, 56), (2048, 7, 7), (64, 112, 112), (512, 28, 28), (1024, 14, 14))
    batch_sizes: tuple = (32, 2)
    big: tuple = (128, 256, 56, 56)  # no cache holds it
    groups: int = 32
    settings: tuple = (
        ("bfloat16", "channels_last"), ("float32", "NCHW"), ("bfloat16", "NCHW"),
        ("float32", "channels_last"),
    )  # fmt: skip
    rounds: Rounds = ROUNDS
    rounds_of_steps: Rounds = ROUNDS_OF_STEPS
    backend: str = "inductor"
    contract_only: str | None = None


TINY = Sizes(
    checked=((2, 24, 3, 4),), step_batches=(2,), compiled_batch=2, image=32, depths=(1,), width=8,
    shapes=((8, 4, 4),), batch_sizes=(2,), big=(2, 8, 4, 4), groups=4,
    settings=(("bfloat16", "channels_last"),), rounds=Rounds(1, 0, 1),
    rounds_of_steps=Rounds(1, 0, 1), backend="eager", contract_only="test_layers and bn and pixel",
)  # fmt: skip
NEEDED_S = {"compiled": 45.0, "steps": 15.0, "row": 3.0}


@dataclass(kw_only=True)
class Bench:
    """What the parts share: where, how large, how long, and the record that they fill."""

    device: torch.device
    sizes: Sizes
    budget: Budget
    record: dict = field(default_factory=lambda: {
        "contract": {}, "checks": [], "steps": [], "fused": [], "layers": [], "bandwidth": [],
        "profile": {},
    })  # fmt: skip

    def draw(self, shape, dtype, layout, seed=0):
        """Values with a mean, laid out as wanted."""
        generator = torch.Generator(self.device).manual_seed(seed)
        values = torch.randn(shape, device=self.device, generator=generator) + 0.5
        return values.to(DTYPES[dtype]).contiguous(memory_format=LAYOUTS[layout])

    def rows(self):
        """Every layer to be timed, most important first: its name, shape, dtype and layout."""
        sizes = self.sizes
        return [
            (name, (batch_size, *shape), dtype, layout)
            for dtype, layout in sizes.settings
            for shape in sizes.shapes
            for batch_size in sizes.batch_sizes
            for name in peers_of(sizes.groups)
        ]


def parts_of(bench):
    """All of it, most important first, with the seconds that each may count on."""
    return [
        Part("contract", 90, partial(contract, bench)),
        Part("checks", 15, partial(checks, bench)),
        Part("steps", 60, partial(steps, bench)),
        Part("compiled steps", 95, partial(compiled_steps, bench)),
        Part("calls", 55, partial(calls, bench)),
        Part("graphs", 35, partial(graphs, bench)),
        Part("bandwidth", 15, partial(bandwidth, bench)),
        Part("fused steps", 75, partial(fused_steps, bench)),
        Part("profile", 10, partial(profile, bench)),
        Part("Liger's and compiled layers", 15, partial(others, bench)),
    ]


def contract(bench):
    """All of the contract by pytest, where it is installed."""
    found = run_contract(max(bench.budget.left_s, 1.0), bench.sizes.contract_only)
    bench.record["contract"] = found
    if found["status"] is None:
        bench.budget.leave_out(f"what came after {found['passed']} tests")


def checks(bench):
    """Every norm, forward and backward, against the plain formula in float64."""
    for shape in bench.sizes.checked:
        for dtype, layout in bench.sizes.settings:
            for norm in CHECKED:
                row = norm, shape, dtype, layout
                bench.budget.attempt(_named(row), partial(_check, bench, row), 1.0)


def _check(bench, row):
    norm, shape, dtype, layout = row
    x, grad = (bench.draw(*row[1:], seed=seed) for seed in (0, 1))
    found = check(norm, x, grad)
    bench.record["checks"].append(found | {"shape": shape, "dtype": dtype, "layout": layout})


def steps(bench):
    """ResNet-50's training step under autocast to bfloat16, in channels_last, and its memory."""
    for batch_size in bench.sizes.step_batches:
        what = f"ResNet-50 at batch {batch_size}"
        run = partial(_steps, bench, batch_size)
        bench.budget.attempt(what, run, NEEDED_S["steps"])


def _steps(bench, batch_size):
    norms = norms_of(bench.sizes.groups)
    makers = {key: partial(_trainer, bench, norm, batch_size) for key, norm in norms.items()}
    found = _measured(bench, makers)
    for (kind, whose), values in found.items():
        bench.record["steps"].append({
            "norm": kind, "whose": whose, "batch_size": batch_size, "way": "eager", **values,
        })  # fmt: skip


def compiled_steps(bench):
    """The whole network compiled: with ours and with torch's norms."""
    order = [("batch", "ours"), ("batch", "torch"), ("group", "ours"), ("group", "torch")]
    for kind, whose in order:
        what = f"ResNet-50 with {kind} norm, {whose}"
        run = partial(_compiled_step, bench, kind, whose)
        bench.budget.attempt(what, run, NEEDED_S["compiled"])


def _compiled_step(bench, kind, whose):
    batch_size = bench.sizes.compiled_batch
    norm = norms_of(bench.sizes.groups)[kind, whose]
    torch.compiler.reset()
    before, started_s = torch.cuda.memory_allocated(), bench.budget.spent_s
    step = _trainer(bench, norm, batch_size, bench.sizes.backend)
    first_loss = float(step())
    compile_s = bench.budget.spent_s - started_s
    torch.cuda.reset_peak_memory_stats()
    step()
    peak = torch.cuda.max_memory_allocated() - before
    times = times_us({"step": step}, bench.sizes.rounds_of_steps)
    bench.record["steps"].append({
        "norm": kind, "whose": whose, "batch_size": batch_size, "way": "compiled",
        "step_ms": times["step"] / 1e3, "first_loss": first_loss,
        "peak_mib": round(peak / MIB), "compile_s": round(compile_s, 1),
    })  # fmt: skip


SIDES = {"torch": (nn.BatchNorm2d, False), "ours": (nk.BatchNorm, False),
         "fused": (nk.BatchNorm, True)}  # fmt: skip
"""Batch norms, and whether they take the activations and sums behind them into their pass."""


def fused_steps(bench):
    """A ResNet-50 with batch norms that take what follows into their pass, at its largest batch.

    Eager beside torch's and ours one by one; then each compiled, while there is time.
    """
    batch_size = max(bench.sizes.step_batches)
    eager = {side: partial(_side, bench, side, batch_size) for side in SIDES}
    bench.budget.attempt("eager", partial(_fused, bench, eager, "eager"), NEEDED_S["steps"])
    for side in ("fused", "torch", "ours"):
        one = {side: partial(_side, bench, side, batch_size, bench.sizes.backend)}
        run = partial(_fused, bench, one, "compiled")
        bench.budget.attempt(f"{side}, compiled", run, NEEDED_S["compiled"])


def _side(bench, side, batch_size, backend=None):
    norm, is_fused = SIDES[side]
    return _trainer(bench, norm, batch_size, backend, is_fused)


def _fused(bench, makers, way):
    torch.compiler.reset()
    batch_size = max(bench.sizes.step_batches)
    bench.record["fused"] += [
        {"whose": side, "way": way, "batch_size": batch_size, **values}
        for side, values in _measured(bench, makers).items()
    ]


def _measured(bench, makers):
    """Of steps that are made one after another and timed in turns: time, first loss and memory."""
    made, found = {}, {}
    for name, make in makers.items():
        before = torch.cuda.memory_allocated()
        made[name] = step = make()
        first_loss = float(step())
        step()
        torch.cuda.reset_peak_memory_stats()
        step()
        peak = torch.cuda.max_memory_allocated() - before
        found[name] = {"first_loss": first_loss, "peak_mib": round(peak / MIB)}
    times = times_us(made, bench.sizes.rounds_of_steps)
    return {name: {"step_ms": times[name] / 1e3, **values} for name, values in found.items()}


def _trainer(bench, norm, batch_size, backend=None, is_fused=False):
    """A training step of a new network, which returns its loss."""
    torch.manual_seed(0)
    model = resnet50(norm, bench.sizes.depths, bench.sizes.width).to(bench.device)
    if is_fused:
        nk.fuse_activations_(model)
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=True)
    image = (batch_size, 3, bench.sizes.image, bench.sizes.image)
    x = bench.draw(image, "float32", "channels_last")
    target = torch.arange(batch_size, device=bench.device)
    if backend is not None:
        model = torch.compile(model, backend=backend)

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(bench.device.type, torch.bfloat16):
            loss = functional.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def calls(bench):
    """Forward and backward beside torch's: until the GPU is done, and until Python goes on."""
    _each_layer(bench, {"calls": times_us, "host": host_us})


def graphs(bench):
    """Forward and backward as CUDA graphs: the kernels alone."""

    def in_graphs(steps, rounds):
        return times_us({whose: graphed(step) for whose, step in steps.items()}, rounds)

    _each_layer(bench, {"graph": in_graphs})


def _each_layer(bench, ways):
    for row in bench.rows():
        run = partial(_layer, bench, row, ways)
        bench.budget.attempt(_named(row), run, NEEDED_S["row"])


def _named(row):
    name, shape, dtype, layout = row
    return f"{name}, {shape}, {dtype}, {layout}"


def _layer(bench, row, ways):
    spec, peer = peers_of(bench.sizes.groups)[row[0]]
    steps = {
        "ours": _both_ways(bench, nk.build(spec, row[1][1]), row),
        "torch": _both_ways(bench, cast_(peer(row[1][1]), DTYPES[row[2]]), row),
    }
    _time(bench, row, steps, ways)


def _time(bench, row, steps, ways):
    name, shape, dtype, layout = row
    for by, measure in ways.items():
        bench.record["layers"].append({
            "norm": name, "shape": list(shape), "dtype": dtype, "layout": layout, "by": by,
            "us": measure(steps, bench.sizes.rounds),
        })  # fmt: skip


def _both_ways(bench, module, row):
    """Forward and backward of a module, as a call without arguments."""
    module = module.to(bench.device)
    x, grad = (bench.draw(*row[1:], seed=seed) for seed in (0, 1))
    leaf, parameters = x.requires_grad_(), list(module.parameters())
    return lambda: torch.autograd.grad(module(leaf), [leaf, *parameters], grad)


def bandwidth(bench):
    """Bytes a second of each primitive on a map that no cache holds, beside a copy's."""
    for dtype, layout in bench.sizes.settings:
        run = partial(_bandwidth, bench, dtype, layout)
        bench.budget.attempt(f"{dtype}, {layout}", run, NEEDED_S["row"])


def _bandwidth(bench, dtype, layout):
    big = bench.sizes.big
    x, g = (bench.draw(big, dtype, layout, seed=seed) for seed in (0, 1))
    size, table, out = big[2] * big[3], torch.rand(big[:2], device=bench.device), x.clone()
    three, kernels = (table, table, table), select.primitives(x)
    runs = {  # with the times that a map is read or written
        "copy": (2, partial(out.copy_, x)),
        "moments": (1, partial(kernels.moments, x, size)),
        "apply": (2, partial(kernels.apply, x, *three, size)),
        "reduce_grad": (2, partial(kernels.reduce_grad, g, x, table, size)),
        "combine_grad": (3, partial(kernels.combine_grad, g, x, table, three, size)),
    }
    found = times_us({name: run for name, (_, run) in runs.items()}, bench.sizes.rounds)
    rates = {name: maps * x.nbytes / found[name] / 1e3 for name, (maps, _) in runs.items()}
    for name, rate in rates.items():
        bench.record["bandwidth"].append({
            "kernel": name, "dtype": dtype, "layout": layout, "shape": list(big),
            "gb_per_s": round(rate), "of_copy": round(rate / rates["copy"], 3),
        })  # fmt: skip


def profile(bench):
    """Which kernels a step's time goes into, on a large map."""
    batch_size, shape = bench.sizes.batch_sizes[0], bench.sizes.shapes[0]
    for name in ("bn", "gn", "bcn"):
        row = name, (batch_size, *shape), "bfloat16", "channels_last"
        bench.budget.attempt(name, partial(_profile, bench, row), NEEDED_S["row"])


def _profile(bench, row):
    spec, _ = peers_of(bench.sizes.groups)[row[0]]
    step = _both_ways(bench, nk.build(spec, row[1][1]), row)
    step()
    on_gpu = {torch.profiler.ProfilerActivity.CUDA} & set(torch.profiler.supported_activities())
    with torch.profiler.profile(activities=on_gpu or None) as found:
        step()
        torch.cuda.synchronize()
    events = [e for e in found.key_averages() if e.device_time_total > 0]
    bench.record["profile"][row[0]] = [
        {"kernel": e.key[:60], "calls": e.count, "us": round(e.device_time_total, 2)}
        for e in sorted(events, key=lambda e: -e.device_time_total)[:10]
    ]


def others(bench):
    """Beside Liger's group norm, where it is installed, and torch's layers compiled."""
    batch_size = bench.sizes.batch_sizes[0]
    if liger_group_norm() is None:
        bench.budget.leave_out("Liger's group norm, which is not installed")
    else:
        for shape in bench.sizes.shapes:
            for dtype in DTYPES:
                row = "gn", (batch_size, *shape), dtype, "NCHW"
                bench.budget.attempt(f"Liger, {_named(row)}", partial(_liger, bench, row), 1.0)
    for name in peers_of(bench.sizes.groups):
        row = name, (batch_size, *bench.sizes.shapes[0]), "bfloat16", "channels_last"
        bench.budget.attempt(f"{name} compiled", partial(_compiled_layer, bench, row), 5.0)


def _compiled_layer(bench, row):
    torch.compiler.reset()
    spec, peer = peers_of(bench.sizes.groups)[row[0]]
    module = cast_(peer(row[1][1]), DTYPES[row[2]]).to(bench.device)
    compiled = torch.compile(module, fullgraph=True, backend=bench.sizes.backend)
    steps = {
        "ours": _both_ways(bench, nk.build(spec, row[1][1]), row),
        "compiled": _both_ways(bench, compiled, row),
    }
    _time(bench, row, steps, {"calls": times_us})


def _liger(bench, row):
    function, channels, groups = liger_group_norm(), row[1][1], bench.sizes.groups

    class Liger(nn.GroupNorm):
        def forward(self, x):
            return function(x, self.weight, self.bias, channels, groups, self.eps)

    module = cast_(Liger(groups, channels), DTYPES[row[2]])
    steps = {
        "ours": _both_ways(bench, nk.build(f"gn:{groups}", channels), row),
        "liger": _both_ways(bench, module, row),
        "torch": _both_ways(bench, cast_(nn.GroupNorm(groups, channels), DTYPES[row[2]]), row),
    }
    _time(bench, row, steps, {"calls": times_us})
