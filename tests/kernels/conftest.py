"""In Triton's interpreter no kernel may touch memory outside its tensors, not even in unused elements."""

from contextlib import ExitStack
from unittest import mock

import numpy as np
import pytest
import torch


def span(tensor: torch.Tensor) -> tuple[int, int]:
    """Addresses of a tensor's first byte and of the byte after its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.itemsize if tensor.numel() else 0


def assert_inside(spans: list[tuple[int, int]], pointers: np.ndarray, active: np.ndarray, itemsize: int) -> None:
    addresses = pointers[np.broadcast_to(active, pointers.shape).astype(bool)].astype(np.int64)
    inside = np.zeros(addresses.shape, bool)
    for low, high in spans:
        inside |= (addresses >= low) & (addresses + itemsize <= high)
    assert inside.all(), f"{(~inside).sum()} of {inside.size} accesses are outside of the kernel's tensors"


@pytest.fixture(autouse=True)
def only_its_tensors():
    """Checks every load and store of the interpreted kernels."""
    if torch.cuda.is_available():
        yield  # compute-sanitizer checks that
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter", exc_type=ModuleNotFoundError)
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    spans: list[tuple[int, int]] = []
    arguments, load, store = executor._init_args_hst, builder.create_masked_load, builder.create_masked_store

    def given(self, *args):
        found = arguments(self, *args)
        values = [*found[0], *found[1].values()]
        spans[:] = [span(value) for value in values if isinstance(value, torch.Tensor)]
        return found

    def check(pointers, mask):
        assert_inside(spans, pointers.data, mask.data, max(1, pointers.get_element_ty().primitive_bitwidth // 8))

    def checked_load(self, pointers, mask, *rest):
        check(pointers, mask)
        return load(self, pointers, mask, *rest)

    def checked_store(self, pointers, value, mask, *rest):
        check(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    with ExitStack() as patches:
        for owner, name, function in (
            (executor, "_init_args_hst", given),
            (builder, "create_masked_load", checked_load),
            (builder, "create_masked_store", checked_store),
        ):
            patches.enter_context(mock.patch.object(owner, name, function))
        yield
