"""Layers that keep a bounded window, against the oracle: filling, full and overrun, and left alone by default."""

import pytest
import torch
from compare import Rules, Trio, padding, tokens
from models import hugging_face
from transformers import StaticCache
from windows import BUFFER, CUTS, Kind, register
from written_out import Style

from think_compile import report, think_compile
from think_compile.cache.handle import Handle
from think_compile.passes.refusal import Reason

RULES = Rules(recent=4, sliding=True)
SOFTCAP = Style(extra="softcap")
FILLING = [7, 1, 1, 3, 1, 1, 1, 1, 1, 1]  # 16 tokens are in the window
OVERRUN = [9, 5, 1, 30, 1, 2, 1]
LONG = [40, 1, 1, 1, 20, 1]


def follow(name: str, *talks: list[int], rules: Rules = RULES, side: str = "none", lowering: str = "eager") -> Trio:
    """Conversations in which every cache is compared; all layers must have been rewritten."""
    trio = Trio(name, rules, lowering=lowering)
    for calls in talks:
        trio.begin().run(tokens(2, sum(calls)), calls, padding(side, 2, calls[0]))
    found = report(trio.model)
    assert not found.refused, str(found)
    trio.check_handles(len(trio.got.raw()))
    return trio


KINDS = [Kind(cut, stock, style=style) for cut in CUTS for stock, style in [(True, Style()), (False, SOFTCAP)]]
OTHERS = [Kind(cut, by="positive") for cut in CUTS] + [Kind(style=Style(layout="bs(hd)")), Kind(stock=False)]


def often(cases, *places):
    """The kinds at these indices run every time; the others repeat them in other combinations, and are slow."""
    return [case if i in places else pytest.param(case, marks=pytest.mark.slow) for i, case in enumerate(cases)]


@pytest.mark.parametrize("kind", often(KINDS, 3), ids=str)
@torch.no_grad()
def test_each_cut(kind):
    follow(register(kind), FILLING, OVERRUN, LONG, side="left")


@pytest.mark.parametrize("kind", often(OTHERS, 1, 3), ids=str)
@torch.no_grad()
def test_other_ways_to_cut(kind):
    follow(register(kind), [7, 1, 8, 1, 1, 20, 1])


