"""The simulated methods against the independent oracle, and their rules one by one."""

import dataclasses

import pytest
import torch
import transformers
from oracle import CACHE, Oracle, assert_close_to
from random_lm import PRUNED, in_float64, random_model
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel, T5Config

from think_compile import think_compile
from think_compile.evals import methods, rules
from think_compile.evals.calls import Piece, TwoCalls
from think_compile.evals.methods import SimulatedLayer, apply
from think_compile.evals.rules import Observed, at_random, best, energy
from think_compile.evals.settings import METHODS, SIMULATED, Settings

HEADS, GROUPS, WIDTH = 2, 2, 32  # of the random model
RULES = {name: PRUNED[name] for name in ("ratio", "recent", "observe", "channel_multiple")}


def settings(method, **options):
    return Settings.of(method=method, **PRUNED | options)


def batch(rows=3, length=20):
    """Ids and mask, padded on the left by 0, 5, 10..."""
    ids, mask = torch.randint(2, 60, (rows, length)), torch.ones(rows, length, dtype=torch.long)
    for row in range(rows):
        mask[row, : 5 * row] = 0
    return ids, mask


def steps(model, ids, mask, sizes, cache=None):
    """Logits of successive calls on one cache."""
    logits, start = [], 0
    for size in sizes:
        end = start + size
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, start:end]
        options = {} if cache is None else {CACHE: cache}
        with torch.no_grad():
            output = model(
                input_ids=ids[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=positions,
                use_cache=True,
                **options,
            )
        cache, start = output[CACHE], end
        logits.append(output.logits)
    return torch.cat(logits, 1), cache


def simulated_steps(model, method, *args, **options):
    applied = apply(model, settings(method, **options))
    try:
        return steps(model, *args, cache=applied.new_cache())
    finally:
        applied.close()


# --------------------------------------------------------------------------------------------- against the oracle


@pytest.mark.parametrize("options", [{}, {"prune_generated": False}, {"channel_multiple": 12}], ids=str)
def test_simulated_method_is_the_oracle(options):
    """With padding, calls of many tokens and of one, and tokens that leave the window in between."""
    model, (ids, mask) = random_model(), batch()
    calls = [13, 4, 1, 1, 1]
    got, cache = simulated_steps(model, "simulated", ids, mask, calls, **options)
    oracle = Oracle(model, **RULES | options)
    same, _ = steps(oracle, ids, mask, calls)
    exact, _ = steps(Oracle(in_float64(model), **RULES | options, replay=oracle.decisions), ids, mask, calls)
    chosen = mask.bool()
    assert_close_to(same[chosen], got[chosen], exact[chosen])
    for layer, kept in zip(cache.layers, oracle.decisions, strict=True):
        assert torch.equal(layer.kept, kept)


def test_simulated_method_follows_the_batch():
    model, (ids, mask) = random_model(), batch()
    index = torch.tensor([2, 0, 0, 1])
    applied = apply(model, settings("simulated"))
    _, cache = steps(model, ids, mask, [17], cache=applied.new_cache())
    cache.batch_select_indices(index)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.arange(8).flip(0))
    rows = index.repeat_interleave(2).flip(0)
    positions = (mask[rows].cumsum(1) - 1)[:, 17:]
    with torch.no_grad():
        rest = {"input_ids": ids[rows][:, 17:], "attention_mask": mask[rows], "position_ids": positions}
        got = model(**rest, **{CACHE: cache}).logits
    expected = steps(model, ids, mask, [17, 3], cache=applied.new_cache())[0][rows][:, 17:]
    torch.testing.assert_close(got, expected)
    applied.close()


def test_layers_with_a_bounded_window_stay_dense():
    """Gemma 3 has both kinds of layers."""
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "hidden_size": 64}
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2}
    config = Gemma3TextConfig(**sizes, **kinds, intermediate_size=64, vocab_size=60, sliding_window=64)
    model = Gemma3ForCausalLM(config).eval()
    ids, mask = batch()
    _, cache = simulated_steps(model, "simulated", ids, mask, [17, 3])
    assert [isinstance(layer, SimulatedLayer) for layer in cache.layers] == [False, True]
    oracle = Oracle(model, **RULES)
    expected = steps(oracle, ids, mask, [17, 3])[0]
    got = simulated_steps(model, "simulated", ids, mask, [17, 3])[0]
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()])


# -------------------------------------------------------------------------------------------------- rule by rule


