"""Lowering: make a rewritten graph runnable, with Inductor through ``compile_fx`` or op by op.

Inductor is called directly, with fake inputs in a shape environment of the graph's own. The dynamic sizes of the
caller's graph and the capacities of growing stores are symbols there. Inductor's assumptions about them form one Python
expression, checked before each call. The caller's guards fix everything else. Layers are compiled once, see
:mod:`.regions`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import SymInt, Tensor
from torch._dynamo.source import LocalSource
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from think_compile.runtime.regions import compile_by_regions

log = logging.getLogger(__name__)

aten = torch.ops.aten
_TUNING_IS_KEPT = TorchVersion(torch.__version__) >= "2.13"
_WITH_WEIGHTS = {aten.linear.default, aten.mm.default, aten.addmm.default}


class CompilationFailed(Exception):
    """Compilation raised ``error``; nothing has run yet."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(frozen=True)
class Dims:
    """The sizes of an input that vary between calls: the axes of a tensor, or (``number``) the value itself.

    ``strided``: the strides of the tensor may vary as well.
    ``named`` gives a name to a number, or to each varying size of a contiguous tensor. Sizes with the same name and
    value share one symbol, such as the sizes and lengths of the stores.
    """

    varying: tuple[int, ...] = ()
    named: tuple[str, ...] = ()
    strided: bool = False
    number: bool = False


class Eager:
    """Runs the graph op by op."""

    def __init__(self, graph_module: GraphModule) -> None:
        self.forward = graph_module.forward

    def __call__(self, args: Sequence[Any]) -> Sequence[Any]:
        return self.forward(*args)


Getter = Callable[[Sequence[Any]], int]


@dataclass
class _Variant:
    """One compilation: valid if the ``fixed`` sizes are equal and ``guards`` holds for the others."""

    run: Callable[..., Any]
    fixed: Sequence[tuple[Getter, int]]
    getters: Sequence[Getter]
    guards: CodeType | None
    shape_env: ShapeEnv

    def accepts(self, args: Sequence[Any]) -> bool:
        if any(get(args) != value for get, value in self.fixed):
            return False
        if self.guards is None:
            return True
        sizes = [get(args) for get in self.getters]
        return self.shape_env.evaluate_guards_expression(self.guards, sizes)  # type: ignore[arg-type]


class Inductor:
    """Compiles with Inductor on the first call, and again only when a varying size breaks an assumption."""

    def __init__(self, graph_module: GraphModule, dims: Sequence[Dims], options: Mapping[str, Any]) -> None:
        self.graph_module, self.dims, self.options = graph_module, dims, dict(options)
        self.variants: list[_Variant] = []

    def __call__(self, args: Sequence[Any]) -> Sequence[Any]:
        for variant in self.variants:
            if variant.accepts(args):
                return variant.run(*args)
        try:
            self.variants.insert(0, self._compile(args))
        except Exception as error:
            raise CompilationFailed(error) from error
        return self.variants[0].run(*args)

    def is_compiled_for(self, args: Sequence[Any]) -> bool:
        """Whether a call with ``args`` needs no compilation."""
        return any(variant.accepts(args) for variant in self.variants)

    def _compile(self, args: Sequence[Any]) -> _Variant:
        from torch._inductor.compile_fx import compile_fx

        if self.variants:
            log.info("compiling again: the varying sizes broke an assumption")
        shape_env = ShapeEnv(duck_shape=False)
        mode = FakeTensorMode(shape_env=shape_env)
        fakes = _Fakes(mode, shape_env).make(args, self.dims)

        def compile_graph(graph_module: GraphModule, inputs: list[Any]) -> Any:
            options = suited(graph_module) | self.options
            with torch.no_grad(), tracing(TracingContext(mode)):
                return compile_fx(graph_module, inputs, config_patches=options or None)

        run = compile_by_regions(self.graph_module, fakes, mode, compile_graph)
        varying = _varying(fakes, self.dims)
        fixed = [(get, value) for get, value in varying if isinstance(value, int)]
        symbolic = [(get, value) for get, value in varying if isinstance(value, SymInt)]
        guards = _guards(shape_env, [value for _, value in symbolic])
        return _Variant(run, fixed, [get for get, _ in symbolic], guards, shape_env)


