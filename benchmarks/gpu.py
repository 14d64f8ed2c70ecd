"""Checks and measures the Triton kernels on a GPU: one call, less than ten minutes.

    PYTHONPATH=src python benchmarks/gpu.py

It needs torch and triton; jaxtyping is stood in for where it is absent, and pytest, where it is
there, runs a part of the contract. What the time does not suffice for is named in the record.
``--dry-run`` goes the same way on the CPU, in triton's interpreter, on tiny maps: no figure of
such a record means anything.
"""

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
import types
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def arguments():
    """The command line, read before triton is imported: it looks at the environment once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="on the CPU; figures mean nothing")
    parser.add_argument("--budget-s", type=float, default=540.0, help="seconds for everything")
    parser.add_argument("--out", type=Path, help="where to write (a name without suffix)")
    return parser.parse_args()


OPTIONS = arguments()
DRY = OPTIONS.dry_run
STARTED = time.perf_counter()
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(ROOT / "src"))


class _AnyShape:
    """What jaxtyping's names are where it is absent: they are for readers and type checkers."""

    def __class_getitem__(cls, item):
        return item[0]


STAND_IN = importlib.util.find_spec("jaxtyping") is None
if STAND_IN:
    module = types.ModuleType("jaxtyping")
    for name in ("Float", "Int", "Shaped", "Bool"):
        setattr(module, name, _AnyShape)
    sys.modules["jaxtyping"] = module

if importlib.util.find_spec("triton") is None:
    sys.exit("triton is not installed; `pip install triton`, in the version torch asks for")

import torch
from gpu_peers import Chain, Positions, Runs, resnet50
from gpu_report import environment, markdown
from torch import nn
from torch.nn import functional

import normkit as nk
from normkit.kernels.triton import primitives

DEVICE = torch.device("cpu" if DRY else "cuda")
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
TOLERANCE = {torch.bfloat16: 3e-2, torch.float32: 3e-5}
RESNET50 = (
    (64, 112, 112), (64, 56, 56), (256, 56, 56), (128, 28, 28), (512, 28, 28), (256, 14, 14),
    (1024, 14, 14), (512, 7, 7), (2048, 7, 7),
)  # fmt: skip
SHAPES = ((8, 4, 4),) if DRY else RESNET50
BATCH_SIZES = (2,) if DRY else (32, 2)
BIG = (2, 8, 4, 4) if DRY else (128, 256, 56, 56)
GROUPS = 4 if DRY else 32
REPEATS = 1 if DRY else 20

record = {part: [] for part in ("checks", "bandwidth", "layers", "training", "left_out", "errors")}
record["profile"] = {}


def left_s():
    """Seconds that are left of the budget."""
    return OPTIONS.budget_s - (time.perf_counter() - STARTED)


def has_time(what, needed_s):
    """Whether there is time for something; if not, it is named in the record."""
    if left_s() < needed_s:
        record["left_out"].append(what)
    return left_s() >= needed_s


def keep(part, what, measure, *wanted):
    """Add what is measured to a part of the record, or the error that came instead."""
    try:
        record[part].append(measure(*wanted) | {"what": what})
    except Exception as error:  # noqa: BLE001 - the rest is still worth measuring
        record["errors"].append({"what": what, "error": f"{type(error).__name__}: {error}"[:600]})


def times_s(calls, repeats=REPEATS):
    """Median seconds of each call, taken in turns, by the GPU's clock."""
    found = {name: [] for name in calls}
    for turn in range(repeats + (0 if DRY else 5)):
        for name, call in calls.items():
            elapsed = once_s(call)
            if DRY or turn >= 5:
                found[name].append(elapsed)
    return {name: statistics.median(values) for name, values in found.items()}


def once_s(call):
    """Seconds from an idle device to the end of what a call starts."""
    if DRY:
        started = time.perf_counter()
        call()
        return time.perf_counter() - started
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def graphed(step):
    """A step as a CUDA graph: what the kernels take without the calls that start them."""
    if DRY:
        return step
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def draw(shape, dtype, layout, seed=0):
    """Values with a mean, laid out as wanted."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    values = torch.randn(shape, device=DEVICE, generator=generator) + 0.5
    return values.to(dtype).contiguous(memory_format=LAYOUTS[layout])


def stepper(module, x, grad):
    """Forward and backward of a module."""
    leaf, parameters = x.detach().requires_grad_(), list(module.parameters())
    return lambda: torch.autograd.grad(module(leaf), [leaf, *parameters], grad)


def check_layers():
    """Every norm, forward and backward, against the plain formula in float64."""
    norms = ["bn", "gn:4", "pn", "sn"] if DRY else [
        "bn", "gn:32", "in", "ln", "bgn:8", "bgn:192", "ghost:2", "gbgn:8", "bcn:32", "gnplus:32",
        "sn", "ibn", "pn",
    ]  # fmt: skip
    shapes = [(2, 8, 3, 4)] if DRY else [(4, 96, 14, 14), (3, 96, 57, 56)]
    for norm in norms:
        for dtype, layout, shape in (
            (d, lay, s) for d in DTYPES for lay in LAYOUTS for s in shapes
        ):
            what = f"check of {norm}, {dtype}, {layout}, {shape}"
            if has_time(what, 0 if DRY else 420):
                keep("checks", what, check, norm, DTYPES[dtype], layout, shape)


def check(norm, dtype, layout, shape):
    """Largest differences of one norm's results, in parts of the largest value."""
    layer = nk.build(norm, shape[1]).to(DEVICE)
    twin = nk.build(norm, shape[1]).to(DEVICE).double()
    x, grad = draw(shape, dtype, layout), draw(shape, dtype, layout, seed=1)
    with nk.use_kernels("triton"):
        why = nk.explain(layer, x)
        found = [layer(x), *stepper(layer, x, grad)()]
    with nk.use_kernels("reference"):
        expected = [twin(x.double()), *stepper(twin, x.double(), grad.double())()]
    worst = max(
        float((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-3))
        for a, b in zip(found, expected, strict=True)
    )
    held = worst <= TOLERANCE[dtype] and why.kernels == "triton"
    return {"kernels": f"{why.kernels}: {why.reason}", "error": worst, "held": held}


