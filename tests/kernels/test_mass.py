"""The kernels of H2O against its blocks of PyTorch operations."""

import pytest
import torch

from think_compile.formats.tokens.h2o import attention_mass
from think_compile.kernels import mass
from think_compile.kernels.mass import key_mass

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def log_sums(q, k, rows, valid, scale):
    """[B, Hq, N]: the log-sum-exp of each query's logits with the valid keys up to its own row."""
    logits = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * scale
    seen = torch.arange(k.shape[2], device=q.device) <= rows[:, None]
    if valid:
        seen = seen & valid[0][:, None, None]
    return logits.masked_fill(~seen, -torch.inf).logsumexp(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("n_new", "size", "start", "most_rows"),
    [(150, 150, 0, 128), (150, 150, 0, 32), (70, 200, 130, 128), (70, 200, 40, 16), (1, 65, 64, 128)],
)
@pytest.mark.parametrize("padded", ["", "left", "with gaps"])
def test_the_mass_of_each_key(n_new, size, start, padded, dtype, most_rows, monkeypatch):
    for name, keys in (("OF_QUERIES", most_rows), ("OF_KEYS", max(16, most_rows // 2))):
        monkeypatch.setattr(mass, name, getattr(mass, name)._replace(queries=most_rows, keys=keys))
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 6, n_new, 24), (2, 2, size, 24)
    q, k = (torch.randn(*shape, generator=generator).to(DEVICE, dtype) * 2 for shape in shapes)
    valid = []
    if padded:
        pads = torch.tensor([[0], [start + n_new // 3]], device=DEVICE)
        rows = torch.arange(size, device=DEVICE)
        keys = (rows >= pads) & (rows < start + n_new)
        if padded == "with gaps":
            keys &= (rows % 37 != 5) & ((rows < 10) | (rows > 50))
        valid = [keys, keys[:, start : start + n_new]]
    at = torch.tensor(start, device=DEVICE)
    rows = at + torch.arange(n_new, device=DEVICE)
    want = attention_mass(q.cpu(), k.cpu(), rows.cpu(), [x.cpu() for x in valid], 0.2)
    got = key_mass(q, k, at, valid, 0.2).cpu()
    torch.testing.assert_close(got, want, atol=1e-5 * n_new, rtol=1e-4)
    lse = log_sums(q.float(), k.float(), rows, valid, 0.2)
    for known in (lse, torch.full_like(lse, torch.nan)):
        again = key_mass(q, k, at, valid, 0.2, known).cpu()
        torch.testing.assert_close(again, want, atol=1e-5 * n_new, rtol=1e-4)
        again = attention_mass(q.cpu(), k.cpu(), rows.cpu(), [x.cpu() for x in valid], 0.2, known.cpu())
        torch.testing.assert_close(again, want, atol=1e-5 * n_new, rtol=1e-4)
    assert not padded or (got[1, :, : start + n_new // 3] == 0).all()
