"""``python -m evals.peers``: the token rules of kvpress on the samples of the study ``tokens``.

Needs ``pip install kvpress``. Its presses choose the tokens, in hooks on the attention modules of a plain model; the
rest is as for our own rules. Prompts are read one by one: presses know no padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from torch import Tensor
from transformers import DynamicCache

from benchmarks.models import CACHE
from evals.studies import RESULTS, Result, Row, head_of, measures, samples_of
from think_compile import demo
from think_compile.evals.calls import Piece
from think_compile.evals.divergence import Divergence


class Peer(NamedTuple):
    """A press, the share of the tokens that it leaves, and the attention of the plain model that it needs."""

    name: str
    share: float
    press: Any
    attention: str = "sdpa"


def peers(shares: Sequence[float]) -> Iterator[Peer]:
    """What is measured."""
    from kvpress import ObservedAttentionPress, SnapKVPress

    for share in shares:
        given = {"compression_ratio": 1 - share}
        yield Peer("SnapKVPress", share, SnapKVPress(**given))
        yield Peer("SnapKVPress, window_size=32", share, SnapKVPress(**given, window_size=32))
        yield Peer("ObservedAttentionPress", share, ObservedAttentionPress(**given), "eager")  # reads the probabilities


@contextmanager
def compressing(model: Any, peer: Peer, cache: Any) -> Iterator[None]:
    """In this context, a call with the empty ``cache`` leaves it compressed."""

    def compress(module: Any, given: Any, kwargs: Any, output: Any) -> None:
        layer = cache.layers[module.layer_idx]
        rows = peer.press.compress(module, kwargs["hidden_states"], layer.keys, layer.values, output[1], kwargs)
        layer.keys, layer.values = rows

    before = model.config._attn_implementation
    model.set_attn_implementation(peer.attention)
    hooks = [layer.self_attn.register_forward_hook(compress, with_kwargs=True) for layer in model.get_decoder().layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation(before)


def reader(model: Any, peer: Peer) -> Callable[[Piece], Tensor]:
    """The predictions [N, V] for a piece, through a cache that the press has compressed."""

    @torch.no_grad()
    def logits(piece: Piece) -> Tensor:
        cache = DynamicCache(config=model.config)
        first, later = (torch.tensor([ids], device=model.device) for ids in (piece.first, piece.later))
        with compressing(model, peer, cache):
            model(input_ids=first, logits_to_keep=1, **{CACHE: cache})
        positions = first.shape[1] + torch.arange(later.shape[1], device=model.device)[None]
        read: Tensor = model(input_ids=later, position_ids=positions, **{CACHE: cache}).logits
        return read[0]

    return logits


def main(
    task: Annotated[str, typer.Option(help="whose texts are read")] = "continuation_2k",
    samples: Annotated[int, typer.Option(min=1)] = 100,
    share: Annotated[list[float] | None, typer.Option(help="of the tokens that stay; may be given again")] = None,
    device: str = "cpu",
    out: Annotated[Path, typer.Option(help="where rows are kept")] = RESULTS,
) -> None:
    """Measure kvpress's rules on the demonstration's model."""
    console = Console()
    network, tokenizer = demo.load_demo_model(console, device)
    texts = samples_of(task, tokenizer, samples)
    head = head_of("peers", network, model=demo.CONVERTED, task=task, samples=len(texts))
    head["versions"] |= {"kvpress": version("kvpress")}
    result, divergence, rows = Result(out / "peers.json", head), Divergence(network, texts), []
    for peer in peers(share or (0.5, 0.25, 0.125)):
        found = divergence.of_logits(reader(network, peer), {})
        row: Row = {"method": peer.name, "share": peer.share, **measures(found)}
        console.print({key: value for key, value in row.items() if "samples" not in key})
        rows.append(row)
        result.keep(rows)


if __name__ == "__main__":
    typer.run(main)
