"""Every model family against the oracle: logits of each call, cache contents, rewritten layers."""

import copy
from dataclasses import dataclass

import pytest
import torch
from compare import Rules, Trio, padding, tokens
from models import CAPACITY, HUGGING_FACE, WRITTEN_HERE, hugging_face, own, session, sliding_layers
from transformers import StaticCache

from think_compile import report, think_compile


@dataclass(frozen=True)
class Setting:
    """One run: pruning rules, batch, prompt, and the calls after it."""

    rules: Rules
    batch: int = 2
    prompt: int = 40
    padded: str = "none"
    steps: tuple[int, ...] = (1,) * 11

    @property
    def calls(self) -> list[int]:
        return [self.prompt, *self.steps]

    @property
    def graphs(self) -> int:
        """First call, one-token calls, several-token calls; a past of one token has its own shape."""
        return 2 + any(step > 1 for step in self.steps) + (self.prompt == 1)


SETTINGS = {
    "half": Setting(Rules(0.5, recent=8, observe=16, channel_multiple=16)),
    "left": Setting(Rules(0.5, recent=4, observe=8), batch=3, padded="left"),
    "right": Setting(Rules(0.75, recent=8, observe=32), batch=3, padded="right"),
    "third": Setting(Rules(0.3, recent=4, observe=16), padded="left"),
    "most": Setting(Rules(0.75, recent=4, observe=32, channel_multiple=16), padded="left"),
    "zero": Setting(Rules(0.0, recent=4, observe=8, channel_multiple=16), padded="left"),
    "zero_plain": Setting(Rules(0.0, recent=8, observe=16)),
    "short": Setting(Rules(0.75, recent=8, observe=16), prompt=5, steps=(1,) * 8 + (5, 1)),
    "one": Setting(Rules(0.5, recent=4, observe=16), batch=1, prompt=1),
    "paper": Setting(Rules(0.3, recent=4, observe=8, prune_generated=False), batch=1),
    "no_window": Setting(Rules(0.5, recent=0, observe=8), padded="right"),
}

# Nearly every family runs with every ratio; multiples, padding and windows are spread over the families.
FAMILIES = {
    "llama": [*SETTINGS],
    "qwen3": ["half", "right", "short"],
    "gemma3": ["half", "left", "third"],
    "gemma3_deep": ["left"],
    "gpt2": ["left", "most", "short"],
    "opt": ["half", "right", "zero"],
    "falcon": ["half", "left", "zero_plain"],
    "falcon_new": ["third", "right"],
    "phi3": ["half", "left", "paper"],
    "olmo2": ["third", "most"],
    "mixtral": ["left", "zero_plain"],
    "starcoder2": ["right", "half"],
    "gpt_neox": ["half", "left", "no_window"],
    "tuple_cat": ["half", "left", "short", "zero"],
    "bshd_cat": ["half", "right", "short", "zero_plain"],
    "buffer_index_put": ["half", "left", "short", "zero_plain"],
    "buffer_slice": ["half", "right", "short", "zero"],
    "buffer_index_copy": ["third", "left", "no_window"],
}
# One padded setting of each family in every run, "left" if it has that. The other settings repeat tests of the same
# style of cache: slow.
OFTEN = {
    name: "left" if "left" in settings else next(s for s in settings if SETTINGS[s].padded != "none")
    for name, settings in FAMILIES.items()
}
OF_LLAMA = {"one", "paper", "short", "no_window"}  # each difference between settings, once


def is_often(name: str, setting: str) -> bool:
    return setting == OFTEN[name] or (name == "llama" and setting in OF_LLAMA)


CASES = [
    pytest.param(name, s, id=f"{name}-{s}", marks=[] if is_often(name, s) else pytest.mark.slow)
    for name, settings in FAMILIES.items()
    for s in settings
]


def follow(trio: Trio, setting: Setting) -> None:
    """The whole run, teacher-forced with random tokens."""
    ids = tokens(setting.batch, sum(setting.calls))
    real = padding(setting.padded, setting.batch, setting.prompt)
    trio.run(ids, setting.calls, real)


def layers_of(trio: Trio) -> int:
    return len(trio.got.raw())


def check_report(trio: Trio, name: str) -> None:
    """Every full layer was rewritten, every sliding one refused with a reason."""
    found, sliding = report(trio.model), sliding_layers(name)
    assert len(found.rewritten) == layers_of(trio) - sliding
    assert len(found.refused) == sliding
    assert all(record.reason is not None for record in found.refused)
    assert all(record.kept == trio.rules.kept for record in found.rewritten)
    trio.check_handles(layers_of(trio) - sliding)


def test_every_family_is_covered():
    assert set(FAMILIES) == {*HUGGING_FACE, *WRITTEN_HERE}


@pytest.mark.parametrize(("name", "setting"), CASES)
@torch.no_grad()
def test_eager(name, setting):
    setting = SETTINGS[setting]
    trio = Trio(name, setting.rules, rows=setting.batch)
    follow(trio, setting)
    check_report(trio, name)
    # If the prompt overfills a window, it is once a strided view: one more graph, in plain torch.compile too.
    assert report(trio.model).graphs == setting.graphs + (sliding_layers(name) > 0)


STATIC = [
    *(pytest.param("llama", s, id=f"llama-{s}") for s in ("left", "right", "zero", "short")),
    *(pytest.param("qwen3", s, id=f"qwen3-{s}", marks=pytest.mark.slow) for s in ("left", "most")),
]


