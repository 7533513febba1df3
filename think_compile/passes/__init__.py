"""The passes, in the order the backend runs them: normalize, attention (find), kv_cache (prove), rewrite.

Each works on a plain ``torch.fx.GraphModule`` of functional pre-dispatch ATen, logs one line (matches, ms) to
``think_compile.passes`` at INFO and dumps the graph at DEBUG, before and after.
"""
