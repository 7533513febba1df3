"""Every causal language model of the installed transformers: rewritten or refused by name, and none wrong."""

import warnings

import architectures
import pytest
import torch
from trial import try_out

from think_compile import ThinkWarning

# A few in every run, one for each way of attending and caching that the others vary.
FEW = ["bloom", "ctrl", "deepseek_v3", "falcon_mamba", "gemma2", "gpt_oss"]
# Their tiny configuration cannot be built, or their cache is made for other inputs than tokens alone.
NOT_BUILT = {"blt", "dots3_note", "emu3", "gemma3n", "gemma4_assistant", "gemma4_unified_assistant"}


def cases() -> list:
    return [name if name in FEW else pytest.param(name, marks=pytest.mark.zoo) for name in architectures.causal_names()]


@pytest.mark.parametrize("ratio", [0.5, pytest.param(0.0, marks=pytest.mark.zoo)])
@pytest.mark.parametrize("name", cases())
def test_architecture(name, ratio):
    if name in NOT_BUILT:
        pytest.skip("no tiny model of it can be built yet")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ThinkWarning)
        outcome = try_out(architectures.build(name), ratio)
    assert outcome.right, f"logits off by {outcome.error:.2e}, {outcome.natural:.2e} is natural"
    assert outcome.packed <= outcome.expected
    if outcome.packed < outcome.expected:
        assert outcome.found.refused, "a layer with a key cache is neither rewritten nor refused"
    assert torch.isfinite(torch.tensor(outcome.error))
