"""The entry point ``tahf4``: registers the commands and turns our errors into one message."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from . import (
    bench,
    bisect_model,
    calibrate,
    convert,
    demo,
    doctor,
    evaluate,
    explain,
    inspect_model,
    parallel,
    passes,
    quantize,
    reproduce,
)
from .errors import own_error
from .kernels import memory, roofline, table

__all__ = ["app", "main"]


class _Commands(TyperGroup):
    """A group that prints an error of this project as one message, with exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            own = own_error(error)
            if own is None or ctx.params.get("debug"):
                raise
            typer.secho("error: ", fg="red", bold=True, err=True, nl=False)
            typer.echo(str(own), err=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(show: bool) -> None:
    if show:
        from importlib.metadata import version

        typer.echo(version("tahf4-compiler"))
        raise typer.Exit


@app.callback()
def tahf4(
    debug: Annotated[
        bool, typer.Option("--debug", envvar="TAHF4_DEBUG", help="Show the traceback of an error.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Run PyTorch models in HiFloat4 W4A4: 4-bit weights and 4-bit activations.

    In Python the compiler is `torch.compile(model, backend="tahf4")`. These commands show it at work:
    start with `tahf4 doctor`, then `tahf4 demo`.
    """


app.command("demo")(demo.demo)
app.command("calibrate")(calibrate.calibrate)
app.command("evaluate")(evaluate.evaluate)
app.command("reproduce")(reproduce.reproduce)
app.command("quantize")(quantize.quantize)
app.command("verify")(quantize.verify)
app.command("convert")(convert.convert)
app.command("inspect")(inspect_model.inspect)
app.command("explain")(explain.explain)
app.command("bench")(bench.bench)
app.command("kernels")(table.kernels)
app.command("roofline")(roofline.roofline)
app.command("memory")(memory.memory)
app.command("parallel")(parallel.parallel)
app.command("passes")(passes.passes)
app.command("bisect")(bisect_model.bisect)
app.command("doctor")(doctor.doctor)


def main() -> None:
    """Run the command line."""
    app(prog_name="tahf4")


if __name__ == "__main__":
    main()
