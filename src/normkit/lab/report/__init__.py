"""The report of a sweep as one self-contained HTML file."""

from normkit.lab.report.page import REPORT_NAME, render, write_report

__all__ = ["REPORT_NAME", "render", "write_report"]
