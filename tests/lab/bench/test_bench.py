import json
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import normkit as nk
from normkit.errors import DataError, PartitionError, SpecError
from normkit.lab.bench import (
    BenchError,
    BenchSpec,
    cells_of,
    end_to_end,
    jobs_of,
    read_record,
    read_shapes,
    run_bench,
    targets_of,
    write_record,
)
from normkit.lab.bench import peers as peers_module
from normkit.lab.bench.chart import write_chart
from normkit.lab.bench.end_to_end import (
    Setting,
    Workload,
    pairs_of,
    run_end_to_end,
    workloads_for,
)
from normkit.lab.bench.fused import FusedRecord, measure_peaks, run_fused
from normkit.lab.bench.markdown import markdown
from normkit.lab.bench.peers import Peer, peers_of
from normkit.lab.bench.run import SCREENING
from normkit.lab.bench.subject import Subject, require_agreement
from normkit.lab.bench.timing import Budget, Call, time_in_turns

KINDS = ("torch", "composition")


def spec_of(*norms, **options):
    given = {"maps": ((6, 5, 7),), "batch_sizes": (4,), "repeats": 2, "budget_s": 0.0}
    return BenchSpec(norms=norms, **(given | options))


@pytest.fixture(scope="module")
def record():
    return run_bench(spec_of("bn", "gn:2", "in", "ln", "pn", "bgn:2", "ghost:2", "gbgn:2"))


def test_every_layer_is_measured_against_its_counterpart(record):
    names = {row.norm: row.entries[row.peers[0]].name for row in record.rows}
    assert names["bn"] == "nn.BatchNorm2d"
    assert names["gn:2"] == names["ln"] == "nn.GroupNorm"
    assert names["in"] == "nn.InstanceNorm2d"
    assert all(row.peers == ("composition",) for row in record.rows if row.norm in ("pn", "bgn:2"))
    assert {row.norm for row in record.rows} == set(record.spec.norms)
    assert all(row.entries["ours"].forward.repeats == 2 for row in record.rows)


def test_the_tiny_map_is_compared_with_torch_batch_norm(record):
    tiny = [row for row in record.rows if row.shape == (64, 8, 8)]
    assert len(tiny) == 8
    assert all("batch_norm" in row.entries for row in tiny)
    assert all(cell.batch_size == 4 for cell in cells_of(record))


def test_a_record_survives_the_file(record, tmp_path):
    path = tmp_path / "new" / "bench.json"
    write_record(path, record)
    assert read_record(path) == record
    assert sorted(p.name for p in path.parent.iterdir()) == ["bench.json"]


@pytest.mark.parametrize(
    ("content", "text"),
    [(None, "cannot be read"), ("{}", "holds no benchmark .spec: "), ("?", "holds no benchmark")],
)
def test_a_file_that_is_no_record_is_refused(tmp_path, content, text):
    path = tmp_path / "bench.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=text):
        read_record(path)


def test_the_chart_and_the_markdown_show_every_norm(record, tmp_path):
    write_chart(tmp_path / "chart.svg", record)
    chart, text = (tmp_path / "chart.svg").read_text(encoding="utf-8"), markdown(record)
    assert "<svg " in chart
    assert chart.count('id="dots-') == 2 * 8  # a shape, two passes, eight norms
    assert all(f"{norm}, batch 4" in chart and f"`{norm}`" in text for norm in record.spec.norms)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "norm", ["bn", "gn:2", "in", "ln", "pn", "bgn:2", "bgn:9", "ghost:2", "gbgn:3:examples=2"]
)
def test_peers_compute_what_the_layer_does(norm, dtype, last):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    layer = nk.build(norm, 6).to(wide)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.5, 2, 6))
        layer.bias.copy_(torch.linspace(-1, 1, 6))
    layout = torch.channels_last if last else torch.contiguous_format
    x, grad = (torch.randn(4, 6, 3, 9).to(dtype, memory_format=layout) for _ in range(2))
    found = [peer for kind in KINDS for peer in peers_of(layer, kind, 4)]
    assert found
    for peer in found:
        ours = Subject.of(Peer(name="ours", module=layer), x, grad)
        require_agreement(ours, Subject.of(peer, x, grad), peer, norm)


