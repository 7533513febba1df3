"""The axis algebra against the truth: the same operations on a tensor of distinct numbers."""

import signal

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from think_compile.passes import layout as lay

pytestmark = pytest.mark.host
aten = torch.ops.aten
OPTIONS = settings(
    max_examples=150,
    phases=[Phase.explicit, Phase.generate],  # shrinking a hang takes forever
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


class Step:
    """One operation: a function of a tensor, and a name."""

    def __init__(self, name, f):
        self.name, self.f = name, f

    def __repr__(self):
        return self.name


def factorings(n: int, parts: int):
    if parts == 1:
        return [(n,)]
    return [(d, *rest) for d in range(1, n + 1) if n % d == 0 for rest in factorings(n // d, parts - 1)]


@st.composite
def step(draw, shape):
    """A random operation that is legal on ``shape``."""
    rank, count = len(shape), torch.Size(shape).numel()
    axis = draw(st.integers(0, rank - 1))
    if draw(st.booleans()):
        axis -= rank
    kinds = ["permute", "transpose", "unsqueeze", "view", "reshape", "merge", "split", "same"]
    kinds += ["expand", "repeat", "repeat_interleave", "whole_slice"] if count < 2000 else []
    kinds += ["squeeze"] if rank > 1 else []
    kind = draw(st.sampled_from(kinds))
    if kind == "permute":
        dims = draw(st.permutations(range(rank)))
        return Step(f"permute{dims}", lambda x: aten.permute(x, dims))
    if kind == "transpose":
        other = draw(st.integers(-rank, rank - 1))
        return Step(f"transpose{axis, other}", lambda x: aten.transpose(x, axis, other))
    if kind == "unsqueeze":
        return Step(f"unsqueeze{axis}", lambda x: aten.unsqueeze(x, axis))
    if kind == "squeeze":
        return Step(f"squeeze{axis}", lambda x: aten.squeeze(x, axis))
    if kind in ("view", "reshape"):
        sizes = draw(st.sampled_from(factorings(count, draw(st.integers(1, min(5, rank + 1))))))
        return Step(f"reshape{sizes}", lambda x: aten.reshape(x, sizes))
    if kind == "merge":
        i = draw(st.integers(0, max(0, rank - 2)))
        sizes = [*shape[:i], torch.Size(shape[i : i + 2]).numel(), *shape[i + 2 :]]
        return Step(f"merge{sizes}", lambda x: aten.reshape(x, sizes))
    if kind == "split":
        at = axis % rank
        outer, inner = draw(st.sampled_from(factorings(shape[at], 2)))
        sizes = [*shape[:at], outer, inner, *shape[at + 1 :]]
        return Step(f"split{sizes}", lambda x: aten.reshape(x, sizes))
    if kind == "expand":
        sizes = [draw(st.sampled_from([1, 2, 3])) if n == 1 else -1 for n in shape]
        front = draw(st.sampled_from([[], [], [1], [2]]))
        return Step(f"expand{front, sizes}", lambda x: aten.expand(x, [*front, *sizes]))
    if kind == "repeat":
        times = [draw(st.sampled_from([1, 1, 1, 2])) for _ in shape]
        times = draw(st.sampled_from([[], [1], [2]])) + times
        return Step(f"repeat{times}", lambda x: aten.repeat(x, times))
    if kind == "repeat_interleave":
        times = draw(st.integers(1, 3))
        return Step(f"repeat_interleave{times, axis}", lambda x: aten.repeat_interleave.self_int(x, times, axis))
    if kind == "whole_slice":
        return Step(f"slice{axis}", lambda x: aten.slice(x, axis, 0, 2**63 - 1))
    return Step("clone", lambda x: aten.clone(x))


def chain_of(f, example):
    """The graph of ``f`` as pre-dispatch ATen: its source, and the layout operations after it."""
    graph = make_fx(f, tracing_mode="fake", pre_dispatch=True)(example).graph
    out = graph.output_node().args[0]
    return lay.walk_back(out)


def truth_agrees(axes, source_shape, actual) -> None:
    """Every element of the result must be the source's element given by the algebra."""
    sizes = [torch.Size([a.size for a in atoms]).numel() for atoms in axes]
    assert tuple(sizes) == tuple(actual.shape), f"{sizes} are not {tuple(actual.shape)}"
    parts = parts_of(axes, source_shape)
    for position in positions(actual.shape):
        found = [0] * len(source_shape)
        for i, atoms in enumerate(axes):
            rest = position[i]
            for atom in reversed(atoms):
                rest, digit = divmod(rest, atom.size)
                if atom.axis is not None:
                    found[atom.axis] += digit * parts[(atom.axis, atom.part)]
        expected = int(actual[position])
        index = 0
        for i, n in enumerate(source_shape):
            index = index * n + found[i]
        assert index == expected, f"at {position}: {index}, not {expected}"


def positions(shape):
    generator = torch.Generator().manual_seed(0)
    some = min(60, torch.Size(shape).numel())
    return [tuple(int(torch.randint(0, n, (), generator=generator)) for n in shape) for _ in range(some)]


def parts_of(axes, source_shape):
    """(axis, part) -> stride of that factor within its axis: a binary tree of parts, 2p+1 outer, 2p+2 inner."""
    leaves = {}
    for atom in (a for atoms in axes for a in atoms if a.axis is not None):
        leaves[(atom.axis, atom.part)] = atom.size

    strides = {}

    def size_below(axis, part):
        if (axis, part) in leaves:
            return leaves[(axis, part)]
        if part > 2**12:
            return 1
        return size_below(axis, 2 * part + 1) * size_below(axis, 2 * part + 2)

    def visit(axis, part, stride):
        if (axis, part) in leaves:
            strides[(axis, part)] = stride
            return
        if part > 2**12:
            return
        visit(axis, 2 * part + 1, stride * size_below(axis, 2 * part + 2))
        visit(axis, 2 * part + 2, stride)

    for axis in range(len(source_shape)):
        visit(axis, 0, 1)
    return strides


def check(shape, steps) -> bool:
    """Returns whether the chain could be followed; checks the result if so."""

    def f(x):
        for each in steps:
            x = each.f(x)
        return x

    source = torch.arange(torch.Size(shape).numel()).view(shape)
    root, chain = chain_of(f, torch.empty(shape))
    assert root.op == "placeholder"
    try:
        axes = lay.follow(chain, lay.source_axes(shape))
    except lay.NotLayout:
        return False
    try:
        truth_agrees(axes, shape, f(source))
    except AssertionError as error:
        raise AssertionError(f"{shape} through {steps}: {error}; axes {axes}") from None
    return True


@OPTIONS
@given(st.data())
def test_random_chains_are_never_wrong(data):
    shape = tuple(data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=2, max_size=4)))
    steps, now = [], torch.empty(shape, device="meta")
    for _ in range(data.draw(st.integers(1, 5))):
        steps.append(data.draw(step(tuple(now.shape))))
        now = steps[-1].f(now)
    check_in_time(shape, steps)


@OPTIONS
@given(st.data())
def test_chains_without_cuts_are_always_followed(data):
    """Moves, unit axes, repeats, merges of whole axes and their inverses: the operations on caches."""
    shape = tuple(data.draw(st.lists(st.sampled_from([1, 2, 3, 5, 7]), min_size=2, max_size=4)))
    steps, now = [], torch.empty(shape, device="meta")
    for _ in range(data.draw(st.integers(1, 5))):
        chosen = data.draw(step(tuple(now.shape)))
        if chosen.name.startswith(("reshape", "split")):
            continue
        steps.append(chosen)
        now = chosen.f(now)
    assert check_in_time(shape, steps), f"{shape} through {steps} is only a rearrangement"


# sizes with partly equal products: split so that neither shape refines the other
REGROUPED = [
    ((6, 4), (8, 3)),
    ((6, 4), (4, 6)),
    ((2, 12, 64), (2, 16, 48)),
    ((4, 6), (3, 8)),
    ((3, 2), (2, 3)),
    ((9, 4), (6, 6)),
    ((1, 6, 4), (8, 3, 1)),
    ((5, 4), (2, 10)),
]


@pytest.mark.parametrize("before,after", REGROUPED, ids=str)
def test_views_that_cut_across_axes(before, after):
    check_in_time(before, [Step(f"view{after}", lambda x: x.view(after))])


def check_in_time(shape, steps):
    """Like check, but an endless loop fails instead of hanging."""

    def stop(*_):
        raise TimeoutError("the algebra does not come to an end")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(1)
    try:
        return check(shape, steps)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


FOLLOWED = {
    "repeat_kv": ((2, 3, 5, 4), lambda x: x[:, :, None].expand(2, 3, 2, 5, 4).reshape(2, 6, 5, 4)),
    "merged heads": ((2, 3, 5, 4), lambda x: x.transpose(1, 2).reshape(2, 5, 12)),
    "split heads": ((2, 5, 12), lambda x: x.view(2, 5, 3, 4).transpose(1, 2)),
    "batch of heads": ((2, 3, 5, 4), lambda x: x.reshape(6, 5, 4).view(2, 3, 5, 4)),
    "split and merged": ((2, 3, 5, 4), lambda x: x.view(2, 3, 5, 2, 2).reshape(2, 3, 5, 4)),
    "transposed keys": ((2, 3, 5, 4), lambda x: x.transpose(-1, -2).transpose(2, 3)),
    "batch of one": ((1, 3, 5, 4), lambda x: x.view(3, 5, 4).unsqueeze(0)),
    "one head": ((2, 1, 5, 4), lambda x: x.expand(2, 4, 5, 4)),
    "one of everything": ((1, 1, 1, 4), lambda x: x.transpose(1, 2).reshape(1, 1, 4)),
    "sequence first": ((5, 2, 12), lambda x: x.view(5, 2, 3, 4).permute(1, 2, 0, 3)),
    "cast": ((2, 3, 5, 4), lambda x: x.to(torch.float64)),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_forms_of_models_are_followed(name):
    shape, f = FOLLOWED[name]
    assert check(shape, [Step(name, f)])


def test_stops_at_what_is_no_layout():
    for f in (lambda x: x * 2, lambda x: x[:, 1:], lambda x: x[:, ::2], lambda x: x.flip(1), lambda x: x[:, 0]):
        root, chain = chain_of(f, torch.empty(2, 6, 4))
        assert root.op != "placeholder"
        assert chain == []


@pytest.mark.parametrize("end", [6, 2**63 - 1])
def test_slices_that_keep_all(end):
    root, chain = chain_of(lambda x: aten.slice(x, 1, 0, end), torch.empty(2, 6))
    assert root.op == "placeholder"
    assert len(chain) == 1


@pytest.mark.parametrize("start,end,stride", [(0, 5, 1), (1, 6, 1), (-5, 6, 1), (0, -1, 1), (0, 6, 2)])
def test_slices_that_do_not(start, end, stride):
    root, _ = chain_of(lambda x: aten.slice(x, 1, start, end, stride), torch.empty(2, 6))
    assert root.target is aten.slice.Tensor


@pytest.mark.parametrize("shape,order", [((2, 3, 4, 5), (0, 2, 1, 3)), ((2, 3, 4, 5), (3, 1, 0, 2))])
def test_stride_order(shape, order):
    x = torch.empty([shape[i] for i in order]).permute(sorted(range(4), key=lambda i: order[i]))
    assert tuple(x.shape) == shape
    assert lay.stride_order(x) == list(order)


@pytest.mark.parametrize("shape", [(1, 3, 4, 5), (2, 1, 4, 5), (2, 3, 1, 5), (1, 1, 1, 5), (1, 1, 1, 1)])
def test_stride_order_with_axes_of_one(shape):
    for dims in [(0, 1, 2, 3), (0, 2, 1, 3)]:
        back = sorted(range(4), key=lambda i: dims[i])
        x = torch.empty([shape[i] for i in dims]).permute(back)
        order = lay.stride_order(x)
        assert sorted(order) == [0, 1, 2, 3]
        again = torch.empty(shape).permute(order).contiguous().permute(sorted(range(4), key=lambda i: order[i]))
        sizes = [n for n in shape if n > 1]
        strides = [(a, b) for a, b, n in zip(again.stride(), x.stride(), shape, strict=True) if n > 1]
        assert len(strides) == len(sizes)
        assert all(a == b for a, b in strides)
