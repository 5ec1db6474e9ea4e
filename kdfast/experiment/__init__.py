"""One run from its parameters to its record: what `experiments/experiment.ipynb` calls. Many runs: `kdfast.study`."""
