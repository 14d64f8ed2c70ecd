"""The recipe of "Four Things" at every batch size, applied, printed and taken back."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

import normkit as nk
from normkit.by_batch_size import ghost_size, recipe_for
from normkit.errors import OptionError


class Residual(nn.Module):
    """Two norms, the second of which leads into a sum."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x):
        return x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), Residual(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.LayerNorm(8), nn.Linear(8, 4),
    )  # fmt: skip


PAPER = {  # section 4.2, and what stands in the table of the docstring
    1: (nk.GroupNorm, {"num_groups": 8}, "printed for batches of 1"),
    2: (nk.GeneralBatchGroupNorm, {"num_groups": 8, "examples_per_group": None}, "printed for"),
    3: (nk.GeneralBatchGroupNorm, {"num_groups": 8}, "our reading for batches of 3 to 5"),
    5: (nk.GeneralBatchGroupNorm, {"num_groups": 8}, "our reading for batches of 3 to 5"),
    6: (nk.GhostBatchNorm, {"ghost_batch_size": 3}, "our reading for batches of 6 and 7"),
    8: (nk.GhostBatchNorm, {"ghost_batch_size": 4}, "printed for batches of 8 and more"),
    128: (nk.GhostBatchNorm, {"ghost_batch_size": 16}, "printed for batches of 8 and more"),
}


@pytest.mark.parametrize("batch_size", PAPER)
def test_norms_become_what_the_paper_takes_at_the_batch_size(batch_size):
    kind, options, source = PAPER[batch_size]
    model = net()
    before = {name: module for name, module in model.named_modules() if not list(module.children())}
    plan = nk.four_things(model, batch_size)
    norms = [model[1], model[2].bn1, model[2].bn2]
    assert [type(norm) for norm in norms] == [kind] * 3
    for name, value in options.items():
        assert {getattr(norm, name) for norm in norms} == {value}
    assert isinstance(model[5], nn.LayerNorm)
    assert source in str(plan)
    assert [change.name for change in plan.changes] == ["1", "2.bn1", "2.bn2"]
    model.train()(torch.randn(batch_size, 3, 8, 8)).sum().backward()
    assert plan.revert() is model
    after = {name: module for name, module in model.named_modules() if not list(module.children())}
    assert after.keys() == before.keys()
    assert all(after[name] is module for name, module in before.items())


