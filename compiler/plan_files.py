"""Plans from files, for the commands that look at them: opened, compared with today's inputs where those are known, and
checked against their own costs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.errors import MeshwrightError
from ..runtime.plan import Plan
from ..runtime.plan_predictions import Beaten
from ..runtime.plan_table import GIB, confidence, duration, error_band, footnotes
from .plan_timeline import step_fault

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True)
class Shown:
    """A plan with what there is to say about its file. `priced`: its predictions were made anew, by today's model,
    cluster and cost model, and `differences` say what changed since; otherwise they are the file's. `notes`: why not,
    what that changed, what does not add up."""

    path: str
    plan: Plan
    notes: tuple[str, ...] = ()
    priced: bool = False
    differences: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return self.plan.predicted.fits

    def with_beaten(self, beaten: tuple[Beaten, ...]) -> Shown:
        """With the best plans of other families beside it."""
        return replace(self, plan=self.plan.model_copy(update={"beaten": beaten}))

    def as_dict(self) -> dict[str, Any]:
        """The plan as in its file, and what follows from it."""
        plan, p = self.plan, self.plan.predicted
        tightest = p.stages[p.tightest]
        return {
            "path": self.path, "priced_again": self.priced, "differences": list(self.differences),
            "notes": list(self.notes), "fits": self.fits, "title": plan.title, "gap": plan.gap,
            "runnable": plan.runnable, "step_time_s": p.step_time_s, "tokens_per_s": p.tokens_per_s, "mfu": p.mfu,
            "tightest_stage": p.tightest, "peak_bytes": tightest.peak_bytes, "limit_bytes": tightest.limit_bytes,
            **confidence(p), "plan": plan.model_dump(mode="json")}

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.text import Text

        return Group(self.plan.table(), *(Text(f"note: {note}") for note in self.notes))


def open_plan(path: Path | str, *, allow_edited: bool = False) -> Shown:
    """The plan in a file, with the file's predictions. Raises `InvalidInputError`, one line, for what can't be read or
    was changed."""
    plan = Plan.load(path, allow_edited=allow_edited)
    fault = step_fault(plan)
    return Shown(str(path), plan, (f"{fault}: don't rely on it",) if fault else ())


def priced_plan(path: Path | str, *, allow_edited: bool = False, run_model_code: bool = False,
                profile: str | None = None) -> Shown:
    """The plan in a file, priced again, with `profile` under another one than its own ("": the presets). Where that
    can't be done the file's predictions are kept and the notes say why; under another profile it raises. Code that the
    plan names as its model is imported with `run_model_code` only. Raises as `open_plan` does."""
    shown = open_plan(path, allow_edited=allow_edited)
    from .plan_answers import planner_of
    from .planner.reprice import reprice

    before = shown.plan
    try:
        now = reprice(before, planner_of(before, run_model_code, profile))
    except MeshwrightError as error:
        if profile is not None:
            raise
        return replace(shown, notes=(*shown.notes, f"the predictions are the file's: {error}"))
    notes = [f"since the plan was made, {line}" for line in before.fingerprints.differences(now.fingerprints)]
    if now.predicted.step_time_ns != before.predicted.step_time_ns:
        notes.append(f"priced again: {duration(now.predicted.step_time_s)} per step, where the file says "
                     f"{duration(before.predicted.step_time_s)}")
    return Shown(shown.path, now, tuple(notes), True, tuple(before.fingerprints.differences(now.fingerprints)))


@dataclass(frozen=True)
class Difference:
    """A field, or the options of some layers, in both plans."""

    what: str
    a: str
    b: str


@dataclass(frozen=True)
class PlanDiff:
    """What two plans do differently and what that is predicted to change."""

    a: Shown
    b: Shown
    inputs: tuple[str, ...]
    settings: tuple[Difference, ...]
    layers: tuple[Difference, ...]
    predictions: tuple[Difference, ...]

    @property
    def same(self) -> bool:
        """Whether both run the same way; predictions may differ."""
        return not (self.settings or self.layers)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        def rows(found: tuple[Difference, ...]) -> list[dict[str, str]]:
            return [dict(vars(d)) for d in found]

        return {"a": self.a.path, "b": self.b.path, "same_layout": self.same, "inputs": list(self.inputs),
                "settings": rows(self.settings), "layers": rows(self.layers), "predictions": rows(self.predictions),
                "step_time_s": [self.a.plan.predicted.step_time_s, self.b.plan.predicted.step_time_s]}

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        ratio = self.b.plan.predicted.step_time_ns / self.a.plan.predicted.step_time_ns
        verdict = "both run the same way" if self.same else f"B takes {ratio:.4g} times as long a step as A (predicted)"
        parts: list[Any] = [Text(f"A: {self.a.path}\nB: {self.b.path}\n{verdict}")]
        for title, rows in (("settings", self.settings), ("layers", self.layers), ("predicted", self.predictions)):
            if rows:
                table = Table(title=title, title_justify="left")
                for head in ("", "A", "B"):
                    table.add_column(head, overflow="fold")
                for d in rows:
                    table.add_row(Text(d.what), Text(d.a), Text(d.b))
                parts.append(table)
        parts += [Text(f"other inputs: {line}") for line in self.inputs]
        return Group(*parts)


def diff(a: Shown, b: Shown) -> PlanDiff:
    """Compare two plans field by field, layers by their names."""
    return PlanDiff(a, b, tuple(a.plan.fingerprints.differences(b.plan.fingerprints)),
                    tuple(_settings(a.plan, b.plan)), tuple(_layers(a.plan, b.plan)),
                    tuple(_predictions(a.plan, b.plan)))


def _settings(a: Plan, b: Plan) -> list[Difference]:
    found = []
    for section in ("ask", "mesh", "schedule", "training"):
        one, two = getattr(a, section), getattr(b, section)
        found += [Difference(f"{section}.{name}", _plain(getattr(one, name)), _plain(getattr(two, name)))
                  for name in type(one).model_fields if getattr(one, name) != getattr(two, name)]
    if (a.model.name, a.model.layers) != (b.model.name, b.model.layers):
        found.insert(0, Difference("model", f"{a.model.name}, {len(a.model.layers)} layers",
                                   f"{b.model.name}, {len(b.model.layers)} layers"))
    elif a.parts != b.parts:
        found.append(Difference("cuts before", ", ".join(p.first for p in a.parts[1:]) or "none",
                                ", ".join(p.first for p in b.parts[1:]) or "none"))
    return found


def _layers(a: Plan, b: Plan) -> list[Difference]:
    """Stretches of layers that run differently; nothing where the models are others."""
    if a.model.layers != b.model.layers:
        return []
    one, two = (([r.options for r in p.layers for _ in range(r.count)]) for p in (a, b))
    found: list[tuple[int, int]] = []
    for i, (x, y) in enumerate(zip(one, two, strict=True)):
        if x != y and found and found[-1][1] == i - 1 and (x, y) == (one[i - 1], two[i - 1]):
            found[-1] = found[-1][0], i
        elif x != y:
            found.append((i, i))
    names = a.model.layers
    return [Difference(names[i] if i == j else f"{names[i]} … {names[j]} ({j - i + 1})", one[i].title, two[i].title)
            for i, j in found]


def _predictions(a: Plan, b: Plan) -> list[Difference]:
    def row(what: str, value: Any) -> Difference:
        return Difference(what, value(a), value(b))

    def slowest(p: Plan) -> Any:
        return min(p.predicted.stages, key=lambda s: s.bubble_ns)

    def largest(p: Plan) -> Any:
        return p.predicted.stages[p.predicted.tightest]

    rows = [
        row("step", lambda p: duration(p.predicted.step_time_s)),
        row("error band", lambda p: error_band(p.predicted) or "-"),
        row("tokens/s", lambda p: f"{p.predicted.tokens_per_s:,.0f}"),
        row("MFU", lambda p: "-" if p.predicted.mfu is None else f"{p.predicted.mfu:.1%}"),
        row("busiest stage: compute", lambda p: duration(slowest(p).compute_ns / 1e9)),
        row("busiest stage: exposed communication", lambda p: duration(sum(slowest(p).exposed_ns.values()) / 1e9)),
        row("busiest stage: bubble", lambda p: duration(slowest(p).bubble_ns / 1e9)),
        row("tightest stage: GiB of limit", lambda p: f"{largest(p).peak_bytes / GIB:.2f} of "
                                                      f"{largest(p).limit_bytes / GIB:.2f}"),
        row("fits", lambda p: "yes" if p.predicted.fits else "no"),
        row("gap", lambda p: "-" if p.gap is None else f"{p.gap:.2%}"),
        row("doubts", lambda p: "; ".join(n for n in footnotes(p) if n.startswith("low")) or "-")]
    return [r for r in rows if r.a != r.b]


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