def check_contract():
    """A part of the contract by pytest, where it is installed."""
    if DRY or importlib.util.find_spec("pytest") is None:
        record["left_out"].append("the contract by pytest (a dry run, or pytest is absent)")
        return
    limit_s = min(left_s() - 330, 150)
    if limit_s < 20:
        record["left_out"].append("the contract by pytest (no time)")
        return
    contract = "tests/kernels/triton/contract"
    options = f"-q -p no:cacheprovider -c {os.devnull} --rootdir=. --confcutdir={contract}"
    command = [
        sys.executable,
        "-m",
        "pytest",
        *options.split(),
        "--import-mode=importlib",
        contract,
    ]
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    added = {"PYTHONPATH": path, "NORMKIT_CONTRACT": "picked"}
    try:
        done = subprocess.run(command, cwd=ROOT, env=os.environ | added, timeout=limit_s,
                              capture_output=True, text=True, check=False)  # fmt: skip
        record["contract"] = {"status": done.returncode, "end": done.stdout[-1500:]}
    except subprocess.TimeoutExpired as cut:
        record["contract"] = {"status": None, "end": (cut.stdout or b"").decode()[-1500:]}
        record["left_out"].append(f"the rest of the contract by pytest (after {limit_s:.0f} s)")


def measure_bandwidth():
    """Bytes a second of each primitive on a map that no cache holds, beside a copy's."""
    num_examples, channels = BIG[:2]
    size = BIG[2] * BIG[3]
    for dtype, layout in ((d, lay) for d in DTYPES for lay in LAYOUTS):
        if not has_time(f"bandwidth, {dtype}, {layout}", 0 if DRY else 200):
            continue
        x, g = draw(BIG, DTYPES[dtype], layout), draw(BIG, DTYPES[dtype], layout, seed=1)
        table = torch.rand(num_examples, channels, device=DEVICE)
        out = torch.empty_like(x)
        three = (table, table, table)
        calls = {  # with the times that a map is read or written
            "copy": (2, functools.partial(out.copy_, x)),
            "moments": (1, functools.partial(primitives.moments, x, size)),
            "apply": (2, functools.partial(primitives.apply, x, *three, size)),
            "reduce_grad": (2, functools.partial(primitives.reduce_grad, g, x, table, size)),
            "combine_grad": (
                3,
                functools.partial(primitives.combine_grad, g, x, table, three, size),
            ),
        }
        found = times_s({name: call for name, (_, call) in calls.items()})
        rate = {name: calls[name][0] * x.nbytes / found[name] / 1e9 for name in calls}
        for name in calls:
            record["bandwidth"].append({
                "kernel": name, "dtype": dtype, "layout": layout, "shape": BIG,
                "gigabytes_per_s": rate[name], "of_copy": rate[name] / rate["copy"],
            })  # fmt: skip


PEERS = {  # ours, torch's, and how many times faster ours is to be
    "bn": ("bn", nn.BatchNorm2d, 1.0),
    "gn": (f"gn:{GROUPS}", lambda c: nn.GroupNorm(GROUPS, c), 1.3),
    "ln": ("ln", lambda c: nn.GroupNorm(1, c), 1.3),
    "in": ("in", lambda c: nn.InstanceNorm2d(c, affine=True), 1.3),
    "bgn": ("bgn:8", lambda c: Runs(c, 8), 1.3),
    "pn": ("pn", Positions, 1.3),
    "bcn": (f"bcn:{GROUPS}", lambda c: Chain(c, GROUPS), 2.0),
}


