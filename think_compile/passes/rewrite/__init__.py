"""Rewrite a graph: first calls store their caches, later calls attend to the stored caches."""
