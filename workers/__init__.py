"""One worker: frames, scheduler, KV books, model binding, runner, sampling, the engine's loop and the Ray actor around it.

Importing the package loads nothing. Callers name the module they mean: `messages` and `framing` for a gateway, `process` for whoever
runs a worker (it imports torch), `actor` for the controller.
"""

__all__: list[str] = []
