"""The report: rewritten layers, refused layers with their reasons, and the bytes of the live caches."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import distributed

from think_compile.cache.canonical import CHANNEL, HEAD, describe
from think_compile.cache.cell import Cell
from think_compile.cache.packed import Packed
from think_compile.cache.store import Store
from think_compile.config import ThinkConfig
from think_compile.passes.as_written import plain_parts
from think_compile.passes.find.attention import Attention
from think_compile.passes.prove.site import CachedAttention, CacheSite
from think_compile.passes.refusal import UNDECIDED, Reason, Refused

# The spelling of call arguments and modules' dictionaries in a trace, and a person's spelling.
_SPELLINGS = (
    (r"^L\['kwargs'\]\['(\w+)'\]", r"\1"),
    (r"^L\['(\w+)'\]", r"\1"),
    (r"\._(?:modules|buffers)\['(\w+)'\]", r".\1"),
)


@dataclass(frozen=True)
class LayerRecord:
    """One attention layer.

    Attributes:
        layer: module path, if known from the trace.
        cache: "growing", "sliding" (bounded), "fixed" or "none".
        source: the past keys' name in the trace, or "" while there are none.
        axes: the cache's axes, of B(atch) H(ead) S(equence) D(channel); merged ones in brackets.
        q_heads, kv_heads, head_dim: sizes.
        kept: stored channels of a key outside the window.
        stored: how keys and values are stored, as text.
        reason: why the layer was left alone; None for a rewritten layer.
        detail: the cause of the refusal in the graph; for a rewritten layer, a remark.
    """

    layer: str
    cache: str = "none"
    source: str = ""
    axes: str = ""
    q_heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    kept: int | None = None
    reason: Reason | None = None
    detail: str = ""
    stored: str = ""

    @property
    def sentence(self) -> str:
        """The layer and the reason why it was left alone."""
        return f"{self.layer or '(attention)'}: {self.why}"

    @property
    def why(self) -> str:
        """The reason, and its cause in the graph."""
        assert self.reason is not None
        return self.reason.value + (f" [{self.detail}]" if self.detail else "")

    @property
    def place(self) -> str:
        """Where the cache lives, as in code: ``cache.layers[0].keys``; "" while unknown."""
        place = self.source
        for pattern, written in _SPELLINGS:
            place = re.sub(pattern, written, place)
        return place


def rewritten_record(site: CacheSite, sources: list[str], config: ThinkConfig) -> LayerRecord:
    """The record of a rewritten layer."""
    head_dim, form = int(site.keys.size(CHANNEL)), site.format(config.format_for)
    record = LayerRecord(
        layer=site.attention.path,
        cache="fixed" if site.fixed else "growing" if site.window is None else "sliding",
        source="" if site.past is None else sources[site.past[0]],
        axes=describe(next(iter(site.keys.outputs.values()))),
        kv_heads=int(site.keys.size(HEAD)),
        head_dim=head_dim,
        kept=form.keys.kept,
        detail="" if form.is_lossy else f"all {head_dim} are kept: {_why_all(config, head_dim)}",
        stored=form.describe(),
    )
    if isinstance(site, CachedAttention):
        return replace(record, q_heads=site.query_heads)
    return replace(record, detail="stored in codes, decoded on read")


def _why_all(config: ThinkConfig, head_dim: int) -> str:
    if head_dim - int(head_dim * config.ratio) == head_dim:
        return f"ratio {config.ratio} drops none"
    return f"rounding up to channel_multiple={config.channel_multiple} reaches the head's size"


def refused_record(site: Attention, refused: Refused) -> LayerRecord:
    """The record of a layer left alone."""
    shape, head_axis = site.q.meta["val"].shape, site.layout.index((HEAD,))
    q_heads = int(shape[head_axis]) if site.region is None and len(shape) == 4 else None
    head_dim = int(shape[-1 if site.region is None else site.region.logits.contracted[0]])
    return replace(refused_graph(refused, site.path), q_heads=q_heads, head_dim=head_dim)


def refused_graph(refused: Refused, layer: str = "") -> LayerRecord:
    """The record of a graph whose layers are unknown."""
    return LayerRecord(layer, reason=refused.reason, detail=refused.detail)


def sentence(refused: Sequence[tuple[Attention, Refused]]) -> str:
    """The refusals as text, with the layers grouped by reason."""
    by_reason: dict[str, list[str]] = {}
    for site, why in refused:
        detail = f" [{why.detail}]" if why.detail else ""
        by_reason.setdefault(why.reason.value + detail, []).append(site.path or "an attention")
    return "; ".join(f"{len(paths)} layers ({paths[0]}, ...): {reason}" for reason, paths in by_reason.items())


def _weight(record: LayerRecord) -> int:
    """How telling a record is: failures most, then rewritings, refusals, and calls given up or without a cache."""
    if record.reason is None:
        return 2
    if record.reason is Reason.FAILED:
        return 3
    return 0 if record.reason in (*UNDECIDED, Reason.GIVEN_UP) else 1


class Ledger:
    """Collects the records of a model's layers, and counts its graphs."""

    def __init__(self) -> None:
        self.layers: dict[str, LayerRecord] = {}
        self.graphs = 0

    def add(self, records: Iterable[LayerRecord]) -> None:
        """Add the records of one graph; for a known layer the more telling record stays."""
        seen: dict[str, int] = {}
        for record in records:
            nth = seen[record.layer] = seen.get(record.layer, 0) + 1
            key = record.layer if nth == 1 else f"{record.layer}#{nth}"
            self.layers[key] = _merged(self.layers.get(key), record)

    def give_up(self, records: Iterable[LayerRecord]) -> None:
        """Record layers as left alone from now on, replacing earlier records."""
        for record in records:
            known = self.layers.get(record.layer)
            self.layers[record.layer] = replace(record, source=known.source if known else "")


