"""On a CUDA GPU only: Inductor's generated kernels, CUDA graphs, and stored bytes as counted by the allocator."""

import copy
import gc
import re

import pytest
import torch
import torch.nn.functional as F
from oracle import CACHE
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from think_compile import Mustafar, SnapKV, report, think_compile
from think_compile.api import _backend_of
from think_compile.kernels import lse
from think_compile.runtime import capture
from think_compile.runtime.capture import NotCaptured

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

BATCH, PROMPT = 4, 4096


def llama(layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=128,
        vocab_size=1024,
    )
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    return model.to(torch.bfloat16).eval()


def cache_of(kind: str, config: LlamaConfig) -> DynamicCache | StaticCache:
    if kind == "growing":
        return DynamicCache(config=config)
    return StaticCache(config=config, max_cache_len=PROMPT + 64)


def generated_code(call) -> str:
    """All code written by Inductor while ``call`` runs."""
    from torch._inductor.utils import run_and_get_code

    lines = "\n".join(run_and_get_code(call)[1]).splitlines()
    return "\n".join(line for line in lines if not line.lstrip().startswith("#"))


@pytest.mark.parametrize("kind", ["growing", "fixed"])
@torch.no_grad()
def test_scoring_and_packing_are_fused_triton_kernels(kind):
    model = think_compile(llama(1), 0.5)
    ids = torch.randint(0, 1024, (1, 256), device="cuda")
    code = generated_code(lambda: model(ids, **{CACHE: cache_of(kind, model.config)}))
    kernels = [line for line in code.splitlines() if line.startswith("triton_") and "async_compile" in line]
    names = " ".join(kernel.split(" =")[0] for kernel in kernels)
    assert "pow" in names or "mean" in names or "sum" in names, names  # energies of queries and keys
    assert "gather" in names, names  # narrow rows, written with their padding in one kernel
    assert not re.search(r"torch\.ops\.aten\.(sort|topk|gather|scatter)", code)  # no stock kernels


@pytest.mark.parametrize("kind", ["growing", "fixed"])
@torch.no_grad()
def test_the_allocator_confirms_the_stored_bytes(kind):
    model = think_compile(llama(4), 0.5)
    ids = torch.randint(0, 1024, (BATCH, PROMPT + 3), device="cuda")
    warm = cache_of(kind, model.config)
    steps_of(model, ids, warm, PROMPT)  # compiles, captures; workspaces are allocated
    del warm
    assert_stored_bytes_are_allocated(model, ids, cache_of(kind, model.config))


def assert_stored_bytes_are_allocated(model, ids, cache):
    gc.collect()
    before = torch.cuda.memory_allocated()
    steps_of(model, ids, cache, PROMPT)
    gc.collect()
    allocated = torch.cuda.memory_allocated() - before
    stored = report(model).stored_bytes
    assert abs(allocated - stored) <= 0.02 * stored, (allocated, stored)
    assert report(model).stored_key_bytes <= 0.55 * report(model).dense_key_bytes


def captures(model) -> int:
    """How many CUDA graphs a wrapped model holds."""
    programs = [program for graph in _backend_of(model).graphs for program in graph.programs.values()]
    return sum(len(program.replayed.captures) for program in programs if program.replayed is not None)


def steps_of(model, ids, cache, prompt, *, strictly=False):
    """Logits of a prompt and of one-token calls; ``strictly``: from the fourth on, none may wait for the device."""
    logits = [model(ids[:, :prompt], **{CACHE: cache}, logits_to_keep=1).logits]
    for at in range(prompt, ids.shape[1]):
        step = ids[:, at : at + 1].contiguous()
        torch.cuda.set_sync_debug_mode("error" if strictly and at > prompt + 3 else "default")
        try:
            logits.append(model(step, **{CACHE: cache}).logits)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return torch.cat(logits, 1)


@torch.no_grad()
def test_steps_on_a_fixed_cache_replay_one_graph():
    """With a sliding window, no synchronisation, no second capture, and the results of plain launches."""
    plain, prompt = llama(2), 100
    ids = torch.randint(0, 1024, (2, prompt + 48), device="cuda")
    runs = []
    for options in ({}, {"cuda_graphs": False}):
        torch._dynamo.reset()
        model = think_compile(copy.deepcopy(plain), 0.5, **options)
        runs.append(steps_of(model, ids, StaticCache(config=model.config, max_cache_len=256), prompt, strictly=True))
        assert captures(model) == (0 if options else 1)
        assert report(model).graphs == 2
    assert torch.equal(*runs)


