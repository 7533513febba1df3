"""Compiles the Triton kernels for GPUs (without one), and prints each result; run as a program.

A process of its own, since the tests have Triton interpret its kernels.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter

import by_hand
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from think_compile.formats.bits import KeyBits, ValueBits
from think_compile.kernels.codecs import SIZES, parts_of
from think_compile.kernels.codes import LEAST_TILE
from think_compile.kernels.launch import H100, Device, Launch, launch_for, launch_for_codes
from think_compile.kernels.mass import OF_KEYS, OF_QUERIES, fitted, sum_keys, sum_queries
from think_compile.kernels.merge import COLUMNS, merge_shares
from think_compile.kernels.pair import kernels_of

DEVICES = {
    "H100": (GPUTarget("cuda", 90, 32), H100),
    "A100": (GPUTarget("cuda", 80, 32), Device(166_912, 108)),
    "RTX 4090": (GPUTarget("cuda", 89, 32), Device(101_376, 128)),
    "MI250": (GPUTarget("hip", "gfx90a", 64), Device(65_536, 104)),
    "RX 7900": (GPUTarget("hip", "gfx1100", 32), Device(65_536, 96)),
}
LEAVES = re.compile(r"ttg.convert_layout .*tensor<\d+x\d+xf32, #mma\d*> -> tensor<\d+x\d+xf32, #blocked")
OPCODE = re.compile(r"^\t(?:@%\w+ )?([a-z][\w.]+)", re.M)
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


def compiled(
    kernel, types: dict[str, str], constants: dict[str, object], device: str = "H100", **options
) -> dict[str, object]:
    """Bytes of shared memory, how often a matrix moves to another layout in a loop, and the count of each opcode."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    given = {(names.index(name),): value for name, value in constants.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=given, attrs=aligned)
    target, limits = DEVICES[device]
    made = triton.compile(source, target=target, options=options)
    return {
        "shared": made.metadata.shared,
        "may": limits.shared_bytes,
        "moved": moved_in_loops(made.asm["ttgir"]),
        "opcodes": Counter(OPCODE.findall(made.asm.get("ptx", ""))),
    }


def moved_in_loops(text: str) -> int:
    """Products converted inside loops, in a kernel in Triton's GPU dialect, to a layout other than a product's."""
    moved, depth = 0, []
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        depth = [loop for loop in depth if loop < indent or (line.lstrip().startswith("}") and loop == indent)]
        moved += bool(depth) and bool(LEAVES.search(line))
        if " scf.for " in line:
            depth.append(indent)
    return moved


