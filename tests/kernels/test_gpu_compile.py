"""The Triton kernels compile for a GPU, and fit it; no GPU is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SHARED_BYTES = 232_448  # of a multiprocessor of an H100

KERNELS = [
    ("share", {}),
    ("share", {"mask": "bool", "queries": 16}),
    ("share", {"mask": "float", "dtype": "fp32", "d": 256, "kept": 240, "dv": 256, "group": 7, "causal": True}),
    ("share", {"dtype": "fp16", "d": 96, "kept": 80, "dv": 48, "on_device": False}),
    ("merge", {}),
    ("append", {}),
]


def test_kernels_compile_for_a_gpu_and_fit_it():
    program = Path(__file__).with_name("gpu_compile.py")
    settings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    settings["PYTHONPATH"] = os.pathsep.join(sys.path)
    ran = subprocess.run([sys.executable, program, json.dumps(KERNELS)], env=settings, capture_output=True, text=True)
    assert not ran.returncode, ran.stderr[-3000:]
    shared = json.loads(ran.stdout.splitlines()[-1])
    assert all(taken <= SHARED_BYTES for taken in shared), list(zip(KERNELS, shared, strict=True))
