"""One self-contained HTML page from run folders: what was trained, what was proved, and how to read it."""

from tightrope.report.comparison import Row, differences
from tightrope.report.page import compare, write_report
from tightrope.report.search import write_search

__all__ = ["Row", "compare", "differences", "write_report", "write_search"]
