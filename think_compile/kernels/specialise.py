"""Triton kernels out of templates: names of functions and of groups of arguments are put into a template's source.

A template is a plain function. A *function* name in it stands for a codec's device function, a *group* name for several
arguments or variables: ``KEYS`` becomes ``K_ROWS, K_CHANNELS`` wherever it stands. The result is source text of its
own, since Inductor writes a kernel again from the source of the functions that it names (Triton's own
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
    """The kernel, or device function, ``name`` of ``template``; ``options`` as of ``triton.jit``.

    Raises:
        ValueError: a name to be replaced does not stand in the template.
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
