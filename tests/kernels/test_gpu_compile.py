"""The Triton kernels compile for a GPU, and fit it; no GPU is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from think_compile.kernels.launch import query_tile, table

pytest.importorskip("triton")

SHARES = [
    ("share", {}),
    ("share", {"dtype": "fp32", "d": 256, "kept": 128, "dv": 256, "queries": 64}),
    ("share", {"d": 256, "kept": 128, "dv": 256, "queries": 4}),
    ("share", {"mask": "bool", "queries": 16}),
    ("share", {"mask": "float", "dtype": "fp32", "d": 256, "kept": 240, "dv": 256, "group": 7, "causal": True}),
    ("share", {"dtype": "fp16", "d": 96, "kept": 80, "dv": 48, "on_device": False}),
    ("share", {"sinks": 4}),
]
CODES = [
    ("codes", {}),
    ("codes", {"keys": [[8, 32], [4, 96]], "on_device": False}),
    ("codes", {"keys": [[4, 64], [2, 64]], "mask": "float"}),
    ("codes", {"values": None}),
    ("codes", {"keys": None, "sinks": 0}),
    ("codes", {"keys": [[8, 128]], "values": [[8, 128]], "records": 64, "queries": 4}),
]
LARGEST = [
    ("largest", {}),
    ("largest", {"keys": [40, 16], "values": None, "mask": "float"}),
    ("largest", {"keys": None, "values": [40, 8], "d": 80, "on_device": False, "mask": "none"}),
]
KERNELS = [
    *SHARES,
    *LARGEST,
    ("share", {"mask": "bool", "rolling": True}),
    ("merge", {}),
    ("append", {}),
    ("finish", {}),
]
MASSES = [(kernel, options) for kernel in ("mass", "sums") for options in ({}, {"dtype": "fp32", "d": 256})]
KERNELS += MASSES


CODED = [
    ("coded", {}),
    ("coded", {"keys": None, "sinks": 0}),
    ("coded", {"values": None, "records": 64}),
    ("coded", {"keys": 64}),
    ("coded", {"keys": "mustafar", "values": None, "records": 1, "sinks": 0}),
]


def compiled(kernels: list) -> list[dict]:
    program = Path(__file__).with_name("gpu_compile.py")
    settings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    settings["PYTHONPATH"] = os.pathsep.join(sys.path)
    ran = subprocess.run([sys.executable, program, json.dumps(kernels)], env=settings, capture_output=True, text=True)
    assert not ran.returncode, ran.stderr[-3000:]
    return json.loads(ran.stdout.splitlines()[-1])


def test_kernels_compile_for_a_gpu_and_fit_it():
    made = compiled(KERNELS)
    assert all(one["shared"] <= one["may"] for one in made), list(zip(KERNELS, made, strict=True))


def test_kernels_for_codes_compile_for_a_gpu_and_fit_it():
    made = compiled(CODES)
    assert all(one["shared"] <= one["may"] for one in made), list(zip(CODES, made, strict=True))
    assert all(any("mma" in opcode and "s8" in opcode for opcode in one["opcodes"]) for one in made)


def test_kernels_that_store_codes_compile_for_a_gpu():
    assert all(one["shared"] <= one["may"] for one in compiled(CODED))


@pytest.mark.slow  # compiles for minutes; depends only on the kernels
@pytest.mark.parametrize("device", ["A100", "RTX 4090", "MI250", "RX 7900"])
def test_kernels_compile_for_other_gpus_and_fit_them(device):
    # Triton 3.6 cannot compile the largest for an MI250
    shares = [share for share in SHARES if device != "MI250" or share[1].get("kept") != 240]
    kernels = [(name, options | {"device": device}) for name, options in [*shares, *MASSES]]
    made = compiled(kernels)
    assert all(one["shared"] <= one["may"] for one in made), list(zip(kernels, made, strict=True))


def test_no_launch_of_the_table_moves_logits_to_the_layout_of_the_mask():
    """Triton converts the layout in tiles with at least as many rows as threads."""
    launches = {(query_tile(row["rows"]), *row["launch"][:3]) for row in table("channels+whole")}
    kernels = [("share", {"mask": "bool", "launch": (*launch, 4)}) for launch in sorted(launches)]
    moving = ("share", {"mask": "bool", "launch": (16, 128, 4, 3, 4)})
    *made, counted = compiled([*kernels, moving])
    assert counted["moved"], "what this test looks for is not found where it is known to be"
    assert not any(one["moved"] for one in made), list(zip(kernels, made, strict=True))


def test_the_kernel_of_the_template_has_the_opcodes_of_the_one_by_hand():
    options = [{"mask": "bool"}, {"mask": "float", "queries": 4, "on_device": False}]
    compilations = [("share", one | {"hand": hand}) for one in options for hand in (False, True)]
    results = compiled(compilations)
    for made, hand in zip(results[::2], results[1::2], strict=True):
        assert made["opcodes"] == hand["opcodes"] and sum(made["opcodes"].values()) > 500
        assert made["shared"] == hand["shared"]
