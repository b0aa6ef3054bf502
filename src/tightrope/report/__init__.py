"""One self-contained HTML page from run folders: what was trained, what was proved, and how to read it."""

from tightrope.report.page import Row, compare, differences, write_report

__all__ = ["Row", "compare", "differences", "write_report"]
