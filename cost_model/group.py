"""`Group`: how the ranks of one communicator lie in a cluster, in closed form from the mesh; no lists of ranks.

Rank = Σ coordinate · stride, the first axis of the order has stride 1. For every link level a group is described by its
members in one block of the level (`group_size` consecutive ranks), the blocks that it touches, and how many equal
groups share a block's ports at the same time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .cluster import Cluster, ClusterError, whole


@dataclass(frozen=True)
class Group:
    """A group of `size` ranks; the tuples have one entry per level of the cluster, innermost first.

    `members`: ranks of the group in one block that it touches; `blocks`: how many it touches; `concurrent`: groups that
    use a block's ports at once. Where the groups of a mesh lie unevenly (`even` is False) these are bounds for the
    worst one: not more members, not fewer blocks, not fewer sharers.
    """

    size: int
    members: tuple[int, ...]
    blocks: tuple[int, ...]
    concurrent: tuple[int, ...]
    even: bool = True

    @classmethod
    def of(cls, cluster: Cluster, sizes: Mapping[str, int], order: Sequence[str], axis: str | Sequence[str]) -> Group:
        """The groups along `axis` (or several axes flattened) of a mesh with `sizes`, ranks laid out in `order`,
        innermost axis first; all of them communicate at the same time.

        Three ranks with stride 4 on nodes of 8 lie unevenly and are priced as their worst group. Raises `ClusterError`
        for unknown axes, a mesh of another size than the cluster, and axes apart from each other that lie unevenly.
        """
        runs = _runs(cluster, sizes, order, axis)
        size = math.prod(n for _, n in runs)
        members: list[int] = []
        blocks: list[int] = []
        concurrent: list[int] = []
        even = True
        for level in cluster.levels:
            block = level.group_size
            inside = _in_blocks(runs, block)
            if inside is not None:
                found = inside, size // inside, block // inside
            elif len(runs) == 1:
                even, (stride, n) = False, runs[0]
                # a touched block holds a whole touched part of the level inside; `stride` groups cross either end
                found = members[-1] if members else 1, _most_blocks(stride, n, block), min(block, 2 * stride)
            else:
                names = axis if isinstance(axis, str) else ", ".join(axis)
                raise ClusterError(f"the flattened axes {names} lie unevenly in blocks of {block} GPUs; expected "
                                   "degrees that divide a block or are multiples of it")
            for values, value in zip((members, blocks, concurrent), found, strict=True):
                values.append(value)
        return cls(size, tuple(members), tuple(blocks), tuple(concurrent), even)

    @classmethod
    def contiguous(cls, cluster: Cluster, size: int) -> Group:
        """Groups of `size` consecutive ranks. Raises `ClusterError` unless they divide the cluster."""
        whole("group size", size)
        if cluster.gpus % size:
            raise ClusterError(f"groups of {size} GPUs; expected a divisor of the cluster's {cluster.gpus}")
        return cls.of(cluster, {"group": size, "rest": cluster.gpus // size}, ("group", "rest"), "group")

    def crosses(self, level: int) -> bool:
        """Whether the group uses the links of `level`: it touches several blocks of the level inside."""
        return (self.blocks[level - 1] if level else self.size) > self.blocks[level]

    @property
    def outermost(self) -> int:
        """The outermost level whose links the group uses (0 for a single rank)."""
        return max((i for i in range(len(self.blocks)) if self.crosses(i)), default=0)


def _runs(cluster: Cluster, sizes: Mapping[str, int], order: Sequence[str],
          axis: str | Sequence[str]) -> list[tuple[int, int]]:
    """(stride, size) of the axes in `axis`, innermost first; neighbours in the order are one run."""
    if sorted(order) != sorted(sizes):
        raise ClusterError(f"rank order {', '.join(order)}; expected each of {', '.join(sizes)} once")
    for name in order:
        whole(f"degree of {name}", sizes[name])
    total = math.prod(sizes.values())
    if total != cluster.gpus:
        raise ClusterError(f"a mesh of {' x '.join(f'{k} {sizes[k]}' for k in order)} has {total} ranks; expected the "
                           f"cluster's {cluster.gpus}")
    wanted = {axis} if isinstance(axis, str) else set(axis)
    if not wanted <= set(order):
        raise ClusterError(f"unknown axis {', '.join(sorted(wanted - set(order)))}; expected one of {', '.join(order)}")
    runs: list[tuple[int, int]] = []
    stride = 1
    for name in order:
        n = sizes[name]
        if name in wanted and n > 1:
            if runs and runs[-1][0] * runs[-1][1] == stride:
                runs[-1] = (runs[-1][0], runs[-1][1] * n)
            else:
                runs.append((stride, n))
        stride *= n
    return runs


def _in_blocks(runs: Sequence[tuple[int, int]], block: int) -> int | None:
    """Members of each group in each block of `block` ranks that it touches; None when that differs."""
    inside = 1
    for stride, n in runs:
        if stride >= block:
            continue  # every step leaves the block
        if block % (stride * n) == 0:
            inside *= n
        elif block % stride == 0 and (stride * n) % block == 0:
            inside *= block // stride
        else:
            return None
    return inside


def _most_blocks(stride: int, n: int, block: int) -> int:
    """Blocks that the worst of the groups {first + i·stride, i < n} touches, for stride < block. `first` runs over
    r + k·stride·n with r < stride, so its place in a block is r plus a multiple of gcd(stride·n, block)."""
    step = math.gcd(stride * n, block)
    latest = block - 1 if stride >= step else block - step + stride - 1
    return (latest + (n - 1) * stride) // block + 1
