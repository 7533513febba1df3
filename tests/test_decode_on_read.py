"""decode=True: caches that attention does not read as they are stored are kept in codes, and decoded by each read.

The oracle is the plain model, given the caches that the wrapped model would have read.
"""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from test_refused import HEADS, WIDTH, Attending, CachesLatents, D, Rounds
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch.utils._pytree import tree_map
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DynamicCache, StaticCache

from think_compile import ThinkConfig, explain, report, think_compile
from think_compile.cache.handle import Handle
from think_compile.cache.state import COUNTERS, Prompt, Span, Stored
from think_compile.formats.base import window_start_of
from think_compile.passes.refusal import READ_OTHERWISE, Reason

RULES = {"keys": 8, "values": 4, "recent": 3, "group": 4, "sinks": 1, "decode": True}


class TwoLatents(Attending):
    """As multi-head latent attention: a latent for keys and values, and a part of the keys shared by all heads."""

    def forward(self, x, past=None):
        latent, shared = self.down(x)[:, None], self.mix_in(x)[:, None]
        if past is not None:
            latent, shared = torch.cat([past[0], latent], 2), torch.cat([past[1], shared], 2)
        q, _, _ = self.heads(x)
        k, v = (self.up(latent)[:, 0].unflatten(-1, (HEADS, D)).transpose(1, 2) for _ in range(2))
        k = torch.cat([k[..., : D - 4], shared[..., :4].expand(-1, HEADS, -1, -1)], -1)
        return F.scaled_dot_product_attention(q, k, v), (latent, shared)

    def mix_in(self, x):
        return self.down(x)[..., :4].sin()


class WrittenOut(TwoLatents):
    def forward(self, x, past=None):
        latent = self.down(x) if past is None else torch.cat([past[0], self.down(x)], 1)
        q, _, _ = self.heads(x)
        k, v = (y.unflatten(-1, (HEADS, D)).transpose(1, 2) for y in (self.up(latent), self.up(latent).tanh()))
        return (q @ k.mT / 4).softmax(-1) @ v, (latent,)


class RotatesLater(Attending):
    """Keys are cached as projected, and rotated for each call."""

    def forward(self, x, past=None):
        q, k, v = self.heads(x)
        k, v = self.joined(past, k, v)
        angle = torch.arange(k.shape[2])[:, None] * torch.arange(1, D // 2 + 1) / 50
        a, b = k.chunk(2, -1)
        turned = torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)
        return F.scaled_dot_product_attention(q, turned, v), (k, v)


class MixesChannels(Attending):
    def forward(self, x, past=None):
        q, k, v = self.heads(x)
        k, v = self.joined(past, k, v)
        return F.scaled_dot_product_attention(q, k @ self.qkv.weight[:D, :D], v), (k, v)


class ChangesValues(Attending):
    def forward(self, x, past=None):
        q, k, v = self.heads(x)
        k, v = self.joined(past, k, v)
        return F.scaled_dot_product_attention(q, k, v.tanh()), (k, v)


class TokensFirst(Attending):
    """[B, S, H, D], with the hidden states among the outputs: those are no cache."""

    def forward(self, x, past=None):
        q, k, v = (y.transpose(1, 2) for y in self.heads(x))
        if past is not None:
            k, v = torch.cat([past[0], k], 1), torch.cat([past[1], v], 1)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.sin().transpose(1, 2), v.transpose(1, 2))
        return out, (k, v), x.tanh()


class TwoReaders(Attending):
    """Two attentions read one latent."""

    def forward(self, x, past=None):
        latent = self.down(x) if past is None else torch.cat([past, self.down(x)], 1)
        q, _, _ = self.heads(x)
        k, v = (y.unflatten(-1, (HEADS, D)).transpose(1, 2) for y in (self.up(latent), self.up(latent).tanh()))
        return F.scaled_dot_product_attention(q, k, v) + F.scaled_dot_product_attention(q * 2, v, k), latent


