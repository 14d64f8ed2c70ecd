"""Models that hide their layers are refused by every tool, with the way out."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

import normkit as nk
from normkit.passes import unwrap

X, TARGET = torch.zeros(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
PAIRS = [(X, TARGET)] * 2


def opened(context):
    with context:
        pass


TOOLS = {
    "recalibrate": lambda net: nk.recalibrate(net, [X]),
    "freeze_statistics": nk.freeze_statistics,
    "thaw_statistics": nk.thaw_statistics,
    "set_example_weight": lambda net: nk.set_example_weight(net, 0.1),
    "estimation_shift": lambda net: nk.estimation_shift(net, [X]),
    "channel_difference": lambda net: nk.channel_difference(net, [X]),
    "inactive_channels": lambda net: nk.inactive_channels(net, [X]),
    "gradient_landscape": lambda net: nk.gradient_landscape(net, PAIRS),
    "lipschitz_terms": lambda net: nk.lipschitz_terms(net, PAIRS),
    "hessian_norms": lambda net: nk.hessian_norms(net, PAIRS),
    "projected_updates": lambda net: nk.projected_updates(net, PAIRS),
    "similarity_propagation": lambda net: nk.similarity_propagation(net, [X]),
    "singularity_ratio": nk.singularity_ratio,
    "output_bound": lambda net: nk.output_bound(net, [X]),
    "disturb_statistics": lambda net: opened(nk.disturb_statistics(net, 0.1)),
    "add_output_noise": lambda net: opened(nk.add_output_noise(net)),
    "Probe": lambda net: opened(nk.Probe(net)),
    "accumulate_statistics": lambda net: opened(nk.accumulate_statistics(net, 2)),
    "synchronize_": nk.synchronize_,
    "tune_example_weight": lambda net: nk.tune_example_weight(net, PAIRS),
    "example_weight_curve": lambda net: nk.example_weight_curve(net, PAIRS),
    "diagnose": lambda net: nk.diagnose(net, PAIRS, PAIRS),
    "param_groups": lambda net: nk.param_groups(net, 0.1),
    "bake_weights_": nk.bake_weights_,
    "standardize_weights_": nk.standardize_weights_,
    "convert_norm_": lambda net: nk.convert_norm_(net, "gn:4"),
    "four_things": lambda net: nk.four_things(net, 8),
    "fold": lambda net: nk.fold(net, X),
    "guard_statistics_": nk.guard_statistics_,
    "place_xbn_": nk.place_xbn_,
    "place_ibn_": lambda net: nk.place_ibn_(net, "a"),
    "place_gnbn_": nk.place_gnbn_,
    "sync_update_rates": lambda net: nk.sync_update_rates(net, torch.optim.SGD([X], lr=0.1)),
}
TAKE_SHARDS = ("param_groups", "sync_update_rates")


def net():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())


class Functional(nn.Module):
    """Calls the norm's function, so that a trace of it has no norm."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        norm = self.norm
        return nn.functional.batch_norm(x, norm.running_mean, norm.running_var)


def quantized():
    kind = torch.ao.nn.quantized.BatchNorm2d
    return nn.Sequential(nn.Conv2d(3, 8, 3), kind(8))


@pytest.fixture(scope="module")
def closed():
    return {
        "scripted": torch.jit.script(net()),
        "scripted inside": nn.Sequential(torch.jit.script(net()[:1]), nn.BatchNorm2d(8)),
        "exported": torch.export.export(net().eval(), (X,)).module(),
        "traced": torch.fx.symbolic_trace(Functional()),
        "quantized": quantized(),
    }


SAID = {
    "scripted": r"the model is compiled \(ScriptModule\).* first and script or trace it afterwards",
    "scripted inside": r"module '0' is compiled \(ScriptModule\).* first and script or trace it",
    "exported": r"is exported: its forward is a graph of operators.* model that it was exported fr",
    "traced": r"graph of functions .* calls of batch_norm.* first and trace it afterwards",
    "quantized": r"module '1' is quantized \(BatchNorm2d\).* first and quantize it afterwards",
}


@pytest.mark.parametrize("kind", SAID)
@pytest.mark.parametrize("tool", TOOLS)
def test_what_nobody_can_look_into_is_refused(tool, kind, closed):
    with pytest.raises(nk.OptionError, match=SAID[kind]):
        TOOLS[tool](closed[kind])


@pytest.mark.parametrize("tool", TOOLS)
def test_what_is_no_module_is_refused(tool):
    with pytest.raises(nk.InputTypeError, match=r"a str was given to .*torch\.nn\.Module"):
        TOOLS[tool]("model")


@pytest.fixture
def sharded():
    """A model whose parameters are shared out over one process."""
    from torch.distributed.fsdp import fully_shard  # slow import

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield fully_shard(net())
    dist.destroy_process_group()


def test_a_sharded_model_is_refused_but_sorted(sharded):
    for name, tool in TOOLS.items():
        if name not in TAKE_SHARDS:
            with pytest.raises(
                nk.OptionError, match=r"is sharded \(FSDPModule\).* first and shard"
            ):
                tool(sharded)
    sizes = [len(g["params"]) for g in nk.param_groups(sharded, 0.1, norm_weight_decay=0.1)]
    assert sizes == [1, 1, 1, 1]


def test_flattened_parameters_are_not_sorted():
    class FullyShardedDataParallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self._flat_param = net(), nn.Parameter(torch.zeros(9))

    with pytest.raises(nk.OptionError, match=r"is sharded \(FullyShardedDataParallel\)"):
        nk.param_groups(FullyShardedDataParallel(), 0.1)


def test_graphs_that_call_norms_as_modules_are_measured():
    traced = torch.fx.symbolic_trace(net())
    assert [row.name for row in nk.recalibrate(traced, [torch.randn(4, 3, 8, 8)]).layers] == ["1"]
    assert nk.freeze_statistics(traced) == ("1",)


def test_wrappers_are_opened_and_compiled_parts_run_as_they_are_written():
    inner = net()
    assert unwrap(nn.DataParallel(torch.compile(inner, backend="eager")), "open") is inner
    model = nn.Sequential(torch.compile(net(), backend="eager"), nk.BatchNorm(8))
    x = torch.randn(4, 3, 8, 8)
    model(x)  # compiled without a hook
    names = ["0._orig_mod.1", "1"]
    assert [row.name for row in nk.recalibrate(model, [x]).layers] == names
    assert [row.name for row in nk.estimation_shift(model, [x]).layers[1:]] == names
    assert [row.num_channels for row in nk.inactive_channels(model, [x]).layers] == [8]
    assert nk.set_example_weight(nn.DataParallel(model), 0.5) == ("1",)


@pytest.mark.parametrize("tool", ["add_output_noise", "accumulate_statistics"])
def test_hooks_that_compiled_code_would_not_see_are_refused(tool):
    inside = nn.Sequential(net())
    inside[0].compile(backend="eager")
    compiled = torch.compile(net(), backend="eager")
    for model, name in ((compiled, "the model"), (inside, "module '0'")):
        with pytest.raises(
            nk.OptionError, match=f"{name} is compiled, and compiled code does not run hooks"
        ):
            TOOLS[tool](model)
