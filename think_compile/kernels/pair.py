"""The kernels of a pair of codecs, made from the templates, and the torch operations that call them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
from torch import Tensor
from torch.library import triton_op

from think_compile.kernels import attend_template, store_template
from think_compile.kernels.channels import CHANNELS
from think_compile.kernels.codecs import CODED_PARTS, DeviceCodec
from think_compile.kernels.codes import KEY_BITS, VALUE_BITS
from think_compile.kernels.encode import writer
from think_compile.kernels.merge import merge_shares
from think_compile.kernels.mustafar import MUSTAFAR
from think_compile.kernels.shares import Given, Kernels, code_constants, device_of_launch, launch_shares, traced
from think_compile.kernels.specialise import specialised
from think_compile.kernels.whole import WHOLE

CODECS = {codec.name: codec for codec in (CHANNELS, WHOLE, MUSTAFAR, KEY_BITS, VALUE_BITS)}
# Lengths change with each token and must not compile a new kernel variant each time.
_LENGTHS = ["window_start", "start", "first", "extent", "room", "splits", "whole_splits"]
_STORES: dict[str, Any] = {
    "whole": store_template.store_whole_side,
    "channels": store_template.store_channels_side,
    "mustafar": store_template.store_mustafar_side,
}


def stored_parts(codec: DeviceCodec) -> tuple[str, ...]:
    """Names of a side's stored tensors, which a writer takes."""
    return CODED_PARTS if codec in (KEY_BITS, VALUE_BITS) else codec.parts


@functools.cache
def kernels_of(keys: str, values: str) -> Kernels:
    """The kernels for keys and values of these codecs."""
    k, v = CODECS[keys], CODECS[values]
    name = f"{keys}_{values}"
    groups = {"KEYS": k.pointers("K"), "VALUES": v.pointers("V"), "ACC": v.accumulators}
    own = WHOLE.accumulators if v is WHOLE else ("a0", "a1")
    encoded = {"K_SIZES": k.constants("K"), "V_SIZES": v.constants("V")}
    coded = {"QUERIES": k.queries, **groups, **encoded}
    whole = {
        "WHOLE": ("w0", "w1"),
        "WHOLE_ACC": own,
        "D_SIZES": WHOLE.constants("D"),
        "DV_SIZES": WHOLE.constants("DV"),
    }
    products = {"scores": k.functions["scores"], "mix": v.functions["mix"]}
    of_codecs = {
        "walk_encoded": specialised(attend_template.walk, f"walk_{name}", products, coded),
        "values_zero": v.functions["zero"],
    }
    of_window = {f"whole_{function}": WHOLE.functions[function] for function in ("scores", "mix", "zero")}
    functions = {
        **{f"keys_{function}": k.functions[function] for function in ("locate", "prepare")},
        **{f"values_{function}": v.functions[function] for function in ("locate", "finish")},
        **{f"whole_{function}": WHOLE.functions[function] for function in ("locate", "prepare", "finish")},
        "encoded_share": specialised(attend_template.encoded_share, f"encoded_{name}", of_codecs, coded),
        "whole_share": specialised(attend_template.whole_share, f"whole_{name}", of_window, whole),
    }
    first = {"KEY_ROWS": k.pointers("K")[:1], "VALUE_ROWS": v.pointers("V")[:1]}
    share = specialised(
        attend_template.attend_share,
        f"attend_{name}",
        functions,
        {**coded, **whole, **first, "VALUES_ARE_WHOLE": (str(v is WHOLE),)},
        do_not_specialize=_LENGTHS,
    )
    if {KEY_BITS, VALUE_BITS, MUSTAFAR} & {k, v}:
        return Kernels(k, v, share, None, _coded_writer(name, k, v))
    return Kernels(k, v, share, *_writers(name, k, v))


def _writers(name: str, k: DeviceCodec, v: DeviceCodec) -> tuple[Any, Any]:
    """The kernels that store a token, if the codecs have the functions."""
    if "store" not in k.functions or "store" not in v.functions:
        return None, None
    of_keys = {f"keys_{function}": k.functions[function] for function in ("locate", "choose", "store")}
    keys, values = {"KEYS": k.pointers("K")}, {"VALUES": v.pointers("V")}
    store = {"store_key": specialised(store_template.store_key, f"store_key_{name}", of_keys, keys)}
    of_values = {f"values_{function}": v.functions[function] for function in ("locate", "store")}
    return (
        specialised(store_template.append_key, f"append_{name}", store, keys),
        specialised(store_template.finish_step, f"finish_{name}", store | of_values, keys | values),
    )


