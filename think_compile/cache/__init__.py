"""Caches outside of graphs: the stores of cache tensors, and the tensor subclass in front of them."""
