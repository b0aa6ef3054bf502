"""One self-contained HTML page from run folders: what was trained, what was proved, and how to read it."""

from tightrope.report.page import write_report
from tightrope.report.read import counts, read_metrics, read_verdicts

__all__ = ["counts", "read_metrics", "read_verdicts", "write_report"]