@pytest.mark.parametrize(("name", "setting"), STATIC)
@torch.no_grad()
def test_static(name, setting):
    setting = SETTINGS[setting]
    trio = Trio(name, setting.rules)
    trio.begin(lambda: StaticCache(config=trio.plain.config, max_cache_len=CAPACITY))
    follow(trio, setting)
    check_report(trio, name)
    assert {record.cache for record in report(trio.model).rewritten} == {"fixed"}
    assert report(trio.model).graphs == setting.graphs


INDUCTOR = [("llama", "left"), ("buffer_index_put", "left")]  # a growing cache and a fixed one; slow: the other styles
MORE = ["gemma3", "gpt2", "tuple_cat", "bshd_cat", "buffer_slice", "buffer_index_copy", "mixtral", "gpt_neox"]
INDUCTOR_CASES = [pytest.param(*case, id="-".join(case)) for case in INDUCTOR] + [
    pytest.param(name, s, id=f"{name}-{s}", marks=pytest.mark.slow) for name in MORE for s in ("left", "short")
]


@pytest.mark.parametrize(("name", "setting"), INDUCTOR_CASES)
@torch.no_grad()
def test_inductor(name, setting):
    setting = SETTINGS[setting]
    trio = Trio(name, setting.rules, rows=setting.batch, lowering="inductor")
    follow(trio, setting)
    check_report(trio, name)


@torch.no_grad()
def test_a_buffer_with_rows_to_spare_is_refused_and_exact():
    """Only part of the cache's batch is written: that layer runs as the model wrote it."""
    model = own("buffer_slice", rows=3)
    ours = think_compile(copy.deepcopy(model), lowering="eager", recent=4)
    got, plain = session("buffer_slice", ours), session("buffer_slice", model)
    with pytest.warns(UserWarning, match="nothing was rewritten"):
        for new in [20, 1, 1, 1]:
            ids = tokens(2, new)
            torch.testing.assert_close(got.step(ids), plain.step(ids))
    assert len(report(ours).refused) == 2


# ------------------------------------------------------------------ the default lowering through a longer life


def life(trio: Trio, batch: int) -> None:
    """Padding, several-token calls, crops, branches, other batches and lengths, one after the other."""
    trio.run(tokens(batch, 27), [20, 1, 1, 1, 4], padding("left", batch, 20))
    branch, real = trio.branch(), torch.ones(batch, 1, dtype=torch.long)
    for _ in range(3):
        trio.run(tokens(batch, 1), [1], real)
        branch.run(tokens(batch, 1), [1], real)
    trio.check_caches()


@pytest.mark.slow  # nine graphs, mixing cases that other tests try one by one
@pytest.mark.parametrize("lowering", ["eager", "inductor"])
@torch.no_grad()
def test_a_life(lowering):
    trio = Trio(lowering=lowering)
    life(trio, 3)
    trio.crop(6)
    trio.select(torch.tensor([2, 0]))
    trio.run(tokens(2, 4), [1, 1, 2], torch.ones(2, 4, dtype=torch.long))


@pytest.mark.slow
@torch.no_grad()
def test_inductor_with_conversations_of_many_sizes():
    """Slices of a longer ids tensor keep its stride, which differs between two conversations."""
    trio = Trio(lowering="inductor")
    for batch, prompt in [(2, 20), (2, 13), (2, 31), (7, 9), (1, 12)]:
        trio.begin().run(tokens(batch, prompt + 4), [prompt, 1, 1, 1, 1])


@pytest.mark.slow
@torch.no_grad()
def test_inductor_through_a_life_static():
    trio = Trio(lowering="inductor")
    trio.begin(lambda: StaticCache(config=trio.plain.config, max_cache_len=CAPACITY))
    life(trio, 2)


@pytest.mark.slow
@torch.no_grad()
def test_inductor_growing_store():
    trio = Trio(lowering="inductor")
    trio.run(tokens(2, 10), [10])
    for _ in range(150):
        trio.step(tokens(2, 1))
    trio.check_caches()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_inductor_in_low_precision(dtype):
    """Inductor does not round the products that choose channels, so near ties may differ from the oracle. Nothing is
    pruned here: only the arithmetic is compared."""
    trio = Trio(rules=Rules(0.0), model=hugging_face("llama").to(dtype), lowering="inductor")
    trio.run(tokens(2, 32), [20, *[1] * 9, 3], padding("left", 2, 20))


# --------------------------------------------------------------------------------- handles in calls of no graph of ours


@pytest.mark.parametrize("prune_generated", [True, pytest.param(False, marks=pytest.mark.slow)])
@torch.no_grad()
def test_a_packed_cache_read_op_by_op(prune_generated):
    """The plain model on a packed cache, as torch runs it beyond its recompile limit: same logits."""
    trio = Trio(rules=Rules(0.5, recent=4, prune_generated=prune_generated))
    trio.run(tokens(2, 27), [20, 1, 1, 5])
    call = trio.model._compiled_call_impl
    for new in (1, 1, 3, 1, 9, 1):
        trio.model._compiled_call_impl = None
        trio.step(tokens(2, new))
        trio.model._compiled_call_impl = call
        trio.run(tokens(2, 2), [1, 1])
    trio.check_handles(layers_of(trio))


@pytest.mark.slow
@torch.no_grad()
def test_many_conversations_stay_compiled():
    """More kinds of calls than torch's own recompile limit."""
    trio = Trio()
    for batch in (1, 2):
        for prompt in (1, 2, 17):
            for side in ("none", "left"):
                trio.begin()
                trio.run(tokens(batch, prompt + 2), [prompt, 1, 1], padding(side, batch, prompt))
                trio.check_handles(layers_of(trio))
    assert report(trio.model).graphs > 8
