"""The report of a run: one page that says whether it went well, and how; and the comparison of two.

record   a run directory, read            verdict  what a reader must know, in plain words
curves   metrics as inline SVG            tables   facts, as rows of label and value
page     all of it through a template, into one file that needs no network
"""

from llmtune.evaluation.report.page import write_comparison, write_report
from llmtune.evaluation.report.record import read_record
from llmtune.evaluation.report.summary import summarize

__all__ = ["read_record", "summarize", "write_comparison", "write_report"]
