"""Summaries and reports of runs, from their records: sentences, tables, figures."""
