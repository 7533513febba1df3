"""Templates: the insertions are in the source, which Inductor and Triton read."""

import inspect

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from think_compile.kernels.pair import kernels_of  # noqa: E402
from think_compile.kernels.specialise import specialised  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def add_all(a, b, c):
    return a + b + c


@triton.jit
def only_first(a, b, c):
    return a


def summed(OUT, INPUTS, SIZES: tl.constexpr):
    i = tl.arange(0, WIDTH)  # noqa: F821
    a, b, c = tl.load(X0 + i), tl.load(X1 + i), tl.load(X2 + i)  # noqa: F821
    tl.store(OUT + i, combine(a, b, c))  # noqa: F821


GROUPS = {"INPUTS": ("X0", "X1", "X2"), "SIZES": ("WIDTH",)}


@pytest.mark.parametrize("function", [add_all, only_first])
def test_a_kernel_of_a_template_runs(function):
    kernel = specialised(summed, f"summed_{function.__name__}", {"combine": function}, GROUPS)
    inputs = [torch.randn(16, device=DEVICE) for _ in range(3)]
    out = torch.zeros(16, device=DEVICE)
    kernel[(1,)](out, *inputs, WIDTH=16)
    torch.testing.assert_close(out, sum(inputs) if function is add_all else inputs[0])


def test_the_source_is_what_was_put_together():
    kernel = specialised(summed, "summed_again", {"combine": add_all}, GROUPS)
    source = inspect.getsource(kernel.fn)
    assert source.startswith("def summed_again(OUT, X0, X1, X2, WIDTH: tl.constexpr):")
    assert "add_all(a, b, c)" in source and "INPUTS" not in source


def test_a_name_that_is_not_there_is_told():
    with pytest.raises(ValueError, match="TILES"):
        specialised(summed, "summed_wrong", {"combine": add_all}, GROUPS | {"TILES": ("A",)})


def test_a_pair_of_codecs_is_made_once():
    assert kernels_of("channels", "whole") is kernels_of("channels", "whole")