class SharesOneOfTwo(Attending):
    """Two attentions share the first of two tensors, and each has a second of its own."""

    def forward(self, x, past=None):
        new = self.down(x)[:, None], self.down(x)[:, None, :, :4].sin(), self.down(x)[:, None, :, :4].cos()
        latent, *others = new if past is None else (torch.cat([old, y], 2) for old, y in zip(past, new, strict=True))
        q, _, _ = self.heads(x)
        k = self.up(latent)[:, 0].unflatten(-1, (HEADS, D)).transpose(1, 2)
        joined = (torch.cat([k[..., : D - 4], y.expand(-1, HEADS, -1, -1)], -1) for y in others)
        return sum(F.scaled_dot_product_attention(q, y, k) for y in joined), (latent, *others)


class KeysEscape(Attending):
    """The keys are read by something else, too."""

    def forward(self, x, past=None):
        q, k, v = self.heads(x)
        k, v = self.joined(past, k, v)
        return F.scaled_dot_product_attention(q, k, v) + k.mean(2, keepdim=True), (k, v)


class SharesUnlike(Attending):
    """Of two attentions to one cache, one changes the values."""

    def forward(self, x, past=None):
        q, k, v = self.heads(x)
        k, v = self.joined(past, k, v)
        return F.scaled_dot_product_attention(q, k, v) + F.scaled_dot_product_attention(q, k, v.tanh()), (k, v)


def dense(past):
    return tree_map(lambda x: x.dense().clone() if isinstance(x, Handle) else x, past)


def pair(kind, **options):
    torch.manual_seed(0)
    plain = kind()
    return plain, think_compile(copy.deepcopy(plain), **RULES | {"lowering": "eager"} | options)


def run(plain, ours, lengths=(7, 1, 3, 1, 1, 2, 1, 1)):
    """Largest errors of each call, and what was lost against a cache that was never compressed."""
    generator = torch.Generator().manual_seed(1)
    past = whole = None
    errors, lost = [], 0.0
    with torch.no_grad():
        for length in lengths:
            x = torch.randn(2, length, WIDTH, generator=generator)
            same, exact = plain(x, dense(past))[0], plain(x, whole)
            out, past, *_ = ours(x, past)
            errors.append((out - same).abs().max().item())
            lost, whole = max(lost, (out - exact[0]).abs().max().item()), exact[1]
    return errors, lost, past


KINDS = [
    CachesLatents,
    TwoLatents,
    WrittenOut,
    RotatesLater,
    MixesChannels,
    ChangesValues,
    TokensFirst,
    TwoReaders,
    KeysEscape,
    SharesUnlike,
    Rounds,
]


@pytest.mark.parametrize("kind", KINDS)
def test_reads_get_the_decoded_cache(kind):
    plain, ours = pair(kind)
    errors, lost, past = run(plain, ours)
    assert max(errors) < 2e-6
    assert lost > 1e-4, "nothing was lost: was it compressed?"
    found = report(ours)
    assert not found.refused, str(found)
    assert all("stored in codes, decoded on read" in record.detail for record in found.rewritten)
    kept = torch.utils._pytree.tree_leaves(past)
    assert all(isinstance(x, Handle) for x in kept) and len(kept) in (1, 2)
    assert found.stored_bytes > 0 and "codes" in found.key_parts


@pytest.mark.parametrize("kind", [CachesLatents, RotatesLater])
def test_inductor_lowers_it(kind):
    plain, ours = pair(kind, lowering="inductor")
    errors, _, _ = run(plain, ours, (7, 1, 1, 1))
    assert max(errors) < 5e-6


