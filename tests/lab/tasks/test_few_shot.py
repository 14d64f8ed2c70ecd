"""Few-shot learning: which statistics normalise novel classes, and how a network is judged."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

from normkit.errors import DataError, SpecError
from normkit.lab.experiment import compare
from normkit.lab.spec import Protocol, SweepSpec, TrainingSpec
from normkit.lab.task import parse_task
from normkit.lab.tasks.cosine import CosineClassifier
from normkit.lab.tasks.episodes import draw_episodes
from normkit.lab.train import run
from normkit.lab.work import Upkeep

PROTOCOL = Protocol(
    task="few-shot:episodes=12", model="resnet12:width=2", data="digits", limit=100, epochs=1
)


def spec_of(norm="bn", **changes):
    protocol = PROTOCOL.model_copy(update=changes)
    return TrainingSpec(protocol=protocol, norm=norm, batch_size=20, seed=1)


def started(norm="bn", **changes):
    """A training that has not begun, with its data, statistics that are not those of the start."""
    spec = spec_of(norm, **changes)
    task = parse_task(spec.protocol.task)
    data = task.data(spec.protocol)
    training = task.start(spec, data, task.build(spec, data).model.train())
    for _ in range(3):
        training.loss(training.network, training.examples.take(torch.arange(20)))
    return training, data, training.network.eval()


def checked(**changes):
    protocol = PROTOCOL.model_copy(update=changes)
    sweep = SweepSpec(protocol=protocol, norms=("bn",), batch_sizes=(20,), seeds=(1,))
    task = parse_task(protocol.task)
    task.check(sweep, task.data(protocol))


def by_definition(network, inputs, statistics):
    """Features of an episode's pictures, by networks that are changed by hand."""
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 16
    if statistics != "base":
        seen = inputs[:5] if statistics == "support" else inputs
        for norm in norms:
            norm.momentum, norm.training = 1.0, True
        network(seen)  # leaves this batch's own statistics
        for norm in norms:
            norm.training = False
    body = network[:-1]
    return body(inputs)


@pytest.mark.parametrize("statistics", ["base", "support", "episode"])
def test_novel_classes_are_normalised_by_the_statistics_that_are_named(statistics):
    """One-shot episodes, recognised by cosines with each support picture, one by one."""
    training, data, network = started(task=f"few-shot:statistics={statistics}:episodes=8")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    pool = data.pools["test"]
    episodes = draw_episodes(pool.targets, ways=5, shots=1, queries=15, number=8, seed=0)
    with torch.no_grad():
        found = training._accuracies(episodes, pool, torch.device("cpu"))
        for name, value in network.state_dict().items():
            assert torch.equal(value, before[name]), name
        for episode, share in zip(episodes, found, strict=True):
            network.load_state_dict(before)
            features = by_definition(network, pool.inputs(episode.positions), statistics)
            support, queries = features[:5], features[5:].view(5, 15, -1)
            right = 0
            for way in range(5):
                for query in queries[way]:
                    cosines = [functional.cosine_similarity(query, s, dim=0) for s in support]
                    right += int(torch.stack(cosines).argmax()) == way
            assert share == pytest.approx(right / 75, abs=1.5 / 75)  # a tie in the last digits


def test_the_three_differ_for_batch_norm_and_not_for_group_norm():
    found = {
        (norm, statistics): started(norm, task=f"few-shot:statistics={statistics}:episodes=12")
        for norm in ("bn", "gn:2")
        for statistics in ("base", "support", "episode")
    }
    values = {}
    for key, (training, data, _) in found.items():
        episodes = training._task.drawn(data, "test", 5, 12)
        values[key] = training._accuracies(episodes, data.pools["test"], torch.device("cpu"))
    assert len({tuple(v) for (norm, _), v in values.items() if norm == "bn"}) == 3
    assert len({tuple(v) for (norm, _), v in values.items() if norm == "gn:2"}) == 1


def test_scores_are_means_over_episodes_with_intervals_and_repeat():
    one, other = run(spec_of()).outcome, run(spec_of()).outcome
    assert one.status == "finished", one.message
    assert one == other
    assert list(one.scores)[:3] == ["one_shot", "five_shot", "base"]
    assert one.scores["five_shot"] > one.scores["one_shot"] > 0.2
    assert 0 < one.scores["one_shot_interval"] < 0.2
    assert set(one.epochs[0].validation_scores) == set(one.scores)


def test_more_episodes_give_a_narrower_interval():
    few, many = (
        run(spec_of(task=f"few-shot:episodes={n}")).outcome.scores["one_shot_interval"]
        for n in (10, 400)
    )
    assert many < few / 3  # about the root of 40, and Student's t


def test_the_classifier_is_by_cosines_and_has_the_base_classes():
    _training, data, network = started()
    assert isinstance(network[-1], CosineClassifier)
    assert network[-1].weight.shape == (5, 16)
    assert data.num_classes == 5


