"""Small graph functions around an attention."""

import pytest
import torch
import torch.nn.functional as F

from think_compile.kernels import arrange

B, HQ, H, D, DV, SIZE = 2, 4, 2, 8, 6, 40


def causal(n, extent, start):
    return (torch.arange(extent) <= torch.arange(start, start + n)[:, None])[None, None]


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_attend_prompt(grouped, masked):
    q, k, v = (torch.randn(B, h, 7, d).double() for h, d in ((HQ, D), (H, D), (H, DV)))
    mask = causal(7, SIZE, 0) if masked else None
    got = arrange.attend_prompt(q, k, v, mask, 0.3, not masked, grouped)
    buffers = [F.pad(t, (0, 0, 0, SIZE - 7)).repeat_interleave(HQ // H, 1) for t in (k, v)]
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, *buffers, causal(7, SIZE, 0), scale=0.3))


def test_start_of():
    assert arrange.start_of(torch.tensor([4, 5, 6]), False) == 4
    assert arrange.start_of(torch.tensor([9]), False) == 9


@pytest.mark.host
def test_start_of_positions_with_gaps_raises():
    for gaps in ([1, 3], [3, 2], [1, 1], [0, 1, 2, 0]):
        with pytest.raises(RuntimeError, match="gaps"):
            arrange.start_of(torch.tensor(gaps), False)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [0, 2, 1, 3], [3, 1, 0, 2]])
def test_laid_out(order):
    x = torch.randn(2, 3, 4, 5)
    got = arrange.laid_out(x, order)
    assert torch.equal(got, x)
    assert got.permute(order).is_contiguous()