@torch.no_grad()
def test_one_kernel_decodes_a_tensor():
    """Codes, scales, sinks, the ring and the call's own row are read by one kernel; a product reads its result."""
    form, rows = ThinkConfig(keys=4, values=4, decode=True, group=16).format_for(128, 16), torch.randn(2, 1, 64, 128)
    state = form.keep("keys", rows[:, :, :8], rows, None, Prompt(torch.tensor(40), capacity=64))
    state = {name: x.contiguous() for name, x in state.items()}

    def read(new, state, start, weight):
        stored = Stored(state, window_start_of(state[COUNTERS]))
        return form.join("keys", new, stored, Span(start, 0, 64))[0] @ weight

    given = rows[:, :, :1], torch.tensor(48), torch.randn(128, 8)
    copies = [{name: x.clone() for name, x in state.items()} for _ in range(2)]
    want = read(given[0], copies[0], *given[1:])
    torch._dynamo.reset()
    got, code = run_and_get_code(torch.compile(read), given[0], copies[1], *given[1:])
    assert torch.allclose(got, want, atol=1e-5)
    before, *_ = "".join(code).partition("def call(")[2].partition("extern_kernels.")
    assert len(re.findall(r"(?m)^ +cpp_fused\w*\(", before)) == 1


def test_plans_of_16_bits_for_one_side():
    plain, ours = pair(RotatesLater, values=16)
    errors, lost, _ = run(plain, ours)
    assert max(errors) < 2e-6 < lost
    assert set(report(ours).value_parts) == {"rows"}


@pytest.mark.filterwarnings("ignore::think_compile.ThinkWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_without_it_the_refusal_names_it(kind):
    _, ours = pair(kind, decode=False)
    run(ours, ours, (7, 1))
    found = {record.reason for record in report(ours).refused}
    assert found and found <= READ_OTHERWISE
    assert all("decode=True" in record.sentence for record in report(ours).refused)


def test_a_first_call_waits_for_the_join():
    found = explain(TwoLatents(), (torch.randn(2, 7, WIDTH),), **RULES, lowering="eager", strict=True)
    assert {record.reason for record in found.refused} == {Reason.AWAITS_JOIN} and not found.problems


@pytest.mark.filterwarnings("ignore::think_compile.ThinkWarning")
def test_part_of_a_shared_cache_is_not_decoded():
    plain, ours = pair(SharesOneOfTwo)
    errors, lost, past = run(plain, ours)
    assert max(errors) < 2e-6 and lost < 2e-6
    assert not any(isinstance(x, Handle) for x in past)
    assert {record.reason for record in report(ours).refused} == {Reason.NOT_DECODED}


def test_strict_is_satisfied():
    plain, ours = pair(TwoLatents, strict=True)
    assert max(run(plain, ours)[0]) < 2e-6


class KeepsTheLast(TwoLatents):
    """A bounded window of latents."""

    def forward(self, x, past=None):
        out, (latent, shared) = super().forward(x, past)
        return out, (latent[:, :, -6:], shared[:, :, -6:])


@pytest.mark.filterwarnings("ignore::think_compile.ThinkWarning")
def test_a_bounded_window_stays_as_it_is():
    plain, ours = pair(KeepsTheLast)
    errors, lost, _ = run(plain, ours)
    assert max(errors) == lost == 0.0 and not report(ours).rewritten


class JoinsInTwoWays(TwoLatents):
    """One of the two tensors grows in a way that is not understood: on the left."""

    def forward(self, x, past=None):
        latent, shared = self.down(x)[:, None], self.mix_in(x)[:, None]
        if past is not None:
            latent, shared = torch.cat([past[0], latent], 2), torch.cat([shared, past[1]], 2)
        q, _, _ = self.heads(x)
        k = self.up(latent)[:, 0].unflatten(-1, (HEADS, D)).transpose(1, 2)
        k = torch.cat([k[..., : D - 4], shared.expand(-1, HEADS, -1, -1)], -1)
        return F.scaled_dot_product_attention(q, k, k.sin()), (latent, shared)


@pytest.mark.filterwarnings("ignore::think_compile.ThinkWarning")
def test_a_layer_is_stored_wholly_or_not_at_all():
    plain, ours = pair(JoinsInTwoWays)
    errors, lost, _ = run(plain, ours)
    assert max(errors) == lost == 0.0 and not report(ours).rewritten


class Spreads(Attending):
    """The latent is also joined along its channels: it is not told what grows."""

    def forward(self, x, past=None):
        latent = self.down(x) if past is None else torch.cat([past, self.down(x)], 2)
        q, _, _ = self.heads(x)
        k, v = (self.up(latent[..., :8]).unflatten(-1, (HEADS, D)).transpose(1, 2) for _ in range(2))
        return F.scaled_dot_product_attention(q, k, v), latent


@pytest.mark.filterwarnings("ignore::think_compile.ThinkWarning")
def test_a_join_along_the_channels_is_no_cache():
    plain, ours = pair(Spreads)
    errors, lost, _ = run(plain, ours, (3, 3, 3))
    assert max(errors) == lost == 0.0 and not report(ours).rewritten


# -------------------------------------------------------------------------------------------- a whole model


def latent_model() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 24, "q_lora_rank": 16}
    widths = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "head_dim": 8}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    config = DeepseekV3Config(vocab_size=96, first_k_dense_replace=2, **sizes, **heads, **widths, **experts)
    return DeepseekV3ForCausalLM(config).eval()


