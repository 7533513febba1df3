"""Around the attention and the call: autocast, graph breaks, inference mode."""

import copy
import warnings

import pytest
import torch
import torch.utils._pytree as pytree
from compare import Rules, Trio, tokens
from models import OWN, PastDecoder, causal_mask, own
from torch import nn

from think_compile import report, think_compile
from think_compile.cache.handle import Handle
from think_compile.cache.store import Dense
from think_compile.passes.refusal import Reason
from think_compile.report import _stored

SMALL = vars(Rules())


def talked(model, ids, calls=(12, 1, 3), past=None):
    """Logits and caches of successive calls."""
    logits, start = [], 0
    with torch.no_grad():
        for size in calls:
            stop = start + size
            out, past = model(ids[:, start:stop], past, causal_mask(start, stop, stop, None))
            logits.append(out)
            start = stop
    return logits, past


class InAutocast(PastDecoder):
    def forward(self, ids, past=None, mask=None):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(ids, past, mask)


class Island(PastDecoder):
    """Full precision within autocast."""

    def forward(self, ids, past=None, mask=None):
        with torch.autocast("cpu", enabled=False):
            return super().forward(ids, past, mask)


def of(kind):
    model = own("tuple_cat")
    model.__class__ = kind
    return model


@pytest.mark.parametrize("lowering", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [InAutocast, Island])
def test_autocast_inside_the_model_stays(kind, lowering):
    plain, ids = of(kind), tokens(2, 16)
    ours = think_compile(copy.deepcopy(plain), lowering=lowering, **SMALL | {"ratio": 0.0})
    with torch.autocast("cpu", torch.bfloat16, enabled=kind is Island):
        (expected, dense), (got, packed) = (talked(model, ids) for model in (plain, ours))
    assert len(report(ours).rewritten) == 2
    assert packed[0][0].dtype == dense[0][0].dtype == (torch.float32 if kind is Island else torch.bfloat16)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        error = 1e-5 if kind is Island else 0.05  # from one rounding to bf16 more or less
        torch.testing.assert_close(a, b, rtol=error, atol=error)


@torch.no_grad()
def test_assignment_to_positions_of_one_sequence():
    """Torch drops the batch axis of the value assigned to one sequence."""
    trio = Trio("buffer_index_put", rows=1)
    trio.run(tokens(1, 24), [12, 1, 1, 6, 4])
    assert len(report(trio.model).rewritten) == 2


@pytest.mark.versions
@pytest.mark.parametrize("name", OWN)
@torch.no_grad()
def test_inference_mode_inside_the_model(name):
    trio = Trio(name)
    trio.model.forward = torch.inference_mode()(trio.model.forward)
    trio.run(tokens(2, 24), [12, 1, 1, 6, 4])
    assert len(report(trio.model).rewritten) == 2


class ReadsBehindABreak(PastDecoder):
    def forward(self, ids, past=None, mask=None):
        logits, present = super().forward(ids, past, mask)
        torch._dynamo.graph_break()
        return logits + present[0][0].square().mean(), present


def test_keys_that_are_read_behind_a_graph_break_of_the_same_call():
    model, ids = of(ReadsBehindABreak), tokens(2, 12)
    ours = think_compile(copy.deepcopy(model), lowering="eager", **SMALL)
    with pytest.warns(
        UserWarning, match="after a graph break, aten.* reads a cache that the same call has just compressed"
    ):
        _, past = talked(ours, ids, [12])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        past[0][0].mean()  # outside of a call everyone may
        torch._dynamo.reset()
        exact = think_compile(copy.deepcopy(model), lowering="eager", **SMALL | {"ratio": 0.0})
        (got,), _ = talked(exact, ids, [12])
    (expected,), _ = talked(model, ids, [12])
    torch.testing.assert_close(got, expected)


