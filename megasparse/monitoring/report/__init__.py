"""A run, or several compared, as one self-contained HTML file.

`data` reads metrics.jsonl and run.json, `charts` draws SVG, `page` holds style and hover script, `write` puts the
sections together.
"""

from megasparse.monitoring.report.data import ReportError
from megasparse.monitoring.report.write import write_report

__all__ = ["ReportError", "write_report"]
