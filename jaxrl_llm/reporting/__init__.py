"""Reporting: what a run tells while it goes on (progress) and leaves behind (its run directory)."""

from __future__ import annotations

from jaxrl_llm.reporting.progress import Progress, results_table, samples_table, units_table
from jaxrl_llm.reporting.run_directory import RunDirectory, read_records, write_summary

__all__ = ["Progress", "RunDirectory", "read_records", "results_table", "samples_table", "units_table", "write_summary"]
