"""Trace a graph of torch calls once, into functional ATen operations.

``aot_export_module`` traces twice. Its first trace only finds the needs of training steps, outputs with shared memory,
and tensor subclasses. As there, the trace is pre-dispatch: attention and ``linear`` stay whole.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo.guards import compute_overlapping_tensors
from torch._dispatch.python import enable_python_dispatcher
from torch._functorch._aot_autograd.functional_utils import (
    assert_functional_graph,
    from_fun,
    has_data_mutation,
    has_metadata_mutation,
    to_fun,
    was_inductor_storage_resized,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.fx import Graph, GraphModule, Interpreter, Node, traceback
from torch.fx.experimental.proxy_tensor import make_fx, maybe_enable_thunkify
from torch.fx.experimental.symbolic_shapes import PropagateUnbackedSymInts
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils.stateless import _reparametrize_module

from think_compile.passes.as_written import calls_as_written, recorded
from think_compile.passes.refusal import where
from think_compile.passes.transforms import Transformed, transformed_parts

ASSERTIONS = {torch.ops.aten._assert_async.default, torch.ops.aten._assert_async.msg}  # the model's own
_INFERENCE_MODE = {torch.autograd.grad_mode._enter_inference_mode, torch.autograd.grad_mode._exit_inference_mode}


class NotFunctional(Exception):
    """The graph changes a tensor in a way that a functional graph cannot express."""


def functional_graph(gm: GraphModule, inputs: Sequence[Any], mode: FakeTensorMode) -> tuple[GraphModule, list[int]]:
    """Trace ``gm`` with its fake ``inputs``.

    Returns:
        The graph, and the indices of the written inputs. The graph has the inputs of ``gm``. Its outputs are the new
        values of the written inputs, then the outputs of ``gm``.

    Raises:
        NotFunctional: an input's shape or storage is changed, a written input shares memory with another, or one of
            the tensors of ``gm`` itself is written to.
    """
    held = {**dict(gm.named_parameters(remove_duplicate=False)), **dict(gm.named_buffers(remove_duplicate=False))}
    fakes = _distinct([*(mode.from_tensor(tensor, static_shapes=True) for tensor in held.values()), *inputs])
    transformed = transformed_parts(gm, mode)
    as_written = calls_as_written(gm.graph, mode)
    written: list[int] = []

    def call(*args: Any) -> tuple[Any, ...]:
        # A mode does the functionalization here; without this guard its dispatch key would be active above the mode.
        above = torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.Functionalize))
        with maybe_enable_thunkify(), above:
            wrapped = [to_fun(arg) for arg in args]
            with _reparametrize_module(gm, dict(zip(held, wrapped, strict=False))), traceback.preserve_node_meta():
                outputs = _Interpreter(gm, as_written, transformed).run(*wrapped[len(held) :])
            written[:] = _written(args, wrapped)
            return tuple(from_fun(x) for x in (*(wrapped[i] for i in written), *outputs))

    mode.epoch += 1  # numbers read from tensors by an earlier trace do not count in this one
    with mode, enable_python_dispatcher(), FunctionalTensorMode(pre_dispatch=True, export=True):
        traced = make_fx(call, record_module_stack=True, pre_dispatch=True)(*fakes)
    _check_functional(traced.graph)
    traced.graph.eliminate_dead_code(is_impure_node=lambda node: node.is_impure() or node.target in ASSERTIONS)
    own = [name for i, name in enumerate(held) if i in written]
    if own:
        raise NotFunctional(f"the graph writes to tensors of its own: {own}")
    return _holding(held, traced), [i - len(held) for i in written]


def _check_functional(graph: Graph) -> None:
    """Raise if an in-place operation is left, such as a change of the storage of a tensor of another class."""
    try:
        assert_functional_graph(graph)
    except AssertionError as error:
        left = [node for node in graph.nodes if _writes(node)]
        raise NotFunctional(f"{where(left[0])} is left" if left else str(error).splitlines()[0]) from error


def _writes(node: Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return False
    return not (node.target is torch.ops.aten.copy_.default and node.args[0].op == "placeholder")


def _distinct(fakes: Sequence[Any]) -> list[Any]:
    """Replace repeated tensors by views of themselves: the trace tells its inputs apart by identity."""
    seen: set[int] = set()
    found = []
    for fake in fakes:
        found.append(fake.detach() if isinstance(fake, Tensor) and id(fake) in seen else fake)
        seen.add(id(fake))
    return found


class _Interpreter(PropagateUnbackedSymInts):
    """Runs a graph node by node, to keep the metadata in the traced nodes.

    Skips inference modes: there are no gradients anyway, and torch 2.11 finds no writes in them. Records the calls of
    ``as_written`` unchanged, with the given results. Records the traced operations of the parts of ``transformed``.
    """

    def __init__(self, gm: GraphModule, as_written: dict[Node, Any], transformed: dict[Node, Transformed]) -> None:
        super().__init__(gm)
        self.as_written, self.transformed = as_written, transformed

    def run_node(self, n: Node) -> Any:
        """As in torch, except for the nodes of ``transformed`` and ``as_written``."""
        if n in self.transformed:
            return self._run_transformed(self.transformed[n])
        if n not in self.as_written:
            return super().run_node(n)
        with self._set_current_node(n):
            return recorded(n, *self.fetch_args_kwargs_from_env(n), self.as_written[n])

    def _run_transformed(self, part: Transformed) -> Any:
        """Set the values of all nodes of the part; nodes with known values are not run."""
        for node in part.inputs:
            if node not in self.env:  # an attribute of the graph
                self.env[node] = super().run_node(node)
        results = Interpreter(part.traced).run(*(self.env[node] for node in part.inputs))
        self.env |= dict.fromkeys(part.nodes) | dict(zip(part.outputs, results, strict=True))
        return self.env[part.nodes[0]]

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return None if target in _INFERENCE_MODE else super().call_function(target, args, kwargs)


def _written(args: Sequence[Any], wrapped: Sequence[Any]) -> list[int]:
    """Indices of the inputs written by the call; ``wrapped``: ``args`` as wrapped by functionalization."""
    tensors = [i for i, arg in enumerate(args) if isinstance(arg, Tensor)]
    for i in tensors:
        if has_metadata_mutation(wrapped[i], args[i], check_only_storage_mutation=False):
            raise NotFunctional(f"the shape or the storage of input {i} is changed in place")
        if was_inductor_storage_resized(wrapped[i]):
            raise NotFunctional(f"the storage of input {i} is resized")
    written = [i for i in tensors if has_data_mutation(wrapped[i])]
    sharing = defaultdict(list)
    for i in tensors if written else ():
        sharing[StorageWeakRef(args[i].untyped_storage())].append(i)
    for group in sharing.values():
        if len(group) > 1 and not set(group).isdisjoint(written):
            _check_apart(group, [args[i] for i in group])
    return written


def _check_apart(group: Sequence[int], tensors: Sequence[Tensor]) -> None:
    symbolic = any(isinstance(n, torch.SymInt) for x in tensors for n in (*x.shape, *x.stride(), x.storage_offset()))
    if len(compute_overlapping_tensors(list(tensors), symbolic=symbolic)) > 1:
        raise NotFunctional(f"an input is written to, and others share its memory: inputs {list(group)}")


def _holding(held: dict[str, Tensor], traced: GraphModule) -> GraphModule:
    """Turn the first inputs of the trace, tensors held by the caller's graph, back into attributes of the graph."""
    graph_module = GraphModule(traced, traced.graph)
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    for (name, tensor), node in zip(held.items(), placeholders, strict=False):
        own = f"held_{name.replace('.', '_')}"
        graph_module.register_buffer(own, tensor)
        with graph_module.graph.inserting_before(node):
            constant = graph_module.graph.get_attr(own)
        constant.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(constant)
        graph_module.graph.erase_node(node)
    graph_module.recompile()
    return graph_module
