"""The attention kernel of chosen channels and whole values, written by hand: the reference for the template's."""

import triton
import triton.language as tl


@triton.jit
def _columns(part0: tl.constexpr, part1: tl.constexpr):
    """Column numbers of a row that is read in two parts of a power of two each."""
    return tl.arange(0, part0), part0 + tl.arange(0, part1)


@triton.jit
def _queries(q_row, real, i0, i1, ok0, ok1):
    """The queries' columns ``i0`` and ``i1``, the two parts that :func:`_scores` multiplies."""
    q0 = tl.load(q_row + i0[None, :], mask=real[:, None] & ok0[None, :], other=0.0)
    return q0, tl.load(q_row + i1[None, :], mask=real[:, None] & ok1[None, :], other=0.0)


@triton.jit
def _scores(q0, q1, base, rows, ok, width: tl.constexpr, part0: tl.constexpr, part1: tl.constexpr):
    """Products [M, N] of queries with key rows ``rows`` of ``width`` columns at ``base``."""
    c0, c1 = _columns(part0, part1)
    at = base + rows.to(tl.int64)[:, None] * width
    k0 = tl.load(at + c0[None, :], mask=ok[:, None] & (c0 < width)[None, :], other=0.0)
    s = tl.dot(q0, tl.trans(k0), input_precision="ieee")
    if part0 < width:
        k1 = tl.load(at + c1[None, :], mask=ok[:, None] & (c1 < width)[None, :], other=0.0)
        s += tl.dot(q1, tl.trans(k1), input_precision="ieee")
    return s


@triton.jit
def _masked(MASK, mask_row, column, ok, sm_s, kind: tl.constexpr, alike: tl.constexpr):
    """The model's mask for some columns, [1, N] if ``alike``, else [M, N]; a row of zeros without a mask.

    ``alike``: all rows have the same mask, and ``mask_row`` is a number.
    """
    if kind == 0:
        value = tl.zeros([1, column.shape[0]], tl.int8)
    else:
        columns = column.to(tl.int64)[None, :] * sm_s
        at = MASK + mask_row + columns if alike else MASK + mask_row[:, None] + columns
        value = tl.load(at, mask=ok[None, :], other=0)
    return value


@triton.jit
def _hidden(s, value, column, query, ok, kind: tl.constexpr, causal: tl.constexpr):
    """Logits (base 2) after a mask's ``value``: none (0), bool (1), float that is added (2); -inf where not ``ok``."""
    shown = ok[None, :]
    if causal:
        shown = shown & (column[None, :] <= query[:, None])
    if kind == 1:
        shown = shown & (value != 0)
    if kind == 2:
        added = tl.maximum(value.to(tl.float32), -2e38) * 1.4426950408889634  # a minimum stays finite in base 2
        s += tl.where(value == float("-inf"), float("-inf"), added)
    return tl.where(shown, s, float("-inf"))


@triton.jit
def _absorb(
    m,
    total,
    o0,
    o1,
    s,
    base,
    rows,
    ok,
    width: tl.constexpr,
    part0: tl.constexpr,
    part1: tl.constexpr,
):
    """The online softmax after one more tile of logits ``s`` and value rows."""
    c0, c1 = _columns(part0, part1)
    new = tl.maximum(m, tl.max(s, 1))
    safe = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(s - safe[:, None])
    shrink = tl.exp2(m - safe)
    at = base + rows.to(tl.int64)[:, None] * width
    v0 = tl.load(at + c0[None, :], mask=ok[:, None] & (c0 < width)[None, :], other=0.0)
    o0 = o0 * shrink[:, None] + tl.dot(p.to(v0.dtype), v0, input_precision="ieee")
    if part0 < width:
        v1 = tl.load(at + c1[None, :], mask=ok[:, None] & (c1 < width)[None, :], other=0.0)
        o1 = o1 * shrink[:, None] + tl.dot(p.to(v1.dtype), v1, input_precision="ieee")
    return new, total * shrink + tl.sum(p, 1), o0, o1


