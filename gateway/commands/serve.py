"""`pressgate serve`: run the gateway and say where it is."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
from typing import TYPE_CHECKING, Annotated

import typer

from gateway.commands.options import (
    CacheDir,
    CalibrationFile,
    ConfigFile,
    EvalFile,
    LevelNames,
    ModelName,
    settings_of,
)
from gateway.commands.tables import ladder_table, wide_console
from gateway.config import Model, Settings
from gateway.errors import ConfigError

if TYPE_CHECKING:
    import uvicorn

    from gateway.variants.pool import VariantPool as Pool

_NO_COLLECTOR_S = 15.0


def serve(
    config: ConfigFile = None,
    model: ModelName = None,
    levels: LevelNames = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 picks a free one.")] = None,
    calibration: CalibrationFile = None,
    eval_text: EvalFile = None,
    cache_dir: CacheDir = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of the engine.")] = None,
    memory_budget: Annotated[
        str | None, typer.Option(help="Weights and KV of everything resident, e.g. 4GiB.")
    ] = None,
    speculate: Annotated[
        str | None,
        typer.Option(help="Who drafts for others: off, auto, lookup (the text so far) or a level."),
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
) -> None:
    """Serve a model; levels are built when requests want them."""
    settings = settings_of(
        config,
        model=model,
        levels=levels,
        calibration=calibration,
        eval_text=eval_text,
        cache_dir=cache_dir,
        host=host,
        port=port,
        threads=threads,
        memory_budget=memory_budget,
        speculate=speculate,
        log_level=log_level,
    )
    logging.getLogger().setLevel(settings.log_level.upper())
    logging.getLogger("httpx").setLevel(logging.WARNING)
    from uvicorn.loops.auto import auto_loop_factory

    # uvicorn picks the quickest loop only when it is what runs the loop.
    with asyncio.Runner(loop_factory=auto_loop_factory()) as runner:
        runner.run(_serve(settings))


async def _serve(settings: Settings) -> None:
    from gateway.app import make_app, open_gateway
    from gateway.commands.server import Server

    # A fifth of a start would be the collector walking what imports just made; `_greet` ends it.
    gc.disable()
    # Taken first: a port in use must be said before a model is read.
    with _listen(settings) as listener:
        async with open_gateway(settings) as services:
            server = Server(make_app(services), services.pool.close)
            url = _url(settings.host, listener.getsockname()[1])
            greeting = asyncio.create_task(_greet(server, services.pool, url, settings))
            try:
                await server.serve(sockets=[listener])
            finally:
                greeting.cancel()


def _listen(settings: Settings) -> socket.socket:
    """A bound socket.

    Raises:
        ConfigError: the address is not ours or the port is taken.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # asyncio sets TCP_NODELAY only on sockets that name their protocol; Nagle costs 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        where = f"{settings.host} port {settings.port}"
        raise ConfigError(f"cannot listen on {where}: {error.strerror}", param="port") from None
    return listener


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def _until_ready(server: uvicorn.Server, pool: Pool) -> None:
    while not (server.started and pool.ready):  # noqa: ASYNC110 - uvicorn has no event for it
        await asyncio.sleep(0.02)


async def _greet(server: uvicorn.Server, pool: Pool, base: str, settings: Settings) -> None:
    """Print the ladder, the URLs and a request to paste once the gateway is ready."""
    try:
        async with asyncio.timeout(_NO_COLLECTOR_S):
            await _until_ready(server, pool)
    except TimeoutError:  # a model that is slow or never loads must not cost memory for ever
        gc.enable()
        await _until_ready(server, pool)
    gc.freeze()
    gc.enable()
    console = wide_console()
    for name in pool.models():
        console.print(ladder_table(pool.snapshot(name)))
    console.print(f"\n[bold]console[/bold]  {base}/")
    console.print(f"[bold]API[/bold]      {base}/v1      [dim]docs {base}/docs[/dim]")
    console.print(f"[bold]metrics[/bold]  {base}/metrics\n")
    console.print(example(settings.models[0], base), markup=False, highlight=False)


def example(model: Model, base: str) -> str:
    """A request to paste. Only of the bundled model is it known which megabytes mean something."""
    sla = '"max_ppl_ratio": 1.05'
    if model.path == "builtin":
        sla = '"memory_mb": 25, "max_ppl_ratio": 1.1, "on_miss": "wait"'
    body = (
        f'{{"model": "{model.id}", "prompt": "The function returns", "max_tokens": 32,\n'
        f'       "sla": {{{sla}}}}}'
    )
    return f"curl {base}/v1/completions -H 'content-type: application/json' \\\n  -d '{body}'\n"
