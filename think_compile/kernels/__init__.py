"""Code inside graphs: the Triton kernels and their launch, and small functions around an attention."""
