"""A model's call under Dynamo: a failed call leaves no trace.

Dynamo permanently marks the code of a frame after a failed conversion: one malformed request would make every later
call dense. Here such a frame runs as the model wrote it, in this call only. If the plain code raises too, the error is
the caller's and nothing is remembered. If the plain code succeeds, the failure is ours: calls of this kind are not
traced again, and the report says so.
"""

from __future__ import annotations

import itertools
import types
from collections import Counter
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import set_code_exec_strategy
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.types import ConvertFrameReturn, FrameAction, FrameExecStrategy

from think_compile.backend import OF_THE_USER, Backend
from think_compile.runtime.running import RUNNING, FrameFailure, Running

# Graphs per code object before torch stops compiling and runs the code op by op. A few conversations of different
# batch, padding and cache reach torch's own limit of 8; beyond the limit no new cache would be pruned.
MAX_GRAPHS = 64
MAX_GRAPHS_OF_A_LAYER = 8  # if graph breaks separate the layers, which share one code object
MAX_FAILURES = 8  # kinds of arguments that may fail before Dynamo no longer tries a code object

_numbers = itertools.count()
_CONVERTED = FrameExecStrategy(FrameAction.DEFAULT, FrameAction.DEFAULT)
_SKIPPED_WITH_ALL_INSIDE = FrameExecStrategy(FrameAction.SKIP, FrameAction.SKIP)
_SKIPPED = FrameExecStrategy(FrameAction.SKIP, FrameAction.DEFAULT)


class _Converter:
    """Dynamo's callback for the frames of one model's calls; wraps Dynamo's own ``convert``."""

    def __init__(self, convert: Any) -> None:
        self._torchdynamo_orig_backend = convert  # Dynamo finds the backend of compiled code by this name
        self.failed: dict[CodeType, set[tuple[Any, ...]]] = {}

    def __call__(self, frame: Any, *rest: Any) -> ConvertFrameReturn:
        running = RUNNING.get()
        assert running is not None
        failed = self.failed.get(frame.f_code, ())
        if failed and (len(failed) == MAX_FAILURES or _kind(frame) in failed):
            return ConvertFrameReturn(_SKIPPED, apply_to_code=False)
        running.names = frame.f_locals
        try:
            result = self._torchdynamo_orig_backend(frame, *rest)
        except Exception as error:
            if isinstance(error, BackendCompilerFailed) and isinstance(error.inner_exception, OF_THE_USER):
                raise
            running.failures.append(FrameFailure(frame.f_code, _kind(frame), error))
            return ConvertFrameReturn(_SKIPPED_WITH_ALL_INSIDE, apply_to_code=False)
        if result.guarded_code is None and result.apply_to_code:
            running.marked.append(frame.f_code)
        return result


def _kind(frame: Any) -> tuple[Any, ...]:
    """The kind of a frame's arguments: types, and dtypes and shapes of tensors."""
    leaves = pytree.tree_leaves(dict(frame.f_locals))
    return tuple((x.dtype, tuple(x.shape)) if type(x) is Tensor else type(x) for x in leaves)


def _call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return model._call_impl(*args, **kwargs)


def compiled_call(model: nn.Module, backend: Backend) -> Callable[..., Any]:
    """The call of one model, compiled by ``backend``: a function of model, args and kwargs.

    The function has its own code object: models must not share recompile limits. Errors of the model and of this
    package are passed on unchanged.
    """
    # Dynamo remembers varying sizes by the code's name; models must not share them
    code = _call.__code__.replace(co_name=f"{type(model).__name__}_call_{next(_numbers)}")
    context: Any = torch._dynamo.optimize(backend)  # does nothing if the environment turns Dynamo off
    context.callback = converter = _Converter(getattr(context, "callback", None))
    compiled = context(types.FunctionType(code, globals()))
    limit, accumulated = _limits(model)
    settings = {
        "recompile_limit": limit,
        "accumulated_recompile_limit": accumulated,
        "suppress_errors": False,
        "skip_nnmodule_hook_guards": False,  # hooks may come and go between calls
        "specialize_float": True,  # a varying float would become a tensor, whose value no trace knows
    }

    def call(*args: Any) -> Any:
        running = Running(backend.warn_once, args)
        token = RUNNING.set(running)
        try:
            with torch._dynamo.config.patch(settings):
                result = compiled(*args)
        except BaseException as error:
            for code_object in running.marked:
                set_code_exec_strategy(code_object, _CONVERTED)
            if isinstance(error, BackendCompilerFailed) and isinstance(error.inner_exception, OF_THE_USER):
                raise error.inner_exception from None
            raise
        finally:
            RUNNING.reset(token)
        for failure in running.failures:
            converter.failed.setdefault(failure.code, set()).add(failure.kind)  # the plain code succeeded
            backend.excuse(failure.error, "kind")
        backend.check_attention_was_seen()
        return result

    return call


def _limits(model: nn.Module) -> tuple[int, int]:
    """How often Dynamo may compile one code object of the model, and all code objects of a call together."""
    kinds = Counter(type(module) for module in model.modules() if next(module.children(), None) is not None)
    limit = max(MAX_GRAPHS, MAX_GRAPHS_OF_A_LAYER * max(kinds.values(), default=0))
    return limit, max(limit, torch._dynamo.config.accumulated_recompile_limit)
