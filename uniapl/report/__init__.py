"""The report of a run, or the comparison of several: one self-contained HTML file."""

from uniapl.report.compare import write_comparison
from uniapl.report.page import write_report

__all__ = ["write_comparison", "write_report"]