@pytest.mark.parametrize("batch_size", [1, 2, 4, 8])
def test_what_is_left_to_the_user_is_said_and_can_be_done(batch_size):
    """A training as the plan says it: its groups, and the example weight afterwards."""
    model = net()
    plan = nk.four_things(model, batch_size)
    names = [thing.name for thing in plan.left]
    weighs = batch_size > 1
    assert names == ["inference example weighing"] * weighs + ["weight decay on gamma and beta"]
    groups = plan.param_groups(0.1)
    assert {group["name"]: group["weight_decay"] for group in groups}["norm_weights"] == 0.1
    optimizer = torch.optim.SGD(groups, lr=0.1)
    for _ in range(2):
        loss = functional.cross_entropy(
            model(torch.randn(batch_size, 3, 8, 8)), torch.arange(batch_size) % 4
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    held_out = [(torch.randn(8, 3, 8, 8), torch.arange(8) % 4) for _ in range(2)]
    if weighs:
        found = nk.tune_example_weight(model, held_out, grid=(0.1, 0.5), refine=False)
        assert len(found.curve) == 3
    else:
        with pytest.raises(OptionError, match="nothing to weigh"):
            nk.tune_example_weight(model, held_out)


def test_norms_without_a_residual_path_do_not_decay():
    """As in Inception-v3, where the paper lost 0.13 points by it."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Flatten(),
        nn.Linear(8 * 16, 4),
    )  # fmt: skip
    plan = nk.four_things(model, 8)
    assert not plan.decays_norms
    assert [thing.name for thing in plan.left] == ["inference example weighing"]
    assert "decay on gamma and beta: not used: no norm has a residual path" in str(plan)
    groups = plan.param_groups(0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0.0, 0.0]


class Unseen(nn.Sequential):
    """Decides by values, so that torch.fx cannot follow it."""

    def forward(self, x):
        return super().forward(x) if x.sum() > -1e9 else x


def test_a_model_that_cannot_be_followed_says_so_unless_there_is_an_example():
    plan = nk.four_things(Unseen(*net()), 2)
    assert plan.decays_norms
    assert "is not known here" in str(plan)
    plan = nk.four_things(Unseen(*net()), 2, example_input=torch.randn(2, 3, 8, 8))
    assert "is not known here" not in str(plan)


def test_a_dry_run_changes_nothing_and_an_optimizer_follows():
    model = net()
    before = list(model.modules())
    plan = nk.four_things(model, 2, dry_run=True)
    assert list(model.modules()) == before
    assert "combined: would be done: norms would become gbgn:max=32" in str(plan)
    assert plan.revert() is model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    nk.four_things(model, 8, optimizer=optimizer, ghost_batch_size=2)
    assert model[1].ghost_batch_size == 2
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}


def test_chosen_norms_alone_are_replaced_with_the_given_groups():
    model = net()
    plan = nk.four_things(model, 2, num_groups=4, where=lambda _m, name: name.startswith("2"))
    assert [change.new for change in plan.changes] == ["gbgn:4", "gbgn:4"]
    assert isinstance(model[1], nn.GroupNorm)


def test_a_ghost_batch_is_an_equal_part_of_the_batch_where_there_is_one():
    for batch_size in range(6, 300):
        size = ghost_size(batch_size)
        assert 3 <= size <= 16
        assert size <= -(-batch_size // 2)
        rest, parts = batch_size % size, -(-batch_size // size)
        if any(batch_size % each == 0 for each in range(4, min(16, batch_size // 2) + 1)):
            assert rest == 0
        assert rest == 0 or size - rest < parts


def test_the_printed_text_has_the_four_things_in_the_papers_order():
    text = str(nk.four_things(net(), 8)).splitlines()
    assert text[0].startswith("recipe for batches of 8: ghost:4; printed for batches of 8")
    assert [line.split(":")[0].strip() for line in text[1:5]] == [
        "inference example weighing", "ghost batch norm", "weight decay on gamma and beta",
        "batch and group norm combined",
    ]  # fmt: skip
    assert text[5].startswith("converted 3 of 4 norms")
    assert repr(nk.four_things(net(), 1)) == "<FourThings: recipe for batches of 1: gn:max=32>"


@pytest.mark.parametrize(
    ("batch_size", "options", "said"),
    [
        (0, {}, "batch_size"),
        (2, {"ghost_batch_size": 2}, "ghost_batch_size=2 was given for batches of 2; it is for"),
        (8, {"num_groups": 2}, "num_groups=2 was given for batches of 8; it is for batch sizes up"),
        (8, {"ghost_batch_size": 9}, "a ghost batch is a part of the batch"),
        (8, {"ghost_batch_size": 0}, "ghost_batch_size"),
        (2, {"num_groups": 0}, "num_groups"),
    ],
)
def test_options_of_no_use_are_refused(batch_size, options, said):
    model = net()
    before = list(model.modules())
    with pytest.raises(OptionError, match=said):
        nk.four_things(model, batch_size, **options)
    assert list(model.modules()) == before


def test_a_model_without_batch_or_group_norms_is_refused():
    with pytest.raises(OptionError, match="Sequential has no batch norm and no group norm"):
        nk.four_things(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), 8)
    with pytest.raises(nk.PartitionError, match="3"):
        nk.four_things(net(), 2, num_groups=3)
    assert recipe_for(10**6)[0] == "ghost"


def test_the_page_runs_and_prints_what_stands_below(capsys):
    page = Path(__file__).parents[1] / "docs" / "by-batch-size.md"
    (found,) = re.findall(r"```python\n([\s\S]*?)```\n\n((?:    .*\n)*)", page.read_text())
    exec(found[0], {})
    expected = [line.removeprefix("    ") for line in found[1].splitlines()]
    assert capsys.readouterr().out.splitlines() == expected
