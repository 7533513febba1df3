"""Prove the keys and values of each attention to be a cache, or refuse the layer by name."""