def share(
    *,
    dtype="bf16",
    group=4,
    d=128,
    kept=64,
    dv=128,
    queries=1,
    mask="none",
    on_device=True,
    causal=False,
    rolling=False,
    sinks=0,
    launch=None,
    device="H100",
    hand=False,
) -> dict[str, object]:
    """The kernel of a call's shares, as it is launched for 8 KV heads and 8,192 tokens, or with another ``launch``.

    ``hand``: the kernel written by hand, the template's reference.
    """
    size = BYTES[dtype]
    if launch is None:
        shape = group * queries, (kept + dv) * size, (d + dv) * size, 8
        launch = launch_for("channels+whole", shape, 8192, DEVICES[device][1])
    launch = Launch(*launch)
    widths = {"D": d, "K": kept, "V": dv, "DV": dv}
    constants = {
        **{
            f"{name}_{size}": n
            for name, width in widths.items()
            for size, n in zip(SIZES, parts_of(width), strict=True)
        },
        **{"GROUP": group, "ON_DEVICE": on_device, "ROLLING": rolling, "CAUSAL": causal},
        **{"KIND": ["none", "bool", "float"].index(mask), "ALIKE": mask != "float"},
        **{"HALF_MASK": mask == "float" and dtype == "fp16", "BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n},
        **({"MASK": None} if mask == "none" else {}),
        **dict.fromkeys(("V_RING", "V_SINKS") if sinks else ("K_SINKS", "V_RING", "V_SINKS", "FIRST_TOKEN")),
        **{"SINKS": sinks, "GROUP_N": 1, "BLOCK_W": launch.block_n, "PARTS": 1, "BEFORE": None},
        **({} if on_device else {"WINDOW_START": None, "START": None}),
    }
    types = dict.fromkeys(("Q", "K_NEW", "V_NEW", "K_ROWS", "K_RING", "K_SINKS", "V_ROWS"), f"*{dtype}")
    types |= dict.fromkeys(("OUT", "MOST", "TOTAL"), "*fp32")
    types |= dict.fromkeys(("WINDOW_START", "START", "FIRST_TOKEN"), "*i64") | {"K_CHANNELS": "*i16"}
    types |= {"scale": "fp64" if on_device else "fp32", "MASK": "*i1" if mask == "bool" else f"*{dtype}"}
    kernel = by_hand.attend_share if hand else kernels_of("channels", "whole").attend_share
    if hand:
        types, constants = (
            {NAMES.get(name, name): x for name, x in given.items() if NAMES.get(name, name) in kernel.arg_names}
            for given in (types, constants)
        )
    return compiled(kernel, types, constants, device, num_warps=launch.warps, num_stages=launch.stages)


def codes(
    *,
    keys=((4, 64),),
    values=((4, 128),),
    d=128,
    dv=128,
    group=4,
    queries=1,
    mask="bool",
    sinks=4,
    records=128,
    on_device=True,
    device="H100",
) -> dict[str, object]:
    """The kernel of a call's shares for bit plans; None: whole rows on this side."""
    names = "whole" if keys is None else "key_bits", "whole" if values is None else "value_bits"
    kernels = kernels_of(*names)
    launch = launch_for_codes(group * queries, 8, (8192, 160, max(records, LEAST_TILE)), 1 << 14)
    constants = {"SINKS": sinks, "GROUP_N": records, "GROUP": group, "ON_DEVICE": on_device, "ROLLING": False}
    constants |= {"CAUSAL": False, "KIND": ["none", "bool", "float"].index(mask), "ALIKE": True, "HALF_MASK": False}
    parts = 2 if None not in (keys, values) and records == 128 and group * queries <= 4 else 1
    constants |= {"BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n, "BLOCK_W": 32, "PARTS": parts}
    types = dict.fromkeys(("Q", "K_NEW", "V_NEW", "K_ROWS", "V_ROWS"), "*bf16") | {
        "OUT": "*fp32",
        "FIRST_TOKEN": "*i64",
    }
    types |= dict.fromkeys(("MOST", "TOTAL"), "*fp32") | dict.fromkeys(("WINDOW_START", "START", "BEFORE"), "*i64")
    types |= {"scale": "fp64" if on_device else "fp32", "MASK": "*i1" if mask == "bool" else "*bf16"}
    for side, plan, codec, width, of in (
        ("K", keys, KeyBits, d, kernels.keys),
        ("V", values, ValueBits, dv, kernels.values),
    ):
        types |= {f"{side}_CODES": "*u8", f"{side}_RANGES": "*fp16", f"{side}_CHANNELS": "*i16"} | {
            "K_ORDERED": "*bf16"
        }
        types |= {f"{side}_RING": "*bf16", f"{side}_SINKS": "*bf16"}
        if plan is None:
            constants |= {f"{side}_RING": None, f"{side}_SINKS": None}
            numbers = parts_of(width)
        else:
            numbers = of.sizes(codec(plan, 32, records), None, width, True, parts)
        constants |= dict(zip(of.constants(side), numbers, strict=True))
        if side == "V" and constants.get("V_END0") == 0:
            constants |= {"V_CHANNELS": None}
    for side, width in (("D", d), ("DV", dv)):
        constants |= {f"{side}_{size}": n for size, n in zip(SIZES, parts_of(width), strict=True)}
    constants |= {"MASK": None} if mask == "none" else {}
    constants |= {} if on_device else {"WINDOW_START": None, "START": None}
    constants |= {} if sinks else {"K_SINKS": None, "V_SINKS": None, "FIRST_TOKEN": None}
    return compiled(kernels.attend_share, types, constants, device, num_warps=launch.warps, num_stages=launch.stages)


def largest(
    *, keys=(64, 16), values=(40, 8), d=128, group=4, mask="bool", on_device=True, dtype="bf16", block_n=64, warps=4,
    stages=2, device="H100",
):  # fmt: skip
    """The kernel of a call's shares for rows of the largest numbers, (numbers, bits); None: whole rows on this side."""
    names = ["whole" if side is None else "mustafar" for side in (keys, values)]
    kernels = kernels_of(*names)
    constants = {"SINKS": 0, "GROUP_N": 1, "GROUP": group, "ON_DEVICE": on_device, "ROLLING": False, "CAUSAL": False}
    constants |= {"KIND": ["none", "bool", "float"].index(mask), "ALIKE": True, "HALF_MASK": False, "BLOCK_M": 16}
    constants |= {"BLOCK_N": block_n, "BLOCK_W": block_n, "PARTS": 1, "BEFORE": None, "FIRST_TOKEN": None}
    types = dict.fromkeys(("Q", "K_NEW", "V_NEW", "K_ROWS", "V_ROWS", "K_RING", "V_RING"), f"*{dtype}")
    types |= dict.fromkeys(("OUT", "MOST", "TOTAL"), "*fp32") | dict.fromkeys(("WINDOW_START", "START"), "*i64")
    types |= {"scale": "fp64" if on_device else "fp32", "MASK": "*i1" if mask == "bool" else f"*{dtype}"}
    for side, plan, of in (("K", keys, kernels.keys), ("V", values, kernels.values)):
        constants |= {f"{side}_SINKS": None}
        if plan is None:
            constants |= {f"{side}_RING": None} | dict(zip(of.constants(side), parts_of(d), strict=True))
            continue
        kept, bits = plan
        types |= {f"{side}_NONZEROS": "*i8" if bits == 8 else f"*{dtype}", f"{side}_BITMAP": "*i32"}
        types |= {f"{side}_ROW_SCALES": "*fp16"}
        constants |= {} if bits == 8 else {f"{side}_ROW_SCALES": None}
        constants |= dict(zip(of.constants(side), of.sizes(None, torch.empty(kept), d, True, 1), strict=True))
    for side in ("D", "DV"):
        constants |= {f"{side}_{size}": n for size, n in zip(SIZES, parts_of(d), strict=True)}
    constants |= {"MASK": None} if mask == "none" else {}
    constants |= {} if on_device else {"WINDOW_START": None, "START": None}
    return compiled(kernels.attend_share, types, constants, device, num_warps=warps, num_stages=stages)


# Names in the kernel written by hand, by the template's names.
NAMES = {"K_ROWS": "PRUNED", "K_CHANNELS": "CHANNELS", "K_RING": "RECENT", "V_ROWS": "VALUES", "WINDOW_START": "FLOOR"}
NAMES |= {"D_WIDTH": "D", "D_PART0": "D0", "D_PART1": "D1", "K_WIDTH": "T", "K_PART0": "T0", "K_PART1": "T1"}
NAMES |= {"V_WIDTH": "DV", "V_PART0": "DV0", "V_PART1": "DV1"}


def merge() -> dict[str, object]:
    types = {"OUT": "*fp32", "MOST": "*fp32", "TOTAL": "*fp32", "RESULT": "*bf16"}
    return compiled(merge_shares, types, {"DV": 80, "COLUMNS": COLUMNS, "SPLITS": 33, "BLOCK_S": 64})


def mass(*, kernel=sum_keys, tile=OF_KEYS, dtype="bf16", d=96, device="H100") -> dict[str, object]:
    """The kernels of H2O's scores."""
    types = {"Q": f"*{dtype}", "K": f"*{dtype}", "SUMS": "*fp32", "MASS": "*fp32", "START": "*i64", "scale": "fp32"}
    types |= {"LSE": "*fp32", "KEY_VALID": "*i1", "QUERY_VALID": "*i1", "SPANS": "*i64"}
    target, limits = DEVICES[device]
    tile = fitted(tile, max(128, d) * BYTES[dtype], limits)
    if target.backend != "cuda":
        tile = tile._replace(registers=0)
    options = tile.options()
    sizes = {"GROUP": 4, "HEADS": 8, "D": d, "BLOCK_D": max(128, d)}
    sizes |= {name: options.pop(name) for name in ("BLOCK_M", "BLOCK_N")}
    return compiled(kernel, types, sizes, device, **options)


def sums(**options) -> dict[str, object]:
    return mass(kernel=sum_queries, tile=OF_QUERIES, **options)


STORED = dict.fromkeys(("Q", "K", "V", "K_ROWS", "RING", "V_ROWS", "RESULT"), "*bf16")
STORED |= {"K_CHANNELS": "*i16", "COUNTERS": "*i64", "START": "*i64"}
STORED |= dict.fromkeys(("OUT", "MOST", "TOTAL"), "*fp32")
OF_KEYS = {"GROUP": 4, "D": 96, "K_WIDTH": 48, "BLOCK_D": 128, "BLOCK_K": 64}


def appended() -> dict[str, object]:
    """The kernel that appends a step's key."""
    return compiled(kernels_of("channels", "whole").append_key, STORED, OF_KEYS)


def finished() -> dict[str, object]:
    """The kernel that merges a step's shares and stores its token."""
    merging = {"DV": 80, "BLOCK_V": 128, "COLUMNS": COLUMNS, "SPLITS": 33, "BLOCK_S": 64}
    return compiled(kernels_of("channels", "whole").finish_step, STORED, OF_KEYS | merging)


def coded(*, keys=((8, 32), (4, 64), (2, 32)), values=((4, 128),), d=128, sinks=4, records=128) -> dict[str, object]:
    """The kernel that ends a step on codes."""
    of_keys = "whole" if keys is None else "channels" if isinstance(keys, int) else "key_bits"
    of_keys = "mustafar" if keys == "mustafar" else of_keys
    kernels = kernels_of(of_keys, "whole" if values is None else "value_bits")
    constants = {
        "GROUP": 4,
        "SINKS": sinks,
        "RECORD": records,
        "D": d,
        "BLOCK_D": 128,
        "DV": d,
        "BLOCK_V": 128,
        "COLUMNS": COLUMNS,
        "SPLITS": 33,
        "BLOCK_S": 64,
    }
    types = dict.fromkeys(("Q", "K", "V", "K_ROWS", "V_ROWS", "RESULT"), "*bf16") | {"START": "*i64", "BEFORE": "*i64"}
    types |= dict.fromkeys(("OUT", "MOST", "TOTAL"), "*fp32")
    for side, plan, codec, of in (("K", keys, KeyBits, kernels.keys), ("V", values, ValueBits, kernels.values)):
        types |= {f"{side}_CODES": "*u8", f"{side}_RANGES": "*fp16", f"{side}_RING": "*bf16", f"{side}_SINKS": "*bf16"}
        types |= {f"{side}_CHANNELS": "*i16", f"{side}_FIRST": "*i64", f"{side}_COUNTERS": "*i64"}
        if plan is None:
            constants |= dict.fromkeys(f"{side}_{name}" for name in ("RING", "SINKS", "FIRST", "COUNTERS"))
        if kernels.keys.name == "mustafar" and side == "K":
            types |= {"K_NONZEROS": "*i8", "K_BITMAP": "*i32", "K_ROW_SCALES": "*fp16"}
            numbers = of.sizes(None, torch.empty(64), d, True, 1)
        elif plan is None or isinstance(plan, int):
            numbers = parts_of(plan or d)
        else:
            numbers = of.sizes(codec(plan, 32, records), None, d, True, 1)
        constants |= dict(zip(of.constants(side), numbers, strict=True))
        if constants.get(f"{side}_END0") == 0:
            constants |= {f"{side}_CHANNELS": None}
    constants |= {} if sinks else {"K_SINKS": None, "V_SINKS": None}
    return compiled(kernels.finish_step, types, constants)


if __name__ == "__main__":
    kernels = {"share": share, "codes": codes, "coded": coded, "merge": merge, "append": appended, "finish": finished}
    kernels |= {"mass": mass, "sums": sums, "largest": largest}
    print(json.dumps([kernels[name](**options) for name, options in json.loads(sys.argv[1])]))
