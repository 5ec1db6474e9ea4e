"""Jupyter kernels forked from a server that has imported what every run imports. Knows nothing of distillation."""
