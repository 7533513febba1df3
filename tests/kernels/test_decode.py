"""The Triton kernel of later calls against its specification in float64, in Triton's interpreter or on a GPU."""

from dataclasses import dataclass

import pytest
import torch
from oracle import assert_close_to

from think_compile.cache.state import Call, Span, Stored
from think_compile.formats import attention
from think_compile.formats.base import Side
from think_compile.formats.ring import ring_of
from think_compile.formats.think import CHANNEL, Channels, narrow_rows
from think_compile.formats.whole import Whole
from think_compile.kernels.calls import PAIRS
from think_compile.kernels.codecs import parts_of
from think_compile.kernels.launch import Launch

pytest.importorskip("triton", reason="the kernels need it")
KERNELS = PAIRS["channels", "whole"]
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
SMALL = Launch(16, 16, 4, 1, 3)  # several tiles a share, several shares a head


@dataclass
class Case:
    """A later call of ``queries`` tokens after ``past``; ``spare`` rows after them hold no token.

    ``rolling``: the size of a circular buffer.
    """

    batch: int = 2
    query_heads: int = 4
    heads: int = 2
    d: int = 32
    kept: int = 16
    dv: int = 32
    past: int = 40
    queries: int = 1
    recent: int = 4
    spare: int = 0
    first: int = 0
    mask: str = "none"
    causal: bool = False
    on_device: bool = False
    rolling: int = 0
    dtype: torch.dtype = torch.float32
    launch: tuple[int, ...] | None = SMALL

    def __str__(self) -> str:
        given = {name: value for name, value in vars(self).items() if value != getattr(Case, name)}
        return "-".join(f"{name}={value}" for name, value in given.items()) or "plain"

    @property
    def end(self) -> int:
        return self.past + self.queries

    @property
    def sides(self) -> tuple[Side, Side]:
        return Side(Channels(self.kept, 4), self.d, self.recent), Side(Whole(), self.dv)


def call_of(case: Case) -> tuple[Call, Stored, Stored, Span]:
    """A call; rows without a token hold leftovers of an earlier past."""
    with torch.device(DEVICE):
        keys = torch.randn(case.batch, case.heads, case.past, case.d)
        channels = torch.rand(case.batch, case.heads, case.d).topk(case.kept).indices.sort().values.to(CHANNEL)
        rows = torch.randn(case.batch, case.heads, case.end + case.spare, case.kept)
        rows[:, :, : case.past] = narrow_rows(keys, channels)
        ring = ring_of(keys, case.past, case.recent + 1)
        values = torch.randn(case.batch, case.heads, case.end + case.spare, case.dv)
        q = torch.randn(case.batch, case.query_heads, case.queries, case.d)
        k, v = (torch.randn(case.batch, case.heads, case.queries, width) for width in (case.d, case.dv))
        start, window_start, oldest, columns = case.past, max(0, case.past - case.recent), case.first, case.end
        if case.on_device:
            start, window_start, columns = torch.tensor(start), torch.tensor(window_start), case.end + case.spare
        if case.rolling:
            at = torch.arange(case.past - case.rolling, case.past)
            circle = torch.empty_like(at).scatter_(0, at % case.rolling, at)
            rows, values = rows[:, :, circle].contiguous(), values[:, :, circle].contiguous()
            oldest = torch.tensor(oldest)
        columns = columns - case.first
        mask = MASKS[case.mask](case, columns)
    q, k, v, rows, ring, values = (x.to(case.dtype) for x in (q, k, v, rows, ring, values))
    stored = Stored({"rows": rows, "channels": channels, "ring": ring}, window_start), Stored({"rows": values})
    call = Call(q, k, v, mask, case.d**-0.5, case.causal)
    return call, *stored, Span(start, oldest, columns, bool(case.rolling))


def random_mask(case: Case, columns: int) -> torch.Tensor:
    """Half of the tokens, no row after them, and nothing for one query."""
    mask = torch.rand(case.batch, 1, case.queries, columns) < 0.5
    mask[..., case.end - case.first :] = False
    mask[0, :, 0] = False
    return mask


def mask_of_kv_heads(case: Case, columns: int) -> torch.Tensor:
    return torch.cat([random_mask(case, columns) for _ in range(case.heads)], 1)


