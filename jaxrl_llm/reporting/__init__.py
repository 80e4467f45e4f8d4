"""Reporting: progress during a run, its run directory, metrics, alarms and reports."""

from __future__ import annotations

from jaxrl_llm.reporting.progress import Progress, results_table, rewards_table, samples_table, units_table
from jaxrl_llm.reporting.run_directory import RunDirectory, read_records, write_summary

__all__ = [
    "Progress",
    "RunDirectory",
    "read_records",
    "results_table",
    "rewards_table",
    "samples_table",
    "units_table",
    "write_summary",
]