COMPOSITES = (
    "bcn:2", "bcn:2:channel_affine=channel", "bcn:2:micro",
    "gnplus:2", "gnplus:2:order=batch-first",
    "gnplus:2:order=parallel", "sn", "sn:use_batch=false", "ibn",
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", COMPOSITES)
def test_compositions_of_composites_compute_what_the_layer_does(norm, dtype):
    layer = nk.build(norm, 6).to(torch.float64 if dtype == torch.float64 else torch.float32)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    x, grad = (torch.randn(4, 6, 3, 9).to(dtype) for _ in range(2))
    (peer,) = peers_of(layer, "composition", 4)
    require_agreement(Subject.of(Peer(name="ours", module=layer), x, grad),
                      Subject.of(peer, x, grad), peer, norm)  # fmt: skip
    ours = {name.replace(".", "_"): value for name, value in layer.named_buffers()}
    for name, value in peer.module.named_buffers():
        torch.testing.assert_close(value, ours[name], atol=1e-2, rtol=1e-2)


def test_composites_are_measured_beside_our_batch_norm():
    record = run_bench(spec_of("bcn:2:micro", "sn"))
    assert {row.entries["our_batch_norm"].name for row in record.rows} == {"normkit.BatchNorm"}
    assert all(row.peers == ("composition",) for row in record.rows)
    assert all(cell.kept <= 1 for cell in cells_of(record))


@pytest.mark.parametrize("norm", ["bgn:2", "bgn:9", "ghost:4"])
def test_compositions_move_their_running_statistics_like_the_layer(norm):
    layer = nk.build(norm, 6)
    x = torch.randn(4, 6, 3, 9)
    layer(x)
    expected = layer.running_mean if norm.startswith("bgn") else 0.1 * x.mean(dim=(0, 2, 3))
    for peer in peers_of(layer, "composition", 4):
        peer.module(x)
        assert int(peer.module.num_batches_tracked) == 1
        torch.testing.assert_close(peer.module.running_mean, expected, atol=1e-6, rtol=1e-5)


class Wrong(nn.Module):
    """A batch norm that is right in its output only, or not even there."""

    def __init__(self, scale, detached):
        super().__init__()
        self.inner = nn.BatchNorm2d(6)
        self.scale = scale
        self.detached = detached

    def forward(self, x):
        y = self.inner(x)
        return self.scale * (y.detach() + 0 * x if self.detached else y)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (Wrong(1.01, False), r"bn on \(4, 6, 5, 7\): the outputs of ours and of wrong differ by"),
        (Wrong(1.0, True), r"bn on \(4, 6, 5, 7\): the input gradients of ours and of wrong"),
        (Wrong(float("nan"), False), "the outputs of ours and of wrong differ by nan"),
    ],
)
def test_different_results_are_not_compared(monkeypatch, wrong, text):
    def peers(layer, against, batch_size):
        return [Peer(name="wrong", module=wrong if layer.num_features == 6 else nn.BatchNorm2d(64))]

    monkeypatch.setattr("normkit.lab.bench.run.peers_of", peers)
    monkeypatch.setattr("normkit.lab.bench.run._with_parameters", lambda layer, x: layer)
    with pytest.raises(BenchError, match=text):
        run_bench(spec_of("bn"))


