"""Why a trained model evaluates badly: states compared, causes ranked, fixes tried."""

from normkit.doctor.diagnose import diagnose
from normkit.doctor.diagnosis import Cause, Diagnosis, LayerReport, Trial

__all__ = ["Cause", "Diagnosis", "LayerReport", "Trial", "diagnose"]
