"""Replays of repeated steps, without a new look at their inputs; with a stand-in for the CUDA graph."""

import copy
import dataclasses
import gc
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from oracle import CACHE
from tiny import tiny_llama
from transformers import StaticCache

from think_compile import CacheFull, restore, think_compile
from think_compile.cache.cell import Cell
from think_compile.cache.handle import LostWrite, handle_for
from think_compile.runtime import capture
from think_compile.runtime.repeat import Repeated

ROOM, PROMPT = 24, 9


class StandIn(capture.Capture):
    """A capture that runs the graph on replay: in-place inputs at their addresses, copies of the others."""

    def __init__(self, lowered, values, signature):
        self.signature, self.lowered, self.given = signature, lowered, list(values)
        self.copied = [i for i in signature.others if isinstance(values[i], torch.Tensor)]
        self.parts = [None] * len(self.copied)
        self.inputs = [values[i].clone() for i in self.copied]
        for i, tensor in zip(self.copied, self.inputs, strict=True):
            self.given[i] = tensor
        self.graph, self.outputs = self, []

    def replay(self, values):
        torch._foreach_copy_(self.inputs, self._of(values))
        return [x.clone() if isinstance(x, torch.Tensor) else x for x in self.lowered(self.given)]


@pytest.fixture
def repeated(monkeypatch):
    """For each step, whether it repeats the last."""
    monkeypatch.setattr(capture, "Capture", StandIn)
    monkeypatch.setattr(capture, "obstacle", lambda values: "")
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda gm, inputs, config_patches=None: gm.forward)
    found, values = [], Repeated.values

    def counted(self, args):
        result = values(self, args)
        found.append(result is not None)
        return result

    monkeypatch.setattr(Repeated, "values", counted)
    return found


@pytest.fixture
def models():
    """The model, wrapped, and a copy that neither captures nor repeats."""
    ours = tiny_llama()
    theirs = copy.deepcopy(ours)
    rules = {"recent": 2, "observe": 4, "channel_multiple": 1}
    return think_compile(ours, 0.5, **rules), think_compile(theirs, 0.5, lowering="eager", **rules)


def both(models, ids, caches):
    """Call both, and compare."""
    logits = [model(ids, **{CACHE: cache}).logits for model, cache in zip(models, caches, strict=True)]
    assert torch.equal(*logits)


def begun(models, steps=4):
    """Caches after a prompt and ``steps`` steps."""
    caches = [StaticCache(config=models[0].config, max_cache_len=ROOM) for _ in models]
    both(models, torch.randint(0, 60, (2, PROMPT)), caches)
    for _ in range(steps):
        both(models, torch.randint(0, 60, (2, 1)), caches)
    return caches


def test_a_large_input_of_another_shape_is_no_step_like_the_last():
    """It is read in place, so its address alone does not identify it."""
    large = torch.empty(capture.LARGE, dtype=torch.uint8)
    made = SimpleNamespace(signature=capture.Signature([large], frozenset()))
    last = Repeated([large], made, {0: 0}, [])
    assert last.values([large]) == {} and last.values([large.view(2, -1)]) is None


def talk(model, ids):
    """Logits of a prompt and of steps on a cache of their own."""
    cache = StaticCache(config=model.config, max_cache_len=ROOM)
    with torch.no_grad():
        parts = [ids[:, :PROMPT], *ids[:, PROMPT:].split(1, 1)]
        return torch.cat([model(part.contiguous(), **{CACHE: cache}).logits for part in parts], 1)


def test_threads_take_turns(models, repeated, monkeypatch):
    """A replay lets the other thread run, as that of a CUDA graph does."""
    replay = StandIn.replay
    monkeypatch.setattr(StandIn, "replay", lambda self, values: [time.sleep(0.003), replay(self, values)][1])
    ours, theirs = models
    talks = [torch.randint(0, 60, (1, PROMPT + 12)) for _ in range(4)]
    talk(ours, talks[0])  # compiles
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda ids: talk(ours, ids), talks))
    for ids, logits in zip(talks, found, strict=True):
        assert torch.equal(logits, talk(theirs, ids))
    assert any(repeated)


@torch.no_grad()
def test_all_steps_behind_the_second_replay(models, repeated):
    begun(models, steps=12)
    assert repeated == [True] * 9  # the first compiles, the second captures, the third replays


@torch.no_grad()
def test_in_inference_mode(models, repeated):
    with torch.inference_mode():
        begun(models, steps=8)
    assert repeated == [True] * 5


@torch.no_grad()
def test_another_cache(models, repeated):
    first, second = begun(models), begun(models)
    for caches in (first, second, second, first):
        both(models, torch.randint(0, 60, (2, 1)), caches)
    assert not all(repeated) and any(repeated)


@torch.no_grad()
def test_other_handles_on_the_same_memory(models, repeated):
    caches = begun(models)
    for layer in caches[0].layers:
        layer.keys, layer.values = (
            handle_for(Cell(dataclasses.replace(x.store)), x.axes) for x in (layer.keys, layer.values)
        )
    for _ in range(3):
        both(models, torch.randint(0, 60, (2, 1)), caches)
    assert repeated == [True, False, True, True]


@torch.no_grad()
def test_a_cache_that_is_begun_again(models, repeated):
    caches = begun(models)
    for cache in caches:
        cache.reset()
    both(models, torch.randint(0, 60, (2, PROMPT + 3)), caches)
    for _ in range(4):
        both(models, torch.randint(0, 60, (2, 1)), caches)
    assert all(repeated[-3:])


@torch.no_grad()
def test_weights_in_another_place(models, repeated):
    caches = begun(models)
    for model in models:
        weight = model.model.layers[1].mlp.up_proj.weight
        weight.data = weight.data * 2
    for _ in range(4):
        both(models, torch.randint(0, 60, (2, 1)), caches)
    assert repeated == [True, False, True]  # in between, one step runs uncaptured and one is captured


@torch.no_grad()
def test_weights_that_changed_where_they_are(models, repeated):
    caches = begun(models)
    for model in models:
        model.model.layers[1].mlp.up_proj.weight.mul_(2)
    both(models, torch.randint(0, 60, (2, 1)), caches)
    assert all(repeated)


@torch.no_grad()
def test_a_cache_that_became_dense(models, repeated):
    caches = begun(models)
    for cache in caches:
        cache.layers[0].keys[:, :, :3] = 1.0
    for _ in range(2):
        both(models, torch.randint(0, 60, (2, 1)), caches)


@torch.no_grad()
def test_a_lost_write_is_told(models, repeated):
    caches = begun(models)
    view = caches[0].layers[1].values[:, :, :3]
    view.zero_()
    with pytest.raises(LostWrite):
        models[0](torch.zeros(2, 1, dtype=torch.long), **{CACHE: caches[0]})


@torch.no_grad()
def test_a_full_cache_is_told(models, repeated):
    caches = begun(models, steps=ROOM - PROMPT)
    assert all(repeated)
    with pytest.raises(CacheFull):
        models[0](torch.zeros(2, 1, dtype=torch.long), **{CACHE: caches[0]})


@torch.no_grad()
def test_what_is_remembered_keeps_no_cache_alive(models, repeated):
    caches = begun(models)
    alive = [weakref.ref(layer.keys.store) for cache in caches for layer in cache.layers]
    del caches
    gc.collect()
    assert not any(store() for store in alive)


@torch.no_grad()
def test_a_model_that_is_restored_is_plain_again(models, repeated):
    begun(models)
    restore(models[0])
    assert models[0](torch.zeros(1, 3, dtype=torch.long)).logits.shape == (1, 3, models[0].config.vocab_size)
