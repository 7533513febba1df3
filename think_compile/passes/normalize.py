"""Pass 1: turn a Dynamo graph into one functional pre-dispatch ATen graph, the only form the other passes read."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Node

from think_compile.passes.as_written import own_classes, plain_stand_in
from think_compile.passes.canonicalize import canonicalize
from think_compile.passes.functional import NotFunctional, functional_graph
from think_compile.passes.observe import observed
from think_compile.passes.refusal import Reason, Refused

AUTOCAST = {torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast}


@dataclass
class Normalized:
    """A functional graph, and how its inputs and outputs map to the caller's.

    Attributes:
        graph_module: placeholders as the caller's inputs; each has its fake value in ``meta["val"]``. The outputs are
            first the new values of written inputs, then the caller's own outputs.
        written: for each new value, the index of the written input.
        sources: Dynamo's name of each input's place ("L['self']...", for people), or "".
    """

    graph_module: GraphModule
    written: list[int]
    sources: list[str]

    @property
    def placeholders(self) -> list[Node]:
        return self.graph_module.graph.find_nodes(op="placeholder")

    @property
    def outputs(self) -> list[Any]:
        return list(self.graph_module.graph.output_node().args[0])


def normalize(gm: GraphModule, example_inputs: Sequence[Any]) -> Normalized:
    """Export ``gm``, a graph from Dynamo for a backend, with plain tensors in place of tensor subclasses.

    Raises:
        Refused: the graph writes to memory also read through another input; torch cannot trace one of its
            control-flow operations, function transforms or tensor subclasses; or an input is sharded.
    """
    _refuse_sharded(gm, example_inputs)
    try:
        return _normalize(gm, example_inputs)
    except NotFunctional as error:
        raise Refused(Reason.NOT_FUNCTIONAL, str(error)) from error
    except Refused:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        operations = [node.target for node in gm.graph.nodes if isinstance(node.target, HigherOrderOperator)]
        if names := sorted({operation.name() for operation in operations}):
            raise Refused(Reason.HIGHER_ORDER, f"{', '.join(names)}: {why}") from error
        if names := sorted({cls.__name__ for cls in own_classes(gm.graph)}):
            raise Refused(Reason.TENSOR_CLASS, f"{', '.join(names)}: {why}") from error
        raise


def _refuse_sharded(gm: GraphModule, example_inputs: Sequence[Any]) -> None:
    module = sys.modules.get("torch.distributed.tensor")  # without this import there are no sharded tensors
    if module is None:
        return
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True):
        if isinstance(node.meta.get("example_value", value), module.DTensor):
            raise Refused(Reason.SHARDED, f"input {_source(node) or node.name}")


def _normalize(gm: GraphModule, example_inputs: Sequence[Any]) -> Normalized:
    placeholders = gm.graph.find_nodes(op="placeholder")
    sources = [_source(node) for node in placeholders]
    _drop_idle_dropout(gm)
    with observed("normalize", gm.graph) as count:
        mode = _fake_mode(example_inputs)
        fakes = [_fake(mode, node, value) for node, value in zip(placeholders, example_inputs, strict=True)]
        with torch.no_grad(), tracing(TracingContext(mode)):
            graph_module, written = functional_graph(gm, fakes, mode)
        count.matches, count.graph = len(placeholders), graph_module.graph
    for node, fake in zip(graph_module.graph.find_nodes(op="placeholder"), fakes, strict=True):
        node.meta.setdefault("val", fake)
    _drop_assertions(graph_module)
    canonicalize(graph_module)
    return Normalized(graph_module, written, sources)


def _drop_idle_dropout(gm: GraphModule) -> None:
    """Replace an inactive dropout by its input: otherwise the export would forbid writes to the input."""
    for node in gm.graph.find_nodes(op="call_function", target=torch.nn.functional.dropout):
        p, training, _ = (*node.args[1:], *[None] * 3)[:3]
        p = node.kwargs.get("p", 0.5) if p is None else p
        training = node.kwargs.get("training", True) if training is None else training
        if training is False or p == 0:
            node.replace_all_uses_with(node.args[0] if node.args else node.kwargs["input"])
            gm.graph.erase_node(node)
    gm.recompile()


def _fake_mode(example_inputs: Sequence[Any]) -> FakeTensorMode:
    context = TracingContext.try_get()
    if context is not None and context.fake_mode is not None:
        return context.fake_mode
    return torch._guards.detect_fake_mode(example_inputs) or FakeTensorMode(allow_non_fake_inputs=True)


def _source(node: Node) -> str:
    grapharg = node.meta.get("grapharg")  # cleared once the backend returns: read it now
    source = getattr(grapharg, "source", None)
    if source is None:
        return ""
    name = source.name
    return name() if callable(name) else name


def _fake(mode: FakeTensorMode, node: Node, value: Any) -> Any:
    """The input as a plain fake tensor of the logical shape."""
    value = node.meta.get("example_value", value)
    if not isinstance(value, Tensor):
        return value
    if isinstance(value, FakeTensor):  # from Dynamo, which gives a backend its own mode
        return value if value.fake_mode is mode else mode.from_tensor(value)
    if type(value) in (Tensor, torch.nn.Parameter, torch.nn.Buffer):
        return mode.from_tensor(value, static_shapes=True)
    if torch.utils._python_dispatch.is_traceable_wrapper_subclass(value):
        return plain_stand_in(mode, value)
    return value


def _drop_assertions(graph_module: GraphModule) -> None:
    """Drop dtype assertions: they hold by construction, and would keep otherwise unread tensors alive."""
    target = torch.ops.aten._assert_tensor_metadata.default
    for node in graph_module.graph.find_nodes(op="call_function", target=target):
        graph_module.graph.erase_node(node)
