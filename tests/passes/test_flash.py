"""Attention by flash-attn's operation: a stand-in with the same name and schema, if the package is not installed."""

import pytest
import torch
import torch.nn.functional as F
from compare import Rules, Trio, tokens
from models import OWN, SESSIONS, PastDecoder, Projections, SequenceMajorSession, heads_first
from oracle import tuple_slots
from test_kv_cache import findings_of
from torch import Tensor

from think_compile import report
from think_compile.passes.refusal import Reason

SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, float dropout_p, float softmax_scale, bool causal, SymInt window_size_left, "
    "SymInt window_size_right, float softcap, Tensor? alibi_slopes, bool return_softmax) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


def stand_in(q, k, v, dropout_p, softmax_scale, causal, left, right, softcap, alibi_slopes, return_softmax):
    """[B, N, Hq, D], [B, S, H, D]: the last query sees the last key."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    n, s = q.shape[2], k.shape[2]
    mask = torch.ones(n, s, dtype=torch.bool, device=q.device).tril(s - n) if causal else None
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=softmax_scale).transpose(1, 2).contiguous()
    return out, q.new_zeros(q.shape[:3], dtype=torch.float32), q.new_zeros(0), q.new_zeros(2, dtype=torch.int64)


@pytest.fixture(scope="module", autouse=True)
def operation():
    library = torch.library.Library("flash_attn", "FRAGMENT")
    if not hasattr(torch.ops.flash_attn, "_flash_attn_forward"):
        library.define(f"_flash_attn_forward{SCHEMA}")
        library.impl("_flash_attn_forward", stand_in, "CompositeExplicitAutograd")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(OWN, "flash", (FlashDecoder, FlashPast, tuple_slots(heads_first)))
        patch.setitem(SESSIONS, "flash", SequenceMajorSession)
        yield
    library._destroy()


def flash(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    given = {"left": -1, "right": -1, "softcap": 0.0, "slopes": None} | options
    scale = q.shape[-1] ** -0.5
    return torch.ops.flash_attn._flash_attn_forward(q, k, v, 0.0, scale, True, *given.values(), False)[0]


class FlashPast(Projections):
    """[B, S, H, D], joined by `cat` on axis 1."""

    def forward(self, x: Tensor, pos: Tensor, past: tuple | None, mask: Tensor) -> tuple[Tensor, tuple]:
        q, k, v = self.project(x, pos)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=1), torch.cat([past[1], v], dim=1)
        return self.wo(flash(q, k, v).flatten(2)), (k, v)


class FlashDecoder(PastDecoder):
    sequence_dim = {FlashPast: 1}  # noqa: RUF012


@pytest.mark.parametrize("ratio", [0.0, 0.5])
@torch.no_grad()
def test_flash_attention(ratio):
    trio = Trio("flash", Rules(ratio))
    trio.run(tokens(2, 34), [20, 1, 1, 5, 1, 1, 5])
    assert len(report(trio.model).rewritten) == 2, str(report(trio.model))
    trio.check_handles(2)


@pytest.mark.parametrize(
    "options",
    [{"left": 8, "right": 0}, {"softcap": 30.0}, {"slopes": Tensor.new_ones}],
    ids=["window", "softcap", "alibi"],
)
def test_options_are_refused_by_name(options):
    def f(q, k, v, pk, pv):
        k, v = torch.cat([pk, k], 1), torch.cat([pv, v], 1)
        given = {name: value(q, 4) if callable(value) else value for name, value in options.items()}
        return flash(q, k, v, **given), k, v

    shapes = [(2, 3, 4, 8), *[(2, 3, 2, 8)] * 2, *[(2, 7, 2, 8)] * 2]
    (found,) = findings_of(f, *(torch.randn(shape) for shape in shapes)).refused
    assert found[1].reason is Reason.OPTION
