"""The distance of a method's next-token distributions from the dense model's: KL divergence and top-1 agreement.

Finer than task accuracy: a context is prefilled and pruned, a continuation is read in one call (teacher forcing), and
the two distributions are compared at each token of the continuation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from tqdm import tqdm

from think_compile.evals.calls import Ids, Piece, Scored, TwoCalls, batches
from think_compile.evals.methods import Recorder, Simulation, apply
from think_compile.evals.settings import Settings


@dataclass(frozen=True)
class Sample:
    """Token ids of a context and of its continuation."""

    context: Ids
    continuation: Ids

    @classmethod
    def of(cls, tokenizer: Any, context: str, continuation: str) -> Sample:
        """From texts, tokenized together; a token of both texts belongs to the continuation."""
        whole, alone = (tokenizer(text)["input_ids"] for text in (context + continuation, context))
        shared = next((i for i, (a, b) in enumerate(zip(whole, alone, strict=False)) if a != b), len(alone))
        return cls(tuple(whole[:shared]), tuple(whole[shared:]))


@dataclass(frozen=True)
class Distance:
    """A method and the dense model, on each sample.

    Attributes:
        kl: KL(dense || method) in nats, mean over the tokens of the continuation.
        agreement: share of these tokens with the same most probable prediction of both.
        tokens: number of tokens of all continuations.
        through_pruned: number of tokens predicted with the narrow key of at least one token.
        told: the method's account of its work.
    """

    kl: list[float]
    agreement: list[float]
    tokens: int
    through_pruned: int
    told: dict[str, Any]


@dataclass(frozen=True)
class _Compared:
    """One sample under a method, beside the dense model."""

    kl: float
    agreement: float
    narrow: int


class Divergence:
    """The dense model's predictions on some samples, to compare methods with.

    The predictions stay in main memory: tokens of all continuations x vocabulary numbers of the model's precision.

    Args:
        model: a Hugging Face causal LM, not wrapped.
        samples: contexts longer than ``held_back`` tokens.
        held_back: number of last tokens of a context that read the pruned cache together with the continuation.
        batch_size: samples of a call.

    Raises:
        ValueError: a context is too short, or a continuation empty.
    """

    def __init__(
        self, model: Any, samples: Sequence[Sample], *, held_back: int = Settings.held_back, batch_size: int = 1
    ) -> None:
        self.model, self.batch_size = model, batch_size
        self.pieces = [_piece(sample, held_back) for sample in samples]
        self.batches = list(batches(self.pieces, batch_size))
        self.dense = self._predictions(Settings(method="dense"))[0]

    def of(self, settings: Settings) -> Distance:
        """The distance of a method; its ``held_back`` is ignored for the samples' own.

        Raises:
            ValueError: the method cannot be put in force on the model.
        """
        predictions, told = self._predictions(settings)
        compared = {index: _compare(self._expected(index), ours) for index, ours in predictions.items()}
        return self._distance(compared, told)

    def of_logits(self, logits: Callable[[Piece], Tensor], told: dict[str, Any]) -> Distance:
        """The distance of some other way to read a compressed context; ``told``: its account of its work.

        ``logits`` gives [N, V], the predictions of a piece's targets.
        """
        compared = {}
        for index, piece in enumerate(tqdm(self.pieces, desc="pieces")):
            ours = Scored(logits(piece), len(piece.targets))
            compared[index] = _compare(self._expected(index).to(ours.logits.device), ours)
        return self._distance(compared, told)

    def of_simulated(self, methods: Sequence[Settings]) -> list[Distance]:
        """As :meth:`of` for simulated methods with common first calls: many methods cost little more than one.

        Raises:
            ValueError: methods cannot be simulated on the model.
        """
        found: list[dict[int, _Compared]] = [{} for _ in methods]
        told: list[dict[str, Any]] = [{} for _ in methods]
        observe = max(settings.config.observe for settings in methods)
        with closing(Recorder(self.model, observe)) as recorder:
            for batch in tqdm(self.batches, desc=f"{len(methods)} methods"):
                pieces = [self.pieces[index] for index in batch]
                filled = TwoCalls(self.model, recorder).fill_for(pieces)
                expected = [self._expected(index).to(self.model.device) for index in batch]
                for number, settings in enumerate(methods):
                    with closing(Simulation(self.model, settings)) as method:
                        own = replace(filled, cache=method.of_recorded(filled.cache, recorder.layers))
                        scored = TwoCalls(self.model, method).score_after(own, pieces, self.batch_size)
                        told[number] = method.told()
                    compared = [_compare(*pair) for pair in zip(expected, scored, strict=True)]
                    found[number] |= dict(zip(batch, compared, strict=True))
        return [self._distance(*one) for one in zip(found, told, strict=True)]

    def _expected(self, index: int) -> Tensor:
        """The dense model's log-probabilities of a sample, [N, V]; in fp64, since a method's are nearly the same."""
        return self.dense[index].logits.double().log_softmax(-1)

    def _distance(self, compared: dict[int, _Compared], told: dict[str, Any]) -> Distance:
        ordered = [compared[index] for index in range(len(self.pieces))]
        return Distance(
            kl=[one.kl for one in ordered],
            agreement=[one.agreement for one in ordered],
            tokens=sum(len(piece.targets) for piece in self.pieces),
            through_pruned=sum(one.narrow for one in ordered),
            told=told,
        )

    def _predictions(self, settings: Settings) -> tuple[dict[int, Scored], dict[str, Any]]:
        """Each sample's logits [N, V] on the host; the method's account of its work."""
        found: dict[int, Scored] = {}
        with closing(apply(self.model, settings)) as method, tqdm(total=len(self.pieces), desc=settings.method) as bar:
            calls = TwoCalls(self.model, method)
            for batch in self.batches:
                scored = calls.score([self.pieces[index] for index in batch], self.batch_size)
                found |= {i: replace(one, logits=one.logits.cpu()) for i, one in zip(batch, scored, strict=True)}
                bar.update(len(batch))
            told = method.told()
        return found, told


def _piece(sample: Sample, held_back: int) -> Piece:
    first = len(sample.context) - held_back
    if first < 1 or not sample.continuation:
        raise ValueError(
            f"a sample needs more than held_back={held_back} tokens of context and one of continuation; got "
            f"{len(sample.context)} and {len(sample.continuation)}."
        )
    whole = sample.context + sample.continuation
    return Piece(whole[:first], whole[first:-1], sample.continuation)


def _compare(expected: Tensor, ours: Scored) -> _Compared:
    """KL in nats and agreement, means over tokens; ``expected`` are log-probabilities [N, V] in fp64."""
    got = ours.logits.double().log_softmax(-1)
    kl = (expected.exp() * (expected - got)).sum(-1).mean()
    agreement = (expected.argmax(-1) == got.argmax(-1)).double().mean()
    return _Compared(kl.item(), agreement.item(), ours.narrow)
