"""The attention operation of the flash-attn package, as an attention site.

Its operands are [B, S, H, D], grouped heads need no repeating, and its causal mask is aligned to the end of the keys.
``unsupported`` names the options that packed attention lacks.
"""

from __future__ import annotations

import inspect
import operator
from typing import Any

from torch.fx import Node

from think_compile.cache.canonical import Layout

NAME = "flash_attn::_flash_attn_forward"
LAYOUT: Layout = ((0,), (2,), (1,), (3,))


def _arguments(
    q: Node,
    k: Node,
    v: Node,
    dropout_p: float,
    softmax_scale: Any,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Node | None = None,
    return_softmax: bool = False,
) -> dict[str, Any]:
    options = {
        "a window": (window_size_left, window_size_right) != (-1, -1),
        "a softcap": softcap != 0.0,
        "ALiBi slopes": alibi_slopes is not None,
        "returned probabilities": bool(return_softmax),
    }
    return {
        "q": q,
        "k": k,
        "v": v,
        "scale": softmax_scale,
        "causal_to_end": bool(causal),
        "dropout": dropout_p,
        "unsupported": ", ".join(name for name, given in options.items() if given),
    }


_SIGNATURE = inspect.signature(_arguments)


def arguments_of(node: Node) -> dict[str, Any]:
    """The fields of the attention site for the call ``node``."""
    bound = _SIGNATURE.bind(*node.args, **node.kwargs)
    found = _arguments(*bound.args, **bound.kwargs)
    result, others = _results(node)
    if others:
        found["unsupported"] = ", ".join(filter(None, (found["unsupported"], "its log-sum-exp read")))
    return {**found, "node": result, "operation": node, "layout": LAYOUT}


def _results(node: Node) -> tuple[Node, list[Node]]:
    """The node of the operation's first result, the attention output, and the readers of its other results."""
    outputs = [user for user in node.users if user.target is operator.getitem and user.args[1] == 0]
    others = [user for user in node.users if user not in outputs and user.users]
    return (outputs[0] if len(outputs) == 1 else node), others
