"""The model ``think`` of lm-evaluation-harness: every request is answered through the pruned cache.

The harness's own ``hf`` model scores a continuation in one pass without a cache: every method of cache compression
looks like the dense model. Here the context is prefilled and pruned first.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import get_dtype
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from think_compile import hf
from think_compile.evals.calls import Ids, Piece, TwoCalls, batches
from think_compile.evals.methods import apply
from think_compile.evals.questions import Halves, tails
from think_compile.evals.settings import Settings

log = logging.getLogger("lm_eval.models.think")  # a child of the harness's, for its handler and level

Request = tuple[Any, list[int], list[int]]  # (strings or None, context, continuation)
Answer = tuple[float, bool]


@dataclass
class Counters:
    """Counts since the model was made.

    Attributes:
        scored_tokens: tokens of continuations and documents.
        scored_through_pruned: scored tokens predicted with the narrow key of at least one token.
        generated_tokens, generated_through_pruned: the same of generated tokens; the first of a prompt comes from the
            exact first call, unless the task says ``prune_before``.
        contexts: contexts of requests; windows of documents.
        truncated_contexts: contexts cut on the left to the model's length.
    """

    scored_tokens: int = 0
    scored_through_pruned: int = 0
    generated_tokens: int = 0
    generated_through_pruned: int = 0
    contexts: int = 0
    truncated_contexts: int = 0


@register_model("think")
class ThinkLM(HFLM):
    """A Hugging Face causal LM with a pruned key cache, for lm-evaluation-harness.

    Args:
        pretrained: a hub id, a folder, a ``.gguf`` file or a model object (then with ``tokenizer``).
        ratio, keys, values, group, sinks, recent, observe, channel_multiple, tokens, prune_generated, decode, sliding,
            lowering: as of ``think_compile``.
        method: a key of :data:`think_compile.evals.settings.METHODS`.
        dense: the same protocol without pruning; short for method "dense".
        held_back: number of last tokens of a context that read the pruned cache with the continuation, so that even a
            continuation of one token is predicted through it; of a shorter context all but the first.
        split: prefilled share of each window of a document; the rest reads the pruned cache.
        score_over, seed: as of :class:`think_compile.evals.settings.Settings`.
        device: as of ``HFLM``; the CPU in place of a missing GPU.
        **options: of ``HFLM``.

    Raises:
        ValueError, TypeError: a bad argument, before a model is loaded; an encoder-decoder model.
    """

    def __init__(self, pretrained: Any, *, device: str | None = None, **options: Any) -> None:
        own = {name: options.pop(name) for name in ("dense", *Settings.names()) if name in options}
        self.settings = Settings.of(**own)
        device = _available(device)
        if isinstance(pretrained, str) and pretrained.endswith(".gguf"):
            pretrained, options = _load_gguf(pretrained, device, options)
        elif not isinstance(pretrained, str):
            _check_options(options)
        super().__init__(pretrained, device=device, **options)
        self.counters = Counters()
        self._strings: list[str] = []
        self.method = apply(self.model, self.settings)
        self.calls = TwoCalls(self.model, self.method, self.tokenizer.pad_token_id, self._autocast)

    def _get_backend(self, *args: Any, **kwargs: Any) -> None:
        """As of ``HFLM``; called before a model is loaded."""
        super()._get_backend(*args, **kwargs)
        if self.backend != "causal":
            raise ValueError(
                f"the model think evaluates decoders; {self.config.model_type!r} is an encoder-decoder model: "
                "use the harness's own model hf."
            )

    def close(self) -> None:
        """Restores a given model object."""
        self.method.close()

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = self.mixed_precision_dtype
        return torch.autocast(device_type=self.device.type, dtype=dtype, enabled=dtype is not None)

    # ------------------------------------------------------------------------------------------------ log-likelihoods

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Answer]:
        """As of ``HFLM``, with continuations scored through the pruned cache of their context.

        Raises:
            ValueError: channels are to be dropped, and no token was scored through a pruned cache.
        """
        with self._reading_the_cache("scored"):
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """As of ``HFLM``; the head of each window is scored exactly, its tail through the pruned cache of the head.

        Raises:
            ValueError: as of :meth:`loglikelihood`.
        """
        with self._reading_the_cache("scored"):
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    @contextmanager
    def _reading_the_cache(self, how: str) -> Any:
        """Raises if a method prunes and no token was ``how`` ("scored", "generated") through a pruned cache."""
        before = asdict(self.counters)
        yield
        n_tokens, through = (
            getattr(self.counters, name) - before[name] for name in (f"{how}_tokens", f"{how}_through_pruned")
        )
        if n_tokens and not through and self.settings.prunes:
            raise ValueError(self._nothing_pruned(how, n_tokens))
        log.info("%s: %s", self.settings.method, asdict(self.counters))

    def _nothing_pruned(self, how: str, n_tokens: int) -> str:
        config = self.settings.config
        held = f" (and held_back={self.settings.held_back})" if how == "scored" else ""
        ended = "" if how == "scored" else ", each answer ended with its first token, which comes from the exact call"
        return (
            f"none of {n_tokens} tokens was {how} through a pruned cache at ratio {config.ratio}, so this measures the "
            f"dense model: no context was longer than recent={config.recent}{held}{ended}, or no channel was dropped "
            f"(effective ratio {self.method.effective_ratio():.3g}, channel_multiple={config.channel_multiple}). "
            "Give longer contexts (more few-shot examples), a smaller recent or a smaller channel_multiple."
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        """As of ``HFLM``. Windows of a document come without strings, and are split in two."""
        pieces = [self._piece(*request) for request in requests]
        answers: list[Answer | None] = [None] * len(requests)
        size, quiet = self._batch_size_for(requests, override_bs), disable_tqdm or self.rank != 0
        with tqdm(total=len(requests), disable=quiet, desc="Running loglikelihood requests") as bar:
            for batch in batches(pieces, size):
                scored = self.calls.score([pieces[index] for index in batch], size)
                for index, result in zip(batch, scored, strict=True):
                    answers[index] = self._answer(result.logits, pieces[index].targets)
                    self.counters.scored_through_pruned += result.narrow
                    self.counters.scored_tokens += len(pieces[index].targets)
                    if requests[index][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[index][0], answers[index])
                bar.update(len(batch))
        return answers  # type: ignore[return-value]

    def _piece(self, strings: Any, context: list[int], continuation: list[int]) -> Piece:
        """A request, cut on the left to the model's length as ``HFLM`` does, in two parts."""
        whole = context + continuation
        tokens = whole[-(self.max_length + 1) :]
        self.counters.contexts += 1
        self.counters.truncated_contexts += len(tokens) < len(whole)
        inputs = len(tokens) - 1  # the last token is only predicted
        if strings is None:
            first = max(1, int(inputs * self.settings.split))
        else:
            kept = len(tokens) - len(continuation)  # of the context
            held = min(self.settings.held_back, kept - 1)
            first = kept - held if held else inputs  # a single token cannot be held back: all in one exact call
        return Piece(tuple(tokens[:first]), tuple(tokens[first:-1]), tuple(continuation))

    def _batch_size_for(self, requests: Sequence[Request], override: int | None) -> int:
        if override is not None or self.batch_size != "auto":
            return override or self.batch_size
        longest = sorted(requests, key=lambda request: len(request[1]) + len(request[2]), reverse=True)
        return self._detect_batch_size(longest, 0) if longest else 1

    def _answer(self, logits: Tensor, targets: Ids) -> Answer:
        """Log-probability of the targets, and whether each is the most probable token."""
        wanted = torch.tensor(targets, device=logits.device)
        probabilities = torch.log_softmax(logits, -1, dtype=self.softmax_dtype)
        likelihood = probabilities.gather(1, wanted[:, None]).sum()
        return float(likelihood), bool((logits.argmax(-1) == wanted).all())

    # ----------------------------------------------------------------------------------------------------- generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """As of ``HFLM``, with one generation argument more.

        ``prune_before``: a text. The context before its last occurrence is prefilled and pruned; the rest goes through
        the pruned cache in one call, followed by decoding.

        Raises:
            ValueError: a context does not contain this text, or begins with it. Channels are to be dropped, and no
                token was generated through a pruned cache.
        """
        for request in requests:
            context, arguments = request.args
            if (text := arguments.get("prune_before")) is not None:
                _check_question(context, text, request.task_name)
        with self._reading_the_cache("generated"):
            return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """As of ``HFLM``; counts cut contexts, and remembers the strings for the following :meth:`_model_generate`."""
        self._strings = list(strings)
        ids, mask = super().tok_batch_encode(strings, padding_side, None, truncation)
        length = left_truncate_len or ids.shape[1]
        cut = int((mask.sum(1) > length).sum())
        if cut:
            log.warning("%d contexts are cut on the left to %d tokens", cut, length)
            self.counters.truncated_contexts += cut
        return ids[:, -length:], mask[:, -length:]

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], prune_before: str | None = None, **options: Any
    ) -> Tensor:
        mask, more = options.pop("attention_mask"), max_length - context.shape[1]
        if prune_before is None:
            cache = None if self.settings.method == "think" else self.method.new_cache()
            answers = self._generated(context, mask, cache, mask.sum(1).tolist(), more, stop, options)
            return torch.cat([context, answers], 1)
        halves = Halves.of(context, mask, tails(self.tokenizer, self._strings, prune_before), prune_before)
        new: dict[int, Tensor] = {}
        for rows in halves.of_equal_tails():
            ids, mask, cache = halves.filled(rows, self.calls)
            first = [len(halves.heads[row]) for row in rows]
            new |= dict(zip(rows, self._generated(ids, mask, cache, first, more, stop, options), strict=True))
        answers = pad_sequence([new[row] for row in range(len(context))], True, self.calls.pad)
        return torch.cat([context, answers], 1)

    def _generated(
        self, ids: Tensor, mask: Tensor, cache: Any, first: list[int], more: int, stop: list[str], options: Any
    ) -> Tensor:
        """New tokens [B, N <= more], counted; ``first`` tokens of each context are, or will be, prefilled."""
        exact = int(cache is None or cache.get_seq_length() == 0)  # generated tokens that come from the first call
        options = options | ({} if cache is None else {self.calls.cache_name: cache})
        longest = ids.shape[1] + more
        output = super()._model_generate(
            ids, longest, stop, attention_mask=mask, return_dict_in_generate=True, **options
        )
        new = output.sequences[:, ids.shape[1] :]
        self.method.note(output[self.calls.cache_name])
        dropped = self.method.prunes(output[self.calls.cache_name])
        for tokens, prefilled in zip(new.tolist(), first, strict=True):
            length = tokens.index(self.eot_token_id) + 1 if self.eot_token_id in tokens else len(tokens)
            narrow = [self.method.narrow_tokens(prefilled, prefilled + step) > 0 for step in range(length - exact)]
            self.counters.contexts += 1
            self.counters.generated_tokens += length
            self.counters.generated_through_pruned += sum(narrow) if dropped else 0
        return new

    # ------------------------------------------------------------------------------------------------------- accounts

    def get_model_info(self) -> dict[str, Any]:
        """As of ``HFLM``, with the settings, the counters and the method's account."""
        told = self.settings.described() | asdict(self.counters) | self.method.told()
        return super().get_model_info() | {"think": told}


