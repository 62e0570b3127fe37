"""Keeps the cluster running and carries requests to it: supervision, routing, the Ray actors and the gateway.

Importing the package loads nothing. The CLI names the modules it composes; `controller.gateway` states its own public names.
"""

__all__: list[str] = []
