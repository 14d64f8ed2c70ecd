"""Every result says what to install where matplotlib is missing."""

import sys

import pytest
import torch
from torch import nn

import normkit as nk

X, TARGET = torch.randn(8, 3, 6, 6), torch.arange(8) % 4
PAIRS = [(X[:4], TARGET[:4]), (X[4:], TARGET[4:])]


def net(norm=nn.BatchNorm2d):
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4))


def standardised():
    model = net()
    nk.standardize_weights_(model)
    return model


def probed():
    model = net()
    with nk.Probe(model, every=1) as probe:
        model(X).sum().backward()
        probe.step()
    return probe


RESULTS = {
    "estimation_shift": lambda: nk.estimation_shift(net(), PAIRS),
    "channel_difference": lambda: nk.channel_difference(net(nk.LayerNorm), PAIRS),
    "inactive_channels": lambda: nk.inactive_channels(net(), PAIRS),
    "lipschitz_terms": lambda: nk.lipschitz_terms(standardised(), PAIRS),
    "hessian_norms": lambda: nk.hessian_norms(standardised(), PAIRS, num_filters=1),
    "projected_updates": lambda: nk.projected_updates(standardised(), PAIRS),
    "similarity_propagation": lambda: nk.similarity_propagation(net(), PAIRS),
    "singularity_ratio": lambda: nk.singularity_ratio(net()),
    "grouped_channels": lambda: nk.grouped_channels((0.0, 1.0), (1.0, 2.0)),
    "output_bound": lambda: nk.output_bound(net(), PAIRS),
    "gradient_landscape": lambda: nk.gradient_landscape(net(), PAIRS),
    "Probe": probed,
    "a probe's history": lambda: probed().history,
    "a probe's record": lambda: probed().records[0],
    "tune_example_weight": lambda: nk.tune_example_weight(net(), PAIRS, grid=(0.1,)),
    "example_weight_curve": lambda: nk.example_weight_curve(net(), PAIRS, grid=(0.1,)),
    "diagnose": lambda: nk.diagnose(net(), PAIRS * 2, PAIRS * 2),
}


@pytest.mark.parametrize("name", RESULTS)
def test_without_matplotlib_the_way_out_is_said(name, monkeypatch):
    result = RESULTS[name]()
    assert result.plot().axes
    for module in [m for m in sys.modules if m.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ImportError, match=r'not installed .*; pip install "normkit\[lab\]"'
    ) as told:
        result.plot()
    assert isinstance(told.value, nk.PackageError)
