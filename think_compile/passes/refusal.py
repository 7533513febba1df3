"""The reasons why a layer is left alone, each one sentence for people."""

from __future__ import annotations

import enum
from pathlib import Path

import torch
from torch.fx import Node

TORCH = f"{Path(torch.__file__).parent}/"


class Reason(enum.Enum):
    """Why an attention layer is left exactly as the model wrote it; the value is the sentence for people."""

    NOT_CACHED = "this call keeps no cache of the keys: they neither leave the graph nor are written to an input"
    VALUES_NOT_CACHED = "the values are not cached beside the keys (decode=True can store them in codes)"
    VALUES_TRANSFORMED = (
        "the values are changed between the cache and the attention (decode=True can store them in codes)"
    )
    KEY_ESCAPES = (
        "the cached keys are also read by something other than this attention (decode=True can store them in codes)"
    )
    SHARED = "the cache is shared by attentions that cannot all be rewritten alike (decode=True can store it in codes)"
    CHANNEL_MIXING = (
        "an operation between cache and attention mixes or splits the channels (decode=True can store them in codes)"
    )
    LATENT = (
        "the cache holds a latent, which a projection turns into keys (multi-head latent attention; decode=True can "
        "store it in codes)"
    )
    SLIDING = "the layer keeps a bounded window of tokens, so its cache is small already (sliding=True prunes it)"
    SLIDING_BUFFER = "the layer keeps a bounded window of tokens in a buffer, other than the last tokens filling it"
    WINDOW_TOO_SMALL = "the layer keeps a bounded window of tokens, all of which stay whole"
    BOUNDED = "the layer keeps a bounded window of tokens, and caches that are decoded on read keep all"
    UNKNOWN_WINDOW = "the layer keeps a bounded window of tokens, other than the last tokens in order"
    CROSS_ATTENTION = "the keys are not one for each query (cross-attention, or a full window that is shifted)"
    NO_JOIN_SEEN = "the keys come into the graph whole (cross-attention, or a graph break before the attention)"
    GRAPH_BREAK = "a graph break cuts the attention in two"
    UNKNOWN_ATTENTION = (
        "heads or tokens are mixed between the products with the keys and with the values, or there is no softmax"
    )
    UNKNOWN_LAYOUT = "the cache's axes cannot be told apart"
    UNKNOWN_ROOT = "how the cache is joined from its past and the new keys is not understood"
    PAST_ESCAPES = "the past cache is read by something other than the join"
    HEADS_DIFFER = "keys and values have different heads"
    OPTION = "the attention operation is called with an option that attention to packed keys does not support"
    TRANSFORMED = (
        "the attention does not read the keys as they are cached (rotated once they are, say, or a part of them; "
        "decode=True can store them in codes)"
    )
    DROPOUT = "attention dropout is on"
    NOT_FLOATING = "queries or keys are not floating point"
    REQUIRES_GRAD = "gradients are on, and a compressed cache has none"
    HELD_OUTSIDE = (
        "the cache is written in place to a tensor held neither by the model nor by what the call was given, or to a "
        "part of a larger one"
    )
    AWAITS_JOIN = "its cache stays whole until the next call, in which it is seen how the cache grows (decode=True)"
    NOT_DECODED = (
        "the attention does not read the cache as it is stored, and decode=True cannot decode it: how it is joined is "
        "not understood, or another attention reads a part of it"
    )
    IN_ORDER = (
        "the attention is written out in separate operations on logits in order of position, which tokens= cannot keep"
    )
    FILLED = (
        "its cache of fixed size held tokens before the wrapped model's first call, and tokens= selects among those of "
        "one call"
    )
    GIVEN_UP = "a later call could not read the packed cache, so new caches are left dense"
    HIGHER_ORDER = "the graph holds a control-flow operation or a vmap, and torch cannot export it to ATen operations"
    NOT_FUNCTIONAL = (
        "the model writes to a tensor and reads the same memory through another, or to a tensor that its graph holds "
        "itself, or changes an input's shape or storage in place"
    )
    SHARDED = "the weights are sharded over several processes (DTensor), which is not supported"
    TENSOR_CLASS = "the graph computes with a tensor class of its own (quantized weights, say) that no trace can record"
    FAILED = "an internal failure: calls of this kind run as the model wrote them"
    AMBIGUOUS = "more than one reading of this attention as a cached one is possible"


# The attention does not read the cache as it is stored: it could read the decoded tensor.
READ_OTHERWISE = {
    Reason.LATENT,
    Reason.TRANSFORMED,
    Reason.CHANNEL_MIXING,
    Reason.VALUES_TRANSFORMED,
    Reason.VALUES_NOT_CACHED,
    Reason.KEY_ESCAPES,
    Reason.SHARED,
}
UNDECIDED = {Reason.NOT_CACHED, Reason.AWAITS_JOIN}  # another call may store the cache


class Refused(Exception):
    """The layer is left alone for this reason; ``detail`` names the cause in the graph."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def where(node: Node) -> str:
    """A node for people: the operation and, if known to the trace, its line in the model."""
    line = _last_line_outside_torch(node.meta.get("stack_trace") or "")
    return f"{node.target} ({line})" if line else str(node.target)


def _last_line_outside_torch(trace: str) -> str:
    """Skips torch's own frames: they come last if a torch function mode, such as a default device, is on."""
    last, ours = "", True
    for line in (line.strip() for line in trace.splitlines()):
        if line.startswith('File "'):
            ours = not line.startswith(f'File "{TORCH}')
        elif ours and line.strip("^~ "):
            last = line
    return last