@pytest.mark.parametrize(
    ("stock", "calls"),
    [
        pytest.param(True, FILLING, id="stock-filling", marks=pytest.mark.slow),
        pytest.param(True, LONG, id="stock-long"),
        pytest.param(False, FILLING, id="softcap-filling"),
        pytest.param(False, LONG, id="softcap-long", marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_generated_tokens_left_whole(stock, calls):
    """They stay whole until they leave the layer's window; the first call's tokens leave first."""
    follow(register(Kind(stock=stock, style=SOFTCAP)), calls, rules=Rules(prune_generated=False, sliding=True))


@pytest.mark.parametrize("recent", often([0, 1, 14, 15, 40], 0, 2, 3))
@torch.no_grad()
def test_recent_tokens_beside_the_window(recent):
    """The layer keeps 15 tokens: if all are recent, there is nothing to prune, and it is left alone."""
    rules = Rules(recent=recent, sliding=True)
    if recent < 15:
        follow(register(Kind()), [7, 1, 12, 1], rules=rules)
        return
    with pytest.warns(UserWarning, match="all of which stay whole"):
        trio = Trio(register(Kind()), rules)
        trio.run(tokens(2, 22), [20, 1, 1])
    trio.check_handles(0)
    assert [record.reason for record in report(trio.model).refused] == [Reason.WINDOW_TOO_SMALL]


@pytest.mark.parametrize("cut", ["kept", "read"])
@torch.no_grad()
def test_left_alone_by_default(cut):
    trio = Trio(register(Kind(cut)), Rules(recent=4))
    with pytest.warns(UserWarning, match="bounded window"):
        trio.run(tokens(2, 32), [7, 1, 20, 1, 1, 1, 1])
    assert [record.reason for record in report(trio.model).refused] == [Reason.SLIDING]
    trio.check_handles(0)


@torch.no_grad()
def test_a_past_cut_before_it_is_joined_is_not_told_from_a_growing_one_by_its_first_call():
    trio = Trio(register(Kind("past")), Rules(recent=4))
    trio.step(tokens(2, 7))
    trio.check_handles(1)
    with pytest.warns(UserWarning, match="read densely from now on.*bounded window") as seen:
        trio.got.step(tokens(2, 1))
    assert len(seen) == 1
    assert [record.reason for record in report(trio.model).refused] == [Reason.SLIDING]
    trio.begin().run(tokens(2, 12), [7, 1, 1, 3])  # the next conversation is left alone from its first call on
    trio.check_handles(0)


@pytest.mark.parametrize(
    ("calls", "side"),
    [([18, *[1] * 7, 5, 1], "left"), ([40, 1, 1, 30, 1], "none")],
)
@pytest.mark.slow  # models with both kinds of layers run in test_families
@torch.no_grad()
def test_beside_full_layers(calls, side):
    """Gemma 3: layers with a window of 24 and full ones in one graph, whose lengths are equal while it fills."""
    trio = follow("gemma3_deep", calls, rules=Rules(recent=8, sliding=True), side=side)
    kinds = [record.cache for record in report(trio.model).rewritten]
    assert kinds == ["sliding", "growing"] * 2


@torch.no_grad()
def test_generation():
    """Beams reorder the caches; the tokens are those of the oracle's own model at ratio 0."""
    model, ids = hugging_face("gemma3"), tokens(2, 20)
    options = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    expected = model.generate(ids, **options)
    ours = think_compile(hugging_face("gemma3"), 0.0, recent=4, sliding=True, lowering="eager")
    assert torch.equal(ours.generate(ids, **options), expected)
    assert len(report(ours).rewritten) == 2


@pytest.mark.slow  # a minute of compiling, for one more shape of a growing cache
@pytest.mark.parametrize("kind", [Kind(), KINDS[3]], ids=str)
@torch.no_grad()
def test_inductor(kind):
    follow(register(kind), [13, *[1] * 20], side="left", lowering="inductor")


@pytest.mark.slow
@torch.no_grad()
def test_inductor_beside_full_layers():
    follow("gemma3", [10, *[1] * 18, 5, 1], rules=Rules(recent=8, sliding=True), side="left", lowering="inductor")


@torch.no_grad()
def test_memory_and_graphs_are_bounded():
    """Many steps: the rows of a full window are used again, and its calls are one graph."""
    trio = Trio(register(Kind()), RULES)
    trio.run(tokens(2, 20), [20])
    for _ in range(3):
        trio.step(tokens(2, 1))
    graphs, most = report(trio.model).graphs, 0
    for _ in range(220):
        trio.step(tokens(2, 1))
        most = max(most, report(trio.model).stored_bytes)
    trio.check_caches()
    assert report(trio.model).graphs == graphs
    store = trio.got.raw()[0].store
    assert store.length == 15
    assert store.rows.capacity <= 48
    one = sum(t.nbytes for t in store.tensors()) + trio.got.past[0][1].store.rows.parts["rows"].nbytes
    assert most <= 2.5 * one  # while a buffer is copied there are two


@torch.no_grad()
def test_branches_and_selections():
    trio = Trio(register(Kind()), RULES)
    trio.run(tokens(3, 22), [20, 1, 1])
    earlier = [keys.dense().clone() for keys in trio.got.raw()]
    held = trio.got.raw()
    for _ in range(40):
        trio.step(tokens(3, 1))
    assert all(torch.equal(keys.dense(), was) for keys, was in zip(held, earlier, strict=True))
    trio.check_caches()


@torch.no_grad()
def test_a_packed_window_read_op_by_op():
    """The plain model on a packed cache: joins and slices outside any graph."""
    trio = Trio(register(Kind()), RULES)
    trio.run(tokens(2, 14), [12, 1, 1])
    call = trio.model._compiled_call_impl
    for new in (1, 1, 3, 1, 20, 1):
        trio.model._compiled_call_impl = None
        trio.step(tokens(2, new))
        trio.model._compiled_call_impl = call
        trio.run(tokens(2, 1), [1])
    assert all(isinstance(keys, Handle) and not keys.is_dense for keys in trio.got.raw())


IN_BUFFERS = [
    Kind(BUFFER, by="roll"),
    Kind(BUFFER, by="cat", style=Style(layout="bshd")),
    Kind(BUFFER, stock=False, by="roll", style=SOFTCAP),
    Kind(BUFFER, stock=False, by="cat", style=Style(layout="bs(hd)")),
    Kind(BUFFER, stock=False, by="roll", style=Style(layout="sbhd", product="einsum")),
]


@pytest.mark.parametrize("kind", often(IN_BUFFERS, 0), ids=str)
@torch.no_grad()
def test_buffers_whose_rows_move_up(kind):
    follow(register(kind), [*FILLING, 1, 5, 1], OVERRUN, LONG)


def filled_cache(tokens_at_most: int = 128):
    """Hugging Face's cache of fixed size, whose sliding layers move their rows up in a buffer."""
    config = hugging_face("gemma3").config
    return lambda: StaticCache(config=config, max_cache_len=tokens_at_most)


FULL_BY_STEPS = [18, *[1] * 9, 5, 1, 1]
FULL_AT_ONCE = [40, 1, 1, 1, 30, 1]
OVERRUN_LATER = [9, 1, 20, 1, 1, 2, 1]
EXACTLY_FULL = [24, 1, 1, 3, 24, 1]


@pytest.mark.parametrize(
    ("calls", "prune_generated"),
    [
        (FULL_BY_STEPS, True),
        pytest.param(FULL_AT_ONCE, True, marks=pytest.mark.slow),
        pytest.param(OVERRUN_LATER, False, marks=pytest.mark.slow),
        pytest.param(EXACTLY_FULL, True, marks=pytest.mark.slow),
        pytest.param(FULL_AT_ONCE, False, marks=pytest.mark.slow),
    ],
    ids=str,
)
@torch.no_grad()
def test_windows_in_buffers(calls, prune_generated):
    """24 tokens, beside full layers: filling, overrun by a call or step by step, moved up by one or many."""
    trio = Trio("gemma3", Rules(recent=8, sliding=True, prune_generated=prune_generated), cache=filled_cache())
    trio.run(tokens(2, sum(calls)), calls)
    assert not report(trio.model).refused, str(report(trio.model))
    trio.check_handles(2)


@pytest.mark.parametrize("calls", often([[30, 1, 4, 1], [10, *[1] * 16, 3]], 0), ids=str)
@torch.no_grad()
def test_windows_in_buffers_with_padding(calls):
    trio = Trio("gemma3", Rules(recent=8, sliding=True), cache=filled_cache())
    trio.run(tokens(2, sum(calls)), calls, padding("left", 2, calls[0]))
    trio.check_handles(2)


@torch.no_grad()
def test_a_buffer_that_is_reset_begins_anew():
    """The second conversation's first call fills or overruns a buffer that still has its handle."""
    trio = Trio("gemma3", Rules(recent=8, sliding=True), cache=filled_cache())
    trio.run(tokens(2, 32), [30, 1, 1])
    for first in (40, 9):
        for talk in trio.sessions:
            talk.cache.reset()
            talk.length = 0
            for layer in talk.cache.layers:
                vars(layer).pop("oracle_state", None)
        trio.run(tokens(2, first + 20), [first, 1, 1, 17, 1])
        trio.check_handles(2)


@torch.no_grad()
def test_what_a_full_buffer_takes():
    """Narrow rows, the ring and the channels, nothing else; many steps use one graph."""
    trio = Trio("gemma3", Rules(recent=8, sliding=True), cache=filled_cache())
    trio.run(tokens(2, 28), [26, 1, 1])
    trio.step(tokens(2, 1))  # its ids have other strides than slices of a longer tensor
    graphs = report(trio.model).graphs
    for _ in range(20):
        trio.step(tokens(2, 1))
    assert report(trio.model).graphs == graphs
    store = trio.got.raw()[0].store
    assert tuple(store.rows.parts["rows"].shape[2:]) == (24, trio.rules.kept)
    assert store.own["ring"].shape[2] == 9 and (store.own["counters"] - store.own["counters"][2]).tolist() == [
        16,
        24,
        0,
    ]


@torch.no_grad()
def test_generation_with_windows_in_buffers():
    model, ids = hugging_face("gemma3"), tokens(2, 20)
    options = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": "static"}
    expected = model.generate(ids, **options)
    ours = think_compile(hugging_face("gemma3"), 0.0, recent=4, sliding=True, lowering="eager")
    assert torch.equal(ours.generate(ids, **options), expected)
    assert len(report(ours).rewritten) == 2 and not report(ours).refused


@pytest.mark.slow
@torch.no_grad()
def test_inductor_with_windows_in_buffers():
    calls = [20, *[1] * 8, 5, 1]
    trio = Trio("gemma3", Rules(recent=8, sliding=True), cache=filled_cache(), lowering="inductor")
    trio.run(tokens(2, sum(calls)), calls)
    trio.check_handles(2)
