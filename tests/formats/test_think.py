"""ThinK's choice of channels, and the stored keys of a first call, against loops in plain Python."""

import itertools
import math

import pytest
import torch

from think_compile.cache.state import Call, Prompt, capacity_for
from think_compile.formats import think
from think_compile.formats.base import CacheFormat, Side
from think_compile.formats.whole import Whole

LOW = torch.finfo(torch.float32).min


def first_call(q, k, mask, keep, observe, recent=1):
    """The stored keys."""
    width = k.shape[3]
    keys = Side(think.Channels(keep, observe), width, recent)
    return CacheFormat(keys, Side(Whole(), width)).first_call(Call(q, k, k, mask), Prompt())[0]


def chosen_by_loops(q, k, observe, allowed):
    """(scores, valid keys), in float64. `allowed` [B, N, S]: may the query attend to the key?"""
    batch, q_heads, n_new, dim = q.shape
    heads, length = k.shape[1:3]
    group, start = q_heads // heads, length - n_new
    scores = torch.zeros(batch, heads, dim, dtype=torch.float64)
    for b in range(batch):
        valid = [any(allowed[b, n, s] for n in range(n_new)) for s in range(length)]
        queries = [n for n in range(n_new) if valid[start + n]][-observe:]
        columns = [s for s in range(length) if valid[s]]
        for h, j in itertools.product(range(heads), range(dim)):
            heard = [q[b, h * group + g, n, j].double() ** 2 for g in range(group) for n in queries]
            stored = [k[b, h, s, j].double() ** 2 for s in columns]
            scores[b, h, j] = sum(heard) / max(len(heard), 1) * (sum(stored) / max(len(stored), 1))
    return scores


def channels_by_loops(scores, keep):
    out = []
    for row in scores.flatten(0, 1).tolist():
        order = sorted(range(len(row)), key=lambda j: (-(math.inf if math.isnan(row[j]) else row[j]), j))
        out.append(sorted(order[:keep]))
    return torch.tensor(out, dtype=think.CHANNEL).view(*scores.shape[:2], keep)


def causal(batch, n_new, length):
    return (torch.arange(length) <= torch.arange(length - n_new, length)[:, None]).expand(batch, -1, -1)


def padded(side, batch, n_new, length):
    """Causal with padding: no query attends to it, and its own rows are empty."""
    allowed = causal(batch, n_new, length).clone()
    for b in range(1, batch):
        pad = min(2 * b + 1, length - 1)
        at = slice(0, pad) if side == "left" else slice(length - pad, length)
        allowed[b, :, at] = False
        if side == "right" and n_new == length:
            allowed[b, at] = False
    return allowed


SIZES = [(1, 2, 2, 5, 5), (2, 4, 2, 6, 6), (3, 7, 1, 9, 9), (2, 6, 3, 3, 8), (2, 2, 1, 1, 4)]  # B Hq H N S


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("kind", ["bool", "float", "minus inf", "half", "per head"])
@pytest.mark.parametrize("observe", [1, 3, 50])
def test_first_call(sizes, side, kind, observe):
    batch, q_heads, heads, n_new, length = sizes
    dim, keep = 8, 3
    q, k = torch.randn(batch, q_heads, n_new, dim), torch.randn(batch, heads, length, dim)
    allowed = causal(batch, n_new, length) if side == "none" else padded(side, batch, n_new, length)
    mask = {
        "bool": lambda: allowed[:, None],
        "float": lambda: torch.where(allowed, 0.0, LOW)[:, None],
        "minus inf": lambda: torch.where(allowed, -3.0, -math.inf)[:, None],
        "half": lambda: torch.where(allowed, 0.0, LOW)[:, None].clamp(min=-65504).half(),
        "per head": lambda: spread_over_heads(allowed, q_heads),
    }[kind]()
    got = first_call(q, k, mask, keep, observe, recent=3)
    channels = channels_by_loops(chosen_by_loops(q, k, observe, allowed), keep)
    assert torch.equal(got["channels"], channels)
    narrow = k.gather(3, channels[:, :, None].expand(-1, -1, length, -1).long())
    assert torch.equal(got["rows"][:, :, :length], narrow)
    assert got["rows"].shape == (batch, heads, capacity_for(length), keep)
    assert not got["rows"][:, :, length:].any()
    for position in range(max(0, length - 4), length):
        assert torch.equal(got["ring"][:, :, position % 4], k[:, :, position])


