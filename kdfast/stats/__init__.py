"""Paired statistics: gains, intervals, tests, comparisons of families. No torch, no files but per-example predictions."""
