"""Training with a probe is training without it, to the last bit, also when it is interrupted."""

import copy
import io
import json

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import normkit as nk
from cases import EVERY, SHAPES

COMPILED = pytest.mark.filterwarnings(  # torch.compile itself asks inputs that are no leaves
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)
HOOKS = [name for name in vars(nn.Module()) if "hooks" in name]


class Net(nn.Module):
    """A norm between what has parameters, with random numbers."""

    def __init__(self, norm):
        super().__init__()
        self.scale, self.norm = nn.Parameter(torch.ones(())), norm
        self.relu, self.drop, self.head = nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 4)

    def forward(self, x):
        y = self.relu(self.norm(x * self.scale))
        return self.head(self.drop(torch.relu(y - 0.1)).flatten(2).mean(2))


def small():
    torch.manual_seed(0)
    return Net(nn.BatchNorm2d(6))


def hooks(model):
    return [len(vars(module)[name]) for module in model.modules() for name in HOOKS]


def train(model, every=None, *, shape=(4, 6, 5, 7), context=torch.enable_grad, **options):
    """Four steps of two forwards; everything that they leave behind."""
    torch.manual_seed(1)
    probe = None if every is None else nk.Probe(model, every, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if probe is not None:
        probe.start()
    for _ in range(4):
        optimizer.zero_grad()
        for _ in range(2):
            with context():
                loss = model(torch.randn(shape)).square().mean()
            loss.backward()
        optimizer.step()
        if probe is not None:
            probe.step(loss)
    if probe is not None:
        probe.stop()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return probe, [*model.state_dict().values(), *grads, loss.detach(), torch.get_rng_state()]


def assert_equal(found, expected):
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_every_layer_is_trained_to_the_same_bits(case):
    shape = SHAPES[case.shapes[0]]
    plain, probed = Net(case.make()), Net(case.make())
    probed.load_state_dict(plain.state_dict())
    before = hooks(probed)
    _, expected = train(plain, shape=shape)
    probe, found = train(probed, 2, shape=shape)
    assert_equal(found, expected)
    assert hooks(probed) == before
    assert [record.step for record in probe.records] == [2, 4]
    assert all(record.notes == () for record in probe.records)
    if case.tracks:
        assert any(row.shift_mean is not None for row in probe.records[0].layers)


@pytest.mark.parametrize("every", [1, 3])
def test_autocast_is_trained_to_the_same_bits(every):
    def context():
        return torch.autocast("cpu", torch.bfloat16)

    (_, expected), (probe, found) = (train(small(), e, context=context) for e in (None, every))
    assert_equal(found, expected)
    assert probe.records[-1].notes == ()


def test_there_are_hooks_for_recorded_steps_only():
    model = small()
    none = hooks(model)
    with nk.Probe(model, every=3) as probe:
        for number in range(1, 8):
            assert (hooks(model) == none) == (number % 3 != 0)
            assert (probe._before is None) == (number % 3 != 0)
            model(torch.randn(4, 6, 5, 7)).sum().backward()
            assert torch.overrides._get_current_function_mode_stack() == []
            probe.step()
    assert hooks(model) == none


class Stop(nn.Module):
    """Raises in the middle of a forward."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x, *_given, **_named):
        if self.error is not None:
            raise self.error
        return x


@pytest.mark.parametrize("error", [RuntimeError("middle"), KeyboardInterrupt("middle")], ids=repr)
@pytest.mark.parametrize("where", ["forward", "between", "step"])
def test_an_interruption_leaves_no_hook_and_a_readable_file(where, error, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), Stop(None))
    none, path = hooks(model), tmp_path / "lines.jsonl"

    def interrupted():
        with nk.Probe(model, every=1, path=path) as probe:
            for number in range(4):
                model[3].error = error if where == "forward" and number == 3 else None
                loss = model(torch.randn(4, 6)).sum()
                loss.backward()
                if number == 3 and where == "between":
                    raise error
                if number == 3:
                    monkeypatch.setattr(torch.linalg, "vector_norm", Stop(error))
                probe.step(loss)

    with pytest.raises(type(error), match="middle"):
        interrupted()
    assert hooks(model) == none
    assert torch.overrides._get_current_function_mode_stack() == []
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line["layers"][1]["name"] == "1" for line in lines)


def test_an_interruption_that_is_caught_inside_is_over_at_the_next_forward():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), Stop(KeyboardInterrupt()))
    device = torch.device("cpu")
    with nk.Probe(model, every=1) as probe:
        with pytest.raises(KeyboardInterrupt):
            model(torch.randn(4, 6))
        with device:  # a mode of somebody else's above the one that was left
            model[2].error = None
            model(torch.randn(4, 6)).sum().backward()
            assert len(torch.overrides._get_current_function_mode_stack()) == 1
            record = probe.step()
    assert [row.name for row in record.layers] == ["0", "1"]
    assert torch.overrides._get_current_function_mode_stack() == []


def test_an_opening_that_fails_leaves_no_hook(monkeypatch):
    model = small()
    none = hooks(model)
    monkeypatch.setattr(nn.Linear, "register_forward_hook", Stop(RuntimeError("middle")))
    with pytest.raises(RuntimeError, match="middle"):
        nk.Probe(model, every=1).start()
    assert hooks(model) == none


def test_a_copy_of_the_model_takes_no_part():
    model = small()
    with nk.Probe(model, every=1) as probe:
        copied = copy.deepcopy(model)
        file = io.BytesIO()
        torch.save(model, file)
        loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
        for other in (copied, loaded):
            other(torch.randn(4, 6, 5, 7)).sum().backward()
        record = probe.step()
    assert record.notes[0].startswith("no training forward of the model was seen")


def test_the_gradients_of_a_scaler_are_those_that_the_optimizer_had():
    model = small()
    optimizer, scaler = torch.optim.SGD(model.parameters()), torch.amp.GradScaler("cpu")
    with nk.Probe(model, every=1) as probe:
        scaler.scale(model(torch.randn(4, 6, 5, 7)).sum()).backward()
        scaled = sum(p.grad.double().square().sum() for p in model.parameters()).sqrt()
        scaler.step(optimizer)
        scaler.update()
        record = probe.step()
    assert record.gradient_norm == pytest.approx(float(scaled) / 2**16)


def compiled(model, how):
    if how == "in place":
        model.compile(backend="eager")
        return model
    if how == "a part":
        model.norm = torch.compile(model.norm, backend="eager")
        return model
    return torch.compile(model, backend="eager", fullgraph=True)


@COMPILED
@pytest.mark.parametrize(("how", "every"), [("wrapped", 2), ("in place", 1), ("a part", 1)])
def test_compiled_models_say_what_hooks_do_not_see(how, every):
    torch._dynamo.reset()
    _, expected = train(compiled(small(), how))
    torch._dynamo.reset()
    probe, found = train(compiled(small(), how), every)
    assert_equal(found, expected)
    record = probe.records[-1]
    if how != "a part":
        assert "torch.compile runs the whole model (eager=True runs" in record.notes[0]
        assert record.reading.startswith("Step 4: the gradient's length is")
    else:
        assert record.notes[0].startswith("torch.compile runs the model or parts of it; hooks")
        assert record.notes[1] == "1 of 1 norms were not seen: norm._orig_mod"
    assert record.gradient_change > 0


def test_a_model_whose_compiled_form_the_probe_does_not_know_says_so_too():
    torch._dynamo.reset()
    model = small()
    runs = torch.compile(model, backend="eager", fullgraph=True)
    torch._dynamo.utils.counters.clear()
    with nk.Probe(model, every=2) as probe:
        for _ in range(4):
            runs(torch.randn(4, 6, 5, 7)).sum().backward()
            probe.step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for record in probe.records:
        assert "torch.compile runs" in record.notes[0]


def test_compiled_models_can_run_uncompiled_when_a_step_is_recorded():
    torch._dynamo.reset()
    plain, _ = train(small(), 2)
    probe, _ = train(torch.compile(small(), backend="eager"), 2, eager=True)
    assert [record.notes for record in probe.records] == [(), ()]
    assert probe.records == plain.records
    assert torch._dynamo.eval_frame._stance.stance == "default"


class WithFunction(Net):
    """Calls a compiled function in its forward."""

    def __init__(self):
        super().__init__(nn.BatchNorm2d(6))
        self.function = torch.compile(lambda x: torch.relu(x) + 1, backend="eager", fullgraph=True)

    def forward(self, x):
        return self.function(super().forward(x))


@COMPILED
def test_a_compiled_function_in_the_forward_is_not_compiled_anew():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = WithFunction()
    torch._dynamo.utils.counters.clear()
    probe, _ = train(model, 2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert probe.records[0].notes == ()
    assert [row.num_rectified for row in probe.records[0].layers][:3] == [6, 4, None]


@pytest.fixture
def alone(tmp_path):
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/m", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_first_rank_records_and_others_count(alone, monkeypatch, tmp_path):
    _, expected = train(small())
    probe, found = train(DistributedDataParallel(small()), 2, path=tmp_path / "first")
    assert_equal(found, expected)
    assert [row.name for row in probe.records[0].layers][:2] == ["the model itself", "norm"]
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    model = small()
    none = hooks(model)
    with nk.Probe(model, every=1, path=tmp_path / "second") as probe:
        assert hooks(model) == none
        assert probe.step(1.0) is None
    assert (probe.num_steps, probe.records) == (1, [])
    assert not (tmp_path / "second").exists()