def test_kept_bytes_are_the_input_and_the_tables():
    x = torch.randn(4, 6, 5, 7)
    subject = Subject.of(Peer(name="ours", module=nn.BatchNorm2d(6)), x, torch.randn_like(x))
    assert subject.memory().kept_bytes == x.nbytes + 2 * 6 * 4  # mean and rstd, float32
    twice = Subject.of(Peer(name="two maps", module=nn.Sequential(nn.Sigmoid(), nn.BatchNorm2d(6))),
                       x, torch.randn_like(x))  # fmt: skip
    assert twice.memory().kept_bytes == x.nbytes + 2 * 6 * 4  # sigmoid's output is the norm's input
    ours = Subject.of(Peer(name="ours", module=nk.BatchNorm(6)), x, torch.randn_like(x))
    assert x.nbytes <= ours.memory().kept_bytes <= x.nbytes + 4 * 6 * 8


def test_peak_bytes_are_output_gradient_and_result():
    x = torch.randn(8, 16, 32, 32)
    subject = Subject.of(Peer(name="torch", module=nn.BatchNorm2d(16)), x, torch.randn_like(x))
    peak = subject.memory().peak_bytes
    assert 2 * x.nbytes < peak < 3.2 * x.nbytes  # y, dx, and a contiguous copy at most
    assert subject.x.grad is None


def test_the_faster_composition_is_chosen(monkeypatch):
    class Slow(nn.BatchNorm2d):
        def forward(self, x):
            for _ in range(2000):
                torch.zeros(1)
            return super().forward(x)

    def peers(layer, against, batch_size):
        twins = {"slow": Slow(layer.num_features), "fast": nn.BatchNorm2d(layer.num_features)}
        return [Peer(name=name, module=twin) for name, twin in twins.items()]

    monkeypatch.setattr("normkit.lab.bench.run.peers_of", peers)
    monkeypatch.setattr("normkit.lab.bench.run._with_parameters", lambda layer, x: layer)
    found = run_bench(spec_of("bn", against=("composition",)))
    assert {row.entries["composition"].name for row in found.rows} == {"fast"}
    assert SCREENING.repeats == 3


def test_channels_last_is_also_compared_with_contiguous():
    found = run_bench(spec_of("bn", memory_format="channels_last"))
    assert all("contiguous" in row.entries for row in found.rows)