def test_equal_seeds_give_equal_networks_whatever_the_norm():
    one, other = (started(norm)[2] for norm in ("bn", "gn:2"))
    assert torch.equal(one[-1].weight, other[-1].weight)
    assert torch.equal(one[0].conv1.weight, other[0].conv1.weight)


def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
    spec = spec_of(epochs=2)
    whole = run(spec)
    num_steps = 0

    def kill():
        nonlocal num_steps
        num_steps += 1
        if num_steps == 7:
            raise KeyboardInterrupt

    upkeep = Upkeep(folder=tmp_path, checkpoint_seconds=0)
    with pytest.raises(KeyboardInterrupt):
        run(spec, kill, upkeep)
    assert run(spec, upkeep=upkeep).outcome == whole.outcome


def test_the_test_pictures_have_no_say_before_the_test():
    """Other pictures of the novel classes change nothing but the test's own scores."""
    outcomes = [run(spec_of(task=f"few-shot:episodes=12:per_class={n}")).outcome for n in (30, 60)]
    one, other = (o.epochs[0] for o in outcomes)
    assert (one.train_loss, one.validation_scores) == (other.train_loss, other.validation_scores)
    assert one.test_scores["base"] == other.test_scores["base"]
    assert one.test_scores != other.test_scores


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"task": "few-shot:novel=4"},
            SpecError,
            r"5-way episodes take 5 novel classes, and digits was given 4; give few-shot:novel=5",
        ),
        (
            {"task": "few-shot:novel=9"},
            SpecError,
            r"novel=9:validation=0 leaves 1 of the 10 classes of digits to learn; leave 2 or more",
        ),
        (
            {"task": "few-shot:queries=500"},
            DataError,
            r"5-shot episodes with 500 queries take 505 pictures of each class, and one .* has 1",
        ),
        (
            {"task": "few-shot:statistics=support", "processes": 2},
            SpecError,
            r"statistics=support measures statistics on one process, and 2 were",
        ),
        ({"mixup": 0.2}, SpecError, r"--mixup was given 0.2, which few-shot does not do"),
        (
            {"data": "mini-imagenet"},
            DataError,
            r"mini-imagenet does not have folders train, val and test with .* 64, 16 and 20 clas",
        ),
        ({"data": "folder:/nowhere/at/all"}, DataError, r"/nowhere/at/all is not a folder"),
    ],
)
def test_bad_input_is_answered_in_a_sentence(changes, error, message, tmp_path, monkeypatch):
    monkeypatch.setenv("NORMKIT_DATA", str(tmp_path))
    with pytest.raises(error, match=message):
        checked(**changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("ways=1", r"ways was given '1': .*; give the classes of an episode, 2 or more"),
        ("statistics=test", r"statistics was given 'test': .* base, support or episode"),
        ("shots=5", r"has the argument 'shots=5'; it takes statistics=..., novel=..."),
    ],
)
def test_options_out_of_bounds_are_answered_in_a_sentence(options, message):
    with pytest.raises(SpecError, match=message):
        parse_task(f"few-shot:{options}")


def test_a_paper_scale_sample_has_the_sizes_of_mini_imagenet(tmp_path, monkeypatch):
    monkeypatch.setenv("NORMKIT_DATA", str(tmp_path))
    task = parse_task("few-shot:novel=20:validation=16")
    protocol = Protocol(task=str(task), data="mini-imagenet", image_size=80, hold_out=False)
    data, missing = task.sample(protocol)
    assert (data.num_classes, data.num_examples) == (64, 64 * 600)
    assert data.input_shape == (3, 80, 80)
    assert len(data.pools["test"].targets) == 20 * 600
    assert "mini-imagenet is not there: folders train, val and test" in missing


def write(folder, classes, number):
    generator = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for at in range(number):
            values = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(values).save(folder / name / f"{at}.png")


@pytest.mark.parametrize("layout", ["one folder", "parts of their own"])
def test_a_model_and_pictures_of_ones_own(layout, tmp_path):
    photos = tmp_path / "photos"
    if layout == "one folder":
        write(photos, "abcdef", 30)
        task = "few-shot:novel=3:ways=3:queries=5:episodes=6:statistics=episode"
    else:
        write(photos / "train", "abc", 30)
        write(photos / "test", "xyz", 12)
        task = "few-shot:ways=3:queries=5:episodes=6"
    (tmp_path / "my.py").write_text(
        "from torch import nn\n"
        "def net():\n"  # it does not ask for the number of classes: its last layer is replaced
        "    return nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(),\n"
        "        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1000))\n"
    )
    with pytest.warns(UserWarning, match="validation episodes are drawn from pictures that are"):
        found = compare(
            norms=["bn", "gn:2"],
            batch_sizes=[8],
            seeds=[1],
            task=task,
            model=f"{tmp_path}/my.py:net",
            data=f"folder:{photos}",
            epochs=1,
            out=tmp_path / "out",
        )
    assert [r.outcome.status for r in found.records] == ["finished"] * 2
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Test one_shot" in page
    assert "their pictures are normalised by" in page