def zeroed_reference(model, ids, first, kept, old):
    """Logits after the `first` tokens, from keys repeated for all query heads and zeroed by hand.

    `kept` [layers, Hq, D] and `old(past)`: how many of the oldest tokens are narrow.
    """
    plain = torch.nn.functional.scaled_dot_product_attention
    layer = 0

    def zeroed(q, k, v, attn_mask=None, is_causal=False, scale=None, enable_gqa=False, **_):
        nonlocal layer
        past = k.shape[2] - q.shape[2]
        k, v = (x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        if past:
            k = k.clone()
            k[:, :, : old(past)] *= kept[layer][None, :, None]
        layer = (layer + 1) % len(kept)
        return plain(q, k, v, attn_mask=attn_mask, is_causal=is_causal, scale=scale)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", zeroed)
        return steps(model, ids, torch.ones_like(ids), first)[0]


@pytest.mark.parametrize("method", SIMULATED)
def test_each_method_reads_what_its_rule_leaves(method):
    """The channels are those kept by the layers; each method zeroes its own positions."""
    model, (ids, _) = random_model(), batch(rows=1)
    calls = [14, 4, 2]
    got, cache = simulated_steps(model, method, ids, torch.ones_like(ids), calls)
    kept = [layer.kept[0] for layer in cache.layers]
    assert all((mask.sum(-1) == WIDTH // 2).all() for mask in kept)
    wide = [mask if mask.shape[0] == HEADS * GROUPS else mask.repeat_interleave(GROUPS, 0) for mask in kept]
    old = (lambda past: 14) if method == "kvpress" else (lambda past: past - RULES["recent"])
    expected = zeroed_reference(model, ids, calls, torch.stack(wide).float(), old)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    dense = steps(model, ids, torch.ones_like(ids), calls)[0]
    assert (got - dense)[:, 14:].abs().max() > 0.1
    assert torch.equal(got[:, :14], dense[:, :14])  # the first call is exact


def observed(batch_size=2, queries=9, seed=3):
    q, k = torch.randn(batch_size, HEADS * GROUPS, queries, 8), torch.randn(batch_size, HEADS, queries, 8)
    chosen = torch.ones(batch_size, queries, dtype=torch.bool)
    chosen[1, :4] = False
    late = chosen & (torch.arange(queries) >= 6)
    return Observed(q, k, late, chosen, chosen, seed)


def test_rules_are_their_formulas():
    seen = observed()
    q, k = seen.q[1, :, 6:].double(), seen.k[1, :, 4:].double()  # the second sequence: padded, three observed
    q_energy, k_energy = q.square().mean(1), k.square().mean(1)
    expected = {
        "simulated": q_energy.view(HEADS, GROUPS, -1).mean(1) * k_energy,
        "kvpress": q_energy.view(HEADS, GROUPS, -1).mean(1) * k_energy,
        "per_query_head": q_energy * k_energy.repeat_interleave(GROUPS, 0),
        "magnitude": k_energy,
    }
    for name, scores in expected.items():
        torch.testing.assert_close(rules.RULES[name](seen)[1], scores.float())
    assert set(rules.RULES) == {*expected, "attended", "random"} == set(SIMULATED)


def test_keys_count_as_they_are_attended_to():
    """By loops, for the second sequence: padded, three observed queries, and one of two keys is not scored."""
    seen = observed()
    seen = dataclasses.replace(seen, keys=seen.keys & (torch.arange(9) % 2 == 1))
    expected = torch.zeros(HEADS, 8, dtype=torch.float64)
    for head in range(HEADS * GROUPS):
        k = seen.k[1, head // GROUPS].double()
        for i in range(6, 9):
            q = seen.q[1, head, i].double()
            probabilities = (k[4 : i + 1] @ q / 8**0.5).softmax(0)
            for s, p in zip(range(4, i + 1), probabilities, strict=True):
                expected[head // GROUPS] += q.square() * p * k[s].square() * (s % 2) / (3 * GROUPS)
    torch.testing.assert_close(rules.attended(seen)[1], expected.float())
    latest = dataclasses.replace(seen, q=seen.q[:, :, -5:], queries=seen.queries[:, -5:])
    torch.testing.assert_close(rules.attended(latest), rules.attended(seen))


def test_a_rule_is_the_papers_norm_of_products():
    """ThinK, equation 5: the channel's score is the Frobenius norm of its column of queries times that of keys."""
    seen = observed()
    q, k = seen.q[1, 1, 6:], seen.k[1, 0, 4:]
    norms = torch.stack([torch.linalg.matrix_norm(q[:, [j]] @ k[:, [j]].T) for j in range(8)])
    ours = rules.per_query_head(seen)[1, 1]
    torch.testing.assert_close(ours, norms.square() / (len(q) * len(k)))


def test_random_scores_depend_on_the_seed_alone():
    first, again, other = observed(seed=3), observed(batch_size=4, seed=3), observed(seed=4)
    assert torch.equal(at_random(first)[0], at_random(again)[3])
    assert not torch.equal(at_random(first), at_random(other))
    assert at_random(first).shape == (2, HEADS, 8)


def test_ties_go_to_the_lower_channel():
    assert best(torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0]), 3).tolist() == [True, True, False, True, False]


def test_energy_of_nothing_is_zero():
    assert energy(torch.ones(1, 1, 3, 4), torch.zeros(1, 3, dtype=torch.bool)).sum() == 0


def test_scoring_over_old_keys_leaves_out_the_window():
    """Keys of the last tokens are huge in some channels: only scores over all keys see that."""
    model, (ids, mask) = random_model(num_hidden_layers=1), batch()
    kept = {}
    for over in ("all", "old"):
        _, cache = simulated_steps(model, "magnitude", ids, mask, [20], score_over=over)
        kept[over] = cache.layers[0].kept
    _, cache = steps(model, ids, mask, [20])
    keys = cache.layers[0].keys
    old = mask.bool().clone()
    old[:, -RULES["recent"] :] = False
    assert torch.equal(kept["old"], best(energy(keys, old), WIDTH // 2))
    assert torch.equal(kept["all"], best(energy(keys, mask.bool()), WIDTH // 2))
    assert not torch.equal(kept["old"], kept["all"])


def test_kept_channels_are_rounded_up_but_for_kvpress():
    model, (ids, mask) = random_model(), batch()
    for method, count in (("simulated", 24), ("kvpress", 16), ("random", 24)):
        _, cache = simulated_steps(model, method, ids, mask, [20], channel_multiple=24)
        assert (cache.layers[0].kept.sum(-1) == count).all()


# ---------------------------------------------------------------------------------------------- applied and undone


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_undone(method):
    model, (ids, mask) = random_model(), batch()
    plain = steps(model, ids, mask, [17, 3])[0]
    functions = dict(transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS)
    applied = apply(model, settings(method))
    applied.close()
    assert torch.equal(steps(model, ids, mask, [17, 3])[0], plain)
    assert dict(transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS) == functions
    assert not model._forward_pre_hooks


def test_two_models_are_simulated_side_by_side():
    one, two = random_model(), random_model()
    ids, mask = batch()
    expected = [simulated_steps(one, method, ids, mask, [17, 3])[0] for method in ("magnitude", "random")]
    applied = [apply(model, settings(name)) for model, name in ((one, "magnitude"), (two, "random"))]
    for model, method, logits in zip((one, two), applied, expected, strict=True):
        assert torch.equal(steps(model, ids, mask, [17, 3], cache=method.new_cache())[0], logits)
    for method in applied:
        method.close()


def test_a_cache_of_its_own_is_needed():
    model, (ids, mask) = random_model(), batch()
    applied = apply(model, settings("simulated"))
    with pytest.raises(ValueError, match="needs a cache that it made"):
        steps(model, ids, mask, [17, 3], cache=transformers.DynamicCache(config=model.config))
    applied.close()


def test_without_a_cache_nothing_is_pruned():
    model, (ids, mask) = random_model(), batch()
    applied = apply(model, settings("simulated"))
    got = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    applied.close()
    torch.testing.assert_close(got, model(input_ids=ids, attention_mask=mask, use_cache=False).logits)


class OwnAttention(GPT2LMHeadModel):
    """Declares what transformers detects in models outside its registry."""

    @classmethod
    def _can_set_attn_implementation(cls):
        return False


class NoSdpa(GPT2LMHeadModel):
    _supports_sdpa = False


@pytest.mark.parametrize(("kind", "complaint"), [(OwnAttention, "registry"), (NoSdpa, "scaled_dot_product")])
def test_a_model_that_cannot_be_simulated_is_refused(kind, complaint):
    model = kind(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=60))
    functions = dict(transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS)
    with pytest.raises(ValueError, match=rf"{complaint}.* methods think and dense need no such thing"):
        apply(model, settings("random"))
    assert dict(transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS) == functions


def test_a_wrapped_model_is_refused():
    model = think_compile(random_model(), lowering="eager")
    with pytest.raises(ValueError, match="wrapped by think_compile already"):
        apply(model, settings("think"))


def test_a_model_without_a_cache_is_refused():
    encoder = transformers.T5EncoderModel(T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(ValueError, match="T5EncoderModel takes no cache"):
        TwoCalls(encoder, methods.Dense(encoder, settings("dense")))


def test_a_cache_that_cannot_be_shared_is_refused():
    model = random_model()
    calls = TwoCalls(model, methods.Dense(model, settings("dense")))
    filled = calls.fill([(3, 4, 5)])
    filled.cache.layers = [object()]
    with pytest.raises(ValueError, match="cannot share a cache with object"):
        list(calls._read_all(filled, [(0, (7,)), (0, (8,))], 2))


def test_a_copied_cache_keeps_its_channels():
    model = random_model()
    applied = apply(model, settings("simulated"))
    calls = TwoCalls(model, applied)
    alone = calls.score([Piece((3, 4, 5, 6, 7, 8, 9), (10,), (11,))], 1)[0].logits
    twice = calls.score([Piece((3, 4, 5, 6, 7, 8, 9), (10 + n,), (11,)) for n in range(2)], 1)
    applied.close()
    torch.testing.assert_close(twice[0].logits, alone)
    assert [scored.narrow for scored in twice] == [1, 1]