@pytest.mark.parametrize(
    ("spec", "error", "text"),
    [
        (spec_of("gn:4"), PartitionError, "6"),
        (spec_of("bgn:2", against=("torch",)), SpecError, "bgn:2 has no peer of the kind torch"),
        (spec_of("bn:affine=false"), SpecError, "bn:affine=false has no weight and bias"),
        (spec_of("ghost:2", batch_sizes=(3,)), SpecError, "batch size 3 is not divided by the 2"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(spec, error, text):
    with pytest.raises(error, match=text):
        jobs_of(spec)


def test_a_layer_without_a_known_composition_is_refused():
    with pytest.raises(SpecError, match="no composition of torch's operators is known for Linear"):
        peers_of(nn.Linear(2, 2), "composition", 2)
    with pytest.raises(SpecError, match="no formula to compile is known for Linear"):
        peers_module.peers_of(nn.Linear(2, 2), "compile", 2)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("[[1, 2]]", "at 0"),
        ("[[1, 2, 0]]", "at 0.2: Input should be greater than or equal to 1"),
        ('{"a": 1}', "at the whole: Input should be a valid list"),
        ("[", "is not JSON"),
        ("[]", "lists no shape"),
    ],
)
def test_a_shapes_file_that_cannot_be_used_is_explained(tmp_path, content, text):
    path = tmp_path / "shapes.json"
    path.write_text(content)
    with pytest.raises(SpecError, match=text):
        read_shapes(str(path))


def test_shapes_come_by_name_or_from_a_file(tmp_path):
    path = tmp_path / "shapes.json"
    path.write_text(json.dumps([[6, 5, 7]]))
    assert read_shapes(str(path)) == ((6, 5, 7),)
    assert len(set(read_shapes("resnet50"))) == 12
    with pytest.raises(
        SpecError, match=r"was given 'resnet', .* name resnet50 or small, or a file"
    ):
        read_shapes("resnet")


SMALL = Workload(model="small-resnet", input_shape=(1, 8, 8), num_classes=10, batch_size=4)


def test_training_steps_of_networks_are_timed_in_turns():
    seen = []
    setting = Setting(repeats=1, budget_s=0.0)
    found = run_end_to_end(setting, (SMALL,), seen.append)
    assert seen == [SMALL]
    assert found.results[0].ratio > 0
    assert found.results[0].ours.repeats == 1


def test_networks_that_differ_are_not_compared(monkeypatch):
    monkeypatch.setattr("normkit.lab.bench.end_to_end._NORMS", {"torch": None, "ours": "in"})
    with pytest.raises(BenchError, match=r"small-resnet: the first loss is .* and .* with ours"):
        run_end_to_end(Setting(repeats=1, budget_s=0.0), (SMALL,))


class FakeEvent:
    """A GPU's clock that advances by 3 ms with each reading."""

    now_ms = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        FakeEvent.now_ms += 3.0
        self.at_ms = FakeEvent.now_ms

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return end.at_ms - self.at_ms


def test_a_gpu_is_timed_by_its_own_clock(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    device = torch.device("cuda")
    calls = {"a": Call(run=lambda: None), "b": Call(run=lambda: None)}
    found = time_in_turns(calls, Budget(seconds=0.0, repeats=5), device)
    assert found["a"].median_s == found["b"].median_s == pytest.approx(3e-3)
    assert waited == [device] * (2 * (2 + 5))  # two calls, warm-ups and repeats


def test_a_gpu_is_given_resnet50_as_it_is_trained():
    sizes = [work.batch_size for work in workloads_for(torch.device("cuda"))]
    assert sizes == [2, 32, 128]
    assert all(w.autocast and w.channels_last for w in workloads_for(torch.device("cuda")))


def test_networks_in_16_bits_and_channels_last_are_timed_too():
    work = SMALL.model_copy(update={"autocast": True, "channels_last": True})
    found = run_end_to_end(Setting(repeats=1, budget_s=0.0), (work,))
    assert [name for name, *_ in pairs_of(found.results[0])] == ["batch"]


def test_torch_group_norms_take_the_place_of_ours():
    model = nn.Sequential(nk.GroupNorm(6, num_groups=3))
    expected = model(torch.ones(2, 6, 4).cumsum(2))
    end_to_end._take_torch_group_norms_(model)
    assert type(model[0]) is nn.GroupNorm
    torch.testing.assert_close(model(torch.ones(2, 6, 4).cumsum(2)), expected)


def test_records_of_a_gpu_have_targets_of_their_own(record):
    spec = record.spec.model_copy(update={"device": "cuda:0", "shapes": "resnet50"})
    found = targets_of(record.model_copy(update={"spec": spec}))
    wanted = {target.name: target.wanted for target in found}
    assert wanted["bn against torch, forward + backward"] == "at least 1 times as fast"
    assert wanted["gn:2 against torch, forward + backward"] == "at least 1.3 times as fast"
    assert wanted["bgn:2 against composition, forward + backward"] == "at least 1.3 times as fast"
    assert sum(target.name.endswith("kept for backward") for target in found) == 8


def test_steps_of_networks_are_timed_before_and_after_fusing():
    found = run_fused(
        Setting(repeats=1, budget_s=0.0), shapes=[(6, 5, 7)], batch_sizes=[2], workloads=[SMALL]
    )
    assert found.mean_ratio("torch", residual=True) > 0
    assert found.networks[0].times.keys() == {"torch", "separate", "fused"}
    assert FusedRecord.model_validate_json(found.model_dump_json()) == found


def test_a_step_of_a_fused_network_takes_no_more_memory_than_torchs():
    workload = Workload(
        model="torchvision:resnet18", input_shape=(3, 96, 96), num_classes=10, batch_size=8
    )
    peaks = measure_peaks(workload, threads=1)
    assert peaks.keys() == {"torch", "separate", "fused"}
    for side in ("separate", "fused"):
        assert peaks[side] <= 1.005 * peaks["torch"]  # tables of statistics
