"""Token rules: which tokens of a first call are stored."""
