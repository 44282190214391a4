"""Models that no table can know: plain classes with names of their own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Quux(nn.Module):
    """Grouped-query attention and a gated feed-forward part, written out; `fused` uses torch's attention call."""

    def __init__(self, width: int, heads: int, groups: int, inner: int, number: int, fused: bool) -> None:
        super().__init__()
        self.heads, self.groups, self.number, self.fused = heads, groups, number, fused
        self.size = width // heads
        self.a, self.b = nn.LayerNorm(width), nn.LayerNorm(width)
        self.ask = nn.Linear(width, width, bias=False)
        self.key, self.val = (nn.Linear(width, groups * self.size, bias=False) for _ in range(2))
        self.out = nn.Linear(width, width, bias=False)
        self.one, self.two, self.back = nn.Linear(width, inner), nn.Linear(width, inner), nn.Linear(inner, width)

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q = self.ask(x).view(batch, length, self.heads, self.size).transpose(1, 2)
        k, v = (f(x).view(batch, length, self.groups, self.size).transpose(1, 2) for f in (self.key, self.val))
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.groups != self.heads)
        else:
            k, v = (t.repeat_interleave(self.heads // self.groups, 1) for t in (k, v))
            mixed = (q @ k.transpose(-1, -2) * self.size ** -0.5).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.mix(self.a(x))
        y = self.b(x)
        return x + self.back(F.silu(self.one(y)) * self.two(y))


class Frobnicator(nn.Module):
    """Table, `depth` equal layers, projection to the table's rows and a loss."""

    def __init__(self, depth: int = 3, width: int = 64, heads: int = 4, groups: int = 2, inner: int = 160,
                 rows: int = 100, *, fused: bool = True, tied: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, width)
        self.stack = nn.ModuleList(Quux(width, heads, groups, inner, i, fused) for i in range(depth))
        self.last, self.project = nn.LayerNorm(width), nn.Linear(width, rows, bias=False)
        if tied:
            self.project.weight = self.table.weight

    def forward(self, tokens: torch.Tensor, wanted: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.table(tokens)
        for layer in self.stack:
            x = layer(x)
        scores = self.project(self.last(x))
        return {"loss": F.cross_entropy(scores.flatten(0, 1), wanted.flatten()), "scores": scores}


def tokens(micro_batch: int = 2, seq: int = 32, rows: int = 100) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and the ids that are wanted."""
    return torch.randint(0, rows, (micro_batch, seq)), torch.randint(0, rows, (micro_batch, seq))
