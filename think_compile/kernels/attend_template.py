"""The template of the attention kernel of later calls: split-KV over encoded rows, the ring, and the call's own rows.

Each program attends to a share of the positions with an online softmax: encoded rows below the window, or the ring and
the new rows. A second kernel (:mod:`.merge`) merges the shares. Lengths are numbers (growing caches), or read from
device memory (caches of fixed size), so that one captured graph serves all steps. The result equals
:func:`think_compile.formats.attention.narrow`; letters as in :mod:`think_compile.cache.state`.

:mod:`.specialise` replaces these names in capitals: KEYS and VALUES, the tensors of each side; QUERIES and WHOLE, the
prepared queries for encoded and for whole keys; ACC and WHOLE_ACC, the accumulators; KEY_ROWS and VALUE_ROWS, the first
tensor of each side; K_SIZES, V_SIZES, D_SIZES and DV_SIZES, the sizes of encoded and of whole keys and values.
"""

# ruff: noqa: F821  specialise fills in the names of a template
# mypy: ignore-errors

import triton.language as tl

from think_compile.kernels.masks import (
    added_by_part,
    counts_some,
    flat_adds,
    flat_hidden,
    flat_masked,
    hidden,
    masked,
    part_of,
    store_sums,
    weighed,
    within,
    within_tile,
    wrapped,
)


