"""`python -m loadtest`: run a workload, measure a gateway's overhead, measure what a build
disturbs.

Exit status: 0, 1 when the server gave no answer at all, 2 for bad input (the message names the
flag)."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from loadtest import gateways, gpu, overhead, predict, shapes, stall, workloads
from loadtest import options as opt
from loadtest.client import Client, Outcome, Target, calibrate
from loadtest.compare import cli as compare
from loadtest.machine import provenance
from loadtest.mix import BadInput, Goals, Mix, load_mix, single_class
from loadtest.peers import install
from loadtest.report import record, summarize
from loadtest.runner import Bounds, Run, run_closed, run_open
from loadtest.sla import cli as sla
from loadtest.tables import print_report

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__
)
app.command("overhead")(overhead.command)
app.command("stall")(stall.command)
app.command("predict")(predict.command)
app.command("shapes")(shapes.command)
app.command("sla")(sla.command)
compare.app.command("cuda")(gpu.command)
app.command("peers")(install.command)
app.add_typer(compare.app, name="compare")
compare.app.command("gateways")(gateways.command)

_Rate = Annotated[
    float | None,
    typer.Option(
        min=1e-3, max=1e5, callback=opt.finite, help="Open loop: Poisson requests per second."
    ),
]
_Steady = Annotated[bool, typer.Option("--steady", help="With --rate: even gaps, not Poisson.")]
_Users = Annotated[
    int | None, typer.Option(min=1, max=10_000, help="Closed loop: this many users.")
]
_Trace = Annotated[
    Path | None, typer.Option(help="Open loop: CSV of TIMESTAMP,ContextTokens,GeneratedTokens.")
]
_Scale = Annotated[float, typer.Option(min=1e-6, max=1e6, callback=opt.finite)]
_Cap = Annotated[int, typer.Option(min=1, max=workloads.MAX_TOKENS)]
_Seconds = Annotated[float, typer.Option(min=0.1, max=86_400, callback=opt.finite)]
_Requests = Annotated[int, typer.Option(min=1, max=workloads.MAX_REQUESTS)]
_Goal = Annotated[
    float | None, typer.Option(min=0.001, callback=opt.finite, help="Goal, when there is no --mix.")
]
_Width = Annotated[int, typer.Option(min=1, max=10_000)]


@dataclass(frozen=True, slots=True)
class _Job:
    """A checked command line."""

    target: Target
    arrivals: list[workloads.Arrival]
    mix: Mix
    prompts: workloads.TextPrompts
    lengths: workloads.DefaultLengths
    users: int | None
    bounds: Bounds
    seed: int


@app.command()
def run(
    *,
    url: opt.Url = "http://127.0.0.1:8000",
    model: opt.ModelName = "docs-17m",
    endpoint: Annotated[str, typer.Option(help="chat or completions")] = "chat",
    rate: _Rate = None,
    steady: _Steady = False,
    users: _Users = None,
    trace: _Trace = None,
    time_scale: _Scale = 1.0,
    length_scale: _Scale = 1.0,
    max_prompt_tokens: _Cap = workloads.MAX_TOKENS,
    max_output_tokens: _Cap = workloads.MAX_TOKENS,
    duration: _Seconds = 60.0,
    requests: _Requests = 1000,
    mix: Annotated[str | None, typer.Option(help="SLA mix: a YAML file, or mixed-sla.")] = None,
    sla: Annotated[bool, typer.Option(help="Send the mix's sla objects.")] = True,
    prompts: Annotated[Path | None, typer.Option(help="Text file to cut prompts from.")] = None,
    prompt_tokens: Annotated[str, typer.Option(help="N or LOW:HIGH")] = "64",
    max_tokens: Annotated[str, typer.Option(help="N or LOW:HIGH")] = "32",
    ttft_ms: _Goal = None,
    tpot_ms: _Goal = None,
    latency_ms: _Goal = None,
    body: opt.Body = "{}",
    seed: opt.Seed = 0,
    timeout: opt.Timeout = 120.0,
    drain: Annotated[float, typer.Option(min=0.0, max=3600, callback=opt.finite)] = 60.0,
    max_in_flight: _Width = 1024,
    api_key_env: opt.ApiKeyEnv = "PRESSGATE_API_KEY",
    allow_remote: opt.AllowRemote = False,
    json_out: opt.JsonOut = None,
    records: Annotated[Path | None, typer.Option(help="One JSON line per request.")] = None,
) -> None:
    """Send a workload and report latencies, throughput and goodput."""
    opt.check_writable(json_out, "--json")
    opt.check_writable(records, "--records")
    url = opt.check_url(url, allow_remote)
    target = opt.make_target(
        url, model, endpoint=endpoint, api_key_env=api_key_env, body=body, timeout=timeout
    )
    rng = np.random.default_rng(seed)
    goals = Goals(ttft_ms=ttft_ms, tpot_ms=tpot_ms, latency_ms=latency_ms)
    if mix is not None and goals != Goals():
        raise BadInput("--ttft-ms, --tpot-ms, --latency-ms: goals come from --mix here")
    scale = workloads.TraceScale(time_scale, length_scale, max_prompt_tokens, max_output_tokens)
    if sum(given is not None for given in (rate, users, trace)) != 1:
        raise BadInput("--rate, --users, --trace: give exactly one of them")
    if trace is not None:
        arrivals = workloads.trace(trace, scale, duration, requests)
    elif rate is None:
        arrivals = workloads.closed(requests)
    elif steady:
        arrivals = workloads.constant(rate, duration, requests)
    else:
        arrivals = workloads.poisson(rate, duration, requests, rng)
    job = _Job(
        target=replace(target, send_sla=sla),
        arrivals=arrivals,
        mix=load_mix(opt.mix_path(mix)) if mix is not None else single_class(goals),
        prompts=workloads.TextPrompts.from_file(prompts)
        if prompts is not None
        else workloads.TextPrompts.from_words(rng),
        lengths=workloads.DefaultLengths(
            prompt=opt.parse_lengths(prompt_tokens, "--prompt-tokens"),
            output=opt.parse_lengths(max_tokens, "--max-tokens"),
        ),
        users=users,
        bounds=Bounds(duration=duration, drain=drain, in_flight=max_in_flight),
        seed=seed,
    )
    result, notes = asyncio.run(_play(job))
    _deliver(result, notes, json_out, records)


async def _play(job: _Job) -> tuple[Run, dict[str, Any]]:
    """Calibrate, plan, run. Returns the run and facts about the prompts."""
    rng = np.random.default_rng([job.seed, 1])
    probes = (job.prompts.prompt(60, rng), job.prompts.prompt(300, rng))
    notes: dict[str, Any] = {"seed": job.seed}
    source = job.prompts
    async with Client(job.target) as client:
        try:
            tokens_per_char, overhead_tokens = await calibrate(client, job.target, probes)
            source = source.scaled(tokens_per_char, overhead_tokens)
            notes["prompt_calibration"] = {
                "tokens_per_char": tokens_per_char,
                "overhead_tokens": overhead_tokens,
            }
        except LookupError as error:
            notes["prompt_calibration"] = f"none, 4 characters per token assumed: {error}"
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            _fail(f"{job.target.url}: no answer: {error or type(error).__name__}")
        planned = workloads.plan(job.arrivals, job.mix, source, job.lengths, rng)
        with _progress() as bar:
            task = bar.add_task("requests", total=len(planned), kept="")

            def seen(outcome: Outcome) -> None:
                bar.update(task, advance=1, kept=outcome.status)

            if job.users is None:
                result = await run_open(client, planned, job.bounds, seen)
            else:
                result = await run_closed(client, planned, job.users, job.bounds, seen)
    return result, notes


def _progress() -> Progress:
    """A bar on stderr, shown on a terminal only."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(
        *columns,
        TimeElapsedColumn(),
        TextColumn("{task.fields[kept]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _deliver(
    result: Run, notes: dict[str, Any], json_out: Path | None, records: Path | None
) -> None:
    report = provenance(result.started_at) | {"workload": notes} | summarize(result)
    console = opt.deliver_json(report, json_out)
    if records is not None:
        origin = min((o.intended for o in result.outcomes), default=0.0)
        lines = (json.dumps(record(outcome, origin)) + "\n" for outcome in result.outcomes)
        records.write_text("".join(lines), encoding="utf-8")
    print_report(report, console)
    if not any(outcome.http_status for outcome in result.outcomes):
        _fail("no request was answered")


def _fail(message: str) -> None:
    Console(stderr=True).print(f"error: {message}", markup=False)
    raise typer.Exit(1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits the process."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="python -m loadtest")
    except BadInput as error:
        Console(stderr=True).print(f"error: {error}", markup=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
