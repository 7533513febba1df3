"""The oracle against brute force: scores, padding, ties, rounding, the moving window, layers left dense."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import (
    CAPACITY,
    HUGGING_FACE,
    VOCAB,
    WRITTEN_HERE,
    build,
    causal_mask,
    hugging_face,
    own,
    session,
    slots_of,
)
from oracle import (
    Oracle,
    Seen,
    Yardstick,
    allowed_pairs,
    assert_close_to,
    channel_scores,
    kept_count,
    kept_mask,
    observed_queries,
    valid_keys,
)
from transformers import StaticCache

MIN = torch.finfo(torch.float32).min


def tokens(batch, length):
    return torch.randint(3, VOCAB, (batch, length))


def oracle_of(name, ratio=0.5, recent=4, observe=8, multiple=1, rows=2, **kwargs):
    return Oracle(build(name, rows=rows), ratio, recent, observe, multiple, slots=slots_of(name), **kwargs)


# ------------------------------------------------------------------ masks and padding


def test_no_mask_every_key_is_valid():
    assert valid_keys(allowed_pairs(None, True, 2, 5, 5)).all()
    assert valid_keys(allowed_pairs(None, False, 2, 1, 5)).all()


def test_causal_flag_aligns_upper_left():
    assert allowed_pairs(None, True, 1, 2, 3)[0].tolist() == [[True, False, False], [True, True, False]]


@pytest.mark.parametrize("low", [float("-inf"), MIN, 0.75 * MIN], ids=["inf", "min", "near_min"])
def test_float_mask_counts_above_half_its_minimum(low):
    mask = torch.tensor([[0.0, -1e4, low, MIN / 4]])
    assert allowed_pairs(mask, False, 1, 1, 4)[0, 0].tolist() == [True, True, False, True]


def test_any_head_and_broadcast_batch():
    mask = torch.zeros(1, 2, 1, 3, dtype=torch.bool)
    mask[0, 1, 0, 2] = True
    assert allowed_pairs(mask, False, 2, 1, 3).tolist() == [[[False, False, True]]] * 2


def test_unwritten_slots_of_a_fixed_cache_are_not_valid():
    assert valid_keys(allowed_pairs(causal_mask(0, 5, 9, None), False, 1, 5, 9))[0].tolist() == [True] * 5 + [False] * 4


@pytest.mark.parametrize(
    ("valid", "observe", "expected"),
    [
        ("1111", 2, "0011"),
        ("1111", 9, "1111"),
        ("0111", 2, "0011"),
        ("1100", 1, "0100"),
        ("1100", 3, "1100"),
        ("0000", 2, "0000"),
        ("1010", 2, "1010"),
    ],
    ids=["plain", "short", "left", "right", "right_short", "none", "holes"],
)
def test_observed_queries(valid, observe, expected):
    bits = torch.tensor([[c == "1" for c in valid]])
    assert observed_queries(bits, 4, observe)[0].tolist() == [c == "1" for c in expected]


def test_queries_are_the_last_positions_of_a_longer_key_axis():
    valid = torch.tensor([[True, True, True, False, True]])
    assert observed_queries(valid, 2, 8)[0].tolist() == [False, True]


# ------------------------------------------------------------------ scores, ties, rounding


def brute_score(q, k, valid, observed, b, kv_head, channel):
    """One channel's score, spelled out."""
    group = q.shape[1] // k.shape[1]
    heads = range(kv_head * group, (kv_head + 1) * group)
    qs = [float(q[b, h, i, channel]) ** 2 for h in heads for i in range(q.shape[2]) if observed[b][i]]
    ks = [float(k[b, kv_head, p, channel]) ** 2 for p in range(k.shape[2]) if valid[b][p]]
    return sum(qs) / len(qs) * sum(ks) / len(ks) if qs and ks else 0.0


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    lengths=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=3),
    group=st.integers(1, 3),
    observe=st.integers(1, 9),
)
def test_scores_and_padding_against_loops(seed, lengths, group, observe):
    torch.manual_seed(seed)
    size, dim, batch = 7, 3, len(lengths)
    q, k = torch.randn(batch, 2 * group, size, dim), torch.randn(batch, 2, size, dim)
    real = [[left <= p < size - right for p in range(size)] for left, right in lengths]
    mask = causal_mask(0, size, size, torch.tensor(real))
    valid = valid_keys(allowed_pairs(mask, False, batch, size, size))
    observed = observed_queries(valid, size, observe)
    assert valid.tolist() == real
    last = [[r and sum(row[i:]) <= observe for i, r in enumerate(row)] for row in real]
    assert observed.tolist() == last
    scores = channel_scores(q, k, valid, observed)
    expected = [[[brute_score(q, k, real, last, b, h, c) for c in range(dim)] for h in range(2)] for b in range(batch)]
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_score_is_the_norm_of_the_channel_product():
    q, k = torch.randn(1, 1, 6, 5), torch.randn(1, 1, 6, 5)
    everything = torch.ones(1, 6, dtype=torch.bool)
    scores = channel_scores(q, k, everything, everything)[0, 0]
    norms = torch.stack([torch.linalg.norm(torch.outer(q[0, 0, :, j], k[0, 0, :, j])) for j in range(5)])
    torch.testing.assert_close(scores, norms.square() / 36)


