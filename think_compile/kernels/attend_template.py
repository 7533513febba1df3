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
    within,
    within_tile,
)


def walk(
    m, total, ACC, QUERIES, KEYS, VALUES, low, high, k_shift, v_shift, ring_rows, MASK, mask_row, query, first, sm_s,
    scale, capacity, ROLLING: tl.constexpr, IN_K_RING: tl.constexpr, IN_V_RING: tl.constexpr, HIDDEN: tl.constexpr,
    hidden_from, K_SIZES: tl.constexpr, V_SIZES: tl.constexpr,
    KIND: tl.constexpr, CAUSAL: tl.constexpr, ALIKE: tl.constexpr, GROUP_N: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr = None, PARTS: tl.constexpr = 1,
):  # fmt: skip
    """Attend to positions [low, high); keys and values are in rows position - shift, or in a ring.

    ``ROLLING``: position p is in row p % capacity. ``HIDDEN`` positions from ``hidden_from`` on do not count. Tiles
    begin at multiples of ``GROUP_N``. ``STAGES``: of the loop, None for the launch's.
    ``PARTS``: see :func:`attend_share`.
    """
    begin = low // GROUP_N * GROUP_N if GROUP_N > 1 else low
    position = begin + tl.arange(0, BLOCK_N)
    FLAT: tl.constexpr = GROUP_N > 1 and ALIKE and not CAUSAL  # what a mask adds is worked out once for all rows
    if FLAT:
        value = flat_masked(MASK, mask_row, position - first, within(position, low, high, GROUP_N), sm_s, KIND)
    else:
        value = masked(MASK, mask_row, position - first, within(position, low, high, GROUP_N), sm_s, KIND, ALIKE)
    for at in tl.range(begin, high, BLOCK_N, num_stages=STAGES):
        position = at + tl.arange(0, BLOCK_N)
        ok, later = within(position, low, high, GROUP_N), position + BLOCK_N
        k_row = position % ring_rows if IN_K_RING else position % capacity if ROLLING else position - k_shift
        v_row = position % ring_rows if IN_V_RING else position % capacity if ROLLING else position - v_shift
        s = scores(QUERIES, KEYS, at, k_row, ok, scale, K_SIZES)
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
        new = tl.maximum(m, tl.max(s, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(s - safe[:, None])
        shrink = tl.exp2(m - safe)
        ACC = mix(ACC, shrink, p, VALUES, at, v_row, ok, V_SIZES)
        m, total = new, total * shrink + tl.sum(p, 1)
    return m, total, ACC


def encoded_share(
    QUERIES, KEYS, VALUES, MASK, mask_row, query, real, first, window_start, end, extent, split, splits, ring_rows,
    sm_s, scale, capacity, first_token, K_SIZES: tl.constexpr, V_SIZES: tl.constexpr, SINKS: tl.constexpr,
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
    after, last = part_of(end, extent, split, splits, CHUNK)
    value = masked(MASK, mask_row, after + chunk - first, after + chunk < last, sm_s, AFTER, ALIKE)
    m, total, ACC = walk_encoded(
        m, total, ACC, QUERIES, KEYS, VALUES, low, high, 0, 0, ring_rows, MASK, mask_row, query, first, sm_s,
        scale, capacity, ROLLING, False, False, SINKS, first_token, K_SIZES, V_SIZES, KIND, CAUSAL, ALIKE, GROUP_N,
        BLOCK_N, None, PARTS,
    )  # fmt: skip
    if not CAUSAL:
        for at in range(after, last, CHUNK):
            if counts_some(value, m, real, at + chunk < last, KIND, ALIKE, HALF_MASK):
                m, total, ACC = walk_encoded(
                    m, total, ACC, QUERIES, KEYS, VALUES, at, tl.minimum(at + CHUNK, last), 0, 0, ring_rows, MASK,
                    mask_row, query, first, sm_s, scale, capacity, ROLLING, False, False, SINKS, first_token,
                    K_SIZES, V_SIZES, KIND, CAUSAL, ALIKE, GROUP_N, BLOCK_N, None, PARTS,
                )  # fmt: skip
            position = at + CHUNK + chunk
            value = masked(MASK, mask_row, position - first, position < last, sm_s, AFTER, ALIKE)
    return m, total, ACC


def whole_share(
    WHOLE, K_NEW, V_NEW, K_RING, V_RING, K_SINKS, V_SINKS, k_rows, v_rows, MASK, mask_row, query, first, window_start,
    start, end, split, whole_splits, bh, ring_rows, sm_s, scale, capacity, first_token, D_SIZES: tl.constexpr,
    DV_SIZES: tl.constexpr, SINKS: tl.constexpr, ROLLING: tl.constexpr, KIND: tl.constexpr, CAUSAL: tl.constexpr,
    ALIKE: tl.constexpr, GROUP_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr,
    HAS_K_RING: tl.constexpr, HAS_V_RING: tl.constexpr,
):  # fmt: skip
    """A share of the window and the call's own rows; the first share also has the sinks."""
    m, total = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    WHOLE_ACC = whole_zero(BLOCK_M, DV_SIZES)
    STAGES: tl.constexpr = None if GROUP_N == 1 else 2  # whole rows are large beside codes
    low, high = part_of(tl.maximum(first, window_start), end, split, whole_splits, BLOCK_W)
    m, total, WHOLE_ACC = walk_window(
        m, total, WHOLE_ACC, WHOLE, K_RING, V_RING, low, tl.minimum(high, start), 0, 0, ring_rows, MASK,
        mask_row, query, first, sm_s, scale, capacity, ROLLING, HAS_K_RING, HAS_V_RING, 0, 0, D_SIZES, DV_SIZES,
        KIND, CAUSAL, ALIKE, 1, BLOCK_W, STAGES,
    )  # fmt: skip
    m, total, WHOLE_ACC = walk_new(
        m, total, WHOLE_ACC, WHOLE, K_NEW, V_NEW, tl.maximum(low, start), high, start, start, ring_rows, MASK,
        mask_row, query, first, sm_s, scale, capacity, False, False, False, 0, 0, D_SIZES, DV_SIZES,
        KIND, CAUSAL, ALIKE, 1, BLOCK_W, STAGES,
    )  # fmt: skip
    if SINKS > 0:  # noqa: SIM102  the first is decided while compiling
        if split == 0:
            # a side without sinks has all rows whole, by position
            HAS_K_SINKS: tl.constexpr = K_SINKS is not None
            HAS_V_SINKS: tl.constexpr = V_SINKS is not None
            k_first = whole_locate(K_SINKS, bh, SINKS, D_SIZES) if HAS_K_SINKS else k_rows
            v_first = whole_locate(V_SINKS, bh, SINKS, DV_SIZES) if HAS_V_SINKS else v_rows
            k_shift = first_token if HAS_K_SINKS else 0
            v_shift = first_token if HAS_V_SINKS else 0
            m, total, WHOLE_ACC = walk_sinks(
                m, total, WHOLE_ACC, WHOLE, k_first, v_first, tl.maximum(first, first_token),
                tl.minimum(first_token + SINKS, tl.minimum(window_start, end)), k_shift, v_shift, ring_rows, MASK,
                mask_row, query, first, sm_s, scale, capacity, False, False, False, 0, 0, D_SIZES, DV_SIZES,
                KIND, CAUSAL, ALIKE, 1, BLOCK_W, STAGES,
            )  # fmt: skip
    return m, total, WHOLE_ACC


def attend_share(
    Q, K_NEW, V_NEW, KEYS, K_RING, K_SINKS, VALUES, V_RING, V_SINKS, FIRST_TOKEN, MASK, WINDOW_START, START,
    BEFORE, OUT, MOST, TOTAL,
    window_start, start, first, extent, scale, queries, heads, capacity, value_rows, ring_rows, splits, whole_splits,
    sm_b, sm_h, sm_n, sm_s,
    GROUP: tl.constexpr, D_SIZES: tl.constexpr, DV_SIZES: tl.constexpr, K_SIZES: tl.constexpr, V_SIZES: tl.constexpr,
    SINKS: tl.constexpr, ON_DEVICE: tl.constexpr, ROLLING: tl.constexpr, KIND: tl.constexpr, CAUSAL: tl.constexpr,
    ALIKE: tl.constexpr, HALF_MASK: tl.constexpr, GROUP_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One share of the positions of one KV head, for BLOCK_M of its rows (query head of the group, query).

    ``ROLLING``: ``first`` counts back from the start, and position p is in row p % capacity. ``GROUP_N``: tokens of a
    record. ``BLOCK_W``: positions with whole rows in a tile. ``PARTS``: parts of a record that stand below one another
    in a tile of encoded rows, so that few queries fill its rows.
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
    mask_row = bh // heads * sm_b
    if not ALIKE:
        mask_row += ((bh % heads) * GROUP + row // queries) * sm_h + query.to(tl.int64) * sm_n
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
            ring_rows, sm_s, scale, capacity, first_token, K_SIZES, V_SIZES, SINKS, ROLLING, KIND, CAUSAL, ALIKE,
            HALF_MASK, GROUP_N, BLOCK_M, BLOCK_N, PARTS,
        )  # fmt: skip
        if not VALUES_ARE_WHOLE:
            out = encoded * n_rows + tile_row
            values_finish(ACC, tl.where(total > 0, total, 1.0), OUT + out * DV_WIDTH, real, VALUES, V_SIZES)
            store_sums(MOST, TOTAL, out, m, total, real)
    else:  # whole keys
        WHOLE = whole_prepare(q_row, bh * n_rows + row, real, K_RING, D_SIZES)
        m, total, WHOLE_ACC = whole_share(
            WHOLE, K_NEW, V_NEW, K_RING, V_RING, K_SINKS, V_SINKS, KEY_ROWS, VALUE_ROWS, MASK, mask_row, query, first,
            window_start, start, end, split + whole_splits, whole_splits, bh, ring_rows, sm_s, scale, capacity,
            first_token, D_SIZES, DV_SIZES, SINKS, ROLLING, KIND, CAUSAL, ALIKE, GROUP_N, BLOCK_M, BLOCK_W,
            HAS_K_RING, HAS_V_RING,
        )  # fmt: skip
        if not VALUES_ARE_WHOLE:
            out = share * n_rows + row
            whole_finish(WHOLE_ACC, tl.where(total > 0, total, 1.0), OUT + out * DV_WIDTH, real, V_NEW, DV_SIZES)
            store_sums(MOST, TOTAL, out, m, total, real)

    if VALUES_ARE_WHOLE:  # both branches have the same accumulators
        out = share * n_rows + row
        values_finish(ACC, tl.where(total > 0, total, 1.0), OUT + out * DV_WIDTH, real, VALUES, V_SIZES)
        store_sums(MOST, TOTAL, out, m, total, real)
