"""Find attention in the normalized graph: stock operations, fused kernels, and written-out softmaxes."""