def _merged(known: LayerRecord | None, record: LayerRecord) -> LayerRecord:
    """The record of a layer after one more graph."""
    if known is None:
        return record
    if _weight(record) >= _weight(known):
        return replace(record, source=record.source or known.source)
    if _weight(known) == 2 and _weight(record) == 1:
        return replace(known, detail=f"a later call reads it densely: {record.why}")
    return known


def _stored(stores: Iterable[Store]) -> dict[str, int]:
    """Bytes of the distinct tensors of the stores, by the name of their part."""
    sizes: dict[str, dict[int, int]] = {}
    for store in stores:
        for name, tensor in store.named_tensors():
            for t in plain_parts(tensor):
                sizes.setdefault(name, {})[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    return {name: sum(of_part.values()) for name, of_part in sizes.items()}


def _dense(stores: Iterable[Store]) -> int:
    """Bytes of plain tensors of the same logical shapes; stores with shared rows count once."""
    longest: dict[int, int] = {}
    for store in stores:
        batch, heads, length, width = store.logical_shape
        n_bytes = batch * heads * length * width * store.dtype.itemsize
        key = id(store.rows)
        longest[key] = max(longest.get(key, 0), n_bytes)
    return sum(longest.values())


@dataclass(frozen=True)
class Report:
    """The effect of think_compile on a model.

    Attributes:
        config: the settings in force.
        rewritten: layers whose cache is compressed.
        refused: layers left exactly as they were, each with its reason.
        graphs: number of compiled graphs.
        key_parts, value_parts: bytes of the tensors of the live caches, by part: rows, codes, the window's ring, ...
        dense_key_bytes, dense_value_bytes: bytes of plain caches of the same tokens.
        selected: of the live caches made by a token rule, the different pairs (stored tokens of the first call, all
            its tokens).
        rank: (rank, group size) of a process in a group; the fields above are this rank's.
    """

    config: ThinkConfig
    rewritten: tuple[LayerRecord, ...]
    refused: tuple[LayerRecord, ...]
    graphs: int
    key_parts: Mapping[str, int]
    dense_key_bytes: int
    value_parts: Mapping[str, int]
    dense_value_bytes: int
    selected: tuple[tuple[int, int], ...] = ()
    rank: tuple[int, int] | None = None

    @classmethod
    def of(cls, config: ThinkConfig, ledger: Ledger, cells: Iterable[Cell]) -> Report:
        """The report at this moment."""
        live = list(cells)
        keys = [cell.store for cell in live if cell.of_keys]
        values = [cell.store for cell in live if not cell.of_keys]
        sizes = _stored(keys), _dense(keys), _stored(values), _dense(values)
        rewritten = tuple(r for r in ledger.layers.values() if r.reason is None)
        refused = tuple(r for r in ledger.layers.values() if r.reason is not None)
        pairs = {store.selected for store in keys if isinstance(store, Packed)} - {None}
        selected = tuple(sorted(pair for pair in pairs if pair is not None))
        return cls(config, rewritten, refused, ledger.graphs, *sizes, selected, _rank())

    @property
    def stored_key_bytes(self) -> int:
        """Bytes of the live caches' keys."""
        return sum(self.key_parts.values())

    @property
    def stored_value_bytes(self) -> int:
        """Bytes of the live caches' values."""
        return sum(self.value_parts.values())

    @property
    def problems(self) -> tuple[LayerRecord, ...]:
        """Layers for which ``strict=True`` raises: refused ones with a cache; all refused if none was rewritten."""
        without_cache = UNDECIDED if self.rewritten else {Reason.AWAITS_JOIN}
        return tuple(r for r in self.refused if r.reason not in without_cache)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the live caches, keys and values."""
        return self.stored_key_bytes + self.stored_value_bytes

    @property
    def dense_bytes(self) -> int:
        """Bytes of plain caches of the same tokens, keys and values."""
        return self.dense_key_bytes + self.dense_value_bytes

    def __str__(self) -> str:
        whose = "" if self.rank is None else f" (this rank, {self.rank[0]} of {self.rank[1]})"
        lines = [f"think_compile: {len(self.rewritten)} layers rewritten, {len(self.refused)} left as they were{whose}"]
        lines += [_line(record) for record in (*self.rewritten, *self.refused)]
        if len(lines) == 1:
            lines.append("  no attention with a cache was found" if self.graphs else "  the model was not called yet")
        lines += [f"  first calls: {kept:,} of {tokens:,} tokens stored" for kept, tokens in self.selected]
        if self.dense_bytes:
            lines.append(_bytes_line("keys", self.key_parts, self.dense_key_bytes))
            lines.append(_bytes_line("values", self.value_parts, self.dense_value_bytes))
        return "\n".join(lines)


def _rank() -> tuple[int, int] | None:
    """Rank and size of the default process group; None for a single process."""
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return None
    return distributed.get_rank(), distributed.get_world_size()


def _line(record: LayerRecord) -> str:
    if record.reason is not None:
        return f"  left as it was: {record.sentence}"
    name = record.layer or "(attention)"
    place = f" in {record.place}" if record.place else ""
    heads = f"{record.kv_heads} heads" if record.q_heads is None else _heads(record)
    return f"  {name}: {record.cache} cache {record.axes}{place}, {heads}, {record.stored}" + (
        f"; {record.detail}" if record.detail else ""
    )


def _heads(record: LayerRecord) -> str:
    return f"{record.q_heads} query and {record.kv_heads} key heads"


def _bytes_line(name: str, parts: Mapping[str, int], dense: int) -> str:
    stored = sum(parts.values())
    shares = ", ".join(f"{part} {n_bytes:,}" for part, n_bytes in sorted(parts.items(), key=lambda item: -item[1]))
    detail = f": {shares}" if len(parts) > 1 else ""
    return f"  live {name}: {stored:,} bytes stored, {dense:,} if dense ({stored / max(dense, 1):.3f}){detail}"
