"""Refusals that need a whole model: the right reason, the plain model's numbers, no failure."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from think_compile import explain, report, think_compile
from think_compile.passes.refusal import Reason

WIDTH, HEADS, D, ROOM = 32, 2, 16, 24


class Attending(nn.Module):
    """One attention; subclasses vary it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * HEADS * D)
        self.mix = nn.Conv2d(HEADS, HEADS, 1)
        self.down, self.up = nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)

    def heads(self, x):
        return (part.unflatten(-1, (HEADS, D)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))

    def joined(self, past, k, v):
        return (k, v) if past is None else (torch.cat([past[0], k], 2), torch.cat([past[1], v], 2))


class MixesHeads(Attending):
    def forward(self, x, past=None):
        q, k, v = self.heads(x)
        k, v = self.joined(past, k, v)
        return self.mix((q @ k.mT / 4).softmax(-1)) @ v, (k, v)


class CachesLatents(Attending):
    def forward(self, x, past=None):
        latent = self.down(x)
        if past is not None:
            latent = torch.cat([past, latent], 1)
        q, _, _ = self.heads(x)
        k, v = (y.unflatten(-1, (HEADS, D)).transpose(1, 2) for y in (self.up(latent), self.up(latent).tanh()))
        return F.scaled_dot_product_attention(q, k, v), latent


class Chooses(Attending):
    """A ``where`` that is no write to a cache: its condition is an input."""

    def forward(self, x, past=None):
        q, k, v = self.heads(x)
        k, v = self.joined(past, k, v)
        kept = torch.where(past[2] if past is not None else x[0, 0, 0] > 9, x, x + 1)
        return F.scaled_dot_product_attention(q, k, v), (k, v, kept[0, 0, 0] > 9)


class HalfTheBatch(Attending):
    def __init__(self) -> None:
        super().__init__()
        self.k, self.v = torch.zeros(4, HEADS, ROOM, D), torch.zeros(4, HEADS, ROOM, D)

    def forward(self, x, past=None):
        start = 0 if past is None else past
        q, k, v = self.heads(x)
        end = start + x.shape[1]
        self.k[:2, :, start:end], self.v[:2, :, start:end] = k, v
        return F.scaled_dot_product_attention(q, self.k[:2, :, :end], self.v[:2, :, :end]), end


class NoSoftmax(Attending):
    def forward(self, x, past=None):
        q, k, v = self.heads(x)
        k, v = self.joined(past, k, v)
        return self.weights(q @ k.mT / 4) @ v, (k, v)

    def weights(self, logits):
        return logits.sigmoid()


class SoftmaxPlusOne(NoSoftmax):
    """Probabilities that need not sum to one."""

    def weights(self, logits):
        exponentials = (logits - logits.amax(-1, keepdim=True)).exp()
        return exponentials / (1 + exponentials.sum(-1, keepdim=True))


class Ring(Attending):
    """Positions begin again at the end of the buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.v = torch.zeros(2, HEADS, 8, D), torch.zeros(2, HEADS, 8, D)

    def forward(self, x, past=None):
        start = 0 if past is None else past
        q, k, v = self.heads(x)
        positions = torch.arange(start, start + x.shape[1])
        self.write(positions, k, v)
        return F.scaled_dot_product_attention(q, self.k, self.v), start + x.shape[1]

    def write(self, positions, k, v):
        self.k[:, :, positions % 8], self.v[:, :, positions % 8] = k, v


class RingOfPowerOfTwo(Ring):
    def write(self, positions, k, v):
        self.k.index_copy_(2, positions & 7, k)
        self.v.index_copy_(2, positions & 7, v)


class Rounds(Attending):
    """The cached numbers are not those attended to."""

    def forward(self, x, past=None):
        q, k, v = self.heads(x)
        k, v = self.joined(past, k, v)
        return F.scaled_dot_product_attention(q, *self.read(k, v)), (k, v)

    def read(self, k, v):
        return k.to(torch.int8).float(), v


class RoundsToHalf(Rounds):
    def read(self, k, v):
        return k.bfloat16().float(), v


class RoundsValues(Rounds):
    def read(self, k, v):
        return k, v.half().float()


class ViewsOfOne(Attending):
    """Buffers that are views of a larger one."""

    def __init__(self) -> None:
        super().__init__()
        self.both = torch.zeros(2, 2, HEADS, ROOM, D)
        self.k, self.v = self.both

    def forward(self, x, past=None):
        start = 0 if past is None else past
        q, k, v = self.heads(x)
        end = start + x.shape[1]
        self.k[:, :, start:end], self.v[:, :, start:end] = k, v
        return F.scaled_dot_product_attention(q, self.k[:, :, :end], self.v[:, :, :end]), end


class ReadsWhole(ViewsOfOne):
    """Writes through one tensor and reads through another."""

    def forward(self, x, past=None):
        out, end = super().forward(x, past)
        return out + self.both.mean(), end


def calls(model, lengths=(6, 1, 1)):
    torch.manual_seed(1)
    outputs, past = [], None
    with torch.no_grad():
        for length in lengths:
            out, past = model(torch.randn(2, length, WIDTH), past)
            outputs.append(out)
    return torch.cat(outputs, 2)


def both(kind):
    """The outputs of the plain and of the wrapped model, and the latter's report."""
    torch.manual_seed(0)
    plain, ours = kind(), kind()
    ours.load_state_dict(plain.state_dict())
    ours = think_compile(ours, 0.5, recent=2, observe=4, channel_multiple=1, lowering="eager")
    return calls(plain), calls(ours), report(ours)


