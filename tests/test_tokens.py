"""Token rules: the wrapped model against attention to the kept tokens alone, by rules written apart."""

import copy
import math
import pickle
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from oracle import CACHE
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from think_compile import NoDenseForm, RuleError, ThinkConfig, ThinkWarning, report, think_compile
from think_compile.cache.state import Call
from think_compile.evals.command import settings_from
from think_compile.evals.settings import Settings
from think_compile.formats.seen import seen
from think_compile.formats.tokens import h2o as h2o_module
from think_compile.formats.tokens.h2o import H2O
from think_compile.formats.tokens.kvcrush import KVCrush
from think_compile.formats.tokens.snapkv import SnapKV
from think_compile.passes.refusal import Reason

HEADS, GROUP, D, VOCABULARY = 3, 2, 16, 97
CONFIG = LlamaConfig(
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=HEADS * GROUP,
    num_key_value_heads=HEADS,
    head_dim=D,
    vocab_size=VOCABULARY,
)


# ------------------------------------------------------------------------------------------ the rules, in plain loops


def probabilities(q, k, pad):
    """[HEADS, GROUP, queries, keys] of one sequence; the queries are the last tokens, the first ``pad`` are padding."""
    n, size = q.shape[1], k.shape[1]
    out = torch.zeros(HEADS, GROUP, n, size, dtype=torch.float64)
    for h in range(HEADS):
        for g in range(GROUP):
            for i in range(n):
                row = size - n + i
                if row >= pad:
                    logits = k[h, pad : row + 1].double() @ q[h * GROUP + g, i].double() / math.sqrt(D)
                    out[h, g, i, pad : row + 1] = logits.softmax(0)
    return out


def count_of(budget, size):
    return min(size, budget if isinstance(budget, int) else int(size * budget + 1e-9))


def best(score, allowed, count):
    return sorted(allowed, key=lambda j: (-score[j], j))[:count]


def snapkv_scores(rule, q, k, pad):
    """A head's importance of each token, and the observed tokens."""
    size = k.shape[1]
    observed = list(range(max(pad, size - rule.observe), size))
    p = probabilities(q, k, pad)[:, :, -rule.observe :].mean(1).sum(1) / max(1, len(observed))
    p[:, observed] = 0
    half = rule.pool // 2
    pooled = [[max(row[max(0, j - half) : j + half + 1]) for j in range(size)] for row in p.tolist()]
    return pooled, observed


def snapkv(rule, q, k, pad):
    scores, observed = snapkv_scores(rule, q, k, pad)
    count = count_of(rule.budget, k.shape[1])
    others = [j for j in range(pad, k.shape[1]) if j not in observed]
    return [set(observed) | set(best(row, others, count - len(observed))) for row in scores]


def h2o(rule, q, k, pad):
    size, n = k.shape[1], q.shape[1]
    mass = probabilities(q, k, pad).mean(1).sum(1)
    seen_by = [sum(row >= max(j, pad) for row in range(size - n, size)) for j in range(size)]
    scores = [[m / max(1, c) for m, c in zip(row, seen_by, strict=True)] for row in mass.tolist()]
    return [set(best(row, range(pad, size), count_of(rule.budget, size))) for row in scores]


