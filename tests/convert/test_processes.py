"""What conversion does with statistics over several processes, and with frozen ones."""

import pytest
import torch.distributed as dist
from torch import nn

import normkit as nk
from convert.networks import timm

LAYERS = timm.layers


@pytest.mark.parametrize(
    ("old", "spec"),
    [(nn.SyncBatchNorm(6), "bn"), (LAYERS.norm_act.SyncBatchNormAct(6), "bgn:2")]
    + [(nk.BatchNorm(6, process_group="world"), f) for f in ("ghost:2", "bcn:3", "ibn", "sn")],
)
def test_statistics_stay_over_all_processes(old, spec):
    done = nk.convert_norm(old, spec)
    assert done.model.process_group == "world"
    assert "statistics over all processes" in done.changes[0].carried
    assert nk.convert_norm(done.model, spec).changes == ()


def test_what_looks_at_one_example_loses_them_by_name():
    old = nk.BatchNorm(6, process_group="world")
    assert "statistics over all processes" in nk.convert_norm(old, "gn:3").changes[0].lost
    tracked = nk.convert_norm(old, "gn:3:track_running_stats").model
    assert tracked.process_group == "world"
    alone = nk.GroupNorm(6, num_groups=3, process_group="world")
    assert nk.convert_norm(alone, "bn").changes[0].lost == ()


def test_a_group_of_its_own_is_carried(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/m", rank=0, world_size=1)
    try:
        group = dist.new_group([0])
        old = nn.SyncBatchNorm(6, process_group=group)
        assert nk.convert_norm_(nn.Sequential(old), "bn").model[0].process_group is group
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.BatchNorm2d(6),
        lambda: nk.BatchChannelNorm(6, num_groups=3),
        lambda: nk.convert_norm(LAYERS.BatchNormAct2d(6, act_layer=nn.SiLU), "bn").model,
    ],
    ids=["torch", "a stage", "with an activation"],
)
def test_frozen_statistics_are_refused_with_the_way_out(make):
    model = nn.Sequential(make())
    nk.freeze_statistics(model)
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(
        nk.ConversionError,
        match=r"0 to gn:2: its statistics are frozen, .*call normkit.thaw_statistics first",
    ):
        nk.convert_norm_(model, "gn:2")
    assert [type(m) for m in model.modules()] == kinds
    nk.thaw_statistics(model)
    assert len(nk.convert_norm_(model, "gn:2").changes) == 1
