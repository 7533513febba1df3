"""Every format without some tokens of its first call: a later call is attention over the decoded rows that are left."""

from dataclasses import replace

import pytest
import torch
from contract import FORMATS, HQ, B, D, H, draw

from think_compile.cache.packed import Packed
from think_compile.cache.state import POSITIONS, Call, Prompt, Span
from think_compile.formats.evicted import in_rows
from think_compile.formats.tokens.h2o import H2O
from think_compile.formats.tokens.kvcrush import KVCrush
from think_compile.formats.tokens.snapkv import SnapKV

PROMPT, SIZE = 17, 48
RULES = [SnapKV(9, observe=3, pool=3), H2O(0.5), KVCrush(7, observe=2), SnapKV(40, observe=3)]


def begun(form, call, size=None):
    """The stores after a first call."""
    states = form.first_call(call, Prompt(capacity=size))
    made = zip(("keys", "values"), states, strict=True)
    return [Packed.made(of, form.side(of), x, torch.float64, size or PROMPT, fixed=size is not None) for of, x in made]


def hand_made(q, k, v, mask, positions):
    """Attention of [B, HQ, N, D] to rows [B, H, M, D] at ``positions`` [B, H, M], in loops."""
    out = torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype)
    for b in range(B):
        for head in range(HQ):
            h = head * H // HQ
            logits = q[b, head] @ k[b, h].mT / D**0.5
            logits = logits.masked_fill(~mask[b, 0][:, positions[b, h]], -torch.inf)
            out[b, head] = logits.softmax(-1) @ v[b, h]
    return out


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_steps_attend_to_what_is_left(form, rule):
    torch.manual_seed(0)
    form, first, length = replace(form, tokens=rule), Call(*draw(PROMPT)), PROMPT
    growing, fixed = begun(form, first), begun(form, first, SIZE)
    kept = growing[0].own[POSITIONS].long()
    for n in (1, 1, 3, 18, 1):
        new, columns = draw(n), length + n
        mask = torch.arange(columns) <= torch.arange(length, columns)[:, None]
        mask = (mask & (torch.rand(B, 1, 1, columns) < 0.8) | torch.eye(columns, dtype=torch.bool)[-n:]).contiguous()
        growing = [store.reserve(n) for store in growing]
        rows = [torch.cat([store._dense_rows(), x], 2) for store, x in zip(growing, new[1:], strict=True)]
        later = torch.arange(PROMPT, columns).expand(B, H, -1)
        want = hand_made(new[0], *rows, mask, torch.cat([kept, later], -1))
        call = Call(*new, mask)
        out, left = form.step(call, *(store.stored() for store in growing), Span(length, 0, columns))
        torch.testing.assert_close(out, want)
        growing = [store.appended(x, n) for store, x in zip(growing, left, strict=True)]
        wide = torch.nn.functional.pad(mask, (0, SIZE - columns))
        span = Span(torch.tensor(length), 0, SIZE)
        again, _ = form.step(call._replace(mask=wide), *(store.stored() for store in fixed), span)
        torch.testing.assert_close(again, want)
        length += n


@pytest.mark.parametrize("size", [None, SIZE])
@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_the_parts_are_what_is_stored(form, size):
    form = replace(form, tokens=RULES[0])
    for store in begun(form, Call(*draw(PROMPT)), size):
        parts = form.side(store.of).parts(fixed=size is not None)
        assert sorted(store.state) == sorted(part.name for part in parts)
        assert store.selected == (9, PROMPT) and store.logical_shape == (B, H, size or PROMPT, D)
        room = (size or form.keys.capacity_for(9)) - (PROMPT - 9 if size else 0)
        group, encoded = form.keys.window_group, room
        if size and store.side.codec.group > 1:  # what stays in the window is not encoded
            encoded = (room - store.side.recent) // group * group
        assert store.rows.capacity * store.side.codec.group == -(-encoded // group) * group


@pytest.mark.parametrize("heads", [1, HQ])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float64], ids=str)
def test_masks_are_gathered_at_the_stored_positions(dtype, heads):
    """Of one head, or of each; and causal ones."""
    form = replace(FORMATS["whole"], tokens=RULES[0])
    keys, _ = begun(form, Call(*draw(PROMPT)))
    kept, columns = keys.own[POSITIONS].long(), PROMPT + 4
    mask = torch.rand(B, heads, 2, columns) < 0.5 if dtype == torch.bool else torch.randn(B, heads, 2, columns).double()
    for causal in (False, True):
        call, span = in_rows(
            Call(*draw(2), mask, causal=causal), keys.stored(), Span(PROMPT + 2, 0, columns), form.keys
        )
        assert (span.start, span.oldest, span.columns) == (9 + 2, 0, 9 + 4) and not call.causal
        for b in range(B):
            for head in range(HQ):
                at = torch.cat([kept[b, head * H // HQ], torch.arange(PROMPT, columns)])
                want = mask[b, head % heads][:, at]
                if causal:
                    seen = at <= torch.arange(2)[:, None]
                    want = want & seen if dtype == torch.bool else want.masked_fill(~seen, -torch.inf)
                assert torch.equal(call.mask_by_query_head[b, head], want)
