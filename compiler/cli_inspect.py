"""The commands that look at a plan: `show`, `diff`, `report`, `export`. `register` adds them to the command line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..runtime.errors import InvalidInputError

if TYPE_CHECKING:
    from .plan_files import Shown

PlanFile = Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file that meshwright saved.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Edited = Annotated[bool, typer.Option("--allow-edited", help="Also open a plan that was changed by hand; its "
                                                             "predictions may then not belong to it.")]
Stored = Annotated[bool, typer.Option("--stored", help="Show the file's predictions as they are, without pricing the "
                                                      "plan again.")]
RunCode = Annotated[bool, typer.Option("--run-model-code", help="Import the model where PLAN names it as "
                                                                "module:callable.")]
Profile = Annotated[Path | None, typer.Option(help="Price under this file of meshwright profile instead of what "
                                                  "PLAN was made under.")]


def _file(path: Path | None) -> Path | None:
    """Before anything is priced: whether the file can be there."""
    from ..runtime.plan import in_a_folder

    if path is not None:
        in_a_folder(path)
    return path


Mixing = Annotated[bool, typer.Option("--mixing", help="With --why also what a layout of its own for every "
                                                       "layer would gain; takes long.")]
Trace = Annotated[Path | None, typer.Option(callback=_file,
                                                help="Also write the pipeline's time line for Chrome and Perfetto.")]
Page = Annotated[Path, typer.Option("--output", "-o", callback=_file, help="The page to write.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", callback=_file, help="Write it to a file.")]
DOES_NOT_FIT = 3


def register(app: typer.Typer, show_value: Callable[[Any], None],
             progress: Callable[[str], AbstractContextManager[None]]) -> None:
    """Add the commands; `show_value` prints a value or plain data, `progress` shows that something runs."""

    def opened(path: Path, stored: bool, edited: bool, code: bool, profile: Path | None) -> Shown:
        from .plan_files import open_plan, priced_plan

        if stored and profile is not None:
            raise InvalidInputError("--stored and --profile", expected="one of them")
        if stored:
            return open_plan(path, allow_edited=edited)
        with progress(f"pricing {path}"):
            return priced_plan(path, allow_edited=edited, run_model_code=code,
                               profile=str(profile) if profile else None)

    @app.command()
    def show(plan: PlanFile, trace: Trace = None, profile: Profile = None, stored: Stored = False,
             allow_edited: Edited = False, run_model_code: RunCode = False, as_json: Json = False) -> None:
        """Print PLAN, priced again: strategy per layer group, time, memory against the limit, what to doubt. Exit code
        3: does not fit."""
        found = opened(plan, stored, allow_edited, run_model_code, profile)
        _write_trace(trace, found.plan)
        show_value(found.as_dict() if as_json else found)
        if not found.fits:
            raise typer.Exit(DOES_NOT_FIT)

    @app.command()
    def diff(a: Annotated[Path, typer.Argument(metavar="A", help="A plan file.")],
             b: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
             profile: Profile = None, stored: Stored = False, allow_edited: Edited = False,
             run_model_code: RunCode = False, as_json: Json = False) -> None:
        """Print what two plans do differently, layer by layer, and what that is predicted to change."""
        from .plan_files import diff as compared

        found = compared(*(opened(path, stored, allow_edited, run_model_code, profile) for path in (a, b)))
        show_value(found.as_dict() if as_json else found)

    @app.command()
    def report(plan: PlanFile, output: Page,
               why: Annotated[bool, typer.Option("--why", help="Also search the families that PLAN beat; takes as long "
                                                               "as meshwright why.")] = False,
               mixing: Mixing = False, trace: Trace = None, profile: Profile = None, stored: Stored = False,
               allow_edited: Edited = False, run_model_code: RunCode = False, as_json: Json = False) -> None:
        """Write PLAN, priced again, as one HTML page that opens offline: pipeline, memory, costs, search."""
        from ..runtime.plan import write_atomically
        from .plan_page import plan_page

        found = opened(plan, stored, allow_edited, run_model_code, profile)
        if why or mixing:
            from .plan_why import why_of

            with progress(f"searching the families that {plan} beat"):
                reasons = why_of(plan, run_model_code, str(profile) if profile else None, mixing)
            found = found.with_beaten(reasons.beaten)
        _write_trace(trace, found.plan)
        page = plan_page(found)
        write_atomically(output, page)
        show_value({"page": str(output), "bytes": len(page.encode()), "fits": found.fits} if as_json else
                   f"{output}: {len(page.encode()) / 1024:.0f} KiB")

    _register_export(app, show_value)


def _register_export(app: typer.Typer, show_value: Callable[[Any], None]) -> None:
    @app.command()
    def export(plan: PlanFile, to: Annotated[str, typer.Option(help="torchtitan, megatron, deepspeed or galvatron.")],
               output: Output = None, allow_edited: Edited = False, as_json: Json = False) -> None:
        """Write PLAN as another trainer's configuration; what it has no word for is listed on stderr."""
        from ..runtime.plan import write_atomically
        from .plan_files import open_plan
        from .planner.export import export as exported
        from .planner.export import listed

        made = exported(open_plan(plan, allow_edited=allow_edited).plan, to)
        if output is not None:
            write_atomically(output, made.text)
        if as_json:
            show_value({"target": made.target, "text": made.text, "expressed": dict(made.expressed),
                        "cannot_express": made.lost, "no_setting": {k: v for k, v in made.cannot.items()
                                                                    if k not in made.lost}})
            return
        if output is None:
            sys.stdout.write(made.text)
        for line in listed(made.lost):
            print(f"cannot express {line}", file=sys.stderr)


def _write_trace(path: Path | None, plan: Any) -> None:
    from ..runtime.plan import write_atomically
    from .plan_timeline import chrome_trace

    if path is not None:
        if path.suffix.lower() != ".json":
            raise InvalidInputError(f"--trace {path}", expected="a file name that ends in .json",
                                    do="Chrome and Perfetto open those.")
        write_atomically(path, chrome_trace(plan))