def walk(
    m, total, ACC, QUERIES, KEYS, VALUES, low, high, MASK, mask_row, query, first, sm_s, scale, capacity,
    ROLLING: tl.constexpr, HIDDEN: tl.constexpr, hidden_from, K_SIZES: tl.constexpr, V_SIZES: tl.constexpr,
    KIND: tl.constexpr, CAUSAL: tl.constexpr, ALIKE: tl.constexpr, GROUP_N: tl.constexpr, BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Attend to the encoded rows of positions [low, high).

    ``ROLLING``: position p is in row p % capacity. ``HIDDEN`` positions from ``hidden_from`` on do not count. Tiles
    begin at multiples of ``GROUP_N``. ``PARTS``: see :func:`attend_share`.
    """
    begin = low // GROUP_N * GROUP_N if GROUP_N > 1 else low
    position = begin + tl.arange(0, BLOCK_N)
    FLAT: tl.constexpr = GROUP_N > 1 and ALIKE and not CAUSAL  # what a mask adds is worked out once for all rows
    if FLAT:
        value = flat_masked(MASK, mask_row, position - first, within(position, low, high, GROUP_N), sm_s, KIND)
    else:
        value = masked(MASK, mask_row, position - first, within(position, low, high, GROUP_N), sm_s, KIND, ALIKE)
    for at in tl.range(begin, high, BLOCK_N):
        position = at + tl.arange(0, BLOCK_N)
        ok, later = within(position, low, high, GROUP_N), position + BLOCK_N
        row = position % capacity if ROLLING else position
        s = scores(QUERIES, KEYS, at, high, row, ok, scale, K_SIZES)
        # the mask is read a tile ahead: it is too small for the pipeline that hides the latency of keys and values
        if FLAT:
            shown = within_tile(at, low, high, hidden_from, HIDDEN, BLOCK_N)
            if flat_adds(value, shown, KIND):  # a few tiles: at an end, at the sinks, in the padding
                s = added_by_part(s, flat_hidden(value, shown, KIND), PARTS)
            value = flat_masked(MASK, mask_row, later - first, later < high, sm_s, KIND)
        else:
            if HIDDEN > 0:
                ok = ok & ((position < hidden_from) | (position >= hidden_from + HIDDEN))
            s = hidden(s, value, position - first, query, ok, KIND, CAUSAL)
            value = masked(MASK, mask_row, later - first, later < high, sm_s, KIND, ALIKE)
        m, p, shrink = weighed(m, s)
        ACC = mix(ACC, shrink, p, VALUES, at, high, row, ok, V_SIZES)
        total = total * shrink + tl.sum(p, 1)
    return m, total, ACC


def encoded_share(
    QUERIES, KEYS, VALUES, MASK, mask_row, query, real, first, window_start, end, extent, split, splits, sm_s, scale,
    capacity, room, first_token, K_SIZES: tl.constexpr, V_SIZES: tl.constexpr, SINKS: tl.constexpr,
    ROLLING: tl.constexpr, KIND: tl.constexpr, CAUSAL: tl.constexpr, ALIKE: tl.constexpr, HALF_MASK: tl.constexpr,
    GROUP_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """A share of the encoded rows, and of the empty rows after the tokens."""
    m, total = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    ACC = values_zero(BLOCK_M, V_SIZES)
    CHUNK: tl.constexpr = 1024 if ALIKE and GROUP_N == 1 else 128
    AFTER: tl.constexpr = 0 if CAUSAL else KIND  # causal queries never see those rows
    chunk = tl.arange(0, CHUNK)
    low, high = part_of(first, tl.minimum(window_start, end), split, splits, BLOCK_N)
    # For rows after the tokens, only the mask is read, unless it shows any. Loaded here, tested below.
    if GROUP_N > 1:
        extent = tl.maximum(end, tl.minimum(extent, room))  # the last rows are never encoded
    after, last = part_of(end, extent, split, splits, CHUNK)
    value = masked(MASK, mask_row, after + chunk - first, after + chunk < last, sm_s, AFTER, ALIKE)
    m, total, ACC = walk_encoded(
        m, total, ACC, QUERIES, KEYS, VALUES, low, high, MASK, mask_row, query, first, sm_s, scale, capacity,
        ROLLING, SINKS, first_token, K_SIZES, V_SIZES, KIND, CAUSAL, ALIKE, GROUP_N, BLOCK_N, PARTS,
    )  # fmt: skip
    if not CAUSAL:
        for at in range(after, last, CHUNK):
            if counts_some(value, m, real, at + chunk < last, KIND, ALIKE, HALF_MASK):
                m, total, ACC = walk_encoded(
                    m, total, ACC, QUERIES, KEYS, VALUES, at, tl.minimum(at + CHUNK, last), MASK, mask_row, query,
                    first, sm_s, scale, capacity, ROLLING, SINKS, first_token, K_SIZES, V_SIZES, KIND, CAUSAL, ALIKE,
                    GROUP_N, BLOCK_N, PARTS,
                )  # fmt: skip
            position = at + CHUNK + chunk
            value = masked(MASK, mask_row, position - first, position < last, sm_s, AFTER, ALIKE)
    return m, total, ACC


def whole_share(
    WHOLE, K_NEW, V_NEW, K_RING, V_RING, K_FIRST, V_FIRST, MASK, mask_row, query, first, window_start,
    start, end, split, whole_splits, ring_rows, sm_s, scale, capacity, first_token, D_SIZES: tl.constexpr,
    DV_SIZES: tl.constexpr, SINKS: tl.constexpr, ROLLING: tl.constexpr, KIND: tl.constexpr, CAUSAL: tl.constexpr,
    ALIKE: tl.constexpr, GROUP_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr,
    IN_K_RING: tl.constexpr, IN_V_RING: tl.constexpr, K_HAS_SINKS: tl.constexpr, V_HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """A share of the tiles of whole rows: of the window, of the call's own rows, and of the sinks.

    One loop reads them all: a step of few sequences waits for instructions, and a loop for each has more.
    ``IN_K_RING``: whether the window is in a ring, or in rows by position; ``K_HAS_SINKS``: whether ``K_FIRST`` has the
    sinks alone.
    """
    m, total = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    WHOLE_ACC = whole_zero(BLOCK_M, DV_SIZES)
    STAGES: tl.constexpr = None if GROUP_N == 1 else 1
    low = tl.maximum(first, window_start)
    if IN_K_RING or IN_V_RING:  # in a full cache, which the runtime reports, the window's start may lag behind
        low = tl.maximum(low, start - ring_rows)
    own = tl.maximum(low, start)
    before = tl.minimum(start, end)  # the end of the window
    to_own = tl.cdiv(tl.maximum(before - low, 0), BLOCK_W)
    to_sinks = to_own + tl.cdiv(tl.maximum(end - own, 0), BLOCK_W)
    tiles = to_sinks + (SINKS + BLOCK_W - 1) // BLOCK_W
    for tile in tl.range(tiles * split // whole_splits, tiles * (split + 1) // whole_splits, num_stages=STAGES):
        in_window, is_own = tile < to_own, tile < to_sinks
        at = tl.where(in_window, low + tile * BLOCK_W, own + (tile - to_own) * BLOCK_W)
        last = tl.where(in_window, before, end)
        row = at % capacity if ROLLING else at
        k_row = tl.where(in_window, at % ring_rows if IN_K_RING else row, at - start)
        v_row = tl.where(in_window, at % ring_rows if IN_V_RING else row, at - start)
        k_rows, v_rows = tl.where(in_window, K_RING, K_NEW), tl.where(in_window, V_RING, V_NEW)
        if SINKS > 0:
            sink = (tile - to_sinks) * BLOCK_W
            at = tl.where(is_own, at, first_token + sink)
            last = tl.where(is_own, last, tl.minimum(first_token + SINKS, tl.minimum(window_start, end)))
            k_row = tl.where(is_own, k_row, sink if K_HAS_SINKS else at)
            v_row = tl.where(is_own, v_row, sink if V_HAS_SINKS else at)
            k_rows, v_rows = tl.where(is_own, k_rows, K_FIRST), tl.where(is_own, v_rows, V_FIRST)
        position = at + tl.arange(0, BLOCK_W)
        ok = (position < last) & (position >= first)
        k_row, v_row = k_row + tl.arange(0, BLOCK_W), v_row + tl.arange(0, BLOCK_W)
        if IN_K_RING or ROLLING:
            k_row = wrapped(k_row, ring_rows if IN_K_RING else capacity, in_window)
        if IN_V_RING or ROLLING:
            v_row = wrapped(v_row, ring_rows if IN_V_RING else capacity, in_window)
        value = masked(MASK, mask_row, position - first, ok, sm_s, KIND, ALIKE)
        s = whole_scores(WHOLE, k_rows, at, last, k_row, ok, scale, D_SIZES)
        s = hidden(s, value, position - first, query, ok, KIND, CAUSAL)
        m, p, shrink = weighed(m, s)
        WHOLE_ACC = whole_mix(WHOLE_ACC, shrink, p, v_rows, at, last, v_row, ok, DV_SIZES)
        total = total * shrink + tl.sum(p, 1)
    return m, total, WHOLE_ACC


def attend_share(
    Q, K_NEW, V_NEW, KEYS, K_RING, K_SINKS, VALUES, V_RING, V_SINKS, FIRST_TOKEN, MASK, WINDOW_START, START,
    BEFORE, OUT, MOST, TOTAL,
    window_start, start, first, extent, scale, queries, heads, capacity, value_rows, room, ring_rows, splits,
    whole_splits,
    sm_b, sm_h, sm_g, sm_n, sm_s,
    GROUP: tl.constexpr, D_SIZES: tl.constexpr, DV_SIZES: tl.constexpr, K_SIZES: tl.constexpr, V_SIZES: tl.constexpr,
    SINKS: tl.constexpr, ON_DEVICE: tl.constexpr, ROLLING: tl.constexpr, KIND: tl.constexpr, CAUSAL: tl.constexpr,
    ALIKE: tl.constexpr, HALF_MASK: tl.constexpr, GROUP_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One share of the positions of one KV head, for BLOCK_M of its rows (query head of the group, query).

    ``ROLLING``: ``first`` counts back from the start, and position p is in row p % capacity. ``GROUP_N``: tokens of a
    record. ``BLOCK_W``: positions with whole rows in a tile. ``PARTS``: parts of a record that stand below one another
    in a tile of encoded rows, so that few queries fill its rows. ``room``: positions that both sides have records for.
    """
    scale = tl.cast(scale, tl.float32)  # a Python float arrives as float64 from Inductor
    bh, split = tl.program_id(0).to(tl.int64), tl.program_id(2) - whole_splits  # whole rows first: they take longest
    if ON_DEVICE:
        start = tl.load(START)
        window_start = tl.load(WINDOW_START)
        if BEFORE is not None:
            tl.store(BEFORE, window_start, mask=(bh == 0) & (tl.program_id(1) + tl.program_id(2) == 0))
        window_start = tl.minimum(window_start, start)
        if GROUP_N > 1:  # positions in 32 bits
            start, window_start = start.to(tl.int32), window_start.to(tl.int32)
    if ROLLING:
        first = start - first
        extent = start + queries
    first_token = 0
    if SINKS > 0:
        first_token = tl.load(FIRST_TOKEN + bh // heads).to(start.dtype)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n_rows = GROUP * queries
    real = row < n_rows
    query = row % queries
    q_row = Q + (bh * n_rows + row)[:, None] * D_WIDTH
    mask_row = bh // heads * sm_b + bh % heads * sm_h
    if not ALIKE:
        mask_row += row // queries * sm_g + query.to(tl.int64) * sm_n
        mask_row = tl.where(real, mask_row, 0)  # no read beyond the mask's end
    KEYS = keys_locate(KEYS, bh, capacity, K_SIZES)
    VALUES = values_locate(VALUES, bh, value_rows, V_SIZES)
    K_NEW = whole_locate(K_NEW, bh, queries, D_SIZES)
    V_NEW = whole_locate(V_NEW, bh, queries, DV_SIZES)
    HAS_K_RING: tl.constexpr = K_RING is not None
    HAS_V_RING: tl.constexpr = V_RING is not None
    K_RING = whole_locate(K_RING, bh, ring_rows, D_SIZES) if HAS_K_RING else KEY_ROWS
    V_RING = whole_locate(V_RING, bh, ring_rows, DV_SIZES) if HAS_V_RING else VALUE_ROWS

    end = tl.minimum(start + queries, extent)
    share = bh * (PARTS * splits + whole_splits) + whole_splits + split
    if split >= 0:  # encoded rows, in equal shares
        tile_row, encoded = row, share
        if PARTS > 1:  # rows are (part, row): there is one tile of them
            tile_row, encoded = row % (BLOCK_M // PARTS), share + split * (PARTS - 1) + row // (BLOCK_M // PARTS)
        real = tile_row < n_rows
        q_row = Q + (bh * n_rows + tile_row)[:, None] * D_WIDTH
        QUERIES = keys_prepare(q_row, bh * n_rows + tile_row, real, KEYS, K_SIZES)
        m, total, ACC = encoded_share(
            QUERIES, KEYS, VALUES, MASK, mask_row, query, real, first, window_start, end, extent, split, splits,
            sm_s, scale, capacity, room, first_token, K_SIZES, V_SIZES, SINKS, ROLLING, KIND, CAUSAL, ALIKE, HALF_MASK,
            GROUP_N, BLOCK_M, BLOCK_N, PARTS,
        )  # fmt: skip
        if not VALUES_ARE_WHOLE:
            out = encoded * n_rows + tile_row
            values_finish(ACC, tl.where(total > 0, total, 1.0), OUT + out * DV_WIDTH, real, VALUES, V_SIZES)
            store_sums(MOST, TOTAL, out, m, total, real)
    else:  # whole keys
        WHOLE = whole_prepare(q_row, bh * n_rows + row, real, K_RING, D_SIZES)
        # a side without sinks has all rows whole, by position
        HAS_K_SINKS: tl.constexpr = K_SINKS is not None
        HAS_V_SINKS: tl.constexpr = V_SINKS is not None
        K_FIRST = whole_locate(K_SINKS, bh, SINKS, D_SIZES) if HAS_K_SINKS else KEY_ROWS
        V_FIRST = whole_locate(V_SINKS, bh, SINKS, DV_SIZES) if HAS_V_SINKS else VALUE_ROWS
        m, total, WHOLE_ACC = whole_share(
            WHOLE, K_NEW, V_NEW, K_RING, V_RING, K_FIRST, V_FIRST, MASK, mask_row, query, first, window_start, start,
            end, split + whole_splits, whole_splits, ring_rows, sm_s, scale, capacity, first_token, D_SIZES,
            DV_SIZES, SINKS, ROLLING, KIND, CAUSAL, ALIKE, GROUP_N, BLOCK_M, BLOCK_W, HAS_K_RING, HAS_V_RING,
            HAS_K_SINKS, HAS_V_SINKS,
        )  # fmt: skip
        if not VALUES_ARE_WHOLE:
            out = share * n_rows + row
            whole_finish(WHOLE_ACC, tl.where(total > 0, total, 1.0), OUT + out * DV_WIDTH, real, V_NEW, DV_SIZES)
            store_sums(MOST, TOTAL, out, m, total, real)

    if VALUES_ARE_WHOLE:  # both branches have the same accumulators
        out = share * n_rows + row
        values_finish(ACC, tl.where(total > 0, total, 1.0), OUT + out * DV_WIDTH, real, VALUES, V_SIZES)
        store_sums(MOST, TOTAL, out, m, total, real)
