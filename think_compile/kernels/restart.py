"""The channels of a fixed cache that is written from its first row again, by a step of one token.

What :func:`.reference.rescore_restarted` does, in a kernel that ends at once in all other steps: written in ATen
operations, choosing channels would cost each step of a captured decode as much as it does the one that needs it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from think_compile.kernels.decode import traced


@triton.jit
def _energy(q, k, channel, real, GROUP: tl.constexpr, D: tl.constexpr):
    """mean(q^2) k^2 of a channel, over the queries of a group; what is no number counts most."""
    total = tl.load(q + channel, mask=real, other=0.0).to(tl.float32)
    total = total * total
    for g in range(1, GROUP):
        x = tl.load(q + g * D + channel, mask=real, other=0.0).to(tl.float32)
        total += x * x
    y = tl.load(k + channel, mask=real, other=0.0).to(tl.float32)
    energy = total / GROUP * (y * y)
    return tl.where(energy == energy, energy, float("inf"))


@triton.jit
def _rescore(
    Q, K, CHANNELS, START,
    GROUP: tl.constexpr, D: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One KV head of one sequence; by counting, as :func:`.reference.top_channels`."""
    if tl.load(START) == 0:
        row = tl.program_id(0).to(tl.int64)
        q, k = Q + row * GROUP * D, K + row * D
        channel = tl.arange(0, BLOCK)
        real = channel < D
        mine = _energy(q, k, channel, real, GROUP, D)
        ahead = tl.zeros([BLOCK], tl.int32)
        for other in range(D):
            theirs = _energy(q, k, other, True, GROUP, D)
            ahead += ((theirs > mine) | ((theirs == mine) & (other < channel))).to(tl.int32)
        kept = real & (ahead < T)
        slot = tl.cumsum(kept.to(tl.int32), 0) - 1
        for t in range(T):  # an address that depended on what was loaded would pass for a write to that
            tl.store(CHANNELS + row * T + t, tl.sum(tl.where(kept & (slot == t), channel, 0), 0).to(tl.int64))


@triton_op("think_compile::rescore_restarted", mutates_args={"channels"})
def rescore_restarted(q: Tensor, k_new: Tensor, channels: Tensor, start: Tensor) -> None:
    """Choose ``channels`` [B, H, T] anew, in place, if ``start`` (0-d, int64) is 0.

    q [B, Hq, 1, D], k_new [B, H, 1, D].
    """
    (batch, query_heads, _, d), heads = q.shape, k_new.shape[1]
    traced(_rescore)[(batch * heads,)](
        q.contiguous(), k_new.contiguous(), channels, start,
        GROUP=query_heads // heads, D=d, T=channels.shape[-1], BLOCK=triton.next_power_of_2(d),
    )  # fmt: skip