def _coded_writer(name: str, k: DeviceCodec, v: DeviceCodec) -> Any:
    """The kernel that ends a step if a side has codes."""
    sides = {}
    for of, codec in (("keys", k), ("values", v)):
        functions, groups = {}, {"SIZES": codec.size_names}
        template = _STORES.get(codec.name, store_template.store_side)
        if template is store_template.store_side:
            functions, groups = writer(codec is KEY_BITS), {**groups, "SIDE": CODED_PARTS, "LOCATED": CODED_PARTS}
        sides[f"{of}_side"] = specialised(template, f"store_{of}_{name}", functions, groups)
    groups = {"K_SIZES": k.constants("K"), "V_SIZES": v.constants("V")}
    for side, of, codec in (("KEYS", "K", k), ("VALUES", "V", v)):
        groups[side] = tuple(f"{of}_{part.upper()}" for part in stored_parts(codec))
    return specialised(store_template.finish_coded_step, f"finish_{name}", sides, groups)


# --------------------------------------------------------------------------------------------- operations of torch


@functools.cache
def attend_operation(keys: str, values: str) -> Any:
    """The attention of a later call; arguments as in :class:`.shares.Given`."""

    @triton_op(f"think_compile::attend_{keys}_{values}", mutates_args={})
    def attend(
        own: list[Tensor],
        keys_: list[Tensor],
        values_: list[Tensor],
        whole: list[Tensor | None],
        mask: Tensor | None,
        at: list[Tensor],
        numbers: list[int],
        sizes: list[int],
        scale: float,
        launch: list[int],
    ) -> Tensor:
        kernels = kernels_of(keys, values)
        sides = filled(keys_, kernels.keys), filled(values_, kernels.values)
        given = Given(own, *sides, whole, mask, at, numbers, sizes, scale, launch)
        q, _, v = own
        result = q.new_empty((*q.shape[:3], v.shape[3]))
        with device_of_launch(q):
            shares = launch_shares(kernels, given)
            all_heads, _, rows, _ = shares.out.shape
            traced(merge_shares)[(all_heads, shares.parts)](*shares, result, rows, **shares.sizes())
        return result

    return attend


@functools.cache
def step_operation(keys: str, values: str) -> Any:
    """The attention of one token on a cache of fixed size, which then stores the token.

    As :func:`attend_operation`; ``keys_`` ends with the ring and the counters. ``numbers``: the end of the rows,
    whether the attention is causal, and how many tokens have whole rows after a first call and after a later one.
    """

    @triton_op(f"think_compile::step_{keys}_{values}", mutates_args={"keys_", "values_"})
    def step(
        own: list[Tensor],
        keys_: list[Tensor],
        values_: list[Tensor],
        mask: Tensor | None,
        start: Tensor,
        numbers: list[int],
        sizes: list[int],
        scale: float,
        launch: list[int],
    ) -> Tensor:
        kernels, (extent, causal, *windows) = kernels_of(keys, values), numbers
        q, k, v = own
        *past, ring, counters = keys_
        lengths = [0, 0, 0, extent, 0, causal]
        result = q.new_empty((*q.shape[:3], v.shape[3]))
        with device_of_launch(q):
            whole, at = [ring, None, None, None, None], [counters, start]
            given = Given(own, past, values_, whole, mask, at, lengths, sizes, scale, launch)
            shares = launch_shares(kernels, given)
            constants = _store_sizes(q, k, past[0]) | _value_sizes(v) | shares.sizes()
            traced(kernels.finish_step)[(k.shape[0] * k.shape[1], shares.parts + 1)](
                *shares, result, q, k, v, *past, ring, counters, *values_, start,
                *windows, past[0].shape[2], ring.shape[2], **constants,
            )  # fmt: skip
        return result

    return step


class Coded(NamedTuple):
    """The stored tensors of a side; :func:`coded_step_operation` takes them in this order, without the missing ones.

    Attributes:
        parts: of the codec; None: it is not stored.
        ring, sinks, first_token, counters: as in :class:`think_compile.formats.side.Side`; None: there are none.
    """

    parts: Sequence[Any]
    ring: Tensor | None = None
    sinks: Tensor | None = None
    first_token: Tensor | None = None
    counters: Tensor | None = None

    @classmethod
    def of(cls, tensors: list[Tensor], codec: DeviceCodec, has_sinks: bool, count: int) -> Coded:
        """From the flat list; whole rows are alone in it, and chosen channels without sinks have no first token.

        ``count``: how many of them are the codec's.
        """
        parts = filled(tensors[:count], codec)
        if len(tensors) == count:
            return cls(parts)
        ring, *between, counters = tensors[count:]
        sinks = between.pop(0) if has_sinks else None
        return cls(parts, ring, sinks, between[0] if between else None, counters)


