"""Find attention in the normalized graph: stock operations, fused kernels, and softmaxes that are written out."""
