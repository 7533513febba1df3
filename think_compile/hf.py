"""Loading Hugging Face causal language models from a folder, a GGUF file or a hub id.

A convenience for the command line; nothing in the compiler imports this file.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

Source = str | os.PathLike[str]


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
        OSError: ``source`` does not exist or holds no causal LM that transformers can load; one sentence.
        ImportError: a GGUF file, and the packages that read it are missing.
    """
    where, options = _locate(source, trust_remote_code)
    model = _load(source, AutoModelForCausalLM, where, dtype=dtype, **options)
    tokenizer = _load(source, AutoTokenizer, where, **options)
    if "gguf_file" in options:
        _forget_quantization(model)
    return model.to(device).eval(), tokenizer


def load_config_model(
    source: Source,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
) -> Any:
    """The model at ``source`` with random weights: reads (or downloads) its configuration and nothing else.

    Enough for :func:`think_compile.explain`: what can be rewritten does not depend on the weights.

    Raises:
        OSError, ImportError: as :func:`load_model`.
    """
    where, options = _locate(source, trust_remote_code)
    config = _load(source, AutoConfig, where, **options)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the same layers, with plain weights
    dtype = (config.dtype or torch.float32) if dtype == "auto" else dtype
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    return model.eval()


def _locate(source: Source, trust_remote_code: bool) -> tuple[str, dict[str, Any]]:
    """What ``from_pretrained`` calls this source: a folder or hub id, and keyword arguments."""
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
    """Whether ``source`` can only be meant as a path: a hub id is NAME or OWNER/NAME."""
    text = str(source)
    return not isinstance(source, str) or text.startswith((".", "~", os.sep)) or text.count("/") > 1


def _require_gguf_reader() -> None:
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"reading a GGUF file needs {' and '.join(missing)}: pip install 'think-compile[demo]'")


def _load(source: Source, auto_class: Any, where: str, **options: Any) -> Any:
    """``auto_class.from_pretrained``, whose many and long errors become one OSError of one sentence."""
    try:
        return auto_class.from_pretrained(where, **options)
    except (OSError, ValueError, KeyError) as error:
        first_line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise OSError(f"cannot load {str(source)!r}: {first_line}") from error


def _forget_quantization(model: Any) -> None:
    """States what is true of a model dequantised on loading, so that it can be saved like any other."""
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
