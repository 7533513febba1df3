"""Triton kernels from templates: inserts names of functions and of groups of arguments into a template's source.

A template is a plain function. A *function* name in it is replaced by a codec's device function. A *group* name is
replaced by several arguments or variables: ``KEYS`` becomes ``K_ROWS, K_CHANNELS`` everywhere. The result is new source
text, because Inductor writes kernels out again from the source of the functions that they name (Triton's own
``triton_kernels/specialize.py`` does the same).
"""

from __future__ import annotations

import functools
import inspect
import linecache
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import triton
import triton.language as tl


def specialised(
    template: Callable[..., Any],
    name: str,
    functions: Mapping[str, Any],
    groups: Mapping[str, Sequence[str]],
    **options: Any,
) -> Any:
    """A kernel or device function called ``name``, made from ``template``; ``options`` as for ``triton.jit``.

    Raises:
        ValueError: a name to replace is not in the template.
    """
    text = textwrap.dedent(inspect.getsource(template))
    text = re.sub(r"\bdef \w+\(", f"def {name}(", text[text.index("def ") :], count=1)
    for group, names in groups.items():
        text = _replaced(text, rf"\b{group}\b(: tl\.constexpr)?", functools.partial(_listed, names))
    for placeholder, function in functions.items():
        text = _replaced(text, rf"\b{placeholder}\b", functools.partial(_named, function))
    file = f"<{template.__module__}: {name}>"
    linecache.cache[file] = len(text), None, text.splitlines(keepends=True), file
    known = {function.__name__: function for function in functions.values()}
    namespace = {"__name__": template.__module__, "tl": tl, "triton": triton, **_named_in(template), **known}
    exec(compile(text, file, "exec"), namespace)
    return triton.jit(namespace[name], **options)


def _listed(names: Sequence[str], found: re.Match[str]) -> str:
    return ", ".join(name + (found[1] or "") for name in names)


def _named(function: Any, found: re.Match[str]) -> str:
    return str(function.__name__)


def _replaced(text: str, pattern: str, by: Callable[[re.Match[str]], str]) -> str:
    text, count = re.subn(pattern, by, text)
    if not count:
        raise ValueError(f"{pattern} does not stand in the template")
    return text


def _named_in(template: Callable[..., Any]) -> dict[str, Any]:
    """The device functions that a template calls by their own names."""
    names = template.__code__.co_names
    found = {name: template.__globals__.get(name) for name in names}
    return {name: value for name, value in found.items() if isinstance(value, triton.runtime.KernelInterface)}
