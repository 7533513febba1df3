"""The codec in docs/formats.md runs exactly as printed."""

import re
import sys
import types
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from oracle import CACHE, Yardstick, assert_close_to
from tiny import tiny_llama
from transformers import DynamicCache, StaticCache

from think_compile import report, think_compile
from think_compile.formats import Seen

PAGE = Path(__file__).parents[2] / "docs" / "formats.md"


def on_the_page(name):
    """An object of a class on the page."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    (code,) = (block for block in blocks if f"class {name}" in block)
    module = types.ModuleType(f"page_{name}")
    sys.modules[module.__name__] = module
    exec(compile(code, str(PAGE), "exec"), module.__dict__)
    return getattr(module, name)()


@pytest.fixture(scope="module")
def half():
    return on_the_page("Half")


def rounded(rows):
    return rows.half().to(rows.dtype)


CACHES = {
    "growing": lambda model: DynamicCache(config=model.config),
    "fixed": lambda model: StaticCache(config=model.config, max_cache_len=32),
}


@pytest.mark.parametrize(("kind", "sides"), [("growing", ("keys", "values")), ("fixed", ("values",))])
@torch.no_grad()
def test_the_format_of_the_page(kind, sides, half):
    model = tiny_llama().float()
    given = dict.fromkeys(sides, rounded)
    ratio = 0.5 if "keys" not in sides else 0.0
    yardstick = Yardstick(model, ratio, 4, 8, 1, **given)
    codecs = dict.fromkeys(sides, half)
    ours = think_compile(model, *([ratio] if ratio else []), recent=4, observe=8, channel_multiple=1,
                         lowering="eager", **codecs)  # fmt: skip
    caches = [CACHES[kind](model) for _ in range(3)]
    ids = torch.randint(2, 60, (2, 20))
    begin = 0
    for n in (12, 1, 3, 1, 1):
        logits = [
            m(input_ids=ids[:, begin : begin + n], use_cache=True, **{CACHE: cache}).logits
            for m, cache in zip((ours, yardstick.same, yardstick.exact), caches, strict=True)
        ]
        begin += n
        assert_close_to(logits[1], logits[0], logits[2], what=f"after {begin}")
    told = report(ours)
    assert len(told.rewritten) == 2 and "fp16" in str(told)
    for layer, plain in zip(caches[0].layers, caches[1].layers, strict=True):
        torch.testing.assert_close(layer.keys.dense()[:, :, :begin], plain.keys[:, :, :begin], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(layer.values.dense()[:, :, :begin], plain.values[:, :, :begin], atol=1e-4, rtol=1e-4)


def test_the_rule_of_the_page():
    """The first tokens of each sequence, and the last."""
    rule = replace(on_the_page("Ends"), first=2, last=3)
    seen = Seen(torch.zeros(2, 4, 9, 8), *torch.zeros(2, 2, 2, 9, 8), torch.arange(9) >= torch.tensor([[0], [4]]))
    assert rule.positions(seen).sort(-1).values.tolist() == [[[0, 1, 6, 7, 8]] * 2, [[4, 5, 6, 7, 8]] * 2]
    ours = think_compile(tiny_llama().float(), tokens=rule, lowering="eager")
    with torch.no_grad():
        out = ours(torch.arange(2, 22)[None], use_cache=True)
    assert [x.keys.store.length for x in out[CACHE].layers] == [5, 5] and "the last 3" in str(report(ours))


def test_what_is_no_codec_is_told():
    model = tiny_llama()
    with pytest.raises(TypeError, match=r"keys must be a codec .* without has_window, parts"):
        think_compile(model, keys=SimpleNamespace(name="half", group=1))
    with pytest.raises(TypeError, match=r"keys must be a bit plan, for example 4, .*, or a codec; got 0.5"):
        think_compile(model, keys=0.5)
    with pytest.raises(TypeError, match=r"values must be a codec .* a class and not an object of it"):
        think_compile(model, values=dict)


def test_a_ratio_beside_keys_is_told(half):
    with pytest.raises(ValueError, match="give one"):
        think_compile(tiny_llama(), 0.3, keys=half)