@triton.jit
def _walk(
    m, total, o0, o1, q0, q1, keys, values, low, high, MASK, mask_row, query, first, sm_s, scale, capacity,
    ROLLING: tl.constexpr, WIDTH: tl.constexpr, PART0: tl.constexpr, PART1: tl.constexpr,
    DV: tl.constexpr, DV0: tl.constexpr, DV1: tl.constexpr,
    KIND: tl.constexpr, CAUSAL: tl.constexpr, ALIKE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Attend to the narrow keys of positions [low, high). ``ROLLING``: position p stands in row p % capacity."""
    position = low + tl.arange(0, BLOCK_N)
    value = _masked(MASK, mask_row, position - first, position < high, sm_s, KIND, ALIKE)
    for at in range(low, high, BLOCK_N):
        position = at + tl.arange(0, BLOCK_N)
        ok, behind = position < high, position + BLOCK_N
        row = position % capacity if ROLLING else position
        s = _scores(q0, q1, keys, row, ok, WIDTH, PART0, PART1)
        s = _hidden(s * scale, value, position - first, query, ok, KIND, CAUSAL)
        # read a tile ahead: too small for the pipeline that hides the wait for keys and values
        value = _masked(MASK, mask_row, behind - first, behind < high, sm_s, KIND, ALIKE)
        m, total, o0, o1 = _absorb(m, total, o0, o1, s, values, row, ok, DV, DV0, DV1)
    return m, total, o0, o1


@triton.jit
def _counts(value, m, real, ok, kind: tl.constexpr, alike: tl.constexpr, half: tl.constexpr):
    """Whether a mask's ``value`` shows an ``ok`` column to a ``real`` row; ``m``: the rows' largest logits.

    A key masked with the dtype's minimum, or half of it, counts only for a query whose keys are all masked.
    """
    hidden: tl.constexpr = -47252.0 if half else -1e30  # base 2, as the logits
    if alike:
        shown = tl.zeros([1, ok.shape[0]], tl.float32)
        most = shown + tl.min(m, 0)
    else:
        shown = tl.where(real[:, None], tl.zeros([real.shape[0], ok.shape[0]], tl.float32), float("-inf"))
        most = m[:, None]
    shown = _hidden(shown, value, 0, 0, ok, kind, False)
    counts = (shown > hidden) | ((shown > float("-inf")) & (most < hidden / 2))
    return tl.max(tl.max(counts.to(tl.int32), 1), 0) > 0


@triton.jit
def _part(low, high, i, parts, BLOCK_N: tl.constexpr):
    """Bounds of the ``i``-th of ``parts`` parts of [low, high), in whole tiles; their numbers differ by at most 1."""
    tiles = tl.cdiv(high - low, BLOCK_N)
    return low + tiles * i // parts * BLOCK_N, tl.minimum(low + tiles * (i + 1) // parts * BLOCK_N, high)


# A length that changes with each token must not make a new variant of the kernel each time.
@triton.jit(do_not_specialize=["floor", "start", "first", "extent", "splits", "whole_splits"])
def attend_share(
    Q, K_NEW, V_NEW, PRUNED, CHANNELS, RECENT, VALUES, MASK, FLOOR, START, OUT, MOST, TOTAL,
    floor, start, first, extent, scale, queries, heads, capacity, value_rows, ring_rows, splits, whole_splits,
    sm_b, sm_h, sm_g, sm_n, sm_s,
    GROUP: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    T: tl.constexpr, T0: tl.constexpr, T1: tl.constexpr, DV: tl.constexpr, DV0: tl.constexpr, DV1: tl.constexpr,
    ON_DEVICE: tl.constexpr, ROLLING: tl.constexpr, KIND: tl.constexpr, CAUSAL: tl.constexpr, ALIKE: tl.constexpr,
    HALF_MASK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One share of the positions of one KV head, for BLOCK_M of its rows (query head of the group, query).

    ``ROLLING``: ``first`` counts back from the start, and position p stands in row p % capacity.
    """
    scale = tl.cast(scale, tl.float32)  # a Python float arrives as float64 from Inductor
    bh, split = tl.program_id(0).to(tl.int64), tl.program_id(2) - whole_splits
    if ON_DEVICE:
        start = tl.load(START)
        floor = tl.minimum(tl.load(FLOOR), start)
    if ROLLING:
        first = start - first
        extent = start + queries
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n_rows = GROUP * queries
    real = row < n_rows
    query = row % queries
    q_row = Q + (bh * n_rows + row)[:, None] * D
    mask_row = bh // heads * sm_b + bh % heads * sm_h
    if not ALIKE:
        mask_row += row // queries * sm_g + query.to(tl.int64) * sm_n
        mask_row = tl.where(real, mask_row, 0)  # no tile is read past the mask's end
    pruned, values = PRUNED + bh * capacity * T, VALUES + bh * value_rows * DV
    ring, new = RECENT + bh * ring_rows * D, K_NEW + bh * queries * D
    new_values = V_NEW + bh * queries * DV

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    o0 = tl.zeros([BLOCK_M, DV0], tl.float32)
    o1 = tl.zeros([BLOCK_M, DV1], tl.float32)

    end = tl.minimum(start + queries, extent)
    out = (bh * (splits + whole_splits) + whole_splits + split) * n_rows + row
    if split >= 0:  # narrow keys, in equal shares, and the empty rows after the tokens
        CHUNK: tl.constexpr = 1024 if ALIKE else 128
        BEHIND: tl.constexpr = 0 if CAUSAL else KIND  # causal queries never see those rows
        chunk = tl.arange(0, CHUNK)
        c0, c1 = _columns(T0, T1)
        i0 = tl.load(CHANNELS + bh * T + c0, mask=c0 < T, other=0).to(tl.int32)
        i1 = tl.load(CHANNELS + bh * T + c1, mask=c1 < T, other=0).to(tl.int32)
        q0, q1 = _queries(q_row, real, i0, i1, c0 < T, c1 < T)
        low, high = _part(first, tl.minimum(floor, end), split, splits, BLOCK_N)
        # Of the empty rows only the mask is read, unless it shows some: loaded here, used after the tokens.
        behind, last = _part(end, extent, split, splits, CHUNK)
        value = _masked(MASK, mask_row, behind + chunk - first, behind + chunk < last, sm_s, BEHIND, ALIKE)
        m, total, o0, o1 = _walk(
            m, total, o0, o1, q0, q1, pruned, values, low, high, MASK, mask_row, query, first, sm_s,
            scale, capacity, ROLLING, T, T0, T1, DV, DV0, DV1, KIND, CAUSAL, ALIKE, BLOCK_N,
        )  # fmt: skip
        if not CAUSAL:
            for at in range(behind, last, CHUNK):
                if _counts(value, m, real, at + chunk < last, KIND, ALIKE, HALF_MASK):
                    m, total, o0, o1 = _walk(
                        m, total, o0, o1, q0, q1, pruned, values, at, tl.minimum(at + CHUNK, last), MASK,
                        mask_row, query, first, sm_s, scale, capacity, ROLLING, T, T0, T1, DV, DV0, DV1,
                        KIND, CAUSAL, ALIKE, BLOCK_N,
                    )  # fmt: skip
                position = at + CHUNK + chunk
                value = _masked(MASK, mask_row, position - first, position < last, sm_s, KIND, ALIKE)
    else:  # whole keys
        w0, w1 = _columns(D0, D1)
        whole0, whole1 = _queries(q_row, real, w0, w1, w0 < D, w1 < D)
        share = split + whole_splits
        low = tl.maximum(tl.maximum(first, floor), start - ring_rows)
        own, before = tl.maximum(low, start), tl.minimum(start, end)
        to_own = tl.cdiv(tl.maximum(before - low, 0), BLOCK_N)
        tiles = to_own + tl.cdiv(tl.maximum(end - own, 0), BLOCK_N)
        for tile in range(tiles * share // whole_splits, tiles * (share + 1) // whole_splits):
            in_window = tile < to_own
            at = tl.where(in_window, low + tile * BLOCK_N, own + (tile - to_own) * BLOCK_N)
            last = tl.where(in_window, before, end)
            k_row = tl.where(in_window, at % ring_rows, at - start)
            v_row = tl.where(in_window, at % capacity if ROLLING else at, at - start)
            position = at + tl.arange(0, BLOCK_N)
            ok = (position < last) & (position >= first)
            k_row, v_row = k_row + tl.arange(0, BLOCK_N), v_row + tl.arange(0, BLOCK_N)
            k_row = tl.where(in_window & (k_row >= ring_rows), k_row - ring_rows, k_row)
            if ROLLING:
                v_row = tl.where(in_window & (v_row >= capacity), v_row - capacity, v_row)
            value = _masked(MASK, mask_row, position - first, ok, sm_s, KIND, ALIKE)
            s = _scores(whole0, whole1, tl.where(in_window, ring, new), k_row, ok, D, D0, D1)
            s = _hidden(s * scale, value, position - first, query, ok, KIND, CAUSAL)
            rows = tl.where(in_window, values, new_values)
            m, total, o0, o1 = _absorb(m, total, o0, o1, s, rows, v_row, ok, DV, DV0, DV1)

    seen = total > 0
    total = tl.where(seen, total, 1.0)
    v0, v1 = _columns(DV0, DV1)
    tl.store(OUT + out[:, None] * DV + v0[None, :], o0 / total[:, None], mask=real[:, None] & (v0 < DV)[None, :])
    if DV0 < DV:
        tl.store(OUT + out[:, None] * DV + v1[None, :], o1 / total[:, None], mask=real[:, None] & (v1 < DV)[None, :])
    tl.store(MOST + out, m, mask=real)
    tl.store(TOTAL + out, tl.where(seen, total, 0.0), mask=real)