def test_nan_in_padding_does_not_reach_the_scores():
    q, k = torch.randn(1, 1, 4, 3), torch.randn(1, 1, 4, 3)
    valid = torch.tensor([[False, True, True, True]])
    clean = channel_scores(q, k, valid, valid)
    q[:, :, 0], k[:, :, 0] = float("nan"), float("inf")
    assert torch.equal(channel_scores(q, k, valid, valid), clean)


def test_low_precision_is_scored_in_fp32():
    q = torch.full((1, 1, 1, 2), 512.0, dtype=torch.float16)  # its square overflows fp16
    one = torch.ones(1, 1, dtype=torch.bool)
    assert channel_scores(q, q, one, one).tolist() == [[[512.0**4] * 2]]


def test_ties_break_to_the_lower_channel():
    scores = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0, 0.0]])
    assert kept_mask(scores, 3)[0].tolist() == [True, True, False, True, False, False]
    assert kept_mask(torch.zeros(1, 40), 17)[0].nonzero().flatten().tolist() == list(range(17))


@pytest.mark.parametrize(
    ("dim", "ratio", "multiple", "kept"),
    [
        (32, 0.0, 16, 32),
        (32, 0.3, 1, 23),
        (32, 0.3, 16, 32),
        (32, 0.5, 16, 16),
        (32, 0.75, 1, 8),
        (32, 0.75, 16, 16),
        (64, 0.3, 16, 48),
        (80, 0.5, 16, 48),
        (80, 0.5, 1, 40),
        (20, 0.1, 16, 20),
        (16, 0.5, 32, 16),
        (128, 0.99, 16, 16),
        (16, 0.99, 1, 1),
    ],
)
def test_kept_count(dim, ratio, multiple, kept):
    assert kept_count(dim, ratio, multiple) == kept


# ------------------------------------------------------------------ the window, call by call


def pruned_positions(keys):
    """Positions with a dropped (exactly zero) channel in some sequence or head; keys [B, H, S, D]."""
    return (keys == 0).any(-1).any(1).any(0).nonzero().flatten().tolist()


@pytest.mark.parametrize("recent", [0, 1, 4], ids="recent{}".format)
@pytest.mark.parametrize("name", ["llama", *WRITTEN_HERE])
def test_window_moves_with_every_call(name, recent):
    oracle = oracle_of(name, recent=recent)
    talk, written = session(name, oracle), 0
    with torch.no_grad():
        for new in [9, 1, 1, 3, 1]:
            talk.step(tokens(2, new))
            written += new
            for keys in talk.stored():
                keys = keys.movedim(talk.sequence_dim, 2)
                assert keys.shape[2] == written
                assert pruned_positions(keys) == list(range(written - recent))
                zeros = (keys[:, :, : written - recent] == 0).sum(-1)
                assert (zeros == 16).all()  # half of 32 channels, in every head of every token


