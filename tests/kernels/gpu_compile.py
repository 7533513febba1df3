"""Compiles the Triton kernels for GPUs, which needs none, and prints what became of each; run as a program.

A process of its own, since the tests have Triton interpret its kernels.
"""

from __future__ import annotations

import json
import re
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from think_compile.kernels import append, decode, decode_kernel
from think_compile.kernels.launch import H100, Device, Launch, launch_for

DEVICES = {
    "H100": (GPUTarget("cuda", 90, 32), H100),
    "A100": (GPUTarget("cuda", 80, 32), Device(166_912, 108)),
    "RTX 4090": (GPUTarget("cuda", 89, 32), Device(101_376, 128)),
    "MI250": (GPUTarget("hip", "gfx90a", 64), Device(65_536, 104)),
    "RX 7900": (GPUTarget("hip", "gfx1100", 32), Device(65_536, 96)),
}
LEAVES = re.compile(r"ttg.convert_layout .*tensor<\d+x\d+xf32, #mma\d*> -> tensor<\d+x\d+xf32, #blocked")
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


def compiled(
    kernel, types: dict[str, str], constants: dict[str, object], device: str = "H100", **options
) -> dict[str, int]:
    """Bytes of shared memory that the kernel takes, and how often it moves a matrix to another layout in a loop."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    given = {(names.index(name),): value for name, value in constants.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=given, attrs=aligned)
    target, limits = DEVICES[device]
    made = triton.compile(source, target=target, options=options)
    return {"shared": made.metadata.shared, "may": limits.shared_bytes, "moved": moved_in_loops(made.asm["ttgir"])}


def moved_in_loops(text: str) -> int:
    """Products that leave their layout inside loops of a kernel in Triton's GPU dialect, but for another product's."""
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
    launch=None,
    device="H100",
) -> dict[str, int]:
    """The kernel of a call's shares, as it is launched for 8 KV heads and 8,192 tokens, or with another ``launch``."""
    size = BYTES[dtype]
    if launch is None:
        launch = launch_for(group * queries, (kept + dv) * size, (d + dv) * size, 8, 8192, DEVICES[device][1])
    launch = Launch(*launch)
    parts = {"D": d, "T": kept, "DV": dv}
    constants = {
        **parts,
        **{f"{name}{i}": part for name, width in parts.items() for i, part in enumerate(decode._parts(width))},
        **{
            "GROUP": group,
            "ON_DEVICE": on_device,
            "ROLLING": rolling,
            "KIND": ["none", "bool", "float"].index(mask),
            "CAUSAL": causal,
        },
        **{"ALIKE": mask != "float", "HALF_MASK": mask == "float" and dtype == "fp16"},
        **{"BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n},
        **({"MASK": None} if mask == "none" else {}),
        **({} if on_device else {"FLOOR": None, "START": None}),
    }
    types = dict.fromkeys(("Q", "K_NEW", "V_NEW", "PRUNED", "RECENT", "VALUES"), f"*{dtype}")
    types |= dict.fromkeys(("OUT", "MOST", "TOTAL"), "*fp32") | dict.fromkeys(("CHANNELS", "FLOOR", "START"), "*i64")
    types |= {"scale": "fp64" if on_device else "fp32", "MASK": "*i1" if mask == "bool" else f"*{dtype}"}
    return compiled(
        decode_kernel.attend_share, types, constants, device, num_warps=launch.warps, num_stages=launch.stages
    )


def merge() -> dict[str, int]:
    types = {"OUT": "*fp32", "MOST": "*fp32", "TOTAL": "*fp32", "RESULT": "*bf16"}
    return compiled(decode_kernel.merge_shares, types, {"DV": 80, "BLOCK_V": 128, "SPLITS": 33, "BLOCK_S": 64})


def appended() -> dict[str, int]:
    """The kernel that appends a step's key."""
    types = dict.fromkeys(("Q", "K", "PRUNED", "RECENT"), "*bf16")
    types |= dict.fromkeys(("CHANNELS", "PROGRESS", "START"), "*i64")
    return compiled(append.append_key, types, {"GROUP": 4, "D": 96, "T": 48, "BLOCK_D": 128, "BLOCK_T": 64})


def finished() -> dict[str, int]:
    """The kernel that merges a step's shares and stores its token."""
    types = dict.fromkeys(("Q", "K", "V", "PRUNED", "RECENT", "VALUES", "RESULT"), "*bf16")
    types |= dict.fromkeys(("OUT", "MOST", "TOTAL"), "*fp32")
    types |= dict.fromkeys(("CHANNELS", "PROGRESS", "START"), "*i64")
    constants = {"GROUP": 4, "D": 96, "T": 48, "BLOCK_D": 128, "BLOCK_T": 64}
    return compiled(append.finish_step, types, constants | {"DV": 80, "BLOCK_V": 128, "SPLITS": 33, "BLOCK_S": 64})


if __name__ == "__main__":
    kernels = {"share": share, "merge": merge, "append": appended, "finish": finished}
    print(json.dumps([kernels[name](**options) for name, options in json.loads(sys.argv[1])]))