VIEWS = {
    "select": lambda k: k[0],
    "transpose": lambda k: k.transpose(1, 2),
    "view": lambda k: k.view(-1),
    "slice": lambda k: k[:, :, 2:8],
    "unbind": lambda k: k.unbind(0)[1],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views_in_inference_mode(view):
    """Views of a cache made in inference mode, and of another one."""
    for make, read in ((torch.no_grad, torch.inference_mode), (torch.inference_mode, torch.inference_mode)):
        ours = think_compile(own("tuple_cat"), lowering="eager", **SMALL)
        with make():
            _, past = talked(ours, tokens(2, 12), [12])
        with read():
            assert torch.equal(view(past[0][0]), view(past[0][0].dense()))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_assignment_to_a_packed_cache(mode):
    ours = think_compile(own("tuple_cat"), lowering="eager", **SMALL)
    _, past = talked(ours, tokens(2, 12), [12])
    keys = past[0][0]
    expected = keys.dense()
    with mode():
        expected[:, :, :3] = 0
        keys[:, :, :3] = 0
        assert isinstance(keys, Handle) and torch.equal(keys.dense(), expected)


def test_shared_memory_is_refused():
    ours = think_compile(own("tuple_cat"), lowering="eager", **SMALL)
    _, past = talked(ours, tokens(2, 12), [12])
    with pytest.raises(RuntimeError, match="cannot be moved to shared memory; use"):
        past[0][0].share_memory_()


class Quantized(torch.Tensor):
    """8-bit weights, in full precision for every operation, as in quantization libraries."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, numbers, scale):
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=scale.dtype)

    def __init__(self, numbers, scale):
        self.numbers, self.scale = numbers, scale

    def __tensor_flatten__(self):
        return ["numbers", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, meta, size, stride):
        return cls(inner["numbers"], inner["scale"])

    @classmethod
    def of(cls, weight):
        scale = weight.abs().amax() / 127
        return cls((weight / scale).round().to(torch.int8), scale)

    def full(self):
        return self.numbers * self.scale

    def __repr__(self, *, tensor_contents=None):  # torch's own would read the values, which a trace does not have
        return f"{type(self).__name__}({tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].numbers, args[0].scale)
        args, kwargs = pytree.tree_map_only(cls, cls.full, (args, kwargs or {}))
        return func(*args, **kwargs)


class KnowsLinear(Quantized):
    """The same, but supports only ``linear`` as a whole, not its parts."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.linear:
            x, weight, bias = args
            return torch.nn.functional.linear(x, weight.full(), bias)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func not in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            raise NotImplementedError(f"{cls.__name__} lacks {func}")
        return cls(func(args[0].numbers), args[0].scale)


BROKEN_CPP = pytest.mark.xfail(
    torch.__version__.startswith("2.11"), reason="its Inductor writes C++ that does not compile: a mask from a bool"
)


def quantized_pair(kind):
    """A plain model, and the same one with products' weights of class ``kind``."""
    plain, quantized = own("tuple_cat"), own("tuple_cat")
    for ours, theirs in zip(quantized.modules(), plain.modules(), strict=True):
        if isinstance(ours, torch.nn.Linear):
            weight = kind.of(ours.weight.detach())
            ours.weight = torch.nn.Parameter(weight, requires_grad=False)
            theirs.weight = torch.nn.Parameter(weight.full(), requires_grad=False)
    return plain, quantized


@pytest.mark.parametrize(
    ("kind", "lowering"),
    [
        (Quantized, "eager"),
        pytest.param(KnowsLinear, "eager", marks=pytest.mark.versions),
        pytest.param(Quantized, "inductor", marks=BROKEN_CPP),
        pytest.param(KnowsLinear, "inductor", marks=[BROKEN_CPP, pytest.mark.slow]),  # implied by the other
    ],
)
def test_weights_that_are_tensor_subclasses(kind, lowering):
    plain, quantized = quantized_pair(kind)
    ids, calls = tokens(1, 20), (12, 1)
    expected, _kept = talked(think_compile(plain, lowering="eager", **SMALL), ids, calls)
    got, _cache = talked(think_compile(quantized, lowering=lowering, **SMALL), ids, calls)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not report(quantized).refused
    assert report(quantized).stored_key_bytes == report(plain).stored_key_bytes > 0


class WritesToWhatItIsGiven(KnowsLinear):
    """Its ``linear`` changes its bias."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.linear and args[2] is not None:
            args[2].mul_(1.0)
        return super().__torch_function__(func, types, args, kwargs)


class ReturnsAView(KnowsLinear):
    """Its ``linear`` may return a view of its input."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.linear and args[0].shape[-1] == args[1].shape[0]:
            return args[0].view(args[0].shape)
        return super().__torch_function__(func, types, args, kwargs)


@pytest.mark.parametrize(
    ("kind", "why"), [(WritesToWhatItIsGiven, "writes to what it is given"), (ReturnsAView, "a view of what it is")]
)
def test_functions_of_a_tensor_subclass_that_a_trace_cannot_say(kind, why):
    _, quantized = quantized_pair(kind)
    ids = tokens(1, 20)
    expected, _ = talked(quantized, ids)
    with pytest.warns(UserWarning, match=why):
        ours = think_compile(quantized, lowering="eager", **SMALL)
        got, _ = talked(ours, ids)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert {record.reason for record in report(ours).refused} == {Reason.TENSOR_CLASS}


def test_bytes_of_tensor_subclasses_are_those_of_their_parts():
    """As in a cache with sharded or quantized keys."""
    keys = Quantized.of(torch.randn(1, 2, 8, 16))
    assert sum(_stored([Dense.of(keys)]).values()) == 2 * 8 * 16 + keys.scale.nbytes


def halved(module, args, out):
    return out * 0.5


@torch.no_grad()
def test_hooks_that_come_and_go_between_calls_are_honoured():
    plain, ids = own("tuple_cat"), tokens(2, 16)
    ours = think_compile(copy.deepcopy(plain), lowering="eager", **SMALL | {"ratio": 0.0})
    results = []
    for model in (plain, ours):
        before, _ = talked(model, ids)
        hook = model.layers[0].up.register_forward_hook(halved)
        during, _ = talked(model, ids)
        hook.remove()
        results.append((before, during, talked(model, ids)[0]))
    for expected, got in zip(*results, strict=True):
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(results[0][0][0], results[0][1][0])


class Tempered(nn.Module):
    """One layer with a growing cache, and a float that scales its queries."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(16, 3 * 16)

    def forward(self, x, past=None, temperature=1.0):
        q, k, v = self.project(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = (torch.cat(pair, 2) for pair in zip(past, (k, v), strict=True))
        out = nn.functional.scaled_dot_product_attention(q * temperature, k, v, is_causal=past is None)
        return out, (k, v)


@torch.no_grad()
def test_a_float_argument_that_varies():
    """Dynamo would make it an input, whose value the trace does not know."""
    model = Tempered()
    ours = think_compile(copy.deepcopy(model), 0.0, recent=3, channel_multiple=1, lowering="eager")
    got = expected = None
    for i, temperature in enumerate((0.5, 0.7, 0.9, 1.1)):
        x = torch.randn(1, 1 if i else 8, 16)
        out, got = ours(x, got, temperature)
        wanted, expected = model(x, expected, temperature)
        torch.testing.assert_close(out, wanted)
        assert all(isinstance(tensor, Handle) for tensor in got)
    assert len(report(ours).rewritten) == 1 and not report(ours).refused