def test_only_prompt_tokens_go_without_prune_generated():
    oracle = oracle_of("llama", prune_generated=False)
    talk = session("llama", oracle)
    with torch.no_grad():
        for new in [9, 1, 3, 5]:
            talk.step(tokens(2, new))
            assert all(pruned_positions(keys) == list(range(5)) for keys in talk.stored())


def test_a_prompt_inside_the_window_is_whole_until_it_leaves():
    oracle = oracle_of("llama", prune_generated=True)
    talk = session("llama", oracle)
    with torch.no_grad():
        for written, new in [(3, 3), (4, 1), (5, 1)]:
            talk.step(tokens(1, new))
            assert pruned_positions(talk.stored()[0]) == list(range(max(0, written - 4)))


def spelled_out(layer, history, x_new, kept, recent):
    """One layer's attention output for the newest tokens, logits written as narrow keys, then full keys."""
    q, k, v = history["q"], history["k"], history["v"]
    past, total = k.shape[2] - x_new, k.shape[2]
    narrow = max(0, past - recent)
    out = torch.zeros(q.shape[0], layer.heads, x_new, layer.dim)
    for b in range(q.shape[0]):
        for h in range(layer.heads):
            kv = h // (layer.heads // layer.kv_heads)
            chosen = kept[b, kv].nonzero().flatten()
            for i in range(x_new):
                query = q[b, h, past + i]
                logits = [query[chosen] @ k[b, kv, p, chosen] for p in range(narrow)]
                logits += [query @ k[b, kv, p] for p in range(narrow, past + i + 1)]
                weights = (torch.stack(logits) * layer.dim**-0.5).softmax(0)
                out[b, h, i] = weights @ v[b, kv, : past + i + 1]
    assert total == past + x_new
    return layer.merge(out)


@torch.no_grad()
def test_one_layer_against_the_attention_spelled_out():
    model = own("tuple_cat")
    model.layers = model.layers[:1]
    oracle = Oracle(model, 0.5, 4, 8, 1, slots=slots_of("tuple_cat"))
    talk, layer = session("tuple_cat", oracle), model.layers[0]
    ids, start = tokens(2, 15), 0
    for new in [9, 1, 3, 1, 1]:
        logits = talk.step(ids[:, start : start + new])
        start += new
        x = model.embed(ids[:, :start])
        q, k, v = (t.transpose(1, 2) for t in layer.attention.project(layer.before(x), torch.arange(start)))
        history, recent = {"q": q, "k": k, "v": v}, 99 if start == new else 4
        out = spelled_out(layer.attention, history, new, oracle.decisions[0], recent)
        expected = model.head(model.norm(layer.mlp(x[:, -new:] + out)))
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------ decisions


@torch.no_grad()
def test_set_is_chosen_by_the_first_call_and_stays():
    oracle = oracle_of("llama")
    talk = session("llama", oracle)
    talk.step(tokens(2, 12))
    first = [layer.oracle_state.kept.clone() for layer in talk.cache.layers]
    for new in [7, 1, 1]:
        talk.step(tokens(2, new))
    assert len(oracle.decisions) == 2
    assert all(torch.equal(a, layer.oracle_state.kept) for a, layer in zip(first, talk.cache.layers, strict=True))


@torch.no_grad()
def test_chunked_prefill_chooses_from_the_first_chunk():
    ids = tokens(2, 20)
    chunked, whole = oracle_of("llama"), oracle_of("llama")
    talk = session("llama", chunked)
    talk.step(ids[:, :11])
    talk.step(ids[:, 11:])
    session("llama", whole).step(ids[:, :11])
    assert len(chunked.decisions) == 2
    assert all(torch.equal(a, b) for a, b in zip(chunked.decisions, whole.decisions, strict=True))


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_what_the_padding_says_changes_nothing(side):
    ids = tokens(3, 16)
    real = torch.ones_like(ids)
    real[1, slice(0, 6) if side == "left" else slice(10, 16)] = 0
    decisions = []
    for _ in range(2):
        oracle = oracle_of("llama")
        session("llama", oracle).step(torch.where(real.bool(), ids, tokens(3, 16)), real)
        decisions.append(oracle.decisions)
    assert all(torch.equal(a, b) for a, b in zip(*decisions, strict=True))


