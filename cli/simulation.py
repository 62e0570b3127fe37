"""The commands `flexpert simulate` and `flexpert profile` and their options. Each hands over to a module of its own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    app.command()(simulate)
    app.command()(profile)


def simulate(
    trace: Annotated[
        str, typer.Option(metavar="T", help="A shipped trace's name, or a file: docs/traces.md tells which.")
    ],
    policy: Annotated[str, typer.Option(metavar="FILE,...", help="Policies to play, each on its own.")] = "",
    baselines: Annotated[
        str,
        typer.Option(help="What to compare with: all, or some of static-peak, hpa, kpa, ray-serve, oracle, fixed-N."),
    ] = "",
    devices: Annotated[int, typer.Option(min=1, help="Devices that there are.")] = 64,
    profile: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="What a worker can do: shipped, or made by flexpert profile.")
    ] = "builtin-cpu",
    scale: Annotated[float, typer.Option(help="How many times the recorded load.")] = 1.0,
    stands_for: Annotated[
        int | None,
        typer.Option(
            min=1, help="How many requests one simulated request stands for. [default: so that 1.5 million are played]"
        ),
    ] = None,
    split: Annotated[
        str, typer.Option(help="half: play the second half of the trace, baselines tuned on the first one.")
    ] = "",
    ttft: Annotated[str | None, typer.Option(help="SLO, e.g. 500ms. [default: of the first policy]")] = None,
    tpot: Annotated[str | None, typer.Option(help="SLO, e.g. 50ms. [default: of the first policy]")] = None,
    attainment: Annotated[float | None, typer.Option(min=0, max=1, help="Share that should meet them.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same bytes.")] = 0,
    trace_format: Annotated[str, typer.Option(help="Of the trace's file. [default: found out]")] = "",
    report: Annotated[Path | None, typer.Option(metavar="FILE", help="An HTML page with plots.")] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="All figures, for programs.")] = None,
) -> None:
    """Play a recorded trace against a modelled cluster under scaling policies: attainment, device-hours, changes, in minutes.

    **Examples**

    `flexpert simulate --trace azure-conv --policy a.yaml,b.yaml --devices 64 --report out.html`

    `flexpert simulate --trace servegen-deepseek-r1 --policy a.yaml --baselines all --split half`
    """
    from flexpert.cli.simulate import SimulateOptions, run_simulate, table

    simulation = run_simulate(
        SimulateOptions(
            trace=trace,
            trace_format=trace_format,
            policies=policy,
            baselines=baselines,
            devices=devices,
            profile=profile,
            scale=scale,
            stands_for=stands_for,
            split=split,
            seed=seed,
            ttft=ttft,
            tpot=tpot,
            attainment=attainment,
            report=report,
            json=json,
        ),
        say=lambda line: typer.echo(line, err=True),
    )
    for line in table(simulation):
        typer.echo(line)


def profile(
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the profile goes, as JSON.")],
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="As for flexpert up. [default: the built-in model]")
    ] = None,
    name: Annotated[str, typer.Option(help="What reports call it.")] = "measured",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    memory: Annotated[str, typer.Option(help="Memory for KV, e.g. 1GiB.")] = "1GiB",
    max_running: Annotated[int, typer.Option(min=1, max=4096, help="As for flexpert up.")] = 64,
    max_batch_tokens: Annotated[int, typer.Option(min=1, help="As for flexpert up.")] = 512,
    max_context: Annotated[int | None, typer.Option(min=1, help="As for flexpert up.")] = None,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="How many times everything is measured. [default: 5, with --url 3]")
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="Measure a running cluster from outside: its gateway, at the sizes of --sizes.")
    ] = None,
    sizes: Annotated[str, typer.Option(metavar="N,...", help="With --url: workers. It is left at the first.")] = "1,2",
    base: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="With --url: a profile made without it, of the same model.")
    ] = "builtin-cpu",
    admin_key: Annotated[str | None, typer.Option(help="With --url. [env var: FLEXPERT_ADMIN_KEY]")] = None,
    key: Annotated[str | None, typer.Option(help="With --url: the API key. [env var: FLEXPERT_API_KEY]")] = None,
) -> None:
    """Measure what a worker of a model can do on this machine: two minutes on the real engine, nothing else running.

    With --url a running cluster is measured from outside, with its gateway and whatever shares its cores, and how long joins and leaves
    take: some two minutes for each size. It must serve nobody else meanwhile.

    **Examples**

    `flexpert profile --out mine.json && flexpert simulate --profile mine.json --trace azure-conv --policy a.yaml`

    `flexpert profile --url http://127.0.0.1:8000 --base mine.json --sizes 1,2 --max-running 8 --out served.json`
    """
    from flexpert.cli.options import parse_bytes
    from flexpert.cli.profile import parse_sizes, run_profile

    def say(line: str) -> None:
        typer.echo(line, err=True)

    if url is not None:
        from flexpert.cli.api import find_api
        from flexpert.cli.profile_cluster import ClusterOptions, profile_cluster

        profile_cluster(
            ClusterOptions(
                api=find_api("", url=url, admin_key=admin_key), key=key or os.environ.get("FLEXPERT_API_KEY"), base=base,
                sizes=parse_sizes(sizes), name=name, max_running=max_running, max_batch_tokens=max_batch_tokens, repeats=repeats or 3,
                out=out,
            ),
            say=say,
        )  # fmt: skip
        return
    run_profile(
        model=model,
        name=name,
        device=device,
        dtype=dtype,
        memory_bytes=parse_bytes(memory, option="--memory"),
        max_running=max_running,
        max_batch_tokens=max_batch_tokens,
        max_context_tokens=max_context,
        out=out,
        repeats=repeats or 5,
        say=say,
    )
