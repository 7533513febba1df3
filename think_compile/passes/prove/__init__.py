"""Prove that the keys and values of an attention are a cache, or refuse it by name."""
