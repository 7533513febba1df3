"""What runs inside the rewritten graph: scoring, packing, appending and attending."""