def suited(graph_module: GraphModule) -> dict[str, Any]:
    """Inductor options for a graph; the user's options override them.

    Products of one row, as in steps of one sequence, are bound by reading the weights. On a GPU, Inductor's own kernels
    read them at full speed once tuned, in one launch with the following operations; cuBLAS takes two launches. Before
    torch 2.13, a second process loses the tuning of kernels of the static launcher.
    """
    products = [node.meta.get("val") for node in graph_module.graph.nodes if node.target in _WITH_WEIGHTS]
    one_row = [x is not None and x.is_cuda and all(size == 1 for size in x.shape[:-1]) for x in products]
    if not (one_row and all(one_row)):
        return {}
    return {"coordinate_descent_tuning": True} | ({} if _TUNING_IS_KEPT else {"use_static_cuda_launcher": False})


def _varying(fakes: Sequence[Any], dims: Sequence[Dims]) -> list[tuple[Getter, int | SymInt]]:
    """For each varying number: its getter from the inputs, and its symbol (for sizes 0 and 1, its value)."""
    found: list[tuple[Getter, int | SymInt]] = []
    for i, (fake, d) in enumerate(zip(fakes, dims, strict=True)):
        if d.number:
            found.append((_number_at(i), fake))
        elif isinstance(fake, Tensor):
            found += [(_size_at(i, axis), fake.shape[axis]) for axis in d.varying]
            if d.strided:
                axes = [axis for axis, size in enumerate(fake.shape) if not isinstance(size, int) or size != 1]
                found += [(_stride_at(i, axis), fake.stride()[axis]) for axis in axes]
    return found


def _number_at(i: int) -> Getter:
    return lambda args: args[i]


def _size_at(i: int, axis: int) -> Getter:
    return lambda args: args[i].shape[axis]


def _stride_at(i: int, axis: int) -> Getter:
    return lambda args: args[i].stride(axis)


def _guards(shape_env: ShapeEnv, symbols: Sequence[Any]) -> CodeType | None:
    """Inductor's assumptions about the varying sizes, compiled for evaluation before every call."""
    if not symbols:
        return None
    text = shape_env.produce_guards_expression(placeholders=symbols, ignore_static=False)
    log.debug("guards on the varying sizes: %s", text)
    return None if text is None else compile(text, "<guards>", "eval")


class _Fakes:
    """Fake inputs whose varying sizes are symbols."""

    def __init__(self, mode: FakeTensorMode, shape_env: ShapeEnv) -> None:
        self.mode, self.shape_env = mode, shape_env
        self.named: dict[Any, Any] = {}

    def make(self, args: Sequence[Any], dims: Sequence[Dims]) -> list[Any]:
        """A fake for each input."""
        return [self._one(arg, d, f"input_{i}") for i, (arg, d) in enumerate(zip(args, dims, strict=True))]

    def _one(self, arg: Any, d: Dims, name: str) -> Any:
        if d.number:
            return self._shared(d.named[0], arg, name) if d.named else self._symbol(arg, name)
        if not isinstance(arg, Tensor):
            return arg
        if d.named:
            return self._with_named_sizes(arg, d)
        if is_traceable_wrapper_subclass(arg):  # quantized or sharded weights: each size is compiled for
            return self.mode.from_tensor(arg.detach(), static_shapes=True)
        sizes = [DimDynamic.DYNAMIC if axis in d.varying else DimDynamic.STATIC for axis in range(arg.dim())]
        context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
        return self.mode.from_tensor(arg.detach(), source=LocalSource(name), symbolic_context=context)

    def _with_named_sizes(self, arg: Tensor, d: Dims) -> Tensor:
        assert arg.is_contiguous()
        shape: list[Any] = list(arg.shape)
        for axis, name in zip(d.varying, d.named, strict=True):
            shape[axis] = self._shared(name, arg.shape[axis], f"{name}_{arg.shape[axis]}")
        with self.mode:
            return torch.empty(shape, dtype=arg.dtype, device=arg.device)

    def _shared(self, kind: str, value: int, name: str) -> SymInt | int:
        """One symbol for all equal numbers of a kind; a guard checks their equality in later calls."""
        if (kind, value) not in self.named:
            self.named[kind, value] = self._symbol(value, name)
        return self.named[kind, value]

    def _symbol(self, value: int, name: str) -> SymInt | int:
        source = LocalSource(name)
        make = self.shape_env.create_symbol if value >= 2 else self.shape_env.create_unspecified_symbol
        symbol = make(value, source, DimDynamic.DYNAMIC)
        return self.shape_env.create_symintnode(symbol, hint=value, source=source)