def caches(model, fixed: bool):
    return StaticCache(config=model.config, max_cache_len=40) if fixed else DynamicCache(config=model.config)


@pytest.mark.parametrize("fixed", [False, True], ids=["growing", "fixed"])
@torch.no_grad()
def test_a_padded_batch_is_edited_like_any_cache(fixed):
    """Sinks begin at the first token of each sequence; beams, resets and crops work on the codes."""
    plain = latent_model()
    ours = think_compile(copy.deepcopy(plain), **RULES, lowering="eager")
    ids = torch.randint(0, 96, (2, 30), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    mine = caches(ours, fixed)
    for n, (begin, end) in enumerate([(0, 14), (14, 15), (15, 19), (19, 20), (20, 21)]):
        same = caches(plain, fixed)
        for layer, own in zip(same.layers, mine.layers, strict=True) if n else ():
            length = begin
            rows = [own.keys.dense() if isinstance(own.keys, Handle) else own.keys, own.values]
            rows[1] = rows[1].dense() if isinstance(rows[1], Handle) else rows[1]
            if fixed:
                layer.lazy_initialization(*rows)
                layer.cumulative_length.fill_(length)
                layer.keys.copy_(rows[0])
                layer.values.copy_(rows[1])
            else:
                layer.update(*(x.clone() for x in rows))
        given = {"input_ids": ids[:, begin:end], "attention_mask": mask[:, :end]}
        got = ours(**given, past_key_values=mine).logits
        want = plain(**given, past_key_values=same).logits
        assert torch.allclose(got, want, atol=3e-6), (got - want).abs().max()
        if n == 3:
            mine.reorder_cache(torch.tensor([1, 0]))
            ids, mask = ids.flip(0), mask.flip(0)
    assert isinstance(mine.layers[0].keys, Handle)
    begin_at = mine.layers[0].keys.store.state["first_token"]
    assert begin_at.tolist() == [5, 0]
    assert not report(ours).refused


# -------------------------------------------------------------------------------------------- bad arguments


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "ratio=0.5 prunes keys"),
        ({"keys": "8:0.25+4:0.75"}, "keys must be 8, 4, 2 or 16; got keys='8:0.25\\+4:0.75'"),
        ({"keys": {4: 0.5}}, "got keys='4:0.5'"),
        ({"keys": 4, "values": {8: 0.5, 4: 0.5}}, "values must be 8, 4, 2 or 16"),
        ({"keys": 16, "values": 16}, "needs keys or values in codes"),
    ],
)
def test_plans_that_cannot_be_decoded_on_read(given, said):
    with pytest.raises(ValueError, match=said):
        ThinkConfig(decode=True, **given)


def test_decode_is_a_boolean():
    with pytest.raises(TypeError, match="decode must be True or False"):
        ThinkConfig(keys=4, decode=1)