def random_bias(case: Case, columns: int) -> torch.Tensor:
    bias = torch.randn(case.batch, case.query_heads, case.queries, columns)
    hidden = ~random_mask(case, columns).expand_as(bias)
    bias = bias.to(case.dtype).masked_fill(hidden, torch.finfo(case.dtype).min)
    bias[0, 1, 0] = float("-inf")
    return bias


MASKS = {
    "none": lambda case, columns: None,
    "bool": random_mask,
    "of KV heads": mask_of_kv_heads,
    "float": random_bias,
    "shows all rows": lambda case, columns: torch.ones(1, 1, 1, columns, dtype=torch.bool),
}


def double(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def in_double(call: Call, *stored: Stored) -> tuple:
    wide = [side._replace(state={name: double(x) for name, x in side.state.items()}) for side in stored]
    return Call(*map(double, call)), *wide


def check(case: Case) -> None:
    call, keys, values, span = call_of(case)
    got = KERNELS.attend(call, keys, values, span, case.launch)
    same = attention.narrow(call, keys, values, span, case.sides)
    exact = attention.narrow(*in_double(call, keys, values), span, case.sides)
    assert got.isfinite().all()
    assert_close_to(same, got, exact)


CASES = [
    Case(),
    Case(batch=1, query_heads=7, heads=1, d=96, kept=80, dv=80, queries=2, recent=0),
    Case(query_heads=6, d=80, kept=50, dv=48, past=37, queries=3),
    Case(kept=20),
    Case(kept=5, d=16, dv=16),
    Case(query_heads=2, d=256, kept=240, dv=256, batch=1),
    Case(past=3),
    Case(queries=3, recent=60),
    Case(query_heads=2, past=2, queries=6, causal=True),
    Case(query_heads=8, queries=12, launch=Launch(32, 16, 4, 1, 2)),
    Case(first=7),
    Case(first=7, mask="bool", queries=2),
    Case(mask="bool"),
    Case(mask="float", queries=5),
    Case(mask="of KV heads", on_device=True, spare=30),
    Case(mask="of KV heads", queries=2),
    Case(mask="bool", queries=2, on_device=True, spare=30),
    Case(mask="float", queries=2, on_device=True, spare=30),
    Case(mask="shows all rows", on_device=True, spare=30),
    Case(on_device=True, spare=30),
    Case(mask="shows all rows", on_device=True, spare=1500, batch=1),
    Case(mask="bool", on_device=True, spare=1500, batch=1),
    Case(mask="float", on_device=True, spare=300, queries=2),
    Case(dtype=torch.float16, queries=3, mask="float"),
    Case(dtype=torch.float16, queries=2, mask="float", on_device=True, spare=300),
    Case(on_device=True, rolling=20, first=20),
    Case(on_device=True, rolling=20, first=21, mask="bool", recent=30),
    Case(on_device=True, rolling=37, first=3, mask="float", queries=5),
    Case(on_device=True, rolling=37, first=3, queries=6, causal=True, launch=None),
    Case(launch=None),
    Case(queries=64, query_heads=2, launch=None),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_like_the_reference(case):
    check(case)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rows_behind_the_tokens_are_not_read_where_a_float_mask_hides_them(dtype):
    case = Case(dtype=dtype, on_device=True, spare=300)
    call, keys, values, span = call_of(case)
    values.state["rows"][:, :, case.end :] = torch.nan
    hidden = torch.arange(span.columns, device=DEVICE) >= case.end
    mask = torch.zeros(1, 1, 1, span.columns, dtype=dtype, device=DEVICE).masked_fill(hidden, torch.finfo(dtype).min)
    got = KERNELS.attend(call._replace(mask=mask, scale=0.2), keys, values, span, SMALL)
    assert got.isfinite().all()


@pytest.mark.skipif(not ON_GPU, reason="Triton's interpreter has no bfloat16 products")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("d", [64, 80, 128])
def test_bfloat16(d, mask):
    for queries in (1, 7):
        case = Case(batch=3, query_heads=32, heads=8, d=d, kept=d // 2, dv=d, past=5000, queries=queries, mask=mask)
        case.recent, case.spare, case.on_device, case.dtype, case.launch = 32, 3000, True, torch.bfloat16, None
        check(case)


def test_parts_hold_a_row():
    for width in range(1, 257):
        first, second = parts_of(width)[1:]
        assert first + second >= width and first < 2 * max(width, 16)
        assert not (first & (first - 1) or second & (second - 1))
        assert first >= width or first + second < 2 * width
