"""A comparison as one self-contained page, and as one picture."""

from __future__ import annotations

from ppl.report.figure import write_figure
from ppl.report.page import Section, table_html, write_page

__all__ = ["Section", "table_html", "write_figure", "write_page"]
