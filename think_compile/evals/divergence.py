"""How far a method's next-token distributions are from the dense model's: KL divergence and top-1 agreement.

Finer than task accuracy: a context is prefilled and pruned, a continuation is read in one call (teacher forcing), and
at each of its tokens the two distributions are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from tqdm import tqdm

from think_compile.evals.calls import Ids, Piece, TwoCalls, batches
from think_compile.evals.methods import apply
from think_compile.evals.settings import Settings


@dataclass(frozen=True)
class Sample:
    """Token ids of a context and of what follows it."""

    context: Ids
    continuation: Ids

    @classmethod
    def of(cls, tokenizer: Any, context: str, continuation: str) -> Sample:
        """From texts, tokenized together; a token that both share belongs to the continuation."""
        whole, alone = (tokenizer(text)["input_ids"] for text in (context + continuation, context))
        shared = next((i for i, (a, b) in enumerate(zip(whole, alone, strict=False)) if a != b), len(alone))
        return cls(tuple(whole[:shared]), tuple(whole[shared:]))


@dataclass(frozen=True)
class Distance:
    """A method and the dense model, on each sample.

    Attributes:
        kl: KL(dense || method) in nats, mean over the tokens of the continuation.
        agreement: share of those tokens at which both find the same token most probable.
        tokens: of all continuations.
        through_pruned: those that were predicted with the narrow key of at least one token.
        told: what was really done, as the method tells.
    """

    kl: list[float]
    agreement: list[float]
    tokens: int
    through_pruned: int
    told: dict[str, Any]


class Divergence:
    """The dense model's predictions on some samples, to compare methods with.

    They stay in main memory: tokens of all continuations x vocabulary numbers of the model's precision.

    Args:
        model: a Hugging Face causal LM, not wrapped.
        samples: contexts longer than ``held_back`` tokens.
        held_back: tokens of a context that go through the pruned cache with the continuation.
        batch_size: samples of a call.

    Raises:
        ValueError: a context is too short, or a continuation empty.
    """

    def __init__(
        self, model: Any, samples: Sequence[Sample], *, held_back: int = Settings.held_back, batch_size: int = 1
    ) -> None:
        self.model, self.batch_size = model, batch_size
        self.pieces = [_piece(sample, held_back) for sample in samples]
        self.dense = [logits for logits, _ in self._predictions(Settings(method="dense"))[0]]

    def of(self, settings: Settings) -> Distance:
        """Of a method; ``held_back`` is that of the samples.

        Raises:
            ValueError: the method cannot be put in force on the model.
        """
        predictions, told = self._predictions(settings)
        compared = [_compare(dense, ours) for dense, (ours, _) in zip(self.dense, predictions, strict=True)]
        return Distance(
            kl=[kl for kl, _ in compared],
            agreement=[agreement for _, agreement in compared],
            tokens=sum(len(piece.targets) for piece in self.pieces),
            through_pruned=sum(narrow for _, narrow in predictions),
            told=told,
        )

    def _predictions(self, settings: Settings) -> tuple[list[tuple[Tensor, int]], dict[str, Any]]:
        """Logits [N, V] of each sample on the host, how many were read through narrow keys; what was really done."""
        found: dict[int, tuple[Tensor, int]] = {}
        with closing(apply(self.model, settings)) as method, tqdm(total=len(self.pieces), desc=settings.method) as bar:
            calls = TwoCalls(self.model, method)
            for batch in batches(self.pieces, self.batch_size):
                scored = calls.score([self.pieces[index] for index in batch], self.batch_size)
                found |= {index: (one.logits.cpu(), one.narrow) for index, one in zip(batch, scored, strict=True)}
                bar.update(len(batch))
            told = method.told()
        return [found[index] for index in range(len(self.pieces))], told


def _piece(sample: Sample, held_back: int) -> Piece:
    first = len(sample.context) - held_back
    if first < 1 or not sample.continuation:
        raise ValueError(
            f"a sample needs more than held_back={held_back} tokens of context and one of continuation; got "
            f"{len(sample.context)} and {len(sample.continuation)}."
        )
    whole = sample.context + sample.continuation
    return Piece(whole[:first], whole[first:-1], sample.continuation)


def _compare(dense: Tensor, ours: Tensor) -> tuple[float, float]:
    """Mean KL in nats and agreement of logits [N, V]; in fp64, as both distributions are nearly the same."""
    expected, got = dense.double().log_softmax(-1), ours.double().log_softmax(-1)
    kl = (expected.exp() * (expected - got)).sum(-1).mean()
    return kl.item(), (dense.argmax(-1) == ours.argmax(-1)).double().mean().item()
