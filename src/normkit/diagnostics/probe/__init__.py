"""What normalization does while a network is trained: a probe in the training loop."""

from normkit.diagnostics.probe.probe import Probe
from normkit.diagnostics.probe.record import LayerRecord, ProbedStep, ProbeHistory

__all__ = ["LayerRecord", "Probe", "ProbeHistory", "ProbedStep"]