def spread_over_heads(allowed, q_heads):
    """A mask by head whose union over heads is `allowed`."""
    mask = torch.zeros(allowed.shape[0], q_heads, *allowed.shape[1:], dtype=torch.bool)
    for column in range(allowed.shape[2]):
        mask[:, column % q_heads, :, column] = allowed[:, :, column]
    return mask


@pytest.mark.parametrize("shape", ["NS", "1NS", "11NS", "B11S", "111S"])
def test_masks_of_fewer_axes(shape):
    batch, length = 2, 6
    q, k = torch.randn(batch, 2, length, 8), torch.randn(batch, 1, length, 8)
    allowed = causal(batch, length, length)
    if shape.endswith("11S"):
        columns = torch.tensor([[False, True, True, True, True, False], [True, True, True, True, True, True]])
        columns = columns[:1] if shape == "111S" else columns
        allowed = columns[:, None].expand(batch, length, length)
        mask = columns[:, None, None]
    else:
        mask = allowed[0][(None,) * (len(shape) - 2)]
    got = first_call(q, k, mask, 3, 4)
    assert torch.equal(got["channels"], channels_by_loops(chosen_by_loops(q, k, 4, allowed), 3))


def test_mask_that_broadcasts_over_the_keys():
    """[.., N, 1] and [.., 1, 1] are legal masks of the stock attention."""
    q, k = torch.randn(1, 1, 6, 8), torch.randn(1, 1, 6, 8)
    expected = first_call(q, k, None, 3, 4)["channels"]
    for mask in (torch.zeros(1, 1, 6, 1), torch.ones(1, 1, 1, 1, dtype=torch.bool)):
        got = first_call(q, k, mask, 3, 4)["channels"]
        assert torch.equal(got, expected)


@pytest.mark.parametrize("keep", [1, 5, 8])
def test_ties_go_to_the_lower_channel(keep):
    scores = torch.tensor([[[1.0, 2, 2, 0, 2, 1, 1, 2]]])
    assert torch.equal(think.top_channels(scores, keep), channels_by_loops(scores, keep))
    assert think.top_channels(torch.zeros(1, 2, 8), keep).tolist() == [[list(range(keep))] * 2]


@pytest.mark.parametrize("keep", range(1, 9))
def test_top_channels_of_strange_scores(keep):
    inf, nan = math.inf, math.nan
    rows = [[1, inf, nan, 0, inf, nan, 2, 3], [nan] * 8, [inf] * 8, [0, 0, 1e-45, 0, 1e38, inf, 0, 0]]
    scores = torch.tensor(rows)[:, None]
    got = think.top_channels(scores, keep)
    assert got.dtype == think.CHANNEL
    assert torch.equal(got, channels_by_loops(scores, keep))


def test_top_channels_of_random_scores():
    for dim, keep in [(16, 16), (64, 1), (80, 40), (257, 128)]:
        scores = torch.rand(2, 3, dim).mul(20).round()  # many ties
        assert torch.equal(think.top_channels(scores, keep), channels_by_loops(scores, keep))


def test_padding_with_nan_counts_for_nothing():
    q, k = torch.randn(1, 2, 6, 8), torch.randn(1, 1, 6, 8)
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    mask[..., :2] = False
    expected = first_call(q, k, mask, 3, 9)["channels"]
    q[:, :, :2], k[:, :, :2] = math.nan, math.inf
    got = first_call(q, k, mask, 3, 9)["channels"]
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_are_wide(dtype):
    """Large activations must not overflow to inf in a half type, nor sums lose small ones."""
    q, k = torch.randn(1, 2, 40, 8).mul(300).to(dtype), torch.randn(1, 1, 40, 8).mul(300).to(dtype)
    score = think.score_channels(q, k, 32)
    assert score.dtype == torch.float32
    exact = chosen_by_loops(q, k, 32, causal(1, 40, 40))
    torch.testing.assert_close(score.double(), exact, rtol=1e-5, atol=0)


def test_scores_in_float64_stay_float64():
    q, k = torch.randn(1, 2, 5, 8).double(), torch.randn(1, 1, 5, 8).double()
    torch.testing.assert_close(think.score_channels(q, k, 3), chosen_by_loops(q, k, 3, causal(1, 5, 5)))
