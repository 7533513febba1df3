"""Rewrite a graph: first calls store what they leave, later calls attend to what is stored."""
