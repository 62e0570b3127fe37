"""Options that several commands share, as typer reads them."""

from __future__ import annotations

from typing import Annotated

import typer

Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        metavar="URL",
        help="Gateway of a cluster elsewhere. [env: FLEXPERT_URL; default: of --name on this machine]",
    ),
]
AdminKey = Annotated[
    str | None, typer.Option("--admin-key", metavar="KEY", help="Its admin key. [env: FLEXPERT_ADMIN_KEY, with --url]")
]
Json = Annotated[bool, typer.Option("--json", help="For programs.")]
Name = Annotated[str, typer.Option("--name", help="Name of the cluster; several can run side by side.")]
For = Annotated[
    str | None,
    typer.Option(
        "--for", metavar="TIME", help="Where a policy is active, how long this stands against it. [default: 15m]"
    ),
]
