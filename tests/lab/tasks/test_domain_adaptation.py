"""Two domains: their data, norms of their own, what a step trains on, and whole runs."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

from normkit import recalibrate
from normkit.errors import DataError, SpecError
from normkit.lab.check import check
from normkit.lab.data import open_data
from normkit.lab.data.opening import forget_data
from normkit.lab.dry_run import estimate
from normkit.lab.loading import Loading
from normkit.lab.spec import Protocol, SweepSpec, TrainingSpec
from normkit.lab.task import parse_task
from normkit.lab.tasks.contrastive import contrastive_discrepancy
from normkit.lab.tasks.domain_norms import DomainNorm, join_norms_, separate_norms_, use_domain
from normkit.lab.tasks.domains import ClassAware
from normkit.lab.train import run, train
from normkit.lab.work import Upkeep

MODEL = "small-resnet:width=4"
TASK = "domain-adaptation:target=textured"


def protocol_of(options="", **changes):
    given = {"model": MODEL, "limit": 120, "epochs": 3, "optimizer": "adam", "base_lr": 3e-3}
    task = TASK + options
    return Protocol(**{**given, "lr_batch_size": None, "task": task, **changes})


def spec_of(options="", norm="bn", batch_size=12, **changes):
    protocol = protocol_of(options, **changes)
    return TrainingSpec(protocol=protocol, norm=norm, batch_size=batch_size, seed=1)


def sweep_of(options="", norms=("bn",), batch_sizes=(12,), **changes):
    protocol = protocol_of(options, **changes)
    return SweepSpec(protocol=protocol, norms=norms, batch_sizes=batch_sizes, seeds=(1,))


def opened(options="", **changes):
    protocol = protocol_of(options, **changes)
    return parse_task(protocol.task).data(protocol)


def folder_of(path, classes, shade=0, number=10, size=8):
    """A folder of pictures for each class, each class with a bright row of its own."""
    generator = np.random.default_rng(shade)
    for at, name in enumerate(classes):
        (path / name).mkdir(parents=True)
        for picture in range(number):
            values = generator.integers(0, 40, (size, size)) + shade
            values[2 * at : 2 * at + 2] += 150
            Image.fromarray(values.astype(np.uint8)).save(path / name / f"{picture}.png")
    return path


def test_a_shift_takes_other_pictures_than_the_source():
    found, whole = opened(), open_data("digits", 120)
    positions = torch.arange(120)
    assert torch.equal(found.source.train.targets, whole.train.targets[positions[::2]])
    assert torch.equal(found.target.train.targets, whole.train.targets[positions[1::2]])
    assert (found.num_examples, found.num_classes, found.input_shape) == (60, 10, (1, 8, 8))
    assert found.name == "digits to digits textured"
    assert found.source.train.scaling is found.target.train.scaling
    assert int(found.target.train.values.max()) <= 16
    assert found.fingerprint != opened("+blurred").fingerprint


def test_all_pictures_of_both_domains_may_be_taken():
    found, part = opened(":whole=true"), opened()
    sizes = [len(getattr(part.target, name)) for name in ("train", "validation", "test")]
    assert len(found.target.train) == len(found.target.test) == sum(sizes)
    assert len(found.source.train) == sum(
        len(getattr(part.source, name)) for name in ("train", "validation", "test")
    )


def test_folders_are_domains(tmp_path):
    classes = ("ant", "bee", "cat")
    source = folder_of(tmp_path / "source", classes)
    target = folder_of(tmp_path / "target", classes, shade=60)
    for text in (f"folder:{target}", str(target)):
        found = opened(data=f"folder:{source}", task=f"domain-adaptation:target={text}")
        assert (found.source.name, found.target.name) == ("source", "target")
        assert found.num_classes == 3
    mean = found.target.train.take(torch.arange(len(found.target.train))).inputs.mean()
    assert mean > 0.5  # scaled as the source, so that the shift is seen
    forget_data()


def test_data_of_a_function_is_a_domain(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import torch\n"
        "from torch.utils.data import TensorDataset\n"
        "def make(offset=0.0):\n"
        "    x = torch.randn(80, 1, 8, 8, generator=torch.Generator().manual_seed(0)) + offset\n"
        "    return TensorDataset(x, torch.arange(80) % 2)\n"
        "def shifted():\n"
        "    return make(2.0)\n"
    )
    task = f"domain-adaptation:target={file}:shifted:method=adabn"
    found = opened(data=f"{file}:make", task=task, limit=None)
    assert found.target.train.take(torch.arange(20)).inputs.mean() > 1.5
    assert parse_task(task).method == "adabn"
    forget_data()


@pytest.mark.parametrize(
    ("options", "changes", "complaint"),
    [
        (
            ":method=dann",
            {},
            "domain-adaptation:method was given 'dann'.*'can', 'adabn' or 'source'",
        ),
        (":distance=0", {}, "domain-adaptation:distance was given '0'"),
        (":per_class=0", {}, "domain-adaptation:per_class was given '0'"),
        (":per_class=7", {}, "7 examples of each of two classes are 14; give a larger batch"),
        ("", {"mixup": 0.2}, "--mixup was given, which this task does not do"),
        ("", {"limit": 9}, "--limit was given 9, but digits has 10 classes"),
    ],
)
def test_bad_input_is_answered_in_a_sentence(options, changes, complaint):
    with pytest.raises(SpecError, match=complaint):
        check(sweep_of(options, **changes))


def test_domains_that_do_not_belong_together_are_refused(tmp_path):
    source = folder_of(tmp_path / "source", ("ant", "bee", "cat"))
    other = folder_of(tmp_path / "other", ("ant", "bee", "dog"))
    few = folder_of(tmp_path / "few", ("ant", "bee"))
    large = folder_of(tmp_path / "large", ("ant", "bee", "cat"), size=16)

    def complaint(target, kind=DataError):
        with pytest.raises(kind) as found:
            opened(data=f"folder:{source}", task=f"domain-adaptation:target={target}")
        return str(found.value)

    assert "the classes of the two domains differ: cat only in" in complaint(other)
    assert "dog only in" in complaint(other)
    assert "cat only in" in complaint(few)
    assert f"{tmp_path}/none is not a folder" in complaint(tmp_path / "none")
    assert "give --image-size" in complaint(large)
    assert "the target digits has 10" in complaint("digits")
    assert "there is no data set 'sketches'" in complaint("sketches", SpecError)
    forget_data()


def test_a_network_without_a_linear_layer_at_its_end_is_refused(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from torch import nn\n"
        "def make(num_classes):\n"
        "    return nn.Sequential(nn.Conv2d(1, num_classes, 3), nn.BatchNorm2d(num_classes),\n"
        "                         nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
    )
    with pytest.raises(SpecError, match=r"has no linear layer that gives 10 scores"):
        check(sweep_of(model=f"{file}:make"))


def test_each_domain_has_statistics_scale_and_shift_of_its_own():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    plain = nn.Sequential(*(m for m in model))
    separate_norms_(model)
    norm = model[1]
    assert isinstance(norm, DomainNorm)
    use_domain(model, "target")
    model(torch.randn(8, 1, 4, 4) + 5)
    assert norm.source.running_mean.abs().max() == 0
    assert norm.target.running_mean.abs().max() > 0
    assert {*map(id, norm.source.parameters())}.isdisjoint(map(id, norm.target.parameters()))
    joined = join_norms_(model)
    assert joined[1] is norm.target
    assert [*joined.state_dict()] == [*plain.state_dict()]


def aware(members, per_class=3):
    found = opened()
    return ClassAware(found.source.train, found.target.train, per_class, members), found


def test_a_batch_has_as_many_examples_of_each_class_from_both_domains():
    labels = opened().target.train.targets
    members = {c: (labels == c).nonzero()[:, 0] for c in (0, 3, 4, 8)}
    members[8] = members[8][:1]  # fewer than a batch takes
    examples, _ = aware(members)
    parts = torch.arange(60).split(12)
    seen = set()
    for batch in examples.batches(parts, Loading(seed=5)):
        assert len(batch) == 12
        classes = batch.aligned.by_class(batch.aligned.source.targets[:, None])[..., 0]
        assert classes.shape == (4, 3)
        assert (classes == classes[:, :1]).all()
        assert torch.equal(batch.aligned.target.targets, batch.aligned.source.targets)
        seen |= {tuple(batch.aligned.target.inputs[0].flatten().tolist())}
    assert len(seen) > 1  # batches differ
    first, again, other = (
        next(examples.batches(parts, Loading(seed=seed))).aligned.target.inputs
        for seed in (5, 5, 6)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_without_members_a_batch_is_of_the_source_and_a_measured_one_is_whole():
    for members, is_whole in ((None, False), ({}, True)):
        examples, _ = aware(members)
        assert next(examples.batches([torch.arange(12)], Loading())).aligned is None
        assert (examples.take(torch.arange(12)).aligned is not None) is is_whole


def test_the_loss_is_cross_entropy_and_the_discrepancy_of_features_and_shares():
    spec = spec_of(":weight=0.7")
    data = opened()
    task = parse_task(spec.protocol.task)
    network = task.build(spec, data).model
    with torch.no_grad():  # the domains' norms differ, as after some steps
        for norm in network.modules():
            if isinstance(norm, DomainNorm):
                norm.target.weight.mul_(1.5)
    started = task.start(spec, data, network)
    batch = started.examples.take(torch.arange(12))
    found = started.loss(network.train(), batch)

    def scores_and_features(inputs, domain):
        use_domain(network, domain)
        features = network[:-1](inputs)
        return network[-1](features), features

    scores, _ = scores_and_features(batch.labelled.inputs, "source")
    ours = scores_and_features(batch.aligned.source.inputs, "source")
    theirs = scores_and_features(batch.aligned.target.inputs, "target")
    layers = [(ours[1], theirs[1]), (ours[0].softmax(1), theirs[0].softmax(1))]
    discrepancy = contrastive_discrepancy(
        [tuple(batch.aligned.by_class(v) for v in layer) for layer in layers]
    )
    expected = functional.cross_entropy(scores, batch.labelled.targets) + 0.7 * discrepancy
    torch.testing.assert_close(found.loss, expected)
    assert found.num_right == int((scores.argmax(1) == batch.labelled.targets).sum())


def test_the_last_layer_may_learn_faster():
    spec = spec_of(":head_rate=10")
    task, data = parse_task(spec.protocol.task), opened()
    network = task.build(spec, data).model
    groups = task.start(spec, data, network).parameters(network, spec.protocol)
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert {scales[id(p)] for p in network[-1].parameters()} == {10}
    assert {scales[id(p)] for p in network[:-1].parameters()} == {1}
    assert len(scales) == len(list(network.parameters()))


def test_adabn_measures_the_targets_statistics_and_puts_the_sources_back():
    found = {m: run(spec_of(f":method={m}")).outcome for m in ("source", "adabn")}
    assert found["source"].scores["source"] == found["adabn"].scores["source"]
    assert found["source"].scores["target"] != found["adabn"].scores["target"]
    network, data = train(spec_of(":method=adabn")), opened()
    split = data.target.test
    every = split.take(torch.arange(len(split)))
    recalibrate(network, [data.target.train.take(torch.arange(60)).inputs]).apply()
    with torch.no_grad():
        right = (network(every.inputs).argmax(1) == every.targets).double().mean()
    assert float(right) == pytest.approx(found["adabn"].scores["target"])


def test_adabn_leaves_norms_of_single_examples_as_they_are():
    found = [run(spec_of(f":method={m}", norm="ln")).outcome.scores for m in ("source", "adabn")]
    assert found[0] == found[1]


def test_can_clusters_and_adapts_and_a_killed_run_goes_on(tmp_path):
    spec = spec_of(":source_epochs=1")
    whole = run(spec).outcome
    assert whole.status == "finished", whole.message
    assert set(whole.scores) == {"target", "source", "center_distance", "clustered"}
    assert whole.epochs[0].validation_scores["clustered"] == 0
    assert whole.scores["clustered"] > 0.5
    assert math.isfinite(whole.epochs[-1].train_loss)
    count = 0

    def kill():
        nonlocal count
        count += 1
        if count == 8:  # in the second epoch, which is the first with clusters
            raise KeyboardInterrupt

    upkeep = Upkeep(folder=tmp_path, checkpoint_seconds=0)
    with pytest.raises(KeyboardInterrupt):
        run(spec, kill, upkeep)
    assert run(spec, upkeep=upkeep).outcome == whole


def test_sgd_trains_norms_that_begin_later_than_others():
    outcome = run(spec_of(":source_epochs=1", optimizer="sgd", base_lr=0.05)).outcome
    assert outcome.status == "finished", outcome.message


def test_training_ends_when_the_centres_are_near():
    outcome = run(spec_of(":source_epochs=1:stop=1", epochs=6)).outcome
    assert len(outcome.epochs) == 2
    assert outcome.num_steps == 10
    assert 0 <= outcome.scores["target"] <= 1


def test_far_targets_are_left_out_of_the_training():
    outcome = run(spec_of(":source_epochs=1:distance=0.001:fewest=30")).outcome
    assert outcome.status == "finished", outcome.message
    assert outcome.scores["clustered"] == 0


@pytest.mark.parametrize(
    ("options", "hold_out", "num_pictures"),
    [("", True, 2254 - 225), ("", False, 2254), (":whole=true", False, 2817)],
)
def test_a_dry_run_at_paper_scale_needs_no_pictures(options, hold_out, num_pictures):
    changes = {"data": "office31-amazon", "limit": None, "image_size": 32, "hold_out": hold_out}
    task = f"domain-adaptation:target=office31-dslr{options}"
    protocol = protocol_of("", task=task, **changes)
    sample = parse_task(protocol.task).sample(protocol)
    assert "office31/amazon is not there" in sample.missing
    assert "office31/dslr is not there" in sample.missing
    assert sample.data.input_shape == (3, 32, 32)
    sweep = SweepSpec(protocol=protocol, norms=("bn",), batch_sizes=(14,), seeds=(1,))
    (cell,) = estimate(sweep, sample.data, most_examples=14)
    assert cell.num_steps == 3 * -(-num_pictures // 14)
