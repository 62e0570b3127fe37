"""The options of `flexpert loadtest`; loadtest.py acts on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

_SHAPES = (
    "constant, poisson, gamma, ramp, step, sine, spike, piecewise, trace; `ramp rate=1:9 duration=1m then spike rate=2:20 duration=5m`; "
    "or a .yaml file. [default: poisson]"
)
_SLO = "`ttft_p99<500ms`, `tpot_p95<50ms`, `attainment>0.99`, ...; several. Exit code 1 where one is missed."
_EVENTS = "Of a flexpert server: its scaling events go into the report."


def _in(panel: str) -> Callable[..., Any]:
    def option(help: str, *names: str, env: str | None = None, **more: Any) -> Any:
        if env is not None:
            help = f"{help} [env: {env}]".strip()
            more |= {"envvar": env, "show_envvar": False}
        return typer.Option(*names, help=help, rich_help_panel=panel, **more)

    return option


_load, _asked, _server, _out = (_in(panel) for panel in ("The load", "Each request", "The server", "The verdict"))


def loadtest(
    url: Annotated[str | None, _server("Any server that speaks OpenAI's API.", env="FLEXPERT_URL")] = None,
    api_key: Annotated[str | None, _server("", env="FLEXPERT_API_KEY")] = None,
    admin_key: Annotated[str | None, _server(_EVENTS, env="FLEXPERT_ADMIN_KEY")] = None,
    insecure: Annotated[bool, _server("Take any TLS certificate.", "--insecure")] = False,
    ca: Annotated[Path | None, _server("Trust the CA certificates in this PEM file.", metavar="FILE")] = None,
    model: Annotated[str | None, _server("[default: the first that the server lists]")] = None,
    endpoint: Annotated[str, _server("completions or chat.")] = "completions",
    shape: Annotated[str | None, _load(_SHAPES)] = None,
    rate: Annotated[str | None, _load("Requests a second, 10; for shapes of two levels 2:20.")] = None,
    duration: Annotated[str | None, _load("90s, 5m, 1h.")] = None,
    cv: Annotated[str | None, _load("Of the gaps: 0 perfect order, 1 Poisson, above that bunches.")] = None,
    schedule: Annotated[Path | None, _load("A file that --print-schedule wrote, instead of a shape.")] = None,
    users: Annotated[int | None, _load("Closed loop instead: so many users, who wait for their answers.", min=1)] = None,
    turns: Annotated[int, _load("With --users: questions in a conversation.", min=1)] = 1,
    think: Annotated[str, _load("With --users: time between an answer and the next question.")] = "0s",
    requests: Annotated[int | None, _load("No more than so many.", min=1)] = None,
    seed: Annotated[int, _load("Same seed, same load.", min=0)] = 0,
    prompt_tokens: Annotated[str, _asked("128, 64:256 (even), lognormal:MEAN:CV, 100@0.8,8000@0.2 (shares).")] = "128",
    output_tokens: Annotated[str, _asked("The same.")] = "64",
    prefix_tokens: Annotated[int, _asked("Shared beginning, before the tokens of its own.", min=0)] = 0,
    prefixes: Annotated[int, _asked("How many different beginnings there are.", min=1)] = 1,
    prompts: Annotated[str, _asked("ids, words, or auto: token ids where the server takes them.")] = "auto",
    tokenizer: Annotated[Path | None, _asked("Directory with a tokenizer.json, for servers that give no usage.")] = None,
    ignore_eos: Annotated[bool, _asked("Ask for answers of exact length.", "--ignore-eos/--no-ignore-eos")] = True,
    extra_body: Annotated[str | None, _asked('JSON for each body: \'{"temperature": 0}\'.')] = None,
    timeout: Annotated[str, _asked("From sending to the last byte; later counts as failed.")] = "120s",
    slo: Annotated[list[str] | None, _out(_SLO)] = None,
    warmup: Annotated[str, _out("Left out of the verdict, by intended time.")] = "0s",
    cooldown: Annotated[str, _out("The same at the end.")] = "0s",
    lag_limit: Annotated[str, _out("Schedule lag, p99, above which the run is called degraded.")] = "10ms",
    json_out: Annotated[Path | None, _out("Everything, for programs.", "--json", metavar="FILE")] = None,
    csv_out: Annotated[Path | None, _out("One line a request.", "--csv", metavar="FILE")] = None,
    report: Annotated[Path | None, _out("One HTML file with plots.", metavar="FILE")] = None,
    print_schedule: Annotated[bool, _out("Write what would be sent, and send nothing.", "--print-schedule")] = False,
    quiet: Annotated[bool, _out("No progress while it runs.", "--quiet", "-q")] = False,
) -> None:  # fmt: skip
    """Put load on a server and tell how it took it. Latency counts from when a request was due, not from when it was sent.

    **Examples**

    `flexpert loadtest --url http://127.0.0.1:8000 --rate 5 --duration 1m`

    `flexpert loadtest --url $URL --shape spike --rate 2:20 --duration 5m --slo 'ttft_p99<500ms' --slo 'tpot_p95<50ms' --report out.html`

    `flexpert loadtest --url $URL --users 32 --turns 4 --think 2s --duration 5m`
    """
    from flexpert.cli.loadtest import LoadTestOptions, run_load_test

    options = LoadTestOptions(
        url=url or None, api_key=api_key or None, admin_key=admin_key or None, insecure=insecure, ca=ca, model=model, endpoint=endpoint,
        shape=shape, rate=rate, duration=duration, cv=cv, schedule=schedule, users=users, turns=turns, think=think, requests=requests,
        prompt_tokens=prompt_tokens, output_tokens=output_tokens, prefix_tokens=prefix_tokens, prefixes=prefixes, prompts=prompts,
        tokenizer=tokenizer, ignore_eos=ignore_eos, extra_body=extra_body, seed=seed, timeout=timeout, warmup=warmup, cooldown=cooldown,
        lag_limit=lag_limit, slo=list(slo or ()), print_schedule=print_schedule, json_out=json_out, csv_out=csv_out, report=report,
        quiet=quiet,
    )  # fmt: skip
    raise typer.Exit(run_load_test(options))
