"""What a user's training function is given, and what it may do with it."""

import pytest
import torch
from torch import nn

import normkit as nk
from normkit.errors import DataError, NormError, SpecError
from normkit.lab import compare
from normkit.lab.loggers import Loggers
from normkit.lab.own_training import ApplyNorm, Report, train_by
from normkit.lab.spec import Protocol, TrainingSpec
from normkit.lab.torchvision_ops import register_missing_operators
from normkit.lab.user_code import name_of


def given(norm="gn:2", batch_size=4):
    return ApplyNorm(TrainingSpec(norm=norm, batch_size=batch_size))


def outcome_of(train, norm="gn:2"):
    protocol = Protocol(train=name_of(train, "train"))
    return train_by(TrainingSpec(protocol=protocol, norm=norm, batch_size=4, seed=1), lambda: None)


def make_net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


class Wrapping(nn.Module):
    """Holds its network, as a module of Lightning does, and a norm that sees one example."""

    def __init__(self):
        super().__init__()
        self.net = make_net()
        self.head_norm = nn.LayerNorm(4)

    def forward(self, x):
        return self.head_norm(self.net(x).mean((2, 3)))


GIVEN = {"function": make_net, "class": Wrapping, "network": make_net()}


@pytest.mark.parametrize("given_as", GIVEN.values(), ids=GIVEN)
def test_a_network_or_a_function_that_makes_it_is_given(given_as):
    apply_norm = given()
    net = apply_norm(given_as)
    assert any(isinstance(m, nk.GroupNorm) for m in net.modules())
    assert net is given_as or not isinstance(given_as, nn.Module)
    assert apply_norm.num_parameters == sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("example", [None, torch.zeros(2, 3, 8, 8)], ids=["alone", "example"])
def test_norms_over_the_batch_are_replaced_and_others_stay(example):
    """With and without an example, as in a network that the engine trains."""
    model = given()(Wrapping(), example)
    assert isinstance(model.net[1], nk.GroupNorm)
    assert type(model.head_norm) is nn.LayerNorm
    other = given()(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), None)
    assert isinstance(other[1], nk.GroupNorm)


def test_a_module_of_lightning_is_changed_inside():
    register_missing_operators()  # it imports torchvision
    lightning = pytest.importorskip("lightning.pytorch")

    class Task(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = make_net()

    task = Task()
    assert given()(task) is task
    assert isinstance(task.net[1], nk.GroupNorm)
    assert {name for name, _ in task.named_parameters()} >= {"net.1.weight", "net.1.bias"}


def test_a_model_of_transformers_is_changed_inside_and_takes_named_inputs():
    register_missing_operators()  # it imports torchvision
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=2
    )

    def make():
        return transformers.ResNetForImageClassification(config)

    pixels = torch.randn(2, 3, 32, 32)
    for norm, example in (("gn:2", None), ("gn:2+ws", {"pixel_values": pixels})):
        apply_norm = given(norm)
        model = apply_norm(make, example)
        assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
        assert sum(isinstance(m, nk.GroupNorm) for m in model.modules()) > 4
        assert model(pixel_values=pixels).logits.shape == (2, 2)
        assert bool(apply_norm.placed) == (example is not None)


def test_a_function_may_place_the_norm_by_its_text():
    def train(apply_norm, batch_size, seed, report):
        layer = nk.NormSpec.parse(apply_norm.spec).build(8)
        assert isinstance(layer, nk.GroupNorm)
        return 0.5

    outcome = outcome_of(train)
    assert (outcome.status, outcome.scores) == ("finished", {"score": 0.5})
    assert outcome.num_parameters is None
    assert [given(norm).spec for norm in ("bn", "xbn/gn:4", "four-things")] == [
        "bn", "xbn/gn:4", "gbgn:max=32",
    ]  # fmt: skip


def test_a_function_that_takes_no_notice_of_the_norm_is_told_both_ways():
    said = r"never called apply_norm\(model\) and never read apply_norm.spec, so every norm would"
    with pytest.raises(DataError, match=said):
        outcome_of(lambda apply_norm, batch_size, seed, report: 0.5)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("resnet18", r"apply_norm was given 'resnet18'; give it an nn.Module, or a function"),
        (lambda: 3, r"apply_norm was given a function that returned 3; .* apply_norm.spec names"),
        (nn.Sequential(nn.Linear(2, 2)), r"'Sequential' has no norm to replace, only Linear; "),
    ],
)
def test_what_is_no_network_with_norms_is_refused(model, said):
    with pytest.raises(NormError, match=said):
        given()(model)


def test_scores_are_any_numbers_and_the_first_is_judged():
    def train(apply_norm, batch_size, seed, report):
        apply_norm(make_net())
        return {"perplexity": torch.tensor(231.5), "tokens": 10**6}

    assert outcome_of(train).scores == {"perplexity": 231.5, "tokens": 1e6}


def test_report_counts_steps_and_sends_numbers_and_a_log_counts_none():
    logged, steps = [], []

    class Logger:
        def log_metrics(self, values, step):
            logged.append((step, values))

    report = Report("my.py:train", lambda: steps.append(1), Loggers([Logger(), Logger()]))
    report(loss=torch.tensor(0.5))
    report()
    report.log_metrics({"normkit/loss": 2}, 7)
    assert (report.num_steps, len(steps)) == (2, 2)
    assert logged == [(1, {"loss": 0.5})] * 2 + [(7, {"normkit/loss": 2.0})] * 2
    with pytest.raises(DataError, match=r"report\(...\) in my.py:train was given {'loss': 'low'}"):
        report(loss="low")


def test_an_arm_that_needs_an_input_says_so():
    with pytest.raises(DataError, match=r"call apply_norm\(model, example_input\) with an input"):
        given("gn:2+ws")(make_net())
    with pytest.raises(SpecError, match=r"changes batch norms"):
        given("frozen-bn")(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("source", "takes"),
    [
        ("def train(apply_norm): ...", "(apply_norm)"),
        ("def train(apply_norm, batch_size, seed, report, lr): ...", "seed, report, lr)"),
        ("def train(*, apply_norm, batch_size, seed, report): ...", "(*, apply_norm"),
    ],
)
def test_a_function_with_other_arguments_is_refused_before_anything_is_written(
    tmp_path, source, takes
):
    (tmp_path / "my.py").write_text(source)
    with pytest.raises(SpecError) as refused:
        compare(train=f"{tmp_path}/my.py:train", norms=["bn", "ln"], out=tmp_path / "out")
    assert takes in str(refused.value)
    assert "it is called with apply_norm, batch_size, seed, report" in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_function_may_take_whatever_is_given():
    def train(*given):
        return len(given[0].spec)

    assert outcome_of(train).scores == {"score": 4.0}
