"""Token rules on every architecture of the zoo: later calls attend to the kept tokens alone.

The plain model runs with the other tokens hidden in each attention of a later call. The rule selects the same tokens in
all heads and layers, so that one list of columns tells which.
"""

import copy
import re
import warnings
from dataclasses import dataclass

import architectures
import pytest
import torch
import torch.nn.functional as F
from coverage import cannot_run
from oracle import worst
from torch.overrides import TorchFunctionMode
from trial import BATCH, PROMPT, Run, before_each_call, cache_layers, generate, prompt, runs

from think_compile import Report, ThinkWarning, report, think_compile
from think_compile.cache.handle import Handle
from think_compile.passes.refusal import Reason

FEW = ["cohere", "qwen3"]
NEVER = {Reason.FAILED, Reason.GIVEN_UP}


@dataclass(frozen=True)
class Ends:
    """The first tokens of each sequence, and the last ones."""

    first: int = 2
    last: int = 6

    def positions(self, seen):
        rows = torch.arange(seen.tokens, device=seen.k.device)
        first = seen.first_valid[:, None]
        wanted = ((rows >= first) & (rows < first + self.first)) | (rows >= seen.tokens - self.last)
        best = wanted.int().argsort(dim=1, descending=True, stable=True)[:, : self.first + self.last]
        return best[:, None].expand(-1, seen.k.shape[1], -1)

    def describe(self):
        return "the ends"

    def evicted(self):
        """[B, PROMPT] bool."""
        first = (prompt()[1] == 0).sum(1, keepdim=True)
        rows = torch.arange(PROMPT)
        return (rows >= first + self.first) & (rows < PROMPT - self.last)


class Hidden(TorchFunctionMode):
    """In calls with a past, the attention modules of these names do not see the evicted tokens."""

    def __init__(self, model, names):
        super().__init__()
        self.has_past, self.inside, self.evicted = False, False, Ends().evicted()
        for name in names:
            module = model.get_submodule(name)
            module.register_forward_pre_hook(lambda *_: setattr(self, "inside", self.has_past))
            module.register_forward_hook(lambda *_: setattr(self, "inside", False))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention and self.inside:
            q, k = args[:2]
            hidden = F.pad(self.evicted, (0, k.shape[2] - PROMPT))[:, None, None]
            mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
            args = args[:3]
            shown = torch.ones(BATCH, 1, q.shape[2], k.shape[2], dtype=torch.bool) if mask is None else mask
            kwargs["attn_mask"] = (
                shown & ~hidden if shown.dtype == torch.bool else shown.masked_fill(hidden, float("-inf"))
            )
            kwargs["is_causal"] = False
        return func(*args, **kwargs)


def plain_run(model, static: bool, names: set[str]) -> Run:
    hidden = Hidden(model, names)

    def note(cache):
        hidden.has_past = cache is not None and cache.get_seq_length() > 0

    with before_each_call(model, note), hidden:
        return generate(model, static)


def compiled_run(model, static: bool) -> tuple[Run, Report]:
    torch._dynamo.reset()
    ours = think_compile(copy.deepcopy(model), tokens=Ends(), lowering="eager")
    run = generate(ours, static)
    return run, report(ours)


def cases():
    few, others = [], pytest.mark.zoo
    return [pytest.param(a, id=a.name, marks=few if a.name in FEW else others) for a in architectures.causal()]


def compared(model, static: bool) -> str:
    """ "" after a comparison, or why there is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ThinkWarning)
        got, found = compiled_run(model, static)
    assert not {record.reason for record in found.refused} & NEVER, str(found)
    if not found.rewritten:
        return "no layer is rewritten"
    keys = [getattr(layer, "keys", None) for layer in cache_layers(got.cache)]
    selected = {x.store.selected for x in keys if isinstance(x, Handle) and not x.is_dense}
    if selected == {(8, PROMPT + 1)}:
        return "the cache is stored in the second call"
    assert selected == {(8, PROMPT)}
    names, paths = {record.layer for record in found.rewritten}, {name for name, _ in model.named_modules()}
    if not {name.partition("#")[0] for name in names} <= paths:
        return "a layer's name is no path of the model"
    if any("#" in name for name in names):  # of several attentions under one name the paths are not certain
        tails = tuple(re.split(r"\.\d+\.", name.partition("#")[0])[-1] for name in names)
        names = {name for name in paths if name.endswith(tails)}
    same = plain_run(copy.deepcopy(model), static, names)
    assert worst(got.logits, same.logits) <= 2e-5 * max(1.0, same.logits.abs().max().item())
    return ""


@pytest.mark.parametrize("what", cases())
@torch.no_grad()
def test_later_calls_attend_to_the_kept_tokens(what):
    if reason := cannot_run(what):
        pytest.skip(reason)
    model = what.build()
    kinds = (False, True) if runs(model, True) else (False,)
    without = [why for static in kinds if (why := compared(model, static))]
    if without:  # the other kind of cache was compared all the same
        pytest.skip("; ".join(without))
