"""Shared set-up: few threads, no fall-back to the plain graph, a clean compiler and seed for every test."""

import contextlib
import gc
import os
import random

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["THINK_COMPILE_FALLBACK"] = "0"  # read when think_compile is imported: errors must surface in tests
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
# THINK_COMPILE_TEST_DEVICE=cuda runs the model tests on a GPU: they make all their tensors on the default device.
if "THINK_COMPILE_TEST_DEVICE" in os.environ:
    torch.set_default_device(os.environ["THINK_COMPILE_TEST_DEVICE"])
gc.set_threshold(
    200_000, 20, 100
)  # a trace makes many long-lived objects: collecting less often saves a sixth of the time
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"].split(",")[0]))


@pytest.fixture(autouse=True)
def on_the_host(request):
    """Tests marked `host` run on the CPU: their errors raise there, but end the process on a GPU."""
    with torch.device("cpu") if request.node.get_closest_marker("host") else contextlib.nullcontext():
        yield


@pytest.fixture(autouse=True)
def clean_slate():
    """No compiled code or seed of one test reaches the next."""
    torch._dynamo.reset()
    random.seed(0)
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
