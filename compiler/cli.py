"""The command line; those that make plans are in `cli_plan.py`, those that look at them in
`cli_inspect.py`. `--help` imports no torch, no rich."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from ..runtime.errors import InvalidInputError, MeshwrightError
from .cli_inspect import register as register_inspection
from .cli_plan import register as register_planning
from .cli_profile import register as register_profiling

app = typer.Typer(name="meshwright", no_args_is_help=True, rich_markup_mode=None, add_completion=False,
                  pretty_exceptions_enable=False, help="Compile PyTorch models and show what was done.")
MODEL_HELP = ("A preset (bert-base, gpt2, llama-tiny, minilm, resnet-50, vit-base, …), a Hugging Face config.json or "
              "its directory, or module:callable that returns (nn.Module, example_inputs).")
CLUSTER_HELP = 'Nodes x GPUs per node and a device, such as "8x8 h100-sxm", or a cluster file (YAML).'
Model = Annotated[str, typer.Argument(help=MODEL_HELP, metavar="MODEL")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Batch = Annotated[int, typer.Option(min=1, help="Batch size of the example.")]
Seq = Annotated[int, typer.Option(min=1, help="Sequence length of the example, in tokens.")]


@app.command()
def explain(model: Model, batch: Batch = 1, seq: Seq = 128,
            train: Annotated[bool, typer.Option(help="Compile a training step: forward and backward.")] = False,
            mode: Annotated[str, typer.Option(help="default, or max to also try Inductor.")] = "default",
            disable: Annotated[list[str] | None, typer.Option(help="A pass to switch off (may be repeated).")] = None,
            time_limit_s: Annotated[float | None, typer.Option(help="Seconds for passes and checks.")] = None,
            html: Annotated[Path | None, typer.Option(help="Also write the report as an HTML page.")] = None,
            as_json: Json = False) -> None:
    """Compile MODEL and report what every pass did, and why not."""
    from .explain import compile_for_report

    with progress(f"compiling {model}"):
        report = compile_for_report(model, batch=batch, seq=seq, train=train, mode=mode, disable=disable or [],
                                    time_limit_s=time_limit_s)
    if html is not None:
        _write(html, report.to_html())
    _print(report.as_dict() if as_json else report)


@app.command()
def kernels(model: Model, target: Annotated[str, typer.Option(help="cpu, sm_80, sm_90 or gfx942.")] = "cpu",
            batch: Batch = 1, seq: Seq = 128,
            train: Annotated[bool, typer.Option(help="Also the kernels of the backward graph.")] = False,
            output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write a file per kernel.")] = None,
            as_json: Json = False) -> None:
    """Print every kernel emitted for MODEL; for a GPU target also registers, shared memory and spills."""
    from .explain import emitted_kernels

    with progress(f"emitting kernels of {model} for {target}"):
        found = emitted_kernels(model, target, batch=batch, seq=seq, train=train)
    if output is not None:
        for kernel in found:
            _write(output / f"{kernel.name}.{'cpp' if kernel.language == 'c++' else 'py'}", kernel.source)
    if as_json:
        _print([k.as_dict() for k in found])
        return
    for kernel in found:
        print(f"{kernel.comment}\n{kernel.source}")
    print(f"{len(found)} kernels for {target}", file=sys.stderr)


@app.command()
def model(model: Annotated[str, typer.Argument(metavar="MODEL", help=(
              "A published model (llama3-8b, deepseek-v3, gpt3-175b, …), a preset of explain, a Hugging Face "
              "config.json or its directory, or module:callable that returns (nn.Module, example_inputs)."))],
          seq: Annotated[int, typer.Option(min=1, help="Tokens per sequence.")] = 4096,
          micro_batch: Annotated[int, typer.Option(min=1, help="Sequences per micro-batch.")] = 1,
          dtype: Annotated[str, typer.Option(help="Of the weights: bfloat16, float16 or float32.")] = "bfloat16",
          imbalance: Annotated[float, typer.Option(min=1.0, help="Rows that experts get, over the mean.")] = 1.0,
          verify_folding: Annotated[bool, typer.Option("--verify-folding", help="Capture every layer, also those that "
                                                       "were found equal, and compare.")] = False,
          as_json: Json = False) -> None:
    """Describe MODEL without allocating its weights: FLOPs, parameters and saved activations per kind of layer."""
    from .model_command import describe_model

    with progress(f"capturing {model}"):
        report = describe_model(model, seq=seq, micro_batch=micro_batch, dtype=dtype, imbalance=imbalance,
                                verify_folding=verify_folding)
    _print(report.as_dict() if as_json else report)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what is installed, which compilers and targets work, and how large the kernel cache is."""
    from .doctor import examine

    with progress("looking at this machine"):
        found = examine()
    _print(found.as_dict() if as_json else found)
    if not found.can_compile_for_cpu:
        raise typer.Exit(1)


@app.command()
def cluster(description: Annotated[str, typer.Argument(metavar="CLUSTER", help=CLUSTER_HELP)],
            mesh: Annotated[str | None, typer.Option(help="Groups to price: the axes of a mesh with their degrees, "
                                                          "neighbouring ranks first, such as tp=8,dp=8; by default "
                                                          "groups of consecutive GPUs.")] = None,
            profile: Annotated[Path | None, typer.Option(help="A file of meshwright profile: its measured numbers "
                                                              "replace the preset's.")] = None,
            as_json: Json = False) -> None:
    """Print the links of CLUSTER, how groups lie in it and how long their collectives take."""
    from .cluster_command import describe

    found = describe(description, mesh, str(profile or ""))
    _print(found.as_dict() if as_json else found)


@contextlib.contextmanager
def progress(what: str) -> Iterator[None]:
    """A bar on the terminal with the time passed; silent when stderr is no terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=30, pulse_style="cyan"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        bar.add_task(what, total=None)
        yield


def _print(value: Any) -> None:
    if isinstance(value, (dict, list)):
        print(json.dumps(value, indent=1, default=str))
        return
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 120).print(value)


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise InvalidInputError(f"{path} can't be written: {error.strerror or error}") from None


register_planning(app, _print, progress)
register_inspection(app, _print, progress)
register_profiling(app, _print)


def main() -> None:
    """Run the command line. Mistakes are one line on stderr and exit code 2, those of the command line itself too."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        code = app(standalone_mode=False, prog_name="meshwright")
    except MeshwrightError as error:
        _refuse(str(error))
    except typer.Abort:
        sys.exit(1)
    except Exception as error:  # typer brings a copy of click, whose errors have no public name
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            print(message(), file=sys.stderr)
            sys.exit(2)
        context = getattr(error, "ctx", None)
        _refuse(f"{message().rstrip('.')}; see {context.command_path if context else 'meshwright'} --help")
    sys.exit(code if isinstance(code, int) else 0)


def _refuse(message: str) -> NoReturn:
    print(f"meshwright: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
