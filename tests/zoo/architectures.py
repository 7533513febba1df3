"""Every language model of the installed transformers, tiny and with random weights.

`configs.json` has small sizes for architectures that need special ones. Any other architecture (of a newer
transformers, for example) gets its default configuration, with every common size made small.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from models import randomize
from torch import nn
from transformers import CONFIG_MAPPING, PretrainedConfig
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
    "d_kv": 16,
    "d_ff": 64,
    "moe_intermediate_size": 64,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 16,
    **{
        f"{side}{size}": value
        for side in ("encoder_", "decoder_", "num_encoder_", "num_decoder_")
        for size, value in {"layers": 2, "attention_heads": 4, "ffn_dim": 64}.items()
    },
}
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


@functools.cache
def _known() -> dict[str, dict]:
    return json.loads(Path(__file__).with_name("configs.json").read_text())


@dataclass(frozen=True)
class Architecture:
    """The name of a language model in transformers' list; ``seq2seq``: in its list of encoder-decoder models."""

    name: str
    seq2seq: bool = False

    def __str__(self) -> str:
        return f"seq2seq/{self.name}" if self.seq2seq else self.name

    @property
    def note(self) -> str:
        """The reason why it cannot be tried, if more is known than the error says; else ""."""
        return _known().get(str(self), {}).get("note", "")

    def build(self, seed: int = 0) -> nn.Module:
        """A tiny model of the architecture that never stops early and does not compile itself."""
        known = _known().get(str(self), {})
        listed = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES if self.seq2seq else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        model_class = getattr(transformers, known.get("class", listed[self.name]))
        torch.manual_seed(seed)
        try:
            model = model_class(_config(CONFIG_MAPPING[self.name], known))
        except (AttributeError, TypeError, ValueError):  # a part of a larger model has a configuration of its own
            model = model_class(_config(model_class.config_class, known))
        return _for_generation(randomize(model, seed))


def causal() -> list[Architecture]:
    """The causal language models listed by transformers."""
    return [Architecture(name) for name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)]


def seq2seq() -> list[Architecture]:
    """The encoder-decoder language models listed by transformers."""
    return [Architecture(name, seq2seq=True) for name in sorted(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)]


def _for_generation(model: nn.Module) -> nn.Module:
    settings = model.generation_config
    settings.pad_token_id, settings.decoder_start_token_id, settings.eos_token_id = 0, 1, None
    settings.disable_compile = True
    return model


def _config(config_class: type, known: dict) -> PretrainedConfig:
    given = _part(known["config"], config_class.model_type) if "config" in known else _small(config_class())
    config = config_class(**given)
    if getattr(config, "is_decoder", None) is False and not getattr(config, "is_encoder_decoder", False):
        config.is_decoder = True  # for an encoder that can also be a decoder
    for part in {id(c): c for c in (config, config.get_text_config(decoder=True))}.values():
        for token in SPECIAL_TOKENS:
            value = getattr(part, token, None)
            if isinstance(value, int) and value >= VOCAB:
                setattr(part, token, 1)
    return config


def _part(config: dict, model_type: str) -> dict:
    """The part of a known configuration with this type, or else the whole."""
    parts = [part for part in config.values() if isinstance(part, dict) and part.get("model_type") == model_type]
    return parts[0] if parts else config


def _small(default: PretrainedConfig) -> dict:
    """Arguments that make a configuration like this one, and its parts, small."""
    computed = {key for key in SMALL if isinstance(getattr(type(default), key, None), property)}
    sizes = {key: value for key, value in SMALL.items() if key not in computed and hasattr(default, key)}
    parts = {key: part for key, part in vars(default).items() if isinstance(part, PretrainedConfig)}
    return sizes | {key: type(part)(**_small(part)) for key, part in parts.items()}
