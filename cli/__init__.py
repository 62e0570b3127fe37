"""The `flexpert` command: the composition root. `main` is its entry; `cli.app` names the commands."""

__all__ = ["main"]


def main() -> None:
    """Run the command line and exit with its code."""
    from flexpert.cli.app import run

    run()
