"""The measurement of a GPU, part by part on a pretended one, and the whole of it once."""

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="the script names triton's version")


@pytest.fixture
def parts():
    return importlib.import_module("gpu_parts")


@pytest.fixture
def bench(parts):
    """Every part at its smallest, by the kernels of this CPU."""
    device = importlib.import_module("gpu_device")
    budget = importlib.import_module("gpu_budget").Budget(1000)
    with device.pretended():
        yield parts.Bench(device=torch.device("cpu"), sizes=parts.TINY, budget=budget)


def test_steps_are_measured_with_every_norm_eager_and_compiled(parts, bench):
    parts.steps(bench)
    parts.compiled_steps(bench)
    assert not bench.budget.errors
    rows = bench.record["steps"]
    assert [row["way"] for row in rows] == ["eager"] * 4 + ["compiled"] * 4
    for rest in (rows[:4], rows[4:]):
        losses = {(row["norm"], row["whose"]): row["first_loss"] for row in rest}
        assert len(losses) == 4
        for norm in ("batch", "group"):  # it is the same network
            assert losses[norm, "ours"] == pytest.approx(losses[norm, "torch"], rel=2e-2)
    assert min(row["step_ms"] for row in rows) > 0
    assert all(row["compile_s"] >= 0 for row in rows[4:])


def test_steps_with_what_follows_in_the_norms_pass_are_measured_eager_and_compiled(parts, bench):
    parts.fused_steps(bench)
    assert not bench.budget.errors
    rows = bench.record["fused"]
    sides = ["torch", "ours", "fused"]
    assert [row["whose"] for row in rows if row["way"] == "eager"] == sides
    assert sorted(row["whose"] for row in rows if row["way"] == "compiled") == sorted(sides)
    assert min(row["step_ms"] for row in rows) > 0
    for row in rows:  # it is the same network
        assert row["first_loss"] == pytest.approx(rows[0]["first_loss"], rel=2e-2)
    shown = importlib.import_module("gpu_report").fused(bench.record).splitlines()
    assert shown[0].split(" | ")[2:6] == ["torch, ms", "ours, ms", "fused, ms", "torch / fused"]
    assert [line.split(" | ")[0] for line in shown[2:]] == ["| eager", "| compiled"]


def test_a_network_to_be_fused_has_every_sum_and_activation_in_its_norms(parts, bench):
    peers = importlib.import_module("gpu_peers")
    model = peers.resnet50(parts.nk.BatchNorm, (1, 1), 8)
    done = parts.nk.fuse_activations_(model)
    assert len(done.fused) == 1 + 3 * 2
    assert sum(each.residual for each in done.fused) == 2


def test_every_layer_is_timed_called_on_the_host_and_in_a_graph(parts, bench):
    parts.calls(bench)
    parts.graphs(bench)
    assert not bench.budget.errors
    names = importlib.import_module("gpu_report").WANTED
    found = {(row["norm"], row["by"]) for row in bench.record["layers"]}
    assert found == {(name, by) for name in names for by in ("calls", "host", "graph")}
    called = [row["us"] for row in bench.record["layers"] if row["by"] != "graph"]
    assert min(min(us.values()) for us in called) > 0


def test_the_most_important_layers_come_first_and_a_batch_of_two_is_reached(parts):
    bench = parts.Bench(device=torch.device("cpu"), sizes=parts.Sizes(), budget=None)
    rows = bench.rows()
    norms, sizes = 7, parts.Sizes()
    for place, batch_size in enumerate((32, 2)):  # before any other shape
        some = rows[place * norms : (place + 1) * norms]
        assert {row[1:] for row in some} == {
            ((batch_size, *sizes.shapes[0]), "bfloat16", "channels_last")
        }
    assert {row[2:] for row in rows[: 2 * norms * len(sizes.shapes)]} == {
        ("bfloat16", "channels_last")
    }
    assert len({name for name, *_ in rows[:norms]}) == norms