@torch.no_grad()
def test_right_padding_equals_the_sequence_alone():
    ids = tokens(2, 16)
    real = torch.ones_like(ids)
    real[1, 10:] = 0
    together, alone = oracle_of("llama"), oracle_of("llama")
    session("llama", together).step(ids, real)
    session("llama", alone).step(ids[1:, :10])
    assert all(torch.equal(a[1:], b) for a, b in zip(together.decisions, alone.decisions, strict=True))


@torch.no_grad()
def test_sets_differ_between_heads_and_sequences():
    oracle = oracle_of("llama")
    session("llama", oracle).step(tokens(3, 16))
    kept = oracle.decisions[1]
    assert not torch.equal(kept[:, 0], kept[:, 1])
    assert not torch.equal(kept[0], kept[1])


def test_packed_one_token_calls_are_unpacked():
    q = torch.randn(2, 6, 1, 4)
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    packed = Seen(q.reshape(2, 3, 2, 4), torch.randn(2, 3, 9, 4), mask, False).by_position(1)
    assert torch.equal(packed.q, q)
    assert packed.mask is mask


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@torch.no_grad()
def test_first_call_of_one_token(padded):
    oracle = oracle_of("llama")
    talk = session("llama", oracle)
    for _ in range(6):
        talk.step(tokens(2, 1), torch.ones(2, 1, dtype=torch.long) if padded else None)
    assert pruned_positions(talk.stored()[0]) == [0, 1]


# ------------------------------------------------------------------ nothing pruned, nothing changed


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("name", [*HUGGING_FACE, *WRITTEN_HERE])
@torch.no_grad()
def test_ratio_zero_is_the_plain_model(name, padded):
    oracle = oracle_of(name, ratio=0.0, rows=4)
    ours, plain = session(name, oracle), session(name, build(name, rows=4))
    real = torch.ones(4, 30, dtype=torch.long)
    real[1, :7] = 0
    for step in range(4):
        ids = tokens(4, 30 if step == 0 else 1)
        marks = real if step == 0 else real[:, -1:]
        args = (ids, marks) if padded else (ids,)
        assert torch.equal(ours.step(*args), plain.step(*args))
    assert all(torch.equal(a, b) for a, b in zip(ours.stored(), plain.stored(), strict=True))


@pytest.mark.parametrize("name", [*HUGGING_FACE, *WRITTEN_HERE])
@torch.no_grad()
def test_pruning_is_visible(name):
    """Conversely, at 0.5 the first call is exact and the next ones are far from the plain model."""
    oracle = oracle_of(name)
    ours, plain = session(name, oracle), session(name, build(name, rows=2))
    ids = tokens(2, 30)
    assert torch.equal(ours.step(ids), plain.step(ids))
    ids = tokens(2, 1)
    assert (ours.step(ids) - plain.step(ids)).abs().max() > 1e-2


