"""Which configuration a kernel is started with; a clock stands in for a GPU's."""

from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed, so there are no Triton kernels")

from normkit.kernels.triton import launch

CUDA = torch.device("cuda")


@pytest.fixture
def tried(monkeypatch):
    """Configurations in the order in which they were tried; the second is the fastest."""
    seen = []
    times_ms = dict(zip(launch.CONFIGS, (3.0, 1.0, 2.0), strict=True))
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "_found", {})
    monkeypatch.setattr(launch, "_time_ms", lambda run, c: seen.append(c) or times_ms[c])
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return seen


def test_the_fastest_configuration_is_found_once_for_a_kind_of_call(tried):
    for _ in range(2):
        assert launch.best_config(("apply", 1), CUDA, lambda c: None) == launch.CONFIGS[1]
    assert tried == list(launch.CONFIGS)
    launch.best_config(("apply", 2), CUDA, lambda c: None)
    assert len(tried) == 2 * len(launch.CONFIGS)


def test_nothing_is_tried_while_a_graph_is_captured_or_on_the_cpu(tried, monkeypatch):
    assert launch.best_config(("a",), torch.device("cpu"), lambda c: None) == launch.CONFIGS[0]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert launch.best_config(("a",), CUDA, lambda c: None) == launch.CONFIGS[0]
    assert tried == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert launch.best_config(("a",), CUDA, lambda c: None) == launch.CONFIGS[1]


def test_a_number_travels_in_two_parts():
    high, low = launch.halves(1e-5)
    assert high + low == 1e-5
    assert torch.tensor(high, dtype=torch.float32).double().item() == high