@torch.no_grad()
def test_each_cache_has_a_capture_of_its_own():
    model, prompt = think_compile(llama(2), 0.5), 100
    ids = torch.randint(0, 1024, (1, prompt + 8), device="cuda")
    caches = [StaticCache(config=model.config, max_cache_len=128) for _ in range(2)]
    first, second = (steps_of(model, ids, cache, prompt) for cache in caches)
    assert torch.equal(first, second) and captures(model) == 2


@pytest.mark.parametrize("kind", ["growing", "fixed"])
@torch.no_grad()
def test_steps_attend_with_the_kernel(kind):
    model = think_compile(llama(1), 0.5)
    ids = torch.randint(0, 1024, (1, 257), device="cuda")
    cache = cache_of(kind, model.config)
    model(ids[:, :256], **{CACHE: cache})
    code = generated_code(lambda: model(ids[:, 256:], **{CACHE: cache}))
    assert "attend_channels_whole" in code and ("finish_channels_whole" if kind == "fixed" else "merge_shares") in code
    assert "scaled_dot_product" not in code and "flash" not in code


@pytest.mark.parametrize(
    ("keys", "values", "pair"),
    [
        ({4: 0.5, 2: 0.25}, 4, "key_bits_value_bits"),
        (Mustafar(0.5, 8), Mustafar(0.5), "mustafar_mustafar"),
        (None, Mustafar(0.5, 8), "channels_mustafar"),
    ],
    ids=str,
)
@torch.no_grad()
def test_steps_on_codes_replay_one_graph(keys, values, pair):
    """As with ThinK alone; a group leaves the window on the way, and one kernel attends, another stores."""
    plain, prompt, plan = llama(2), 170, {"keys": keys, "values": values, "recent": 32}
    ids = torch.randint(0, 1024, (2, prompt + 140), device="cuda")
    runs = []
    for options in ({}, {"cuda_graphs": False}, {"lowering": "eager", "cuda_graphs": False}):
        torch._dynamo.reset()
        model = think_compile(copy.deepcopy(plain), **plan, **options)
        cache = StaticCache(config=model.config, max_cache_len=384)
        runs.append(steps_of(model, ids, cache, prompt, strictly=not options))
        assert not report(model).refused
    assert torch.equal(runs[0], runs[1])
    # rounding may move a code, so steps on codes are as close as the format, not as bf16
    assert (runs[0] - runs[2]).norm() <= 0.05 * runs[2].norm()
    model = think_compile(copy.deepcopy(plain), **plan)
    cache = StaticCache(config=model.config, max_cache_len=384)
    model(ids[:, :prompt], **{CACHE: cache})
    code = generated_code(lambda: model(ids[:, prompt : prompt + 1].contiguous(), **{CACHE: cache}))
    assert f"attend_{pair}" in code and f"finish_{pair}" in code


@pytest.mark.parametrize("plan", [{}, {"keys": {4: 0.5}, "values": 4, "recent": 32}], ids=str)
@torch.no_grad()
def test_steps_on_the_kept_tokens_replay_one_graph(plan):
    """Prompts of two lengths: stores of two sizes. In fp32: in bf16 the lowerings' rounding selects other tokens."""
    plain, rule = llama(2).float(), SnapKV(96)
    ids = torch.randint(0, 1024, (2, 340), device="cuda")
    for prompt in (170, 200):
        runs = []
        for options in ({}, {"cuda_graphs": False}, {"lowering": "eager", "cuda_graphs": False}):
            torch._dynamo.reset()
            model = think_compile(copy.deepcopy(plain), tokens=rule, **plan, **options)
            cache = StaticCache(config=model.config, max_cache_len=384)
            runs.append(steps_of(model, ids, cache, prompt, strictly=not options))
            assert not report(model).refused and report(model).selected == ((96, prompt),)
        assert torch.equal(runs[0], runs[1])
        assert (runs[0] - runs[2]).norm() <= 0.05 * runs[2].norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_stock_attention_tells_the_softmax_sums(masked, dtype):
    """Whatever backend runs; the output is the same as without."""
    q, k, v = (torch.randn(2, heads, 190, 128, device="cuda", dtype=dtype) for heads in (8, 2, 2))
    causal = torch.ones(190, 190, dtype=torch.bool, device="cuda").tril()
    mask = causal.expand(2, 1, -1, -1) if masked else None
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            out, found = lse.attend(q, k, v, mask, 0.0, not masked, enable_gqa=True)
            want = F.scaled_dot_product_attention(q, k, v, mask, 0.0, not masked, enable_gqa=True)
        assert torch.equal(out, want)
        logits = q.float() @ k.float().repeat_interleave(4, 1).mT / 128**0.5
        expected = logits.masked_fill(~causal, -torch.inf).logsumexp(-1)
        if found is not None:  # a fused backend
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-2)
        assert found is not None or dtype == torch.float32