def _available(device: str | None) -> str:
    """The device, or the CPU in place of a missing GPU: the harness's command line asks for cuda:0 by default."""
    if device is not None and not device.startswith("cuda"):
        return device
    return (device or "cuda") if torch.cuda.is_available() else "cpu"


def _load_gguf(path: str, device: str, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The model in a GGUF file, and the options left for ``HFLM``, with the tokenizer."""
    options = dict(options)
    dtype, trust = options.pop("dtype", "auto"), bool(options.pop("trust_remote_code", False))
    _check_options(options)
    dtype = dtype if dtype == "auto" else get_dtype(dtype)
    model, tokenizer = hf.load_model(path, dtype=dtype, device=device, trust_remote_code=trust)
    return model, {"tokenizer": tokenizer} | options


def _check_options(options: dict[str, Any]) -> None:
    """Refuse unknown options: for a model object, ``HFLM`` would ignore a misspelt one."""
    known = inspect.signature(HFLM.__init__).parameters
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise TypeError(f"unknown argument {', '.join(unknown)}: neither an option of think nor of the model hf.")


def _check_question(context: str, text: str, task: str | None) -> None:
    position = context.rfind(text) if text else -1
    if position <= 0:
        what = "does not contain it" if position < 0 else "begins with it, so that nothing is left to prefill"
        raise ValueError(f"prune_before={text!r}: a context of task {task} {what}: {context[:80]!r}...")
