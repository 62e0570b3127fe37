"""`flexpert policy ...`: the sub-commands about scaling policies. Each hands over to a module of its own."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from flexpert.cli.typed import AdminKey, Json, Name, Url

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


@app.command()
def default() -> None:
    """Print the default policy, to begin your own with.

    `flexpert policy default > policy.yaml`
    """
    from flexpert.cli.policy_default import DEFAULT_POLICY

    typer.echo(DEFAULT_POLICY, nl=False)


@app.command()
def show(name: Name = "default", json: Json = False, url: Url = None, admin_key: AdminKey = None) -> None:
    """Show the policy that a cluster follows, what stands against it, and its last decision."""
    from flexpert.cli import policy_view

    _print(_api(name, url, admin_key).policy("GET"), policy_view.describe_policy, json=json)


@app.command()
def explain(
    decision: Annotated[
        str | None, typer.Argument(metavar="DECISION", help="Id of a decision. [default: the last one]")
    ] = None,
    last: Annotated[
        int | None, typer.Option("--last", min=1, max=1000, help="List so many that changed the size, or would have.")
    ] = None,
    name: Name = "default",
    json: Json = False,
    url: Url = None,
    admin_key: AdminKey = None,
) -> None:
    """Tell how a decision came about: what each signal asked for, which rules shaped it, and what became of it."""
    from flexpert.cli import policy_view
    from flexpert.cli.errors import CommandError

    api = _api(name, url, admin_key)
    if last is not None:
        _print(api.decisions(limit=last, changes=True), policy_view.describe_decisions, json=json)
        return
    if decision is None:
        found = api.policy("GET").get("last")
        if found is None:
            raise CommandError(
                "not_found", "there is no decision yet; does the cluster have a policy? flexpert policy show"
            )
    else:
        found = api.decision(decision)
    _print(found, policy_view.explain, json=json)


@app.command()
def pause(
    for_time: Annotated[str, typer.Option("--for", metavar="TIME", help="How long, e.g. 30m or 2h.")],
    name: Name = "default",
    json: Json = False,
    url: Url = None,
    admin_key: AdminKey = None,
) -> None:
    """Decide nothing for a while; the cluster keeps its size. `resume` ends it sooner."""
    from flexpert.cli.options import owner, parse_time

    body = {"for_s": parse_time(for_time, option="--for"), "owner": owner()}
    _print_state(_api(name, url, admin_key).policy("POST", "/pause", body), json=json)


@app.command()
def resume(name: Name = "default", json: Json = False, url: Url = None, admin_key: AdminKey = None) -> None:
    """End a pause and a size by hand, and leave the mode to the policy."""
    from flexpert.cli.options import owner

    _print_state(_api(name, url, admin_key).policy("POST", "/resume", {"owner": owner()}), json=json)


@app.command()
def mode(
    wanted: Annotated[
        str, typer.Argument(metavar="MODE", help="active, advisory, paused; or policy: as it is written.")
    ],
    name: Name = "default",
    json: Json = False,
    url: Url = None,
    admin_key: AdminKey = None,
) -> None:
    """Set the mode in place of the policy's: advisory decides and orders nothing."""
    from flexpert.cli.options import owner

    _print_state(_api(name, url, admin_key).policy("POST", "/mode", {"mode": wanted, "owner": owner()}), json=json)


@app.command()
def reload(
    file: Annotated[
        str | None,
        typer.Argument(metavar="FILE", help="Use this one. [default: the file of `flexpert up`, read again]"),
    ] = None,
    name: Name = "default",
    json: Json = False,
    url: Url = None,
    admin_key: AdminKey = None,
) -> None:
    """Have a cluster use another policy, or read its file again at once. One with errors is refused."""
    from flexpert.cli.options import owner
    from flexpert.cli.policy_files import read_text

    body = {"owner": owner(), **({} if file is None else {"text": read_text(file)})}
    _print_state(_api(name, url, admin_key).policy("PUT", "", body), json=json)


@app.command()
def dry_run(
    policy: Annotated[str, typer.Option("--policy", metavar="FILE", help="The policy to try.")],
    recorded: Annotated[
        str | None,
        typer.Option(
            "--recorded", metavar="FILE", help="Decisions of a cluster that need not run: its decisions.jsonl."
        ),
    ] = None,
    name: Name = "default",
    json: Json = False,
    url: Url = None,
    admin_key: AdminKey = None,
) -> None:
    """Tell what another policy would have done with what a cluster has seen: changes, device-hours, attainment."""
    from flexpert.cli import policy_view
    from flexpert.cli.policy_files import dry_run_recorded, read_text

    if recorded is not None:
        found = dry_run_recorded(policy, recorded)
    else:
        found = _api(name, url, admin_key).policy("POST", "/dry-run", {"text": read_text(policy)})
    _print(found, policy_view.describe_dry_run, json=json)


def _api(name: str, url: str | None, admin_key: str | None) -> Any:
    from flexpert.cli.api import find_api

    return find_api(name, url=url, admin_key=admin_key)


def _print_state(found: dict[str, Any], *, json: bool) -> None:
    from flexpert.cli import policy_view

    _print(found, policy_view.describe_state, json=json)


def _print(found: dict[str, Any], describe: Any, *, json: bool) -> None:
    from flexpert.cli import show

    typer.echo(show.as_json(found) if json else describe(found))
