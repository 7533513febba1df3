"""Caches outside of graphs: what is stored of a cache tensor, and the tensor subclass that stands for it."""
