"""`flexpert policy ...`: the sub-commands about scaling policies. Each hands over to a module of its own."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(help="Check a scaling policy, and look after the one that is in force.", no_args_is_help=True)


@app.command()
def check(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Policy files; - is standard input.")],
) -> None:
    """Tell what a policy would do, in words; or every error in it, with its line and what to write instead.

    `flexpert policy check policy.yaml`
    """
    from flexpert.cli.policy_check import check_files

    words, errors = check_files(files)
    for line in words:
        typer.echo(line)
    for line in errors:
        typer.echo(line, err=True)
    if errors:
        raise typer.Exit(2)
