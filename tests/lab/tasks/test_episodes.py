"""Episodes are drawn as they should be, and imprinted weights recognise what they should."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.neighbors import NearestNeighbors
from torch import nn

from normkit.errors import DataError, SpecError
from normkit.lab.models import build_model
from normkit.lab.tasks.cosine import CosineClassifier, features_of, with_cosines_
from normkit.lab.tasks.episodes import accuracy, draw_episodes, imprinted, mean_and_interval

TARGETS = torch.arange(7).repeat_interleave(torch.tensor([9, 8, 30, 12, 8, 10, 11]))


def draw(**changes):
    options = {"ways": 5, "shots": 3, "queries": 4, "number": 200, "seed": 0}
    return draw_episodes(TARGETS, **(options | changes))


def test_an_episode_has_distinct_pictures_of_distinct_classes():
    for episode in draw():
        assert episode.support.shape == (5, 3)
        assert episode.queries.shape == (5, 4)
        assert len(episode.positions.unique()) == 5 * 7
        labels = TARGETS[episode.support][:, :1]
        assert len(labels.unique()) == 5
        assert (TARGETS[episode.support] == labels).all()
        assert (TARGETS[episode.queries] == labels).all()
        assert torch.equal(episode.positions[:15].view(5, 3), episode.support)


def test_classes_and_pictures_are_drawn_evenly():
    episodes = draw(number=3000)
    labels = torch.stack([TARGETS[e.support[:, 0]] for e in episodes])
    shares = labels.flatten().bincount() / len(episodes)
    assert shares.tolist() == pytest.approx([5 / 7] * 7, abs=0.04)  # 5 standard deviations
    first = torch.stack([e.support[:, 0] for e in episodes]).flatten()
    of_largest = first[TARGETS[first] == 2].bincount()[17:47] / (TARGETS[first] == 2).sum()
    assert of_largest.tolist() == pytest.approx([1 / 30] * 30, abs=0.02)


def test_equal_seeds_draw_equal_episodes_and_leave_torchs_state_alone():
    before = torch.get_rng_state()
    one, other, third = draw(number=3), draw(number=3), draw(number=3, seed=1)
    assert all(torch.equal(a.positions, b.positions) for a, b in zip(one, other, strict=True))
    assert not torch.equal(one[0].positions, third[0].positions)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ways": 8}, "8-way episodes were asked for, and there are 7 classes; ask for 7 ways"),
        ({"queries": 6}, "take 9 pictures of each class, and one class has 8; ask for 5 queries"),
        ({"shots": 9}, "take 13 pictures of each class, and one class has 8; ask for 0 queries"),
    ],
)
def test_too_few_classes_or_pictures_are_refused(changes, message):
    with pytest.raises(DataError, match=message):
        draw(**changes)


def test_imprinted_weights_are_nearest_centroids_of_normalised_features():
    """By loops in float64, and by scikit-learn's nearest neighbour on the unit sphere."""
    generator = np.random.default_rng(0)
    for shots in (1, 5):
        centres = generator.normal(size=(5, 1, 12))
        lengths = generator.uniform(0.1, 10, size=(5, shots + 20, 1))
        values = lengths * (centres + generator.normal(size=(5, shots + 20, 12)))
        support, queries = values[:, :shots], values[:, shots:]
        centroids = np.zeros((5, 12))
        for way in range(5):
            for shot in range(shots):
                centroids[way] += support[way, shot] / np.sqrt((support[way, shot] ** 2).sum())
            centroids[way] /= np.sqrt((centroids[way] ** 2).sum())
        found = imprinted(torch.from_numpy(support))
        np.testing.assert_allclose(found.numpy(), centroids, rtol=1e-12)
        unit = queries / np.linalg.norm(queries, axis=-1, keepdims=True)
        near = NearestNeighbors(n_neighbors=1).fit(centroids).kneighbors(unit.reshape(-1, 12))[1]
        expected = (near.reshape(5, 20) == np.arange(5)[:, None]).mean()
        assert 0.3 < expected < 1
        assert accuracy(torch.from_numpy(support), torch.from_numpy(queries)) == expected


def test_the_interval_is_scipys():
    values = np.random.default_rng(0).beta(8, 4, size=600)
    mean, half = mean_and_interval(values.tolist())
    expected = scipy.stats.t.interval(0.95, 599, values.mean(), scipy.stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx(expected, rel=1e-9)


def test_the_classifier_scores_by_cosines():
    layer = CosineClassifier(6, 3).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    scores = layer(x)
    for n in range(4):
        for c in range(3):
            w = layer.weight[c].tolist()
            dot = sum(a * b for a, b in zip(x[n].tolist(), w, strict=True))
            cosine = dot / math.sqrt(sum(a * a for a in w) * x[n].square().sum().item())
            assert scores[n, c].item() == pytest.approx(10 * cosine, rel=1e-12)
    torch.testing.assert_close(layer(7 * x), scores)  # the features' length does not matter
    assert torch.autograd.gradcheck(layer, (x.requires_grad_(),))


@pytest.mark.parametrize(
    "name", ["resnet12:width=4", "torchvision:resnet18", "timm:resnet18", "mlp:depth=2:width=8"]
)
def test_it_takes_the_place_of_the_last_layer_and_features_are_what_it_gets(name):
    model = build_model(name, num_classes=10, input_shape=(1, 32, 32)).model.eval()
    x = torch.randn(3, 1, 32, 32)
    at = with_cosines_(model, num_classes=4, example=x, seed=0, name=name)
    layer = model.get_submodule(at)
    assert isinstance(layer, CosineClassifier)
    features = features_of(model, at, x)
    assert features.shape == (3, layer.weight.shape[1])
    assert torch.equal(layer(features), model(x))
    assert not layer._forward_pre_hooks


def test_equal_seeds_give_equal_classifiers_and_leave_torchs_state_alone():
    weights = []
    for seed in (1, 1, 2):
        model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        before = torch.get_rng_state()
        with_cosines_(model, num_classes=3, example=torch.zeros(1, 1, 2, 2), seed=seed, name="m")
        assert torch.equal(before, torch.get_rng_state())
        weights.append(model[1].weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_network_that_ends_otherwise_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2), nn.LogSoftmax(1))
    with pytest.raises(SpecError, match=r"model 'my.py:net' does not end in an nn.Linear"):
        with_cosines_(
            model, num_classes=3, example=torch.zeros(1, 1, 2, 2), seed=0, name="my.py:net"
        )
