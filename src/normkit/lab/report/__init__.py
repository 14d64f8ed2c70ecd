"""The reports of a sweep and of a diagnosis, each as one self-contained HTML file."""

from normkit.lab.report.diagnosis import DIAGNOSIS_NAME, render_diagnosis, write_diagnosis
from normkit.lab.report.page import REPORT_NAME, render, write_report
from normkit.lab.report.results import RESULTS_NAME

__all__ = [
    "DIAGNOSIS_NAME",
    "REPORT_NAME",
    "RESULTS_NAME",
    "render",
    "render_diagnosis",
    "write_diagnosis",
    "write_report",
]
