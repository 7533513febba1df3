"""Choosing channels anew when a fixed cache is written from its first row, by the Triton kernel."""

import math

import pytest
import torch

from think_compile.kernels import reference as ref

restart = pytest.importorskip("think_compile.kernels.restart", reason="needs triton", exc_type=ModuleNotFoundError)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("start", [0, 1, 40])
@pytest.mark.parametrize(
    ("batch", "query_heads", "heads", "d", "keep"),
    [(2, 4, 2, 32, 16), (1, 7, 1, 80, 50), (3, 2, 2, 16, 16), (1, 9, 3, 96, 1)],
)
def test_like_the_reference(batch, query_heads, heads, d, keep, start):
    with torch.device(DEVICE):
        q, k = torch.randn(batch, query_heads, 1, d), torch.randn(batch, heads, 1, d)
        channels = torch.rand(batch, heads, d).topk(keep).indices.sort().values
        begin = torch.tensor(start)
    expected = ref.rescore_restarted(q, k, None, channels, begin, 50, 8)
    restart.rescore_restarted(q, k, channels, begin)
    assert torch.equal(channels, expected)


def test_ties_and_what_is_no_number():
    q, k = torch.ones(1, 1, 1, 16, device=DEVICE), torch.ones(1, 1, 1, 16, device=DEVICE)
    k[..., 9], q[..., 12] = math.nan, math.inf
    channels = torch.zeros(1, 1, 4, dtype=torch.long, device=DEVICE)
    restart.rescore_restarted(q, k, channels, torch.tensor(0, device=DEVICE))
    assert channels.flatten().tolist() == [0, 1, 9, 12]
