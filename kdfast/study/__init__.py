"""From a study file to finished runs: plan, Snakemake, SLURM, status, doctor, verify. Nothing here plots or concludes."""
