"""`meshwright profile`. `register` adds it to the command line."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer


def register(app: typer.Typer, show_value: Callable[[Any], None]) -> None:
    """Add the command; `show_value` prints a value or plain data."""

    @app.command()
    def profile(output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")] = Path(
                    "profile.json"),
                device: Annotated[str | None, typer.Option(help="cpu or cuda; by default the GPU where there is "
                                                                "one.")] = None,
                ranks: Annotated[int | None, typer.Option(min=1, max=1024, help=(
                    "Processes to start here, which measure at the same time, and their collectives (gloo, or NCCL "
                    "with a GPU each). Under torchrun its ranks are taken, several nodes too."))] = None,
                threads: Annotated[int, typer.Option(min=1, max=1024, help="Of a process on the CPU.")] = 1,
                quick: Annotated[bool, typer.Option("--quick", help="Fewer sizes and dtypes: a few seconds.")] = False,
                name: Annotated[str | None, typer.Option(help="The device's name in clusters, where torch's own does "
                                                              "not say it, such as h100-96-hbm2e.")] = None,
                as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
        """Measure this machine into a file that --profile of plan, price, sweep and others puts in the place of
        presets: products, attention, memory, launches, and with several ranks collectives and overlap."""
        from .profile_command import measure_profile, steps_of

        with _bar(lambda: steps_of(device, ranks, quick)) as progress:
            found = measure_profile(output, device, ranks, threads, quick, name, progress)
        if found is not None:
            show_value(found.as_dict() if as_json else found)


@contextlib.contextmanager
def _bar(steps: Callable[[], int]) -> Iterator[Callable[[str], None]]:
    """A bar that moves on with every report; silent when stderr is no terminal."""
    if not sys.stderr.isatty():
        yield lambda what: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=steps())
        yield lambda what: bar.update(task, advance=1, description=what)