@pytest.mark.filterwarnings("ignore::think_compile.ThinkWarning")
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (MixesHeads, Reason.UNKNOWN_ATTENTION),
        (CachesLatents, Reason.LATENT),
        (HalfTheBatch, Reason.TRANSFORMED),
        (NoSoftmax, Reason.UNKNOWN_ATTENTION),
        (SoftmaxPlusOne, Reason.UNKNOWN_ATTENTION),
        (Ring, Reason.UNKNOWN_WINDOW),
        (RingOfPowerOfTwo, Reason.UNKNOWN_WINDOW),
        (Rounds, Reason.TRANSFORMED),
        (RoundsToHalf, Reason.TRANSFORMED),
        (RoundsValues, Reason.VALUES_TRANSFORMED),
        (ViewsOfOne, Reason.HELD_OUTSIDE),
        (ReadsWhole, Reason.NOT_FUNCTIONAL),
    ],
)
def test_left_alone_by_its_name(kind, reason):
    plain, ours, found = both(kind)
    assert torch.equal(plain, ours)
    assert not found.rewritten
    assert {record.reason for record in found.refused} == {reason}, str(found)


def test_a_choice_that_writes_no_cache():
    _, _, found = both(Chooses)
    assert len(found.rewritten) == 1 and not found.refused


def test_a_model_that_was_not_called():
    wrapped = think_compile(MixesHeads(), 0.5)
    assert "was not called" in str(report(wrapped))


class WritesUnknownRows(Attending):
    def __init__(self) -> None:
        super().__init__()
        self.k, self.v = torch.zeros(2, HEADS, ROOM, D), torch.zeros(2, HEADS, ROOM, D)

    def forward(self, x, at):
        q, k, v = self.heads(x)
        start = at[0]
        self.k[:, :, start : start + x.shape[1]], self.v[:, :, start : start + x.shape[1]] = k, v
        seen = torch.arange(ROOM) <= at[0] + torch.arange(x.shape[1])[:, None]
        return F.scaled_dot_product_attention(q, self.k, self.v, seen)


@pytest.mark.filterwarnings("ignore::think_compile.ThinkWarning")
def test_rows_whose_number_is_read_from_a_tensor():
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        found = explain(WritesUnknownRows(), (torch.randn(2, 1, WIDTH), torch.tensor([5])), lowering="eager")
    assert {record.reason for record in found.refused} == {Reason.UNKNOWN_ROOT}, str(found)


class Sharded(Attending):
    """Its weight is a DTensor, whose local part each call reads, as with heads split over processes."""

    def heads(self, x):
        qkv = F.linear(x, self.qkv.weight.to_local(), self.qkv.bias)
        return (part.unflatten(-1, (HEADS, D)).transpose(1, 2) for part in qkv.chunk(3, -1))

    def forward(self, x, past=None):
        q, k, v = self.heads(x)
        k, v = self.joined(past, k, v)
        return F.scaled_dot_product_attention(q, k, v), (k, v)


@pytest.fixture
def mesh():
    """A mesh of one process."""
    distributed = pytest.importorskip("torch.distributed")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore::think_compile.ThinkWarning")
def test_sharded_weights(mesh):
    from torch.distributed.tensor import Replicate, distribute_tensor

    def kind():
        model = Sharded()
        model.qkv.weight = nn.Parameter(distribute_tensor(model.qkv.weight.detach(), mesh, [Replicate()]))
        return model

    plain, ours, found = both(kind)
    assert torch.equal(plain, ours)
    assert {record.reason for record in found.refused} == {Reason.SHARDED}, str(found)


class MovesItsStorage(Attending):
    """Each call sets a parameter to the memory of another tensor, as quantization libraries do."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.zeros(4), requires_grad=False)
        self.register_buffer("other", torch.zeros(4))

    def forward(self, x, past=None):
        q, k, v = self.heads(x)
        self.own.data = self.other
        k, v = self.joined(past, k, v)
        return F.scaled_dot_product_attention(q, k, v), (k, v)


@pytest.mark.filterwarnings("ignore::think_compile.ThinkWarning")
def test_a_parameter_that_is_set_to_other_memory():
    plain, ours, found = both(MovesItsStorage)
    assert torch.equal(plain, ours)
    assert {record.reason for record in found.refused} == {Reason.NOT_FUNCTIONAL}, str(found)
