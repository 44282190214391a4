"""`meshwright sweep`: the best plan for several cluster sizes, sequence lengths or batches, as a Pareto table."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..runtime.errors import InvalidInputError, UnknownNameError
from ..runtime.plan import Plan
from .planner.objectives import attempt, resized
from .planner.plan_model import Planner, Request
from .planner.space import divisors

if TYPE_CHECKING:
    from rich.console import Group

AXES = {"gpus": "nodes", "seq": "tokens per sequence", "batch": "samples per step"}  # and what their values are
BETTER = {"gpus": "GPU-seconds a token", "seq": "length", "batch": "smallness of the batch"}
MOST = 64
DAY_S = 86400.0


@dataclass(frozen=True)
class Row:
    """One point: the request's changed value and its best plan, None where nothing fits, for the `reason`. `best`: no
    other row is as good in both tokens/s and what `BETTER` says of the axis, and better in one."""

    value: int
    gpus: int
    plan: Plan | None
    usd_per_token: float | None
    days: float | None
    usd: float | None
    best: bool = False
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        p = self.plan.predicted if self.plan else None
        return {"value": self.value, "gpus": self.gpus, "fits": p is not None, "reason": self.reason,
                "pareto": self.best, "title": self.plan.title if self.plan else None,
                "step_time_s": p.step_time_s if p else None,
                "tokens_per_s": p.tokens_per_s if p else None, "mfu": p.mfu if p else None,
                "usd_per_million_tokens": self.usd_per_token * 1e6 if self.usd_per_token is not None else None,
                "days": self.days, "usd": self.usd}


@dataclass(frozen=True)
class Sweep:
    """The rows of a sweep over one axis."""

    over: str
    rows: tuple[Row, ...]
    tokens: float | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"over": self.over, "tokens": self.tokens, "rows": [row.as_dict() for row in self.rows]}

    def __rich__(self) -> Group:
        from rich.console import Group as Rows
        from rich.table import Table
        from rich.text import Text

        table = Table(title="predicted; * marks the Pareto set: no other row is as good in tokens/s and "
                            f"{BETTER[self.over]}", title_justify="left")
        for name in (AXES[self.over], "GPUs", "tokens/s", "MFU", "USD per 10^6 tokens", "days", "USD", "", "plan"):
            table.add_column(name, justify="left" if name == "plan" else "right", overflow="fold")
        for row in self.rows:
            if row.plan is None:
                table.add_row(str(row.value), str(row.gpus), *["-"] * 5, "", Text(row.reason))
                continue
            p = row.plan.predicted
            cells = (f"{p.tokens_per_s:,.0f}", f"{p.mfu:.1%}" if p.mfu is not None else "-",
                     f"{row.usd_per_token * 1e6:.3f}" if row.usd_per_token is not None else "-",
                     f"{row.days:,.1f}" if row.days is not None else "-",
                     f"{row.usd:,.0f}" if row.usd is not None else "-", "*" if row.best else "")
            table.add_row(str(row.value), str(row.gpus), *cells, Text(row.plan.title))
        return Rows(table)


def sweep(request: Request, over: str, values: str | None, tokens: float | None) -> Sweep:
    """Plan for every value: node counts (default: those that divide the cluster's), tokens per sequence, or samples."""
    if over not in AXES:
        raise UnknownNameError("axis of a sweep", over, AXES)
    if tokens is not None and not 0 < tokens < 1e18:
        raise InvalidInputError(f"{tokens:g} tokens", expected="a number above 0")
    base = Planner(request)
    chosen = _values(values) if values is not None else list(divisors(base.cluster.nodes)) if over == "gpus" else None
    if chosen is None:
        raise InvalidInputError(f"a sweep over {over} without --values", expected="such as --values 2048,4096,8192")
    rows = []
    for value in chosen:
        other = (resized(request, value) if over == "gpus" else replace(request, seq=value) if over == "seq"
                 else replace(request, global_batch=value))
        answer, reason = attempt(other, base)
        gpus = value * base.cluster.gpus_per_node if over == "gpus" else base.cluster.gpus
        row = _row(value, gpus, answer.plan if answer else None, request.price_usd_per_gpu_hour, tokens)
        rows.append(replace(row, reason=reason))
    return Sweep(over, tuple(replace(row, best=_is_best(row, rows, over)) for row in rows), tokens)


def _values(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if not found or len(found) > MOST or min(found) < 1:
        raise InvalidInputError(f"--values {text[:60]!r}", expected=f"1 to {MOST} whole numbers with commas between")
    return found


def _row(value: int, gpus: int, plan: Plan | None, price: float | None, tokens: float | None) -> Row:
    if plan is None:
        return Row(value, gpus, None, None, None, None)
    seconds = tokens / plan.predicted.tokens_per_s if tokens is not None else None
    per_token = price * gpus / 3600 / plan.predicted.tokens_per_s if price is not None else None
    return Row(value, gpus, plan, per_token, seconds / DAY_S if seconds is not None else None,
               per_token * tokens if per_token is not None and tokens is not None else None)


def _is_best(row: Row, rows: list[Row], over: str) -> bool:
    if row.plan is None:
        return False
    own = _merits(row, over)
    others = [_merits(other, over) for other in rows if other.plan is not None]
    return not any(all(b >= a for a, b in zip(own, other, strict=True)) and other != own for other in others)


def _merits(row: Row, over: str) -> tuple[float, float]:
    """Tokens/s, and the axis' other merit: more is better in both."""
    assert row.plan is not None
    speed = row.plan.predicted.tokens_per_s
    return speed, {"gpus": speed / row.gpus, "seq": row.value, "batch": -row.value}[over]
