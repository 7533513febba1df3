"""How the data of the offline tasks was made: ``python -m evals.build_tasks``."""
