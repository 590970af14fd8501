"""Event contracts: what is said on the log, and nothing else."""