@torch.no_grad()
def test_own_decoders_differ_only_in_how_they_keep_keys():
    ids = tokens(2, 14)
    outputs = []
    for name in WRITTEN_HERE:
        talk = session(name, oracle_of(name))
        outputs.append([talk.step(part) for part in ids.split([10, 1, 3], dim=1)])
    for other in outputs[1:]:
        for a, b in zip(outputs[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_static_equals_dynamic():
    oracle = oracle_of("llama")
    dynamic, static = session("llama", oracle), session("llama", oracle)
    static.cache = StaticCache(config=oracle.model.config, max_cache_len=CAPACITY)
    for new in [12, 1, 3, 1]:
        ids = tokens(2, new)
        torch.testing.assert_close(static.step(ids), dynamic.step(ids), rtol=1e-4, atol=1e-4)
    for a, b in zip(static.stored(), dynamic.stored(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_reset_static_cache_starts_anew():
    oracle = oracle_of("llama")
    talk = session("llama", oracle)
    talk.cache = StaticCache(config=oracle.model.config, max_cache_len=CAPACITY)
    talk.step(tokens(2, 12))
    talk.cache.reset()
    talk.length = 0
    talk.step(tokens(2, 12))
    assert len(oracle.decisions) == 4


@torch.no_grad()
def test_sliding_layers_stay_dense():
    oracle = oracle_of("gemma3")
    talk = session("gemma3", oracle)
    for new in [30, 1]:
        talk.step(tokens(2, new))
    zeros = [bool((keys == 0).any()) for keys in talk.stored()]
    assert zeros == [False, True]
    assert len(oracle.decisions) == 1


# ------------------------------------------------------------------ what users do to caches


@torch.no_grad()
def test_cropped_tokens_do_not_come_back():
    oracle = oracle_of("llama")
    talk = session("llama", oracle)
    talk.step(tokens(1, 12))
    talk.cache.crop(-3)
    talk.length = 9
    assert pruned_positions(talk.stored()[0]) == list(range(8))
    talk.step(tokens(1, 1))
    assert pruned_positions(talk.stored()[0]) == list(range(8))  # the last 4 would begin at 6
    for _ in range(3):
        talk.step(tokens(1, 1))
    assert pruned_positions(talk.stored()[0]) == list(range(9))


@torch.no_grad()
def test_branches_are_independent():
    oracle = oracle_of("llama")
    talk = session("llama", oracle)
    talk.step(tokens(1, 12))
    branch = copy.copy(talk)
    branch.cache = copy.deepcopy(talk.cache)
    before = branch.stored()[0].clone()
    talk.step(tokens(1, 2))
    assert torch.equal(branch.stored()[0], before)
    ids = tokens(1, 1)
    branch.step(ids)
    assert len(oracle.decisions) == 2
    assert pruned_positions(branch.stored()[0]) == list(range(9))


@torch.no_grad()
def test_selected_sequences_take_their_sets_along():
    oracle = oracle_of("llama")
    talk = session("llama", oracle)
    talk.step(tokens(3, 12))
    oracle.select(talk.cache, torch.tensor([2, 0]))
    talk.step(tokens(2, 1))
    kept = talk.cache.layers[0].oracle_state.kept
    assert torch.equal(kept, oracle.decisions[0][[2, 0]])
    assert torch.equal(talk.stored()[0][:, :, 8] != 0, kept)


@torch.no_grad()
def test_generate_runs_on_the_oracle():
    model = hugging_face("llama")
    oracle = Oracle(model, 0.5, 4, 8, 1)
    ids = tokens(2, 20)
    marks = torch.ones_like(ids)
    pruned = oracle.model.generate(ids, attention_mask=marks, max_new_tokens=8, do_sample=False)
    plain = model.generate(ids, attention_mask=marks, max_new_tokens=8, do_sample=False)
    assert pruned.shape == plain.shape
    assert not torch.equal(pruned, plain)
    assert len(oracle.decisions) == 2


# ------------------------------------------------------------------ the yardstick


@torch.no_grad()
def test_float64_keeps_the_same_channels():
    pair = Yardstick(hugging_face("mixtral"), 0.5, 4, 8, 1)
    same, exact = session("mixtral", pair.same), session("mixtral", pair.exact)
    for new in [12, 1]:
        ids = tokens(2, new)
        a, b = same.step(ids), exact.step(ids)
        assert b.dtype == torch.float64
        assert_close_to(a, a, b)
    for a, b in zip(same.stored(), exact.stored(), strict=True):
        assert torch.equal(a == 0, b == 0)


def test_comparison_is_strict():
    exact = torch.randn(50, dtype=torch.float64)
    same = exact.float()
    assert_close_to(same, same + 1e-6, exact)
    for wrong in (same + 1e-3, same.clone().index_fill_(0, torch.tensor([7]), float("nan"))):
        with pytest.raises(AssertionError, match="off by"):
            assert_close_to(same, wrong, exact)
    with pytest.raises(AssertionError, match="shape"):
        assert_close_to(same, same[:-1], exact)
    with pytest.raises(AssertionError, match="expected"):
        assert_close_to(same, same.half(), exact)
