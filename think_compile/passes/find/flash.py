"""The attention operation of the flash-attn package, as an attention site.

Its operands are [B, S, H, D], grouped heads need no repeating, and its causal mask is aligned to the end of the keys.
"""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import Node

from think_compile.cache.canonical import Layout
from think_compile.passes.layout import arguments_of

NAME = "flash_attn::_flash_attn_forward"
LAYOUT: Layout = ((0,), (2,), (1,), (3,))
# an attention site's field -> the operation's argument
_FIELDS = {"q": "q", "k": "k", "v": "v", "scale": "softmax_scale", "causal_to_end": "causal", "dropout": "dropout_p"}
# every other argument is an option that attention to packed keys lacks; these values turn it off
_OFF = {"window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "return_softmax": False}


def fields_of(node: Node) -> dict[str, Any]:
    """The fields of the attention site for the call ``node``."""
    given = arguments_of(node)
    fields = {field: given.pop(name) for field, name in _FIELDS.items()}
    unsupported = [name for name, value in given.items() if value != _OFF.get(name)]
    result, others = _results(node)
    unsupported += ["its log-sum-exp read"] if others else []
    return {**fields, "unsupported": ", ".join(unsupported), "node": result, "operation": node, "layout": LAYOUT}


def _results(node: Node) -> tuple[Node, list[Node]]:
    """The node of the operation's first result, the attention output, and the readers of its other results."""
    outputs = [user for user in node.users if user.target is operator.getitem and user.args[1] == 0]
    others = [user for user in node.users if user not in outputs and user.users]
    return (outputs[0] if len(outputs) == 1 else node), others
