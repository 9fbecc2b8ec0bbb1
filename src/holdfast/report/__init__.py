"""The report: it only reads what the run has recorded."""
