"""Function transforms in a Dynamo graph, such as ``vmap``: each is traced alone, into ATen operations.

A trace above the dispatcher records the inputs of a transform, but not its own tensors: they belong to a level known
only to the transform. Below the dispatcher the levels are gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx, maybe_enable_thunkify
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from think_compile.passes.as_written import has_own_functions, plain_stand_in
from think_compile.passes.refusal import Reason, Refused
from think_compile.passes.walks import part_of


@dataclass(frozen=True)
class Transformed:
    """A part of a Dynamo graph within transforms.

    Attributes:
        nodes: the calls, in execution order.
        inputs: the outside nodes read by the calls.
        outputs: the calls read by outside nodes.
        traced: a graph of ATen operations from ``inputs`` to ``outputs``.
    """

    nodes: tuple[Node, ...]
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    traced: GraphModule


def is_transform(target: Any) -> bool:
    """Whether a function is a step of a function transform, such as the beginning or the end of a ``vmap``."""
    return "_functorch" in (getattr(target, "__module__", None) or "")


def transformed_parts(gm: GraphModule, mode: FakeTensorMode) -> dict[Node, Transformed]:
    """The parts of a Dynamo graph within transforms, keyed by their first nodes.

    Raises:
        Refused: torch cannot trace one.
    """
    depth = _depth()
    try:
        return {nodes[0]: _transformed(gm, nodes, mode) for nodes in _parts(gm.graph)}
    except Exception as error:
        while _depth() > depth:  # a vmap left open by the failure
            torch._C._functorch.pop_dynamic_layer_stack()
        names = sorted({node.target.__name__ for node in gm.graph.nodes if is_transform(node.target)})
        why = f"{', '.join(names)}: {type(error).__name__}: {str(error).split(chr(10))[0]}"
        raise Refused(Reason.HIGHER_ORDER, why) from error


def _depth() -> int:
    return len(retrieve_all_functorch_interpreters())


def _parts(graph: Graph) -> list[list[Node]]:
    """The calls of each outermost transform, from its beginning to its end."""
    parts: list[list[Node]] = []
    depth, within = 0, False
    for node in graph.nodes:
        if not node.op.startswith("call_"):
            continue
        own = is_transform(node.target)
        if own or depth:
            parts = parts if within else [*parts, []]
            parts[-1].append(node)
        within = own or depth > 0
        name = node.target.__name__ if own else ""
        depth += name.endswith("increment_nesting") - name.endswith("decrement_nesting")
    return parts


def _transformed(gm: GraphModule, nodes: Sequence[Node], mode: FakeTensorMode) -> Transformed:
    inside = set(nodes)
    inputs = tuple(dict.fromkeys(x for node in nodes for x in node.all_input_nodes if x not in inside))
    outputs = tuple(node for node in nodes if any(user not in inside for user in node.users))
    run = Interpreter(GraphModule(gm, part_of(nodes, inputs, outputs))).run
    values = [_fake(mode, node.meta["example_value"]) for node in inputs]
    with torch.no_grad(), tracing(TracingContext(mode)), mode, enable_python_dispatcher(), maybe_enable_thunkify():
        return Transformed(tuple(nodes), inputs, outputs, make_fx(run)(*values))


def _fake(mode: FakeTensorMode, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if has_own_functions(value):
        raise TypeError(f"a {type(value).__name__} is read within")
    return plain_stand_in(mode, value) if is_traceable_wrapper_subclass(value) else mode.from_tensor(value)
