"""First calls whose keys stay behind as the very tensors that came in: a later call that joins them packs them.

Where a graph break parts projection and attention, no graph shows that the keys are a cache. The attention's graph
notes which channels its call chooses; the tensors stay the caller's. A later call whose past they are takes them up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from think_compile.cell import Cell
from think_compile.handle import Handle, handle_for
from think_compile.kernels import reference as ref
from think_compile.kernels.canonical import CHANNEL, HEAD, Layout, to_canonical
from think_compile.kernels.steps import GROWTH_ROWS, LayerSpec, capacity_for
from think_compile.passes.kv_cache import CachedAttention, CacheTensor
from think_compile.store import GrowingKeys, GrowingValues, Rows, allocating

SpecOf = Callable[[CachedAttention], LayerSpec]


class Pending:
    """The channels that first calls chose, by the keys, for as long as those live and nobody writes to them."""

    def __init__(self) -> None:
        self.chosen: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def note(self, keys: Tensor, channels: Tensor, spec: LayerSpec) -> None:
        """Remember what a first call chose of ``keys``."""
        if not isinstance(keys, Handle):
            self.chosen[keys] = channels, spec, _version(keys)

    def take_up(self, args: Sequence[Any], sites: Sequence[CachedAttention], spec: SpecOf) -> Sequence[Any]:
        """``args`` with handles for pasts that a first call chose channels of; ``spec`` tells that of a site."""
        if not self.chosen:
            return args
        taken = list(args)
        for site, channels in self._known(args, sites, spec):
            keys, values = site.past  # type: ignore[misc]
            taken[keys], taken[values] = _packed(args[keys], args[values], site, channels, spec(site))
        return taken

    def _known(
        self, args: Sequence[Any], sites: Sequence[CachedAttention], spec: SpecOf
    ) -> Iterator[tuple[CachedAttention, Tensor]]:
        for site in sites:
            if site.past is None or site.in_buffer or site.window is not None:
                continue
            keys, values = (args[i] for i in site.past)
            if isinstance(keys, Handle) or isinstance(values, Handle) or keys not in self.chosen:
                continue
            channels, chosen_for, version = self.chosen[keys]
            same_heads = channels.shape[1] == site.keys.size(HEAD)
            if same_heads and chosen_for == spec(site) and version == _version(keys):
                yield site, channels


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _packed(
    keys: Tensor, values: Tensor, site: CachedAttention, channels: Tensor, spec: LayerSpec
) -> tuple[Handle, Handle]:
    with allocating():
        k, v = _canonical(keys, site.keys), _canonical(values, site.values)
        length = k.shape[2]
        capacity = capacity_for(length)
        pruned, _, recent = ref.pack_rows(k, channels, length, spec.ring_rows(GROWTH_ROWS), capacity)
        v = F.pad(v, (0, 0, 0, capacity - length)).contiguous()
        floor = max(0, length - spec.recent)
        packed = GrowingKeys(Rows(pruned.contiguous()), channels, recent.contiguous(), length, floor, spec)
        layouts = site.keys.join.past_layout, site.values.join.past_layout
        cells = Cell(packed), Cell(GrowingValues(Rows(v), length))
        return handle_for(cells[0], _known(layouts[0])), handle_for(cells[1], _known(layouts[1]))


def _canonical(past: Tensor, tensor: CacheTensor) -> Tensor:
    return to_canonical(
        past.detach(), _known(tensor.join.past_layout), int(tensor.size(HEAD)), int(tensor.size(CHANNEL))
    )


def _known(layout: Layout | None) -> Layout:
    assert layout is not None
    return layout
