"""Calls on tensor subclasses, such as quantized weights: a trace keeps them as the caller made them.

A class with its own ``__torch_function__`` may implement ``linear``, but none of the ATen operations in the
decomposition of ``linear``. A trace records such a call unchanged, in one node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._functorch._aot_autograd.functional_utils import from_fun, to_fun
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode, track_tensor_tree
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from think_compile.passes.refusal import Reason, Refused, where

_WITH_DEFAULTS = {torch._C._disabled_torch_function_impl, Tensor.__torch_function__.__func__}  # type: ignore[attr-defined]


def has_own_functions(value: Any) -> bool:
    """Whether a tensor is a wrapper subclass with its own ``__torch_function__``."""
    if not is_traceable_wrapper_subclass(value):
        return False
    function: Any = getattr(type(value), "__torch_function__", None)
    return getattr(function, "__func__", function) not in _WITH_DEFAULTS


def own_classes(graph: Graph) -> set[type]:
    """The classes with their own functions in a Dynamo graph, and the wrapper classes that only the graph makes."""
    values = {node: node.meta.get("example_value") for node in graph.nodes}
    given = {type(value) for node, value in values.items() if node.op == "placeholder"}
    made = {type(value) for value in values.values() if is_traceable_wrapper_subclass(value)} - given
    return made | {type(value) for value in values.values() if has_own_functions(value)}


def calls_as_written(graph: Graph, mode: FakeTensorMode) -> dict[Node, Any]:
    """The calls of a Dynamo graph on tensors of such classes, each with a stand-in for its result in a trace.

    Raises:
        Refused: a call writes to an argument, returns a view of one, or returns something other than tensors.
    """
    return {node: _checked(node, mode) for node in graph.nodes if node.op.startswith("call_") and _takes_own(node)}


def _takes_own(node: Node) -> bool:
    return any(has_own_functions(source.meta.get("example_value")) for source in node.all_input_nodes)


def _checked(node: Node, mode: FakeTensorMode) -> Any:
    given = torch.fx.node.map_arg((node.args, node.kwargs), lambda source: source.meta["example_value"])
    operands = [x for x in pytree.tree_leaves(given) if isinstance(x, Tensor)]
    fakes = (x for tensor in operands for x in plain_parts(tensor) if isinstance(x, FakeTensor))
    dynamo = next((x.fake_mode for x in fakes), mode)  # the mode of the example values in Dynamo's graph
    with dynamo, torch.no_grad(), _Writes() as writes:
        result = _function(node)(*given[0], **given[1])
    leaves = pytree.tree_leaves(result)
    if not all(isinstance(x, Tensor) for x in leaves):
        raise Refused(Reason.TENSOR_CLASS, f"{where(node)} returns {type(result).__name__}")
    if not writes.storages.isdisjoint(_storages(operands)):
        raise Refused(Reason.TENSOR_CLASS, f"{where(node)} writes to what it is given")
    plain = [x for x in operands if isinstance(x, FakeTensor)]
    if not _storages(plain).isdisjoint(_storages(leaves)):
        raise Refused(Reason.TENSOR_CLASS, f"{where(node)} returns a view of what it is given")
    return pytree.tree_map(lambda x: plain_stand_in(mode, x), result)


def _function(node: Node) -> Callable[..., Any]:
    if callable(node.target):
        return node.target
    return lambda this, *args, **kwargs: getattr(this, str(node.target))(*args, **kwargs)


class _Writes(TorchDispatchMode):
    """Notes the storages written by operations, after tensor subclasses have handled the operations."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        if any(not issubclass(cls, FakeTensor) for cls in types if cls is not Tensor):
            return NotImplemented
        schema = func._schema.arguments
        given = dict(zip((a.name for a in schema), args, strict=False)) | (kwargs or {})
        written = [given.get(a.name) for a in schema if a.alias_info is not None and a.alias_info.is_write]
        self.storages |= _storages(pytree.tree_leaves(written))
        return func(*args, **(kwargs or {}))


def _storages(tensors: Iterable[Any]) -> set[int]:
    return {part.untyped_storage()._cdata for x in tensors if isinstance(x, Tensor) for part in plain_parts(x)}


def plain_parts(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors inside a tensor of any class; a plain tensor is its own part."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from plain_parts(getattr(tensor, name))


def plain_stand_in(mode: FakeTensorMode, value: Tensor) -> Tensor:
    """A plain fake tensor of the logical shape."""
    with mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def recorded(node: Node, args: Any, kwargs: Any, result: Any) -> Any:
    """Add the call to the running trace; functionalization wraps ``args`` and the return value, not ``result``."""
    proxy_mode = get_proxy_mode()
    assert proxy_mode is not None
    tracer = proxy_mode.tracer
    given: Any = pytree.tree_map(from_fun, (args, kwargs))
    args, kwargs = pytree.tree_map(tracer.unwrap_proxy, given)
    proxy = tracer.create_proxy(node.op, node.target, args, kwargs, name=node.name)
    track_tensor_tree(result, proxy, constant=None, tracer=tracer)
    return pytree.tree_map(to_fun, result)
