"""Find out why a trained model evaluates badly: compare states, rank causes, try fixes."""

from normkit.doctor.diagnose import diagnose
from normkit.doctor.diagnosis import Cause, Diagnosis, LayerReport, Trial

__all__ = ["Cause", "Diagnosis", "LayerReport", "Trial", "diagnose"]
