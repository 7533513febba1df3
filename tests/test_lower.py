"""Lowering by Inductor: one compilation serves all varying sizes, and its assumptions about them are checked."""

import pytest
import torch
from models import build
from oracle import CACHE
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor
from torch.torch_version import TorchVersion
from transformers import DynamicCache, StaticCache

from think_compile import report, think_compile
from think_compile.api import _backend_of
from think_compile.runtime.lower import CompilationFailed, Dims, Inductor, suited


def inductors(model):
    """Every Inductor lowering of the model's graphs."""
    return _backend_of(model).lowered


def cache_for(kind, model):
    if kind == "growing":
        return DynamicCache(config=model.config)
    return StaticCache(config=model.config, max_cache_len=96)


@pytest.mark.parametrize(
    "kind", ["growing", pytest.param("fixed", marks=pytest.mark.slow)]
)  # a fixed one has fewer sizes
@torch.no_grad()
def test_steps_growth_and_batches_share_compilations(kind):
    """Seventy steps, through several growths of the store, and three batch sizes: no compilation per size."""
    plain = build("llama")
    ours = think_compile(build("llama"), 0.0, recent=4, observe=8)
    for batch, steps in ((2, 70), (3, 4), (5, 4)):
        ids = torch.randint(3, 96, (batch, 10 + batch + steps))
        caches = [cache_for(kind, model) for model in (ours, plain)]
        for part in ids.split([10 + batch] + [1] * steps, dim=1):
            got, want = (m(part, **{CACHE: c}).logits for m, c in zip((ours, plain), caches, strict=True))
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert report(ours).graphs <= 4  # a first and a later call, at batch 2 and at any other
    assert all(len(lowered.variants) == 1 for lowered in inductors(ours))


def inputs_with_symbols(model):
    """Input tensors of the model's graphs that have a symbolic size."""
    nodes = [node for graph in _backend_of(model).graphs for node in graph.normalized.placeholders]
    values = [node.meta["val"] for node in nodes]
    return [x for x in values if isinstance(x, torch.Tensor) and any(isinstance(n, torch.SymInt) for n in x.shape)]


@pytest.mark.parametrize("kind", ["growing", "fixed"])
@torch.no_grad()
def test_only_caches_that_grow_are_traced_with_symbols(kind):
    model = think_compile(build("llama"), 0.5, recent=4, observe=8, lowering="eager")
    cache = cache_for(kind, model)
    for part in torch.randint(3, 96, (2, 23)).split([20, 1, 1, 1], dim=1):
        model(part, **{CACHE: cache})
    assert report(model).graphs == 2
    assert bool(inputs_with_symbols(model)) == (kind == "growing")


@torch.no_grad()
def test_caches_of_other_sizes_share_a_compilation():
    model = think_compile(build("llama"), 0.5, recent=4, observe=8, lowering="eager")
    for size in (96, 128, 160, 192):
        cache = StaticCache(config=model.config, max_cache_len=size)
        for part in torch.randint(3, 96, (2, 23)).split([20, 1, 1, 1], dim=1):
            model(part, **{CACHE: cache})
    assert report(model).graphs <= 4  # a first and a later call, of the first size and of any other


def test_a_size_that_leaves_what_was_assumed_compiles_again():
    traced = make_fx(lambda x: (x * 2,))(torch.ones(4, 3))
    lowered = Inductor(traced, [Dims(varying=(0,))], {})
    for rows in (4, 9, 1, 4):
        torch.testing.assert_close(lowered([torch.ones(rows, 3)])[0], torch.full((rows, 3), 2.0))
    assert len(lowered.variants) == 2  # one row has its own shape


def test_weights_that_are_tensor_subclasses():
    """As in quantized and sharded models."""
    traced = make_fx(lambda x, w: (x @ w,))(torch.ones(4, 3), torch.ones(3, 2))
    lowered = Inductor(traced, [Dims(varying=(0,)), Dims()], {})
    weight = torch.randn(3, 2)
    for rows in (4, 9):
        x = torch.randn(rows, 3)
        found = lowered([x, TwoTensor(weight, weight.clone())])[0]
        torch.testing.assert_close(found.a if isinstance(found, TwoTensor) else found, x @ weight)
    assert len(lowered.variants) == 1


def test_a_failure_says_that_nothing_has_run():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(torch.mm, (x, x)),))
    lowered = Inductor(torch.fx.GraphModule({}, graph), [Dims()], {})
    with pytest.raises(CompilationFailed):
        lowered([torch.ones(2, 3)])


def product(rows: int, device: str) -> torch.fx.GraphModule:
    """A graph of one product with weights, traced on fake tensors: no GPU is needed."""
    with FakeTensorMode():
        x, weight = torch.empty(rows, 1, 8, device=device), torch.empty(4, 8, device=device)
        return make_fx(torch.nn.functional.linear, pre_dispatch=True)(x, weight)


@pytest.mark.parametrize(("rows", "device", "tuned"), [(1, "cuda", True), (2, "cuda", False), (1, "cpu", False)])
def test_products_of_one_row_are_tuned_on_a_gpu(rows, device, tuned):
    chosen = suited(product(rows, device))
    assert chosen.pop("coordinate_descent_tuning", False) == tuned
    forgets = TorchVersion(torch.__version__) < "2.13"
    assert chosen == ({"use_static_cuda_launcher": False} if tuned and forgets else {})


def test_a_users_options_come_first(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "think_compile.runtime.lower.suited", lambda graph: {"coordinate_descent_tuning": True, "max_fusion_size": 7}
    )
    monkeypatch.setattr(
        "torch._inductor.compile_fx.compile_fx", lambda g, inputs, config_patches: seen.append(config_patches) or g
    )
    traced = make_fx(lambda x: (x * 2,))(torch.ones(4, 3))
    Inductor(traced, [Dims()], {"coordinate_descent_tuning": False})([torch.ones(4, 3)])
    assert seen == [{"coordinate_descent_tuning": False, "max_fusion_size": 7}]
