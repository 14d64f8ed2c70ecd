"""Who feeds whom: by torch.fx and by running, on real networks and on ones made to be followed."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import normkit as nk
from normkit.lab.torchvision_ops import register_missing_operators
from normkit.tracing import Pair, is_norm, trace_feeds
from normkit.tracing.by_running import trace_by_running
from normkit.tracing.symbolic import trace_symbolically

register_missing_operators()
import timm  # noqa: E402 - its operators must be there first
from torchvision import models  # noqa: E402


class Block(nn.Module):
    """Everything that may happen between a convolution and a norm."""

    def __init__(self):
        super().__init__()
        for name in ("direct", "late", "left", "right", "both", "summed", "unused"):
            setattr(self, name, nn.Conv2d(4, 4, 1))
        self.drop, self.norms = nn.Dropout(), nn.ModuleList([nn.GroupNorm(2, 4) for _ in range(4)])
        self.wide = nk.GroupNorm(8, num_groups=2)

    def forward(self, x, scale=None):
        """Go all the ways."""
        x = self.direct(x)
        x = self.norms[0](x.reshape(x.shape[0], x.size(1), x.shape[2], x.size(3)))
        x = functional.relu(self.norms[1](self.drop(self.late(x).contiguous())))
        x = self.wide(torch.cat([self.left(x), self.right(x)], dim=1))[:, :4]
        both = self.both(x)
        x = self.norms[2](both) + both
        x = self.norms[3](self.summed(x) + x)
        return x if scale is None else x * scale


EXPECTED = (
    Pair("direct", "norms.0", ("reshape",)),
    Pair("late", "norms.1", ("contiguous", "drop")),
    Pair("left", "wide", ("cat",)),
    Pair("right", "wide", ("cat",)),
    Pair("both", "norms.2", (), exclusive=False),
)


def feeds_both_ways(model, x, monkeypatch):
    """What is found by torch.fx, and what by running."""
    by_fx = trace_feeds(model)
    monkeypatch.setattr("normkit.tracing.feeds.trace", trace_by_running)
    return by_fx, trace_feeds(model, x)


def test_all_ways_from_a_convolution_to_a_norm(monkeypatch):
    by_fx, by_running = feeds_both_ways(Block(), torch.randn(1, 4, 3, 3), monkeypatch)
    assert by_fx.how == "torch.fx"
    assert by_running.how == "the example input"
    for found in (by_fx, by_running):
        assert found.pairs == EXPECTED
        assert found.destinations["both"] == ("norms.2", "add")
        assert found.destinations["summed"] == ("add",)
        assert found.uncalled == ("unused",)
        assert found.calls["direct"] == found.calls["norms.3"] == 1


@pytest.mark.parametrize(
    ("name", "pairs"),
    [
        ("resnet18", 20),
        ("mobilenet_v3_small", 34),
        ("shufflenet_v2_x0_5", 56),
        ("convnext_tiny", 19),
    ],
)
def test_real_networks_are_followed_alike_both_ways(name, pairs, monkeypatch):
    model = models.get_model(name, weights=None)
    by_fx, by_running = feeds_both_ways(model, torch.zeros(1, 3, 64, 64), monkeypatch)
    assert len(by_fx.pairs) == pairs
    assert set(by_fx.pairs) == set(by_running.pairs)
    norms = {n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d | nn.LayerNorm)}
    assert {pair.norm for pair in by_fx.pairs} | {"classifier.0"} >= norms - {
        f"features.{i}.0" for i in (2, 4, 6)
    }


def test_timms_norms_with_activations_are_followed_as_norms():
    model = timm.create_model("regnety_002")
    found = trace_feeds(model)
    assert all(is_norm(model.get_submodule(pair.norm)) for pair in found.pairs)
    assert Pair("stem.conv", "stem.bn") in found.pairs


def test_hooks_of_the_user_do_not_meet_proxies():
    calls = []
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    for module in model.modules():
        module.register_forward_hook(lambda *_: calls.append(1))
        module.register_forward_pre_hook(lambda *_: calls.append(1))
    assert len(trace_feeds(model).pairs) == 1
    assert calls == []


def test_a_network_that_torch_fx_cannot_follow_is_followed_by_running():
    model = timm.create_model("mobilevit_xxs")
    with pytest.raises(
        nk.TraceError, match=r"torch.fx cannot trace ByobNet \(.*pass example_input="
    ):
        trace_feeds(model)
    found = trace_feeds(model, torch.zeros(1, 3, 64, 64))
    assert found.how == "the example input"
    assert len(found.pairs) == 35


def test_shared_modules_have_one_name_and_their_calls_are_counted():
    shared, norm = nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4)
    model = nn.Sequential(shared, norm, nn.ReLU(), shared, nn.BatchNorm2d(4))
    for graph in (trace_symbolically(model), trace_by_running(model, torch.zeros(2, 4, 2, 2))):
        names = [call.name for call in graph.calls if call.kind in ("producer", "norm")]
        assert names == ["0", "1", "0", "4"]
    assert trace_feeds(model).calls["0"] == 2


@pytest.mark.parametrize(
    "layer",
    [nn.BatchNorm2d(4), nn.LayerNorm(4), nk.BatchNorm(4), nn.SyncBatchNorm(4), nn.RMSNorm(4)],
)
def test_a_lone_layer_is_followed(layer):
    assert trace_feeds(layer).calls == {"": 1}
    assert is_norm(layer)


def test_running_puts_everything_back():
    model = Block().train()
    model.norms[0].eval()
    modes = [m.training for m in model.modules()]
    state, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    trace_by_running(model, (torch.randn(1, 4, 3, 3),))
    torch.set_rng_state(rng)
    with pytest.raises(RuntimeError, match="channels"):
        trace_by_running(model, {"x": torch.zeros(1, 3, 3, 3)})
    assert torch.equal(torch.get_rng_state(), rng)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_failing_example_says_both_reasons():
    model = timm.create_model("mobilevit_xxs")
    with pytest.raises(
        nk.TraceError, match=r"(?s)ByobNet cannot be traced: torch.fx raised .*the ex"
    ):
        trace_feeds(model, torch.zeros(1, 7, 64, 64))
