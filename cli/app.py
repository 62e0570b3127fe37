"""The commands of `flexpert` and their options. Each hands over to a module of its own; an error becomes one line and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

import flexpert
from flexpert.cli.errors import CommandError
from flexpert.cli.kernels import app as kernels_app
from flexpert.cli.loadtest_command import loadtest
from flexpert.cli.options import owner, parse_bytes, parse_time
from flexpert.cli.policy import app as policy_app
from flexpert.cli.simulation import register as register_simulation
from flexpert.cli.typed import AdminKey, For, Json, Name, Url
from flexpert.controller.runtime_dir import RuntimeDir, RuntimeDirError, find

if TYPE_CHECKING:
    from flexpert.cli.api import AdminApi

app = typer.Typer(
    name="flexpert",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Serve Mixture-of-Experts models on a cluster that grows and shrinks while it serves.\n\n"
    "Start here:\n\n`flexpert up` serves a small built-in model on this machine and prints a curl line to try it.",
)
hbm_app = typer.Typer(help="Look after the HBM manager, the process that owns weights and KV.", no_args_is_help=True)
app.add_typer(hbm_app, name="hbm")
app.add_typer(policy_app, name="policy")
app.add_typer(kernels_app, name="kernels")
register_simulation(app)
app.command()(loadtest)

NoWait = Annotated[bool, typer.Option("--no-wait", help="Return at once; the transition goes on.")]
RequestIdOption = Annotated[
    str | None,
    typer.Option("--request-id", metavar="ID", help="The same id again begins nothing new, it follows what it began."),
]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"flexpert {flexpert.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def up(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="Directory of a checkpoint, a hub id like org/name, or `built-in`."),
    ] = None,
    model_option: Annotated[
        str | None, typer.Option("--model", metavar="MODEL", help="The same, as an option.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any free one.")] = 8000,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda where there is a GPU.")] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16. [default: float32 on the CPU, bfloat16 on a GPU]")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Memory for weights and KV together, e.g. 4GiB. [default: 60% of what is free]")
    ] = None,
    kv_memory: Annotated[
        str | None,
        typer.Option(help="The part of it for KV, e.g. 1GiB. [default: up to 1GiB of what the weights leave]"),
    ] = None,
    max_context: Annotated[
        int | None, typer.Option(min=1, help="Longest prompt and output together, in tokens. [default: the model's]")
    ] = None,
    max_running: Annotated[
        int, typer.Option(min=1, max=4096, help="Requests computed at the same time; more wait.")
    ] = 64,
    max_batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens computed in one step.")] = 512,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="FLEXPERT_API_KEY", help="Key that clients must send. [default: a new one, printed]"),
    ] = None,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Ask clients for no key.")] = False,
    admin_key: Annotated[
        str | None,
        typer.Option(envvar="FLEXPERT_ADMIN_KEY", help="Key of the admin API. [default: a new one]"),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Workers that serve at first, each on a device of its own. [default: 1, or the policy's min]"
        ),
    ] = None,
    standby: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=64,
            help="Warm processes that wait to replace a worker that dies, or to join. [default: 1, or the policy's]",
        ),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Scale by this policy; the file is watched. See: flexpert policy check FILE"),
    ] = None,
    max_workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="How far it may be scaled. [default: the GPUs there are; on the CPU 4, or more with --workers]"
        ),
    ] = None,
    share_gpus: Annotated[
        bool, typer.Option("--share-gpus", help="With more workers than GPUs: several on one. To try things out.")
    ] = False,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Compute threads of each worker on the CPU. [default: the cores there are]"),
    ] = None,
    name: Name = "default",
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error; the logs: flexpert logs.")] = "info",
    drain_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds that running requests get to finish at the end.")
    ] = 30.0,
) -> None:
    """Start a cluster in the foreground and serve a model; Ctrl-C ends it, drained.

    **Examples**

    `flexpert up` (the built-in model, no network needed)

    `flexpert up ./my-checkpoint --port 9000 --memory 16GiB`

    `flexpert up allenai/OLMoE-1B-7B-0924 --device cuda`

    `flexpert up --policy policy.yaml` (grows and shrinks by itself)
    """
    from flexpert.cli.policy_files import start_with
    from flexpert.cli.up import UpOptions, run_up

    if model is not None and model_option is not None and model != model_option:
        raise CommandError("usage", f"two models were given, {model} and --model {model_option}; give one")
    if no_auth and api_key:
        raise CommandError(
            "usage", "--no-auth and an API key (--api-key or FLEXPERT_API_KEY) were both given; give one"
        )
    start = start_with(policy, workers=workers, standbys=standby, max_workers=max_workers)
    run_up(
        UpOptions(
            model=model_option or model or None,
            name=name,
            host=host,
            port=port,
            device=_one_of("--device", device, ("auto", "cpu", "cuda")),
            dtype=None if dtype is None else _one_of("--dtype", dtype, ("float32", "bfloat16", "float16")),
            memory_bytes=None if memory is None else parse_bytes(memory, option="--memory"),
            kv_bytes=None if kv_memory is None else parse_bytes(kv_memory, option="--kv-memory"),
            max_context_tokens=max_context,
            max_running=max_running,
            max_batch_tokens=max_batch_tokens,
            api_key=api_key or None,
            no_auth=no_auth,
            admin_key=admin_key or None,
            workers=start.workers,
            standbys=start.standbys,
            max_workers=max_workers,
            policy=start.path,
            policy_most=start.most,
            share_gpus=share_gpus,
            threads=threads,
            log_level=_one_of("--log-level", log_level, ("debug", "info", "warning", "error")),
            drain_timeout_s=drain_timeout,
        )
    )


@app.command()
def down(
    name: Name = "default",
    timeout: Annotated[float, typer.Option(min=0, help="Seconds to wait for the end.")] = 60.0,
) -> None:
    """End a cluster: running requests finish, then its processes end. Also cleans up after one that was killed."""
    from flexpert.cli.down import run_down

    for line in run_down(name, timeout_s=timeout):
        typer.echo(line)


@app.command()
def scale(
    workers: Annotated[int, typer.Argument(help="How many are to serve.")],
    for_time: For = None,
    no_wait: NoWait = False,
    request_id: RequestIdOption = None,
    json: Json = False,
    name: Name = "default",
    url: Url = None,
    admin_key: AdminKey = None,
) -> None:
    """Change the number of workers while they serve, and follow it; Ctrl-C stops following, not the change."""
    from flexpert.cli.api import find_api

    api, hold = find_api(name, url=url, admin_key=admin_key), _hold(for_time)
    _follow(
        api, lambda wish: api.scale(workers, request_id=wish, hold=hold), request_id=request_id, no_wait=no_wait, json=json,
        again=f"flexpert scale {workers}",
    )  # fmt: skip


@app.command()
def drain(
    worker: Annotated[str, typer.Argument(help="Which one, e.g. worker-1; `flexpert status` lists them.")],
    for_time: For = None,
    no_wait: NoWait = False,
    request_id: RequestIdOption = None,
    json: Json = False,
    name: Name = "default",
    url: Url = None,
    admin_key: AdminKey = None,
) -> None:
    """Take one worker out, any of them; its requests go on at the others."""
    from flexpert.cli.api import find_api

    api, hold = find_api(name, url=url, admin_key=admin_key), _hold(for_time)
    _follow(
        api, lambda wish: api.drain(worker, request_id=wish, hold=hold), request_id=request_id, no_wait=no_wait, json=json,
        again=f"flexpert drain {worker}",
    )  # fmt: skip


@app.command()
def status(
    name: Name = "default",
    json: Annotated[bool, typer.Option("--json", help="Everything, for programs.")] = False,
    url: Url = None,
    admin_key: AdminKey = None,
) -> None:
    """Show a running cluster: its model, epoch, workers, memory and load, and the transition in progress."""
    from flexpert.cli import show
    from flexpert.cli.look import read_status

    found = read_status(name, url=url, admin_key=admin_key)
    typer.echo(show.as_json(found) if json else show.describe_status(found))


@app.command()
def logs(
    process: Annotated[
        str | None, typer.Argument(help="up, controller, gateway, agent, process-0, ... [default: up]")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on printing what is written.")] = False,
    name: Name = "default",
) -> None:
    """Print the log of one process of a cluster.

    `flexpert logs gateway -f`
    """
    from flexpert.cli import show

    path = show.log_file(_runtime(name), process)
    if follow:
        for line in show.follow(path):
            typer.echo(line, nl=False)
    else:
        typer.echo(path.read_text(errors="replace"), nl=False)


@hbm_app.command()
def check(name: Name = "default") -> None:
    """Have every HBM manager prove its books: each granule has one owner, each mapping a lease. Exit code 0 when all is well."""
    from flexpert.cli.show import check_books

    runtime = _runtime(name)
    for line in check_books(runtime):
        typer.echo(line)


@app.command()
def events(
    name: Name = "default",
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    after: Annotated[int, typer.Option(min=0, help="Only those with a higher sequence number.")] = 0,
    url: Url = None,
    admin_key: AdminKey = None,
) -> None:
    """Tell what happened in a cluster and why: started, scaled, died, replaced, each with its time."""
    import json as json_module

    from flexpert.cli import show
    from flexpert.cli.look import read_history

    for event in read_history(name, after=after, url=url, admin_key=admin_key):
        typer.echo(json_module.dumps(event) if json else show.describe_event(event))


def run() -> NoReturn:
    """Entry of the command line."""
    try:
        app()
    except CommandError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def _runtime(name: str) -> RuntimeDir:
    try:
        return find(name)
    except RuntimeDirError as error:
        raise CommandError("directory", str(error)) from error


def _follow(
    api: AdminApi,
    begin: Callable[[str], dict[str, Any]],
    *,
    request_id: str | None,
    no_wait: bool,
    json: bool,
    again: str,
) -> None:
    from rich.console import Console

    from flexpert.cli import show
    from flexpert.cli.scale import begin_and_follow, describe_transition

    transition, code = begin_and_follow(
        begin, api, request_id=request_id, wait=not no_wait, console=Console(quiet=json), again=lambda wish: f"{again} --request-id {wish}",
    )  # fmt: skip
    if json:
        typer.echo(show.as_json(transition))
    elif not code:
        typer.echo(describe_transition(transition))
    raise typer.Exit(code)


def _hold(for_time: str | None) -> dict[str, Any]:
    """Who asks for a size, and for how long that stands against a policy."""
    return {"owner": owner(), **({} if for_time is None else {"for_s": parse_time(for_time, option="--for")})}


def _one_of(option: str, found: str, choices: tuple[str, ...]) -> str:
    if found not in choices:
        raise CommandError("usage", f"{option} {found!r}: expected one of {', '.join(choices)}")
    return found