def measure_layers():
    """Forward and backward beside torch's, by calls and as a graph."""
    for batch_size in BATCH_SIZES:
        for dtype, layout in ((d, lay) for d in DTYPES for lay in LAYOUTS):
            for name in PEERS:
                what = f"{name} at batch {batch_size}, {dtype}, {layout}"
                for shape in SHAPES:
                    if has_time(f"{what}, {shape}", 0 if DRY else 40):
                        wanted = (name, (batch_size, *shape), dtype, layout, shape[0] == 256)
                        keep("layers", f"{what}, {shape}", layer_row, *wanted)


def layer_row(name, shape, dtype, layout, with_compile):
    """Times of one layer, its peer's, and for a few shapes of the peer compiled."""
    spec, peer, _ = PEERS[name]
    x, grad = draw(shape, DTYPES[dtype], layout), draw(shape, DTYPES[dtype], layout, seed=1)
    modules = {"ours": nk.build(spec, shape[1]).to(DEVICE), "torch": peer(shape[1]).to(DEVICE)}
    if name == "bgn":
        modules["torch"].to(DTYPES[dtype])
    if with_compile and not DRY and has_time(f"{name} compiled, {shape}", 90):
        torch.compiler.reset()
        modules["compile"] = torch.compile(peer(shape[1]).to(DEVICE), fullgraph=True)
    row = {"norm": spec, "shape": shape, "dtype": dtype, "layout": layout}
    with nk.use_kernels("triton") if DRY else contextlib.nullcontext():
        steps = {key: stepper(module, x, grad) for key, module in modules.items()}
        row["calls_s"] = times_s(steps)
        try:
            row["graph_s"] = times_s({k: graphed(s) for k, s in steps.items() if k != "compile"})
        except RuntimeError as error:
            row["graph_error"] = str(error)[:300]
    return row


NORMS = {
    "torch's batch norm": nn.BatchNorm2d,
    "our batch norm": nk.BatchNorm,
    "torch's group norm": lambda c: nn.GroupNorm(32, c),
    "our group norm": lambda c: nk.GroupNorm(c, num_groups=32),
}


def measure_training():
    """ResNet-50's training step in bfloat16 and channels_last, and the peak of its memory."""
    for batch_size in (2, 32, 128):
        for name, norm in NORMS.items():
            what = f"training step with {name} at batch {batch_size}"
            if DRY:
                record["left_out"].append(f"{what} (a dry run)")
            elif has_time(what, 30):
                keep("training", what, training_row, name, norm, batch_size)


def training_row(name, norm, batch_size):
    """Time and memory of one network's steps."""
    torch.manual_seed(0)
    model = resnet50(norm).to(DEVICE).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=True)
    x = draw((batch_size, 3, 224, 224), torch.float32, "channels_last")
    target = torch.arange(batch_size, device=DEVICE)

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            loss = functional.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        return loss.detach()

    first_loss = float(step())
    step()
    torch.cuda.reset_peak_memory_stats()
    step()
    peak = torch.cuda.max_memory_allocated()
    time_s = times_s({name: step}, repeats=8)[name]
    return {"norm": name, "batch_size": batch_size, "first_loss": first_loss, "step_s": time_s,
            "peak_bytes": peak}  # fmt: skip


def profile_steps():
    """Which kernels a step's time goes into, on one large map."""
    if DRY or not has_time("profile", 20):
        return
    for name in ("bn", "gn", "bcn"):
        spec = PEERS[name][0]
        shape = (32, 256, 56, 56)
        x, grad = (draw(shape, torch.bfloat16, "channels_last", seed=s) for s in (0, 1))
        step = stepper(nk.build(spec, shape[1]).to(DEVICE), x, grad)
        step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
            step()
            torch.cuda.synchronize()
        events = sorted(found.key_averages(), key=lambda e: -e.device_time_total)[:12]
        record["profile"][spec] = [
            {"kernel": e.key[:80], "calls": e.count, "microseconds": e.device_time_total}
            for e in events
        ]


def write():
    """Write what there is so far: a run that is cut off has left its first part."""
    record["duration_s"] = time.perf_counter() - STARTED
    name = (
        "gpu-dry-run" if DRY else "gpu-" + record["environment"]["device"].lower().replace(" ", "-")
    )
    out = OPTIONS.out or RESULTS / name
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(markdown(record, PEERS), encoding="utf-8")
    return out


def main():
    """Check, measure, write."""
    if not (DRY or torch.cuda.is_available()):
        sys.exit("no CUDA device here: nothing can be measured; --dry-run tries the script itself")
    record["environment"] = environment(DRY, STAND_IN)
    for part in (check_layers, check_contract, measure_bandwidth, measure_training, measure_layers,
                 profile_steps):  # fmt: skip
        try:
            part()
        except Exception as error:  # noqa: BLE001 - the other parts are still worth their time
            record["errors"].append({"what": part.__name__, "error": repr(error)[:600]})
        print(f"{part.__name__}: {time.perf_counter() - STARTED:.0f} s", flush=True)
        write()
    print(markdown(record, PEERS))
    print(f"records: {write()}.json and .md")
    failed = [c for c in record["checks"] if not c["held"]]
    bad = failed or record["errors"] or record.get("contract", {}).get("status", 0)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
