"""What every room needs: parameters, records, files, errors, provenance, plug-ins, generators.

Imports nothing of kdfast but itself, and no torch, `rng` apart: planning thousands of runs must be quick. What knows what a
network, an image or a study is lives above.
"""