def kvcrush(rule, q, k, pad):
    scores, observed = snapkv_scores(rule, q, k, pad)
    size = k.shape[1]
    tokens, count = range(pad, size), count_of(rule.budget, size)
    for row in scores:
        for j in observed:
            row[j] = math.inf
    important = max(min(rule.observe, count), count - int(count * rule.representatives))
    upper = [set(best(row, tokens, len(tokens) // 2)) for row in scores]
    bits = {j: [j in half for half in upper] for j in tokens}
    anchor = [2 * sum(bits[j][h] for j in tokens) >= len(tokens) for h in range(HEADS)]
    kept = []
    for row in scores:
        top = best(row, tokens, important)
        others = sorted(
            set(tokens) - set(top), key=lambda j: (sum(a != b for a, b in zip(bits[j], anchor, strict=True)), j)
        )
        picks = count - important
        if len(others) > picks:
            others = [others[(2 * i + 1) * len(others) // (2 * picks)] for i in range(picks)]
        kept.append(set(top) | set(others))
    return kept


RULES = {SnapKV: snapkv, H2O: h2o, KVCrush: kvcrush}


class Oracle:
    """Runs the plain model on its dense cache, and hides the evicted tokens of the first call from later calls."""

    def __init__(self, rule, pads):
        self.rule, self.pads, self.kept, self.layer = rule, pads, [], 0

    def __call__(self, q, k, v, attn_mask=None, is_causal=False, **options):
        first = len(self.kept) < CONFIG.num_hidden_layers
        layer, self.layer = self.layer, (self.layer + 1) % CONFIG.num_hidden_layers
        own = k[:, ::GROUP] if k.shape[1] == q.shape[1] else k
        if first:
            rule = RULES[type(self.rule)]
            self.kept.append([rule(self.rule, *(x[b] for x in (q, own)), pad) for b, pad in enumerate(self.pads)])
            self.prompt = k.shape[2]
        elif attn_mask is None and not is_causal:
            attn_mask = torch.ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
        if not first:
            hidden = torch.zeros(len(self.pads), HEADS, 1, k.shape[2], dtype=torch.bool)
            for b, heads in enumerate(self.kept[layer]):
                for h, kept in enumerate(heads):
                    hidden[b, h, 0, [j for j in range(self.prompt) if j not in kept]] = True
            hidden = hidden.repeat_interleave(q.shape[1] // HEADS, 1)  # one query may come as a row for each head
            attn_mask = (
                attn_mask & ~hidden if attn_mask.dtype == torch.bool else attn_mask.masked_fill(hidden, -torch.inf)
            )
        options.pop("enable_gqa", None)
        k, v = (x if x.shape[1] == q.shape[1] else x.repeat_interleave(GROUP, 1) for x in (k, v))
        return REAL(q, k, v, attn_mask, is_causal=is_causal, **options)


REAL = F.scaled_dot_product_attention


@pytest.fixture(scope="module")
def plain():
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).eval()


def cache_of(kind):
    return DynamicCache(config=CONFIG) if kind == "growing" else StaticCache(config=CONFIG, max_cache_len=96)


def logits_of(model, ids, pads, lengths, cache):
    """The last logits of a prompt and of later calls of these lengths, with padding on the left."""
    at, found = 0, []
    mask = torch.tensor([[0] * pad + [1] * (ids.shape[1] - pad) for pad in pads])
    with torch.no_grad():
        for length in lengths:
            now = {"attention_mask": mask[:, : at + length], CACHE: cache}
            found.append(model(ids[:, at : at + length], **now).logits[:, -1])
            at += length
    return torch.stack(found)


def some_ids(count=90):
    return torch.randint(0, VOCABULARY, (2, count), generator=torch.Generator().manual_seed(1))


def oracle(plain, rule, pads, lengths, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", Oracle(rule, pads))
        return logits_of(plain, some_ids(), pads, lengths, cache_of("growing"))


def wrapped(plain, rule, ratio=0.0, **options):
    return think_compile(copy.deepcopy(plain), ratio, tokens=rule, **{"strict": True, "lowering": "eager"} | options)


CACHES = ("growing", "fixed")
PROMPT = 36
LONG = (PROMPT, *[1] * 40, 3, 5, 1)
LENGTHS = (PROMPT, 1, 1, 3, 5, 1)
RULED = [
    SnapKV(14, observe=4, pool=3),
    SnapKV(0.5, observe=8),
    H2O(11),
    H2O(0.4),
    KVCrush(16, observe=4),
    SnapKV(99, observe=4),
]


@pytest.mark.parametrize("pads", [(0, 0), (0, 13)], ids=["whole", "padded"])
@pytest.mark.parametrize("rule", RULED, ids=str)
def test_later_calls_attend_to_the_kept_tokens(plain, rule, pads, monkeypatch):
    lengths = LONG if rule is RULED[0] or rule is RULED[2] else LENGTHS
    want = oracle(plain, rule, pads, lengths, monkeypatch)
    for kind in CACHES:
        ours, cache = wrapped(plain, rule), cache_of(kind)
        got = logits_of(ours, some_ids(), pads, lengths, cache)
        assert torch.allclose(got, want, atol=2e-5), kind
        rows = next(iter(cache.layers[0].values.store.rows.parts.values())).shape[2]
        kept, room = count_of(rule.budget, PROMPT), 96 if kind == "fixed" else sum(lengths)
        assert cache.layers[0].values.shape[2] == room
        assert room - PROMPT + kept <= rows <= room - PROMPT + kept + (0 if kind == "fixed" else room // 64 + 32)
        assert not report(ours).refused


@pytest.mark.parametrize("pads", [(0, 0), (0, 13)], ids=["whole", "padded"])
@pytest.mark.parametrize("kind", CACHES)
def test_h2o_takes_softmax_sums_from_the_model_s_attention(plain, kind, pads, monkeypatch):
    seen, mass = [], h2o_module.attention_mass
    monkeypatch.setattr(h2o_module, "attention_mass", lambda *given: seen.append(given) or mass(*given))
    logits_of(wrapped(plain, H2O(11)), some_ids(), pads, (PROMPT, 1), cache_of(kind))
    assert len(seen) == CONFIG.num_hidden_layers
    for q, k, _, _, scale, lse in seen:
        logits = (q @ k[:, :, :PROMPT].repeat_interleave(GROUP, 1).mT * scale).masked_fill(
            ~torch.ones(PROMPT, PROMPT, dtype=torch.bool).tril(), -torch.inf
        )
        for b, pad in enumerate(pads):
            torch.testing.assert_close(lse[b, :, pad:], logits[b, :, pad:, pad:].logsumexp(-1))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
def test_softmax_sums_of_another_mask_are_not_taken(dtype):
    """A window, and one hidden pair."""
    q, lse = torch.randn(2, 4, 8, D), torch.randn(2, 4, 8)
    rows = torch.ones(8, 8, dtype=torch.bool).tril()
    causal = rows & (torch.arange(8) >= torch.tensor([0, 3])[:, None, None, None])
    less = causal.clone()
    less[1, 0, 7, 4] = False  # to a key that others see
    for mask, known in ((causal, True), (causal & ~rows.tril(-4), False), (less, False)):
        if dtype != torch.bool:
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(dtype).min)
        wide = F.pad(mask, (0, 5), value=0 if dtype == torch.bool else torch.finfo(dtype).min)
        for start, given in ((None, mask), (0, mask), (0, wide)):
            k = torch.randn(2, 2, given.shape[-1], D)
            shown = seen(Call(q, k, k, given, lse=lse), start, 8)
            assert torch.equal(shown.lse, lse) if known else shown.lse.isnan().all(), (start, known)
    for shape in ((8, 1), (1, 1), (1, 8)):  # of all keys, or of all queries
        all_seen = torch.ones(1, 1, *shape, dtype=torch.bool)
        mask = all_seen if dtype == torch.bool else torch.zeros(all_seen.shape)
        assert seen(Call(q, k[:, :, :8], k[:, :, :8], mask, lse=lse), None, 8).lse.isnan().all()


@pytest.mark.parametrize("rule", [RULED[0], RULED[2]], ids=str)
@pytest.mark.parametrize("kind", CACHES)
def test_inductor_lowers_it(plain, kind, rule, monkeypatch):
    """Prompts of several lengths, one after the other."""
    ours = wrapped(plain, rule, lowering="inductor")
    for prompt in (36, 41):
        lengths = (prompt, 1, 1)
        want = oracle(plain, rule, (0, 13), lengths, monkeypatch)
        got = logits_of(ours, some_ids(), (0, 13), lengths, cache_of(kind))
        assert torch.allclose(got, want, atol=2e-5), prompt


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize(
    "options", [{"keys": {4: 0.5}, "values": 4}, {"keys": 8, "values": 8, "sinks": 0}, {"ratio": 0.5}], ids=str
)
def test_it_composes_with_every_form_of_the_rows(plain, kind, options):
    """The stored rows are those of the tokens alone: as if the model had been given a cache of only these."""
    rule = SnapKV(24, observe=4)
    options = {"ratio": None, "recent": 4, "group": 8, "channel_multiple": 1} | options
    ours, exact = wrapped(plain, rule, **options), wrapped(plain, rule)
    logits = [logits_of(model, some_ids(), (0, 13), LENGTHS, cache_of(kind)) for model in (ours, exact)]
    dense = logits_of(plain, some_ids(), (0, 13), LENGTHS, cache_of(kind))
    lost, evicted = (logits[0] - logits[1]).abs().mean(), (logits[1] - dense).abs().mean()
    assert 0 < lost < 2 * evicted and evicted > 1e-4
    assert not report(ours).refused


# ---------------------------------------------------------------------------------------------- edits of the cache


def after_a_prompt(plain, rule=RULED[0], kind="growing", lengths=(PROMPT, 1, 1), **options):
    """A wrapped model, and a cache after these calls of a padded batch."""
    ours, cache = wrapped(plain, rule, **options), cache_of(kind)
    return ours, cache, logits_of(ours, some_ids(), (0, 13), lengths, cache)


def step(model, cache, rows=(0, 1), at=PROMPT + 2, ids=None):
    """The logits of one more token."""
    ids = some_ids()[:, at : at + 1] if ids is None else ids
    mask = torch.tensor([[1] * (at + 1), [0] * 13 + [1] * (at - 12)])[list(rows)]
    with torch.no_grad():
        return model(ids[list(rows)], attention_mask=mask, **{CACHE: cache}).logits[:, -1]


@pytest.mark.parametrize("kind", CACHES)
def test_reordering_repeating_and_copying(plain, kind):
    ours, cache, _ = after_a_prompt(plain, kind=kind)
    twin = copy.deepcopy(cache)
    reloaded = pickle.loads(pickle.dumps([(x.keys, x.values) for x in cache.layers]))
    want = step(ours, cache)
    assert torch.equal(step(ours, twin), want)
    _, cache, _ = after_a_prompt(plain, kind=kind)
    for layer, (keys, values) in zip(cache.layers, reloaded, strict=True):
        layer.keys, layer.values = keys, values
    assert torch.equal(step(ours, cache), want)
    if kind == "growing":
        _, cache, _ = after_a_prompt(plain)
        cache.reorder_cache(torch.tensor([1, 0, 1]))
        got = step(ours, cache, (1, 0, 1))
        assert torch.allclose(got, want[[1, 0, 1]], atol=1e-6)
        _, cache, _ = after_a_prompt(plain)
        cache.batch_repeat_interleave(2)
        assert torch.allclose(step(ours, cache, (0, 0, 1, 1)), want[[0, 0, 1, 1]], atol=1e-6)


def test_a_crop_after_the_prompt(plain):
    ours, cache, _ = after_a_prompt(plain)
    assert report(ours).selected == ((14, PROMPT),) and "first calls: 14 of 36 tokens stored" in str(report(ours))
    want = step(ours, cache)
    for index in (3, 4):
        step(ours, cache, at=PROMPT + index)
    cache.crop(-3)
    assert cache.get_seq_length() == PROMPT + 2
    assert torch.equal(step(ours, cache), want)
    with pytest.raises(NoDenseForm, match=r"a crop to 30 tokens cuts the first call, of which 14 tokens are stored"):
        cache.layers[0].keys[:, :, :30]


@pytest.mark.parametrize("kind", CACHES)
def test_a_prompt_in_chunks(plain, kind, monkeypatch):
    """The first call's rule; later prompts are kept."""
    lengths = (PROMPT, 20, 1, 7, 1)
    want = oracle(plain, RULED[2], (0, 13), lengths, monkeypatch)
    got = logits_of(wrapped(plain, RULED[2]), some_ids(), (0, 13), lengths, cache_of(kind))
    assert torch.allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("kind", CACHES)
def test_what_needs_the_evicted_tokens_says_so(plain, kind):
    ours, cache, _ = after_a_prompt(plain, kind=kind)
    keys = cache.layers[0].keys
    for operation in (lambda: keys.dense(), lambda: keys + 1, lambda: keys[:, :, 3:5], lambda: keys.numpy()):
        with pytest.raises(NoDenseForm, match="22 tokens of this cache's first call are not stored"):
            operation()
    with pytest.raises(NoDenseForm, match=r"^aten\.mul\.Tensor: "):
        keys * 2
    assert "Handle" in repr(keys) and step(ours, cache).isfinite().all()


def test_a_fixed_cache_begins_again(plain, monkeypatch):
    ours, cache, first = after_a_prompt(plain, kind="fixed")
    cache.reset()
    again = logits_of(ours, some_ids(), (0, 13), (PROMPT, 1, 1), cache)
    assert torch.allclose(again, first, atol=1e-6)
    for layer in cache.layers:
        layer.cumulative_length.fill_(3)
    with pytest.raises(RuntimeError, match="written before the call's end"):
        step(ours, cache)


def test_a_fixed_cache_that_holds_tokens_already_stays_as_it_is(plain):
    """Its number of tokens is known to the device alone. A new cache on the same model is left alone, too."""
    ours, lengths = wrapped(plain, RULED[0], strict=False), (PROMPT, 1, 1)
    want, cache = logits_of(plain, some_ids(), (0, 13), lengths, cache_of("fixed")), cache_of("fixed")
    first = logits_of(plain, some_ids(), (0, 13), lengths[:1], cache)
    assert torch.equal(first, want[:1])
    with pytest.warns(ThinkWarning, match="held tokens before"):
        got = torch.stack([step(ours, cache, at=PROMPT + i) for i in range(2)])
    assert torch.allclose(got, want[1:], atol=1e-6)
    assert all(type(layer.keys) is torch.Tensor for layer in cache.layers)
    assert {record.reason for record in report(ours).refused} == {Reason.FILLED} and not report(ours).rewritten


def test_a_growing_cache_that_holds_tokens_already(plain):
    """The rule selects among all its tokens, in the first call that it sees."""
    ours, cache = wrapped(plain, H2O(11)), cache_of("growing")
    logits_of(plain, some_ids(), (0, 13), (PROMPT,), cache)
    step(ours, cache, at=PROMPT)
    assert report(ours).selected == ((11, PROMPT + 1),) and not report(ours).refused


@pytest.mark.parametrize("kind", CACHES)
def test_nothing_is_evicted_from_a_short_prompt(plain, kind):
    ours, cache, _ = after_a_prompt(plain, SnapKV(99, observe=4), kind)
    assert "first calls: 36 of 36 tokens stored" in str(report(ours))
    exact = cache_of(kind)
    logits_of(plain, some_ids(), (0, 13), (PROMPT, 1, 1), exact)
    length = PROMPT + 2
    for layer, dense in zip(cache.layers, exact.layers, strict=True):
        assert torch.allclose(layer.keys.dense()[1, :, 13:length], dense.keys[1, :, 13:length], atol=1e-6)
        assert torch.allclose(layer.values.dense()[0, :, :length], dense.values[0, :, :length], atol=1e-6)


# --------------------------------------------------------------------------------------------- rules of the user's own


@dataclass(frozen=True)
class Latest:
    """The latest tokens, told as the positions that a test wants."""

    wanted: str = "latest"

    def positions(self, seen):
        batch, heads, size = seen.k.shape[:3]
        rows = torch.arange(size - 9, size).expand(batch, heads, -1)
        if self.wanted == "twice":
            return rows * 0 + size - 1
        if self.wanted == "outside":
            return rows + 4
        if self.wanted == "shares":
            return rows / 2
        if self.wanted == "raises":
            raise KeyError("no such thing")
        return rows.flip(-1)

    def describe(self):
        return "the latest 9 tokens"


def test_a_rule_of_the_users_own(plain, monkeypatch):
    monkeypatch.setitem(RULES, Latest, lambda rule, q, k, pad: [set(range(k.shape[1] - 9, k.shape[1]))] * HEADS)
    ours = wrapped(plain, Latest())
    want = oracle(plain, Latest(), (0, 13), (PROMPT, 1, 1), monkeypatch)
    assert torch.allclose(logits_of(ours, some_ids(), (0, 13), (PROMPT, 1, 1), cache_of("growing")), want, atol=2e-5)
    assert "the latest 9 tokens" in str(report(ours))


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        ("twice", "gave a position twice"),
        ("outside", "gave positions outside of the call's"),
        ("shares", r"must give rows \(2, 3, 'K'\) as integers, got torch.float32 \[2, 3, 9\]"),
        ("raises", "failed: KeyError: 'no such thing'"),
    ],
)
def test_a_rule_that_selects_what_is_not_there(plain, wanted, told, kind):
    with pytest.raises(RuleError, match=rf"the token rule Latest\(wanted='{wanted}'\) {told}"):
        after_a_prompt(plain, Latest(wanted), kind)


# ------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("make", "error", "told"),
    [
        (lambda: SnapKV(0), ValueError, "a budget of 0 tokens is less than the 32 that always stay"),
        (lambda: SnapKV(20), ValueError, "a budget of 20 tokens is less than the 32"),
        (lambda: H2O(0), ValueError, "a budget of 0 tokens is less than the 1"),
        (lambda: H2O(1.5), ValueError, r"a share of the prompt must be in \(0, 1\), got 1.5"),
        (lambda: H2O("many"), TypeError, "budget must be a number of tokens .* got 'many'"),
        (lambda: SnapKV(64, pool=4), ValueError, "pool must be odd, got 4"),
        (lambda: SnapKV(64, observe=0), ValueError, "observe must be an int >= 1, got 0"),
        (lambda: KVCrush(64, representatives=1), ValueError, r"a share in \[0, 1\), got 1"),
        (lambda: ThinkConfig(tokens="snap:3"), ValueError, "is not RULE:BUDGET with one of snapkv, h2o, kvcrush"),
        (lambda: ThinkConfig(tokens="h2o:few"), ValueError, "'few' is no number of tokens and no share"),
        (lambda: ThinkConfig(tokens=3), TypeError, "tokens must be a rule, .*; got 3, without positions, describe"),
        (lambda: ThinkConfig(tokens=H2O), TypeError, "a class and not an object of it"),
        (lambda: ThinkConfig(tokens=H2O(9), sliding=True), ValueError, "sliding=True stores caches otherwise"),
        (lambda: ThinkConfig(tokens=H2O(9), keys=4, values=4, decode=True), ValueError, "decode=True stores"),
    ],
)
def test_bad_arguments(make, error, told):
    with pytest.raises(error, match=told):
        make()


def test_rules_by_name():
    assert ThinkConfig(tokens="snapkv:1024").tokens == SnapKV(1024)
    assert ThinkConfig(tokens="h2o:0.25").tokens == H2O(0.25)
    assert str(ThinkConfig(tokens=KVCrush(0.25)).tokens) == "kvcrush:0.25"
    assert ThinkConfig(tokens=H2O(9)).ratio == 0 and ThinkConfig(0.5, tokens=H2O(9)).ratio == 0.5


def test_evaluations_take_them():
    settings = Settings.of(tokens="snapkv:64", keys=4)
    assert settings.prunes and settings.label == "think-k4-snapkvx64" and settings.described()["tokens"] == "snapkv:64"
    assert Settings.of(tokens="h2o:0.25").label == "think-0-h2ox0.25" and "tokens" not in Settings.of().described()
    assert settings_from("think", None, tokens="h2o:9")[-1].config.ratio == 0
    with pytest.raises(ValueError, match="keys, values and tokens are for method 'think'; got method 'random'"):
        Settings.of(method="random", tokens="h2o:9")


def test_attention_written_out_is_refused_by_name():
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIG)
    config._attn_implementation = "eager"
    ours = think_compile(LlamaForCausalLM(config).eval(), tokens=RULED[0], lowering="eager")
    with pytest.warns(ThinkWarning):
        logits_of(ours, some_ids(), (0, 0), (PROMPT, 1), cache_of("growing"))
    assert {record.reason for record in report(ours).refused} == {Reason.IN_ORDER}
