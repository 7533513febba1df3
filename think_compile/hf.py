"""Load and explain Hugging Face language models: from a folder, a GGUF file, a hub id or a configuration.

A convenience for the command line; the compiler does not import this file.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.modeling_outputs import BaseModelOutput

import think_compile
from think_compile.report import Report

log = logging.getLogger(__name__)

Source = str | os.PathLike[str]
CACHE_NAMES = ("cache", "past_key_values")  # the cache's name in an output: since transformers 5.24, and before


def load_model(
    source: Source,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """The causal LM and the tokenizer at ``source``, in eval mode on ``device``.

    ``source`` is a folder written by ``save_pretrained``, a ``.gguf`` file (its weights are dequantised)
    or a hub id. ``dtype="auto"`` is the dtype of the checkpoint.

    Raises:
        OSError: ``source`` does not exist or has no causal LM known to transformers; the message is one sentence.
        ImportError: ``source`` is a GGUF file, and packages to read it are missing.
    """
    where, options = _locate(source, trust_remote_code)
    model = _load(source, AutoModelForCausalLM, where, dtype=dtype, **options)
    tokenizer = _load(source, AutoTokenizer, where, **options)
    if "gguf_file" in options:
        _forget_quantization(model)
    return model.to(device).eval(), tokenizer


def explain(
    source: Source,
    prompt_tokens: int,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    **options: Any,
) -> Report:
    """The report of :func:`think_compile.explain` on ``source`` (model or ``config.json``): a prompt, then one token.

    Reads (or downloads) only the configuration. The model's tensors are fake: they have a shape and no memory. If its
    code reads values during a call, the model is built again with random weights.

    Raises:
        OSError, ImportError: as :func:`load_model`, and if the model does not run on tokens alone.
    """
    where, loading = _locate(source, trust_remote_code)
    config = _load(source, AutoConfig, where, **loading)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the same layers, with plain weights

    def told() -> Report:
        with torch.device(device):
            model = _random_model(source, config, dtype, trust_remote_code)
        return think_compile.explain(model, _prompt_of(model, prompt_tokens), _next_token, **options)

    try:
        with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()):
            return told()
    except RuntimeError as error:  # many kinds: the value may be read while tracing, compiling or running
        log.info("%s cannot run on fake tensors (%s): it gets random weights", type(config).__name__, error)
    torch._dynamo.reset()  # drop the failed compilations
    try:
        return told()
    except RuntimeError as error:
        raise OSError(f"cannot run {str(source)!r} from a prompt alone: {_first_line(error)}") from error


def _random_model(source: Source, config: Any, dtype: torch.dtype | str, trust_remote_code: bool) -> Any:
    dtype = (config.dtype or torch.float32) if dtype == "auto" else dtype
    is_decoder = type(config) in AutoModelForCausalLM._model_mapping or not config.is_encoder_decoder
    auto_class = AutoModelForCausalLM if is_decoder else AutoModelForSeq2SeqLM
    try:
        return auto_class.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code).eval()
    except ValueError as error:
        raise OSError(f"cannot build {str(source)!r}: {_first_line(error)}") from error


def _prompt_of(model: Any, tokens: int) -> dict[str, Any]:
    """Arguments of a first call on a prompt."""
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.arange(tokens, device=model.device).remainder(vocabulary)[None]  # [1, S]
    prompt = {"input_ids": ids, "use_cache": True}
    # another length than the encoder's input, so that the two kinds of attention differ in shape
    return prompt | {"decoder_input_ids": ids.repeat(1, 2)} if model.config.is_encoder_decoder else prompt


def _next_token(output: Any) -> dict[str, Any] | None:
    """Arguments of the call after the one with ``output``; None: ``output`` has no cache of keys and values."""
    name = next((name for name in CACHE_NAMES if output.get(name) is not None), None)
    if name is None:
        return None
    ids = torch.zeros(1, 1, dtype=torch.long, device=output.logits.device)
    following = {name: output[name], "use_cache": True}
    if (encoded := output.get("encoder_last_hidden_state")) is not None:
        return following | {"decoder_input_ids": ids, "encoder_outputs": BaseModelOutput(encoded)}
    return following | {"input_ids": ids}


def _locate(source: Source, trust_remote_code: bool) -> tuple[str, dict[str, Any]]:
    """The arguments of ``from_pretrained`` for this source: folder or hub id, and keyword arguments."""
    path, options = Path(source), {"trust_remote_code": trust_remote_code}
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"no such file: {source}")
        _require_gguf_reader()
        return str(path.parent), options | {"gguf_file": path.name}
    if not path.exists() and _is_local(source):
        raise FileNotFoundError(f"no such file or folder: {source}")
    return str(source), options


def _is_local(source: Source) -> bool:
    """Whether ``source`` can only be a path: a hub id is NAME or OWNER/NAME."""
    text = str(source)
    return not isinstance(source, str) or text.startswith((".", "~", os.sep)) or text.count("/") > 1


def _require_gguf_reader() -> None:
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"reading a GGUF file needs {' and '.join(missing)}: pip install 'think-compile[demo]'")


def _load(source: Source, auto_class: Any, where: str, **options: Any) -> Any:
    """``auto_class.from_pretrained``, with its various long errors as one OSError of one sentence."""
    try:
        return auto_class.from_pretrained(where, **options)
    except (OSError, ValueError, KeyError) as error:
        raise OSError(f"cannot load {str(source)!r}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _forget_quantization(model: Any) -> None:
    """Marks a model that was dequantised on loading as unquantised, so that saving works."""
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