@pytest.mark.parametrize("kind", ["growing", "fixed"])
@torch.no_grad()
def test_the_kernel_attends_to_the_kept_tokens(kind):
    """As PyTorch's operations on a CPU do, in fp32."""
    plain, prompt = llama(2).float(), 100
    ids = torch.randint(0, 1024, (2, prompt + 8), device="cuda")
    runs = []
    for device in ("cuda", "cpu"):
        torch._dynamo.reset()
        lowering = "inductor" if device == "cuda" else "eager"
        model = think_compile(copy.deepcopy(plain).to(device), tokens=SnapKV(48), lowering=lowering)
        runs.append(steps_of(model, ids.to(device), cache_of(kind, model.config), prompt).cpu())
    assert (runs[0] - runs[1]).abs().max() <= 1e-3 * runs[1].abs().max()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("lowering", ["inductor", "eager"])
@pytest.mark.parametrize("kind", ["growing", "fixed"])
@torch.no_grad()
def test_the_current_device_need_not_be_the_model_s(kind, lowering):
    plain, prompt = llama(2).float(), 100  # exact enough that all runs keep the same channels
    ids = torch.randint(0, 1024, (1, prompt + 8), device="cuda")

    def run(plain, device, lowering):
        torch._dynamo.reset()
        model = think_compile(copy.deepcopy(plain).to(device), 0.5, lowering=lowering)
        logits = steps_of(model, ids.to(device), cache_of(kind, model.config), prompt)
        assert torch.cuda.current_device() == 0 and not report(model).refused
        return logits.to("cuda:0", torch.float64)

    exact = run(plain.double(), "cuda:0", "eager")
    plain.float()
    natural = (run(plain, "cuda:0", "eager") - exact).abs().max()
    for device in ("cuda:0", "cuda:1"):  # Inductor tunes each separately, so the last bits may differ
        assert (run(plain, device, lowering) - exact).abs().max() <= 4 * natural


@torch.no_grad()
def test_generate_uses_a_static_cache_and_compiles_a_second_prompt_no_more():
    model = think_compile(llama(2), 0.5)
    for length in (30, 50, 70):
        ids = torch.randint(0, 1024, (1, length), device="cuda")
        out = model.generate(ids, max_new_tokens=8, do_sample=False, return_dict_in_generate=True, pad_token_id=0)
        assert isinstance(getattr(out, CACHE), StaticCache)
    graphs = report(model).graphs
    model.generate(torch.randint(0, 1024, (1, 90), device="cuda"), max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert report(model).graphs == graphs and captures(model)


def test_a_capture_that_fails_leaves_the_random_numbers_alone():
    class Waits:
        def is_compiled_for(self, values):
            return True

        def __call__(self, values):
            torch.cuda.synchronize()

    values = [torch.ones(4, device="cuda")]
    torch.manual_seed(3)
    expected = [torch.rand(2, device="cuda") for _ in range(2)]
    torch.manual_seed(3)
    assert torch.equal(torch.rand(2, device="cuda"), expected[0])
    with pytest.raises(NotCaptured):
        capture.Capture(Waits(), values, capture.Signature(values, frozenset()))
    assert torch.equal(torch.rand(2, device="cuda"), expected[1])


@torch.no_grad()
def test_no_step_of_a_growing_cache_copies_it():
    model = think_compile(llama(2), 0.5)
    ids = torch.randint(0, 1024, (2, PROMPT + 20), device="cuda")
    cache = cache_of("growing", model.config)
    steps_of(model, ids[:, : PROMPT + 4], cache, PROMPT)  # compiles, and chooses launches on copies
    bytes_of_a_layer = report(model).stored_bytes // 2
    for at in range(PROMPT + 4, PROMPT + 20):
        step = ids[:, at : at + 1].contiguous()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(step, **{CACHE: cache})
        assert torch.cuda.max_memory_allocated() - before < 0.2 * bytes_of_a_layer
