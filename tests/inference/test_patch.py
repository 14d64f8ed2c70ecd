"""Statistics that are put in, taken out, written and read; and a model that no failure changes."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import normkit as nk
from normkit.inference import measure
from normkit.inference import patch as patch_module


def net(num_features=6):
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, num_features, 3),
        nn.BatchNorm2d(num_features),
        nn.Dropout(0.5),
        nk.BatchChannelNorm(num_features, num_groups=2),
        nk.BatchNorm(num_features),
    )
    model(torch.randn(4, 3, 6, 6))
    return model


def data(seed=0):
    return torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def kept(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(model, values):
    for name, value in model.state_dict().items():
        assert torch.equal(value, values[name]), name


def test_a_patch_is_applied_and_undone_bit_for_bit():
    model = net()
    before, objects = kept(model), dict(model.named_buffers())
    patch = nk.recalibrate(model, [data()] * 2)
    assert_same(model, before)
    assert not patch.applied
    assert patch.undo() is patch
    assert_same(model, before)
    assert patch.apply() is patch
    assert [row.name for row in patch.layers] == ["1", "3.batch", "4"]
    for row in patch.layers:
        for name, value in row.new.items():
            assert torch.equal(model.get_buffer(f"{row.name}.{name}"), value)
            assert not torch.equal(value, row.old[name])
    after = kept(model)
    patch.apply()
    assert_same(model, after)
    patch.undo()
    assert_same(model, before)
    assert all(b is objects[name] for name, b in model.named_buffers())
    assert model.training


def test_applied_statistics_are_undone_whatever_they_have_become():
    model = net()
    before = kept(model)
    patch = nk.recalibrate(model, [data()]).apply()
    model(data(1))
    patch.undo()
    assert_same(model, before)


def test_a_moved_model_takes_no_patch():
    model = net()
    patch = nk.recalibrate(model, [data()])
    model(data(1))
    before = kept(model)
    with pytest.raises(nk.OptionError, match=r"of '1', '3\.batch', '4' are not those that this"):
        patch.apply()
    assert_same(model, before)


def test_statistics_that_were_not_finite_are_repaired_and_put_back():
    model = nn.BatchNorm2d(3)
    model.running_mean[0] = torch.nan
    model.running_var[1] = torch.inf
    patch = nk.recalibrate(model, [data()]).apply()
    assert model.running_mean.isfinite().all()
    patch.undo()
    assert model.running_mean[0].isnan()
    assert model.running_var[1] == torch.inf


def test_an_interruption_while_applying_changes_nothing(monkeypatch):
    model = net()
    before = kept(model)
    patch = nk.recalibrate(model, [data()])
    fill, filled = patch_module._fill, []

    def interrupted(layer, values):
        fill(layer, values)
        filled.append(layer)
        if len(filled) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(patch_module, "_fill", interrupted)
    with pytest.raises(KeyboardInterrupt):
        patch.apply()
    assert_same(model, before)
    assert not patch.applied


def test_distances_are_in_old_standard_deviations():
    model = nn.BatchNorm2d(2, eps=1e-12)
    model.running_mean += torch.tensor([1.0, 0.0])
    model.running_var.copy_(torch.tensor([4.0, 1.0]))
    x = torch.tensor([[[[2.0, 4.0]], [[-3.0, 3.0]]], [[[2.0, 4.0]], [[-3.0, 3.0]]]])
    (row,) = nk.recalibrate(model, [x]).layers
    assert_close(row.mean_shift, ((2 / 2) ** 2 / 2) ** 0.5)
    low, high = row.std_ratio
    assert_close(low, (4 / 3 / 4) ** 0.5)
    assert_close(high, 12.0**0.5)


def test_a_patch_prints_as_a_table():
    model = net()
    model[1].momentum = 0.0
    patch = nk.recalibrate(model, [data()])
    summary = "statistics of 2 layers from 1 batch, in one pass, not applied"
    assert repr(patch) == f"<StatisticsPatch: {summary}>"
    first, head, one, other, left = str(patch).splitlines()
    assert first == summary
    assert head.split() == ["name", "layer", "values", "mean", "shift", "std", "ratio"]
    assert one.split()[:3] == ["3.batch", "InnerBatchNorm", "128"]
    assert other.split()[0] == "4"
    assert left == "left out: 1 (BatchNorm2d): its momentum is 0, so it is frozen"
    assert str(patch.apply()).splitlines()[0].endswith("in one pass, applied")


def test_a_saved_patch_is_that_of_another_process(tmp_path):
    model, path = net(), tmp_path / "statistics.pt"
    before = kept(model)
    patch = nk.recalibrate(model, [data()], sequential=True, max_batches=3)
    patch.save(path)
    read = nk.StatisticsPatch.load(path, net())
    assert str(read) == str(patch)
    read.apply()
    patch.apply()
    assert_same(read.model, kept(model))
    again = nk.StatisticsPatch.load(path, torch.nn.DataParallel(model))
    assert again.applied
    again.undo()
    assert_same(model, before)


def test_files_and_models_that_do_not_fit_are_refused(tmp_path):
    patch, path = nk.recalibrate(net(), [data()]), tmp_path / "statistics.pt"
    with pytest.raises(nk.DataError, match=r"statistics.pt is no file; write one with patch.save"):
        nk.StatisticsPatch.load(path, net())
    path.write_text("text")
    with pytest.raises(nk.DataError, match=r"statistics.pt cannot be read as a patch"):
        nk.StatisticsPatch.load(path, net())
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(nk.DataError, match=r"is no file of the format 'normkit.StatisticsPatch 1'"):
        nk.StatisticsPatch.load(path, net())
    patch.save(path)
    with pytest.raises(nk.OptionError, match=r"no layer '1', '3\.batch', '4' with statistics of"):
        nk.StatisticsPatch.load(path, net(4))
    other = net()
    other[1].running_mean += 1
    read = nk.StatisticsPatch.load(path, other)
    with pytest.raises(nk.OptionError, match="the statistics of '1' are not those"):
        read.apply()
    wide = nn.Sequential(*(nn.BatchNorm2d(3) for _ in range(7)))
    patch = nk.recalibrate(wide, [data()])
    patch.model = nn.Identity()
    with pytest.raises(nk.OptionError, match="no layer '0', '1', '2', '3', '4' and 2 more"):
        patch.apply()


def raising(error):
    def hook(*_):
        raise error

    return hook


def bad_loader():
    yield data()
    random.random()
    raise OSError("the disk is gone")


FAILURES = {
    "the loader": (OSError, "disk is gone", bad_loader, None),
    "the forward": (RuntimeError, "in forward", lambda: [data()], RuntimeError("in forward")),
    "Ctrl-C": (KeyboardInterrupt, "stopped", lambda: [data()], KeyboardInterrupt("stopped")),
    "a batch of another form": (nk.DataError, "type str was", lambda: [data(), "b"], None),
    "a batch of another size": (RuntimeError, "channels", lambda: [data(), data()[:, :2]], None),
    "a batch with NaN": (nk.DataError, "not finite", lambda: [data(), data() * np.nan], None),
}


class Again:
    """Batches that can be read several times."""

    def __init__(self, make):
        self.make = make

    def __iter__(self):
        return iter(self.make())


def state_of(model):
    return {
        "modes": [m.training for m in model.modules()],
        "hooks": [list(m._forward_pre_hooks) for m in model.modules()],
        "objects": [id(b) for b in model.buffers()],
        "grads": [id(p.grad) for p in model.parameters()],
        "random": (random.getstate(), torch.get_rng_state().tolist()),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002 - the state of old programs
    }


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("sequential", [False, True], ids=["at once", "in order"])
@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_leaves_the_model_bit_for_bit(name, sequential, mode):
    kind, message, make, error = FAILURES[name]
    model = net().train(mode)
    model[2].eval()
    if error is not None:
        model[4].register_forward_pre_hook(raising(error))
    values, state = kept(model), state_of(model)
    with pytest.raises(kind, match=message):
        nk.recalibrate(model, Again(make), sequential=sequential)
    assert_same(model, values)
    assert state_of(model) == state


def test_a_failure_after_some_layers_were_settled_changes_nothing(monkeypatch):
    model, settled = net(), []
    values, state = kept(model), state_of(model)
    values_of = measure.values_of

    def interrupted(name, layer, sums):
        settled.append(name)
        if len(settled) == 3:
            raise KeyboardInterrupt
        return values_of(name, layer, sums)

    monkeypatch.setattr(measure, "values_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        nk.recalibrate(model, [data()], sequential=True)
    assert settled == ["1", "3.batch", "4"]
    assert_same(model, values)
    assert state_of(model) == state


@pytest.mark.parametrize("sequential", [False, True], ids=["at once", "in order"])
def test_a_measurement_that_succeeds_changes_nothing_either(sequential):
    model = net()
    values, state = kept(model), state_of(model)
    nk.recalibrate(model, [data()], sequential=sequential)
    assert_same(model, values)
    assert state_of(model) == state
