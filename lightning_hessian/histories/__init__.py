"""Runs read back from disk and from W&B: one table of series."""
