"""Every causal language model of the installed transformers, tiny and with random weights.

`configs.json` holds small sizes for the architectures that need thought. An architecture that is not in it (one of a
newer transformers) gets its default configuration with every size it has in common with the others made small.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
import transformers
from models import randomize
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

VOCAB = 128
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "d_model": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "num_attention_heads": 4,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "moe_intermediate_size": 64,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 16,
}
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@functools.cache
def _known() -> dict[str, dict]:
    return json.loads(Path(__file__).with_name("configs.json").read_text())


def causal_names() -> list[str]:
    """The names under which transformers lists its causal language models."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def seq2seq_names() -> list[str]:
    """The names under which transformers lists its encoder-decoder models."""
    return sorted(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)


def build(name: str, *, seq2seq: bool = False, seed: int = 0) -> nn.Module:
    """A tiny model of the architecture; it never stops early and leaves compiling to us."""
    known = {} if seq2seq else _known().get(name, {})
    listed = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES if seq2seq else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    model_class = getattr(transformers, known.get("class", listed[name]))
    torch.manual_seed(seed)
    try:
        model = model_class(_config(CONFIG_MAPPING[name], known))
    except (AttributeError, TypeError, ValueError):  # a part of a larger model has a configuration of its own
        model = model_class(_config(model_class.config_class, known))
    model = randomize(model, seed)
    model.generation_config.eos_token_id = None
    model.generation_config.disable_compile = True
    return model


def _config(config_class: type, known: dict) -> transformers.PretrainedConfig:
    if known:
        config = config_class(**known["config"])
    else:
        default = config_class()
        config = config_class(**{key: value for key, value in SMALL.items() if hasattr(default, key)})
    if getattr(config, "is_decoder", None) is False and not getattr(config, "is_encoder_decoder", False):
        config.is_decoder = True  # of an encoder that can also be a decoder
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for token in SPECIAL_TOKENS:
            value = getattr(part, token, None)
            if isinstance(value, int) and value >= VOCAB:
                setattr(part, token, 1)
    return config
