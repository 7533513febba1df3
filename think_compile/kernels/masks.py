"""Device functions shared by all attention kernels: masks, the bounds of a share, its sums."""

import triton
import triton.language as tl


@triton.jit
def masked(MASK, mask_row, column, ok, sm_s, kind: tl.constexpr, alike: tl.constexpr):
    """The model's mask at some columns, [1, N] if ``alike``, else [M, N]; a row of zeros without a mask.

    ``alike``: all rows share the mask, and ``mask_row`` is a number.
    """
    if kind == 0:
        value = tl.zeros([1, column.shape[0]], tl.int8)
    else:
        columns = column.to(tl.int64)[None, :] * sm_s
        at = MASK + mask_row + columns if alike else MASK + mask_row[:, None] + columns
        value = tl.load(at, mask=ok[None, :], other=0)
    return value


@triton.jit
def hidden(s, value, column, query, ok, kind: tl.constexpr, causal: tl.constexpr):
    """Logits (base 2) after a mask's ``value``: none (0), bool (1), added float (2); -inf where not ``ok``."""
    shown = ok[None, :]
    if causal:
        shown = shown & (column[None, :] <= query[:, None])
    if kind == 1:
        shown = shown & (value != 0)
    if kind == 2:
        added = tl.maximum(value.to(tl.float32), -2e38) * 1.4426950408889634  # keeps a dtype's minimum finite in base 2
        s += tl.where(value == float("-inf"), float("-inf"), added)
    return tl.where(shown, s, float("-inf"))


@triton.jit
def flat_masked(MASK, mask_row, column, ok, sm_s, kind: tl.constexpr):
    """The mask that all rows share, at some columns, [N]."""
    if kind == 0:
        value = tl.zeros([column.shape[0]], tl.int8)
    else:
        value = tl.load(MASK + mask_row + column.to(tl.int64) * sm_s, mask=ok, other=0)
    return value


@triton.jit
def flat_hidden(value, ok, kind: tl.constexpr):
    """What a mask's ``value`` [N] adds to logits (base 2); -inf where not ``ok``.

    A vector: the layout of a matrix [1, N] would become the logits', and put a row's numbers into all threads.
    """
    added = tl.zeros([value.shape[0]], tl.float32)
    if kind == 1:
        ok = ok & (value != 0)
    if kind == 2:
        added = tl.maximum(value.to(tl.float32), -2e38) * 1.4426950408889634
        ok = ok & (value != float("-inf"))
    return tl.where(ok, added, float("-inf"))


@triton.jit
def flat_adds(value, ok, kind: tl.constexpr):
    """Whether :func:`flat_hidden` adds anything."""
    if kind == 1:
        ok = ok & (value != 0)
    if kind == 2:
        ok = ok & (value == 0)
    return tl.min(ok.to(tl.int32), 0) == 0


@triton.jit
def by_part(x, parts: tl.constexpr, columns: tl.constexpr, rows: tl.constexpr):
    """``x`` [N] for each row of a tile whose rows are (part of N, query): [1, N], or [M, N / parts]."""
    if parts == 1:
        x = x[None, :]
    else:
        both = tl.broadcast_to(tl.reshape(x, (parts, 1, columns // parts)), (parts, rows // parts, columns // parts))
        x = tl.reshape(both, (rows, columns // parts))
    return x


@triton.jit
def added_by_part(s, x, parts: tl.constexpr):
    """``s`` plus ``x``, as :func:`by_part` has it, from vectors: so the layout of ``s`` stays."""
    if parts == 1:
        s += x[None, :]
    else:
        first, second = tl.split(tl.permute(tl.reshape(x, (2, x.shape[0] // 2)), (1, 0)))
        of_first = tl.arange(0, s.shape[0]) < s.shape[0] // 2
        s += tl.where(of_first[:, None], first[None, :], second[None, :])
    return s


@triton.jit
def counts_some(value, m, real, ok, kind: tl.constexpr, alike: tl.constexpr, half: tl.constexpr):
    """Whether a mask's ``value`` shows any ``ok`` column to a ``real`` row; ``m``: the rows' largest logits.

    A key masked with the dtype's minimum, or half of it, counts only for a query whose keys are all masked.
    """
    # base 2, like the logits: half of fp16's minimum is -47251.1; -1e30 hides a key in any wider type
    low: tl.constexpr = -47252.0 if half else -1e30
    if alike:
        shown = tl.zeros([1, ok.shape[0]], tl.float32)
        most = shown + tl.min(m, 0)
    else:
        shown = tl.where(real[:, None], tl.zeros([real.shape[0], ok.shape[0]], tl.float32), float("-inf"))
        most = m[:, None]
    shown = hidden(shown, value, 0, 0, ok, kind, False)
    counts = (shown > low) | ((shown > float("-inf")) & (most < low / 2))
    return tl.max(tl.max(counts.to(tl.int32), 1), 0) > 0


@triton.jit
def part_of(low, high, i, parts, BLOCK_N: tl.constexpr):
    """Bounds of the ``i``-th of ``parts`` parts of [low, high), in whole tiles; their numbers differ by at most 1."""
    tiles = tl.cdiv(high - low, BLOCK_N)
    return low + tiles * i // parts * BLOCK_N, tl.minimum(low + tiles * (i + 1) // parts * BLOCK_N, high)


@triton.jit
def wrapped(row, size, on):
    """Rows below ``2 * size``, in a ring of ``size`` rows where ``on``."""
    return tl.where(on & (row >= size), row - size, row)


@triton.jit
def weighed(m, s):
    """A step of an online softmax: the largest logit with ``s`` [M, N], the weights, and the factor of earlier ones."""
    new = tl.maximum(m, tl.max(s, 1))
    safe = tl.where(new == float("-inf"), 0.0, new)
    return new, tl.exp2(s - safe[:, None]), tl.exp2(m - safe)


@triton.jit
def within(position, low, high, group: tl.constexpr):
    """Whether positions are in [low, high); with groups, the first tile may begin below ``low``."""
    ok = position < high
    if group > 1:
        ok = ok & (position >= low)
    return ok


@triton.jit
def within_tile(at, low, high, hidden_from, HIDDEN: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which positions of the tile at ``at`` are in [low, high) and not among the hidden ones, in 32 bits."""
    column = tl.arange(0, BLOCK_N)
    ok = (column >= tl.cast(low - at, tl.int32)) & (column < tl.cast(high - at, tl.int32))
    if HIDDEN > 0:
        ok = ok & ((column - tl.cast(hidden_from - at, tl.int32)).to(tl.uint32, bitcast=True) >= HIDDEN)
    return ok


@triton.jit
def store_sums(MOST, TOTAL, out, m, total, real):
    """Store a share's largest logits and softmax sums."""
    tl.store(MOST + out, m, mask=real)
    tl.store(TOTAL + out, tl.where(total > 0, total, 0.0), mask=real)
