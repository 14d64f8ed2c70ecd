"""A probe in the training loop: it records what normalization does while a network is trained."""

from normkit.diagnostics.probe.probe import Probe
from normkit.diagnostics.probe.record import LayerRecord, ProbedStep, ProbeHistory

__all__ = ["LayerRecord", "Probe", "ProbeHistory", "ProbedStep"]
