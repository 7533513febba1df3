"""The reference kernels against loops in plain Python."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from think_compile.kernels import reference as ref
from think_compile.kernels.attend import attend

LOW = torch.finfo(torch.float32).min

# ------------------------------------------------------------------ scoring


def chosen_by_loops(q, k, observe, allowed):
    """(scores, valid keys) with `allowed` [B, N, S]: may the query attend to the key; float64 sums."""
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
    return torch.tensor(out).view(*scores.shape[:2], keep)


def causal(batch, n_new, length):
    return (torch.arange(length) <= torch.arange(length - n_new, length)[:, None]).expand(batch, -1, -1)


def padded(side, batch, n_new, length):
    """Causal, and padding that nobody attends to; its own rows are empty."""
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
def test_pack_keys(sizes, side, kind, observe):
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
    got = ref.pack_keys(
        q, k, mask, length, length - n_new, keep=keep, observe=observe, ring_rows=4, capacity=length + 3
    )
    channels = channels_by_loops(chosen_by_loops(q, k, observe, allowed), keep)
    assert torch.equal(got.channels, channels)
    narrow = k.gather(3, channels[:, :, None].expand(-1, -1, length, -1))
    assert torch.equal(got.pruned[:, :, :length], narrow)
    assert got.pruned.shape == (batch, heads, length + 3, keep)
    assert not got.pruned[:, :, length:].any()
    for position in range(max(0, length - 4), length):
        assert torch.equal(got.recent[:, :, position % 4], k[:, :, position])


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
    got = ref.pack_keys(q, k, mask, length, 0, keep=3, observe=4, ring_rows=2, capacity=length)
    assert torch.equal(got.channels, channels_by_loops(chosen_by_loops(q, k, 4, allowed), 3))


def test_mask_that_broadcasts_over_the_keys():
    """[.., N, 1] and [.., 1, 1] are legal masks of the stock attention."""
    q, k = torch.randn(1, 1, 6, 8), torch.randn(1, 1, 6, 8)
    expected = ref.pack_keys(q, k, None, 6, 0, keep=3, observe=4, ring_rows=2, capacity=6).channels
    for mask in (torch.zeros(1, 1, 6, 1), torch.ones(1, 1, 1, 1, dtype=torch.bool)):
        got = ref.pack_keys(q, k, mask, 6, 0, keep=3, observe=4, ring_rows=2, capacity=6).channels
        assert torch.equal(got, expected)


@pytest.mark.parametrize("keep", [1, 5, 8])
def test_ties_go_to_the_lower_channel(keep):
    scores = torch.tensor([[[1.0, 2, 2, 0, 2, 1, 1, 2]]])
    assert torch.equal(ref.top_channels(scores, keep), channels_by_loops(scores, keep))
    assert ref.top_channels(torch.zeros(1, 2, 8), keep).tolist() == [[list(range(keep))] * 2]


@pytest.mark.parametrize("keep", range(1, 9))
def test_top_channels_of_strange_scores(keep):
    inf, nan = math.inf, math.nan
    rows = [[1, inf, nan, 0, inf, nan, 2, 3], [nan] * 8, [inf] * 8, [0, 0, 1e-45, 0, 1e38, inf, 0, 0]]
    scores = torch.tensor(rows)[:, None]
    got = ref.top_channels(scores, keep)
    assert got.dtype == torch.int64
    assert torch.equal(got, channels_by_loops(scores, keep))


def test_top_channels_of_random_scores():
    for dim, keep in [(16, 16), (64, 1), (80, 40), (257, 128)]:
        scores = torch.rand(2, 3, dim).mul(20).round()  # many ties
        assert torch.equal(ref.top_channels(scores, keep), channels_by_loops(scores, keep))


def test_padding_with_nan_counts_for_nothing():
    q, k = torch.randn(1, 2, 6, 8), torch.randn(1, 1, 6, 8)
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    mask[..., :2] = False
    expected = ref.pack_keys(q, k, mask, 6, 0, keep=3, observe=9, ring_rows=2, capacity=6).channels
    q[:, :, :2], k[:, :, :2] = math.nan, math.inf
    got = ref.pack_keys(q, k, mask, 6, 0, keep=3, observe=9, ring_rows=2, capacity=6).channels
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_are_wide(dtype):
    """Large activations must not overflow to inf in a half type, nor sums lose small ones."""
    q, k = torch.randn(1, 2, 40, 8).mul(300).to(dtype), torch.randn(1, 1, 40, 8).mul(300).to(dtype)
    score = ref.score_channels(q, k, 32)
    assert score.dtype == torch.float32
    exact = chosen_by_loops(q, k, 32, causal(1, 40, 40))
    torch.testing.assert_close(score.double(), exact, rtol=1e-5, atol=0)


def test_scores_in_float64_stay_float64():
    q, k = torch.randn(1, 2, 5, 8).double(), torch.randn(1, 1, 5, 8).double()
    torch.testing.assert_close(ref.score_channels(q, k, 3), chosen_by_loops(q, k, 3, causal(1, 5, 5)))


# ------------------------------------------------------------------ the ring


def positions_by_loops(length, rows):
    """The latest position in each row, None where there is none."""
    held = [None] * rows
    for position in range(length):
        held[position % rows] = position
    return held


def test_ring_positions():
    for length, rows in itertools.product(range(0, 40), range(1, 12)):
        for given in (length, torch.tensor(length)):
            got = ref.ring_positions(given, rows, torch.get_default_device()).tolist()
            expected = positions_by_loops(length, rows)
            assert [None if p < 0 else p for p in got] == expected, (length, rows)


@pytest.mark.parametrize("rows", [1, 2, 5, 8])
def test_advance_ring(rows):
    k = torch.randn(1, 1, 60, 2)
    ring, length = ref.ring_of(k, 3, rows), 3
    for n_new in [1, 1, 4, 1, 9, 8, 7, 1, 16, 1]:
        for start in (length, torch.tensor(length)):
            after = ref.advance_ring(ring, k[:, :, length : length + n_new], start)
        ring, length = after, length + n_new
        for row, position in enumerate(positions_by_loops(length, rows)):
            if position is not None and position >= length - rows:
                assert torch.equal(ring[:, :, row], k[:, :, position])


def test_advance_ring_makes_a_new_tensor():
    ring = torch.randn(1, 1, 3, 2)
    before = ring.clone()
    after = ref.advance_ring(ring, torch.randn(1, 1, 1, 2), 7)
    assert torch.equal(ring, before)
    assert after.data_ptr() != ring.data_ptr()


# ------------------------------------------------------------------ attention over packed keys


def state(batch, heads, length, dim, keep, recent, floor=None, capacity=None, dtype=torch.float64):
    """(packed, zero-filled dense keys, values) for ``length`` past tokens, rows above poisoned."""
    capacity = length + 25 if capacity is None else capacity
    k, v = torch.randn(batch, heads, length, dim).to(dtype), torch.randn(batch, heads, capacity, dim).to(dtype)
    channels = torch.stack([torch.randperm(dim)[:keep].sort().values for _ in range(batch * heads)])
    channels = channels.view(batch, heads, keep)
    floor = max(0, length - recent) if floor is None else floor
    pruned = F.pad(ref.narrow_rows(k, channels), (0, 0, 0, capacity - length))
    stays = torch.zeros(batch, heads, dim, dtype=torch.bool).scatter_(-1, channels, True)
    dense = k.clone()
    dense[:, :, :floor] = k[:, :, :floor].masked_fill(~stays[:, :, None], 0)
    return ref.Packed(pruned, channels, ref.ring_of(k, length, recent + 1)), dense, v, floor


CASES = [  # B Hq H N D T W S floor
    (1, 1, 1, 1, 8, 4, 3, 9, None),
    (2, 4, 2, 1, 8, 8, 3, 9, None),
    (2, 7, 1, 3, 16, 1, 4, 12, None),
    (3, 2, 2, 16, 8, 5, 0, 6, None),
    (1, 14, 2, 17, 8, 3, 2, 5, None),
    (2, 4, 2, 20, 8, 4, 32, 7, None),
    (1, 2, 1, 2, 8, 4, 4, 10, 10),
    (1, 2, 1, 2, 8, 4, 4, 10, 8),
    (2, 2, 1, 5, 8, 4, 4, 2, None),
    (1, 4, 4, 1, 6, 2, 1, 1, None),
]


def masks(batch, q_heads, n_new, start, extent):
    causal_mask = torch.arange(extent) <= torch.arange(start, start + n_new)[:, None]
    holes = causal_mask & (torch.rand(batch, 1, n_new, extent) > 0.3)
    holes[..., -1, :] = False  # a row that attends to nothing
    return {
        "bool": causal_mask,
        "holes": holes,
        "float": torch.where(causal_mask, torch.randn(batch, q_heads, n_new, extent).double(), -math.inf),
        "lowest": torch.zeros(holes.shape).double().masked_fill(~holes, torch.finfo(torch.float64).min),
        "bias": torch.randn(1, q_heads, 1, extent).double(),
        "none": None,
    }


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("kind", ["bool", "holes", "float", "lowest", "bias", "none", "is_causal"])
@pytest.mark.parametrize("tensors", [False, True], ids=["ints", "tensors"])
def test_attention(case, kind, tensors):
    batch, q_heads, heads, n_new, dim, keep, recent, start, floor = case
    packed, dense, values, floor = state(batch, heads, start, dim, keep, recent, floor)
    q = torch.randn(batch, q_heads, n_new, dim).double()
    k_new = torch.randn(batch, heads, n_new, dim).double()
    ref.append_rows(packed.pruned, ref.narrow_rows(k_new, packed.channels), start)
    extents = [start + n_new] if kind == "none" else [start + n_new, start + n_new + 3]
    for extent in extents:
        keys = torch.cat([dense, k_new, torch.zeros(batch, heads, extent - start - n_new, dim)], 2)
        mask = masks(batch, q_heads, n_new, start, extent).get(kind)
        is_causal = kind == "is_causal"
        group = q_heads // heads
        expected = F.scaled_dot_product_attention(
            q,
            keys.repeat_interleave(group, 1),
            values[:, :, :extent].repeat_interleave(group, 1),
            mask,
            is_causal=is_causal,
            scale=0.3,
        )
        numbers = (torch.tensor(start), torch.tensor(floor)) if tensors else (start, floor)
        for way in (ref.pruned_attention, ref.dense_attention, attend):
            got = way(q, k_new, packed, values, *numbers, extent, mask, 0.3, is_causal)
            torch.testing.assert_close(got, expected, msg=lambda m: f"{way.__name__}, {extent}: {m}")  # noqa: B023


@pytest.mark.parametrize("way", [ref.pruned_attention, ref.dense_attention], ids=["narrow", "dense"])
def test_poison_in_unused_rows_stays_there(way):
    """Rows of a fixed cache above the tokens may hold anything finite; ring rows below the floor anything at all."""
    packed, dense, values, floor = state(1, 1, 9, 8, 4, 3, floor=9)
    packed.recent.fill_(math.nan)
    k_new, q = torch.randn(1, 1, 1, 8).double(), torch.randn(1, 2, 1, 8).double()
    ref.append_rows(packed.pruned, ref.narrow_rows(k_new, packed.channels), 9)
    expected = F.scaled_dot_product_attention(
        q, torch.cat([dense, k_new], 2), values[:, :, :10], scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(way(q, k_new, packed, values, 9, floor, 10, None, 0.3, False), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("n_new", [1, 20])
def test_attention_dtypes(dtype, n_new):
    packed, dense, values, floor = state(2, 2, 9, 16, 8, 3, dtype=dtype)
    q, k_new = torch.randn(2, 4, n_new, 16).to(dtype), torch.randn(2, 2, n_new, 16).to(dtype)
    ref.append_rows(packed.pruned, ref.narrow_rows(k_new, packed.channels), 9)
    got = attend(q, k_new, packed, values, 9, floor, 9 + n_new, None, 0.25, False)
    assert got.dtype == dtype
    keys = torch.cat([dense, k_new], 2).double().repeat_interleave(2, 1)
    values = values[:, :, : 9 + n_new].double().repeat_interleave(2, 1)
    expected = F.scaled_dot_product_attention(q.double(), keys, values, scale=0.25)
    torch.testing.assert_close(got.double(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("recent", [0, 2, 5, 40])
def test_dense_keys(recent):
    packed, dense, _, floor = state(2, 3, 11, 8, 3, recent)
    for extent in (11, 14):
        expected = F.pad(dense, (0, 0, 0, extent - 11))
        assert torch.equal(ref.dense_keys(packed, floor, 11, extent), expected)
        numbers = torch.tensor(floor), torch.tensor(11)
        assert torch.equal(ref.dense_keys(packed, *numbers, extent), expected)


def test_append_rows_writes_only_its_rows():
    buffer = torch.zeros(2, 2, 9, 4)
    rows = torch.randn(2, 2, 3, 4)
    for start in (4, torch.tensor(4)):
        ref.append_rows(buffer, rows, start)
        assert torch.equal(buffer[:, :, 4:7], rows)
        assert buffer.count_nonzero() == rows.count_nonzero()


@pytest.mark.host
def test_append_rows_past_the_end_raises():
    with pytest.raises(IndexError):
        ref.append_rows(torch.zeros(2, 2, 9, 4), torch.randn(2, 2, 3, 4), 7)