def filled(parts: Sequence[Tensor], codec: DeviceCodec) -> list[Any]:
    """A codec's tensors as its kernels take them: None for those that it does not store."""
    return [*parts, *[None] * (len(stored_parts(codec)) - len(parts))]


@functools.cache
def coded_step_operation(keys: str, values: str) -> Any:
    """As :func:`step_operation`, for sides of codes; arguments as there.

    ``own`` ends with the queries in the order of the keys' plan, if the keys are codes. ``keys_`` and ``values_``: see
    :class:`Coded`; ``numbers`` ends with how many of each are the codec's. ``sizes``: as in :class:`.shares.Given`.
    """

    @triton_op(f"think_compile::step_{keys}_{values}", mutates_args={"keys_", "values_"})
    def step(
        own: list[Tensor],
        keys_: list[Tensor],
        values_: list[Tensor],
        mask: Tensor | None,
        start: Tensor,
        numbers: list[int],
        sizes: list[int],
        scale: float,
        launch: list[int],
    ) -> Tensor:
        kernels, (extent, causal, *windows, key_parts, value_parts) = kernels_of(keys, values), numbers
        q, k, v, *ordered = own
        key_side = Coded.of(keys_, kernels.keys, sizes[0] > 0, key_parts)
        value_side = Coded.of(values_, kernels.values, sizes[0] > 0, value_parts)
        result, before = q.new_empty((*q.shape[:3], v.shape[3])), start.new_empty(())
        counted = value_side if key_side.counters is None else key_side
        assert counted.counters is not None and counted.ring is not None
        first_token = counted.first_token if sizes[0] else None
        whole = [key_side.ring, key_side.sinks, value_side.ring, value_side.sinks, first_token]
        past = [*key_side.parts[:2], *ordered] if ordered else key_side.parts
        lengths, at = [0, 0, 0, extent, 0, causal], [counted.counters, start]
        given = Given([q, k, v], past, value_side.parts, whole, mask, at, lengths, sizes, scale, launch, before)
        with device_of_launch(q):
            shares = launch_shares(kernels, given)
            group, heads = q.shape[1] // k.shape[1], k.shape[1]
            constants = code_constants(kernels, sizes[3:]) | _value_sizes(v) | shares.sizes()
            traced(kernels.finish_step)[(k.shape[0] * heads, shares.parts + 2)](
                *shares, result, q, k, v, *key_side.parts, *key_side[1:], *value_side.parts, *value_side[1:],
                start, before, heads, *windows, extent, key_side.parts[0].shape[2], value_side.parts[0].shape[2],
                counted.ring.shape[2], GROUP=group, SINKS=sizes[0],
                RECORD=sizes[1], D=q.shape[3], BLOCK_D=triton.next_power_of_2(q.shape[3]), **constants,
            )  # fmt: skip
        return result

    return step


@functools.cache
def append_operation(keys: str, values: str) -> Any:
    """Stores the key of one token in a cache of fixed size; ``windows``: the last two ``numbers`` of a step."""

    @triton_op(f"think_compile::append_{keys}_{values}", mutates_args={"keys_"})
    def append(q: Tensor, k: Tensor, keys_: list[Tensor], start: Tensor, windows: list[int]) -> None:
        *past, counters = keys_
        with device_of_launch(q):
            traced(kernels_of(keys, values).append_key)[(k.shape[0] * k.shape[1],)](
                q, k, *past, counters, start,
                *windows, past[0].shape[2], past[-1].shape[2], **_store_sizes(q, k, past[0]),
            )  # fmt: skip

    return append


def _value_sizes(v: Tensor) -> dict[str, int]:
    """The compile-time size for storing a value."""
    return {"BLOCK_V": triton.next_power_of_2(v.shape[3])}


def _store_sizes(q: Tensor, k: Tensor, rows: Tensor) -> dict[str, int]:
    """The compile-time sizes for storing a key."""
    d, width = q.shape[3], rows.shape[-1]
    return {
        "GROUP": q.shape[1] // k.shape[1],
        "D": d,
        "K_WIDTH": width,
        "BLOCK_D": triton.next_power_of_2(d),
        "BLOCK_K": triton.next_power_of_2(width),
    }
