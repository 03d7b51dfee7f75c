"""`pressgate …`: the command line. Parses, calls, prints; every command's work lives elsewhere.

Bad input ends with one line on stderr and exit code 2, never with a traceback.
"""

from __future__ import annotations

import logging
import sys

import typer
from rich.console import Console
from rich.text import Text

from gateway.commands import bench, cache, explain, levels, policy, replay, search, serve
from gateway.errors import PressgateError

app = typer.Typer(
    name="pressgate",
    help="Serve one model at many compression levels, chosen per request.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command()(serve.serve)
app.command()(levels.levels)
app.command()(levels.compress)
app.command()(bench.bench)
app.command()(search.search)
app.command()(explain.explain)
app.command()(replay.replay)
app.add_typer(policy.app, name="policy", help="Check, send and show policies.")
app.add_typer(cache.app, name="cache", help="Look after the artifacts on this disk.")


def main() -> None:
    """Entry point of the console script."""
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    try:
        app()
    except PressgateError as error:
        line = " ".join(error.message.split())  # a parser's message may have several lines
        Console(stderr=True, soft_wrap=True).print(Text(f"error: {line}", style="red"))
        sys.exit(2)


if __name__ == "__main__":
    main()
