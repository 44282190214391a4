"""What a search left out, in few lines: values of an axis that were left out for the same reason stand together."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from rich.table import Table

    from .planner.space import Left

MOST_VALUES = 6
_NUMBER = re.compile(r"\d+(\.\d+)?")


class Cut(NamedTuple):
    """Values of an axis, and why they were left out; the first of their reasons where only numbers differ."""

    axis: str
    values: tuple[str, ...]
    reason: str
    reasons: int

    @property
    def shown(self) -> str:
        """The values, or the first ones and how many more."""
        more = len(self.values) - MOST_VALUES
        return "; ".join(self.values[:MOST_VALUES]) + (f" and {more} more" if more > 0 else "")


def cuts(left: Iterable[Left]) -> list[Cut]:
    """In order of their first appearance."""
    found: dict[tuple[str, str], tuple[dict[str, None], dict[str, None]]] = {}
    for axis, value, reason in left:
        values, reasons = found.setdefault((axis, _NUMBER.sub("0", reason)), ({}, {}))
        values[value] = None
        reasons[reason] = None
    return [Cut(axis, tuple(values), next(iter(reasons)), len(reasons))
            for (axis, _), (values, reasons) in found.items()]


def cuts_table(left: Iterable[Left]) -> Table:
    """A row per axis and reason."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="left out of the search", title_justify="left")
    for name in ("axis", "values", "because"):
        table.add_column(name, overflow="fold")
    for cut in cuts(left):
        like = " (and the like)" if cut.reasons > 1 else ""
        table.add_row(Text(cut.axis), Text(cut.shown), Text(cut.reason + like))
    return table