def test_bandwidth_profile_and_other_peers_are_measured(parts, bench):
    parts.bandwidth(bench)
    parts.profile(bench)
    parts.others(bench)
    assert not bench.budget.errors
    kernels = [row["kernel"] for row in bench.record["bandwidth"]]
    assert kernels == ["copy", "moments", "apply", "reduce_grad", "combine_grad"]
    assert bench.record["profile"].keys() == {"bn", "gn", "bcn"}
    assert all(row["us"].keys() == {"ours", "compiled"} for row in bench.record["layers"])
    assert len(bench.record["layers"]) == 7


def test_ligers_group_norm_is_timed_where_it_is_installed(parts, bench, monkeypatch):
    seen = []

    def liger(x, weight, bias, channels, groups, eps):
        seen.append((weight.dtype, channels, groups))
        return nn.functional.group_norm(x, groups, weight, bias, eps)

    monkeypatch.setattr(parts, "liger_group_norm", lambda: liger)
    parts.others(bench)
    assert not bench.budget.errors
    assert set(seen) == {(torch.bfloat16, 8, 4), (torch.float32, 8, 4)}
    beside = [row["us"] for row in bench.record["layers"] if "liger" in row["us"]]
    assert [us.keys() for us in beside] == [{"ours", "torch", "liger"}] * 2


def test_peers_have_parameters_of_the_maps_dtype_but_those_that_take_others():
    peers = importlib.import_module("gpu_peers")
    for name, (_, make) in peers.peers_of(4).items():
        module = peers.cast_(make(8), torch.bfloat16)
        dtypes = [p.dtype for p in module.parameters()]
        keeps = {"bn": 2, "in": 2, "bcn": 2}.get(name, 0)
        expected = [torch.float32] * keeps + [torch.bfloat16] * (len(dtypes) - keeps)
        assert dtypes == expected, name
        assert all(b.dtype != torch.bfloat16 for b in module.buffers())


@pytest.mark.parametrize(
    ("output", "passed", "failed", "percent"),
    [
        ("... [100%]\n3 passed in 1.20s\n", 3, 0, 100),
        ("..F\nFAILED a\n1 failed, 12 passed, 2 skipped, 1 error in 9.00s (0:01)\n", 12, 2, 0),
        ("bringing up nodes...\n....s.. [ 50%]\n..F.\n", 9, 1, 50),  # cut off
        ("", 0, 0, 0),
    ],
)
def test_results_of_the_contract_are_counted(output, passed, failed, percent):
    found = importlib.import_module("gpu_contract").counted(output)
    assert (found["passed"], found["failed"], found["percent"]) == (passed, failed, percent)


def test_a_contract_that_takes_too_long_is_cut_off_and_says_so(parts, bench, monkeypatch):
    monkeypatch.setattr(type(bench.budget), "left_s", 0.1)
    parts.contract(bench)
    assert bench.record["contract"]["status"] is None
    assert bench.budget.left_out == {"": ["what came after 0 tests"]}


def test_what_is_cut_off_ends_with_the_processes_that_it_started():
    command = ["sh", "-c", "sleep 600 & wait"]
    ended = importlib.import_module("gpu_contract")._ended
    with subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE) as process:
        assert ended(process, 0.2) is None
        assert process.stdout.read() == b""  # which ends only when nobody can write any more


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_all_of_it_runs_in_the_interpreter_and_leaves_a_record(benchmarks, tmp_path):
    out = tmp_path / "record.json"
    options = ["--budget-s", "3000", "--commit", "abc", "--out", str(out)]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "NORMKIT_"))}
    done = subprocess.run(
        [sys.executable, benchmarks / "gpu.py", "--pretend", *options],
        env=kept | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    record = json.loads(out.read_text())
    assert record["environment"]["pretends"]
    assert record["environment"]["commit"] == "abc"
    assert record["errors"] == []
    assert {check["kernels"] for check in record["checks"]} == {"triton"}
    assert record["contract"]["passed"] >= 1
    assert [len(record[part]) for part in ("checks", "steps", "fused", "bandwidth")] == [
        13,
        8,
        6,
        5,
    ]
    assert f"record: {out}" in done.stdout
    assert "No errors." in done.stdout
