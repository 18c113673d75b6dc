"""The `epd` command. Importing it loads no torch and no HTTP: each command imports its own room.

Exit codes: 0 done; 1 the work failed or broke; 2 it could not start as asked (three lines say why).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from epd.errors import EPDError
from epd_services.cli.admin import admin_app
from epd_services.cli.model_commands import calibrate, evaluate, quantize
from epd_services.cli.options import (
    KV,
    Config,
    Device,
    Dtype,
    Json,
    Model,
    Topology,
    exit_with,
    lazy,
)
from epd_services.cli.terminal import three_lines, usage_error

__all__ = ["app", "main"]


class _Commands(TyperGroup):
    """The one place where an `EPDError` becomes three lines and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except EPDError as error:
            typer.echo(three_lines(error), err=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Encode, prefill and decode services for vision-language models.",
)
config_app = typer.Typer(no_args_is_help=True, help="The settings: what they are and whence.")
app.add_typer(config_app, name="config")
app.add_typer(admin_app, name="admin")


@app.command()
def serve(
    model: Model = None,
    topology: Topology = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535)] = None,
    run_dir: Annotated[Path | None, typer.Option(help="Where sockets and logs go.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    kv: KV = None,
    elastic: Annotated[bool | None, typer.Option(help="Let the load move the stages.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of a worker.")] = None,
    cache_url: Annotated[
        str | None, typer.Option(help="redis://…, unix://… or memory://; none: a private server.")
    ] = None,
    model_name: Annotated[str | None, typer.Option(help="Name in /v1/models.")] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="Accepted API keys, one a line.")
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    config: Config = None,
) -> None:
    """Start everything on this machine and print the URL, a curl line and where the logs are."""
    flags = {name: value for name, value in locals().items() if name != "config"}
    settings, _ = lazy("settings", "load_settings")(config, **flags)
    exit_with(lazy("cli.serve", "serve")(settings))


@app.command()
def worker(
    roles: Annotated[str, typer.Option(help="Stages of this worker: letters out of E, P, D.")],
    name: Annotated[
        str | None, typer.Option(help="Unique name; none: made of stages and host.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Directory or hub id.")] = None,
    bind: Annotated[str | None, typer.Option(help="Own inbox, ipc://… or tcp://….")] = None,
    advertise: Annotated[str | None, typer.Option(help="Inbox address that others use.")] = None,
    gateway_address: Annotated[str | None, typer.Option(help="The gateway's inbox.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    kv: KV = None,
    config: Config = None,
) -> None:
    """Run one worker. Everything can come from EPD_… variables, as in a container."""
    from epd.roles import format_stages, parse_stages

    stages = parse_stages(roles)
    flags = {"model": model, "bind": bind, "advertise": advertise, "device": device,
             "dtype": dtype, "kv": kv, "gateway_address": gateway_address}  # fmt: skip
    settings, _ = lazy("settings", "load_settings")(config, **flags)
    given = name or f"{format_stages(stages).lower()}-{os.uname().nodename}"[:64]
    exit_with(lazy("worker_process", "run_worker")(settings, given, stages))


@app.command()
def gateway(
    model: Annotated[str | None, typer.Option(help="Directory or hub id.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535)] = None,
    bind: Annotated[str | None, typer.Option(help="Own inbox, ipc://… or tcp://….")] = None,
    config: Config = None,
) -> None:
    """Run the gateway alone. Everything can come from EPD_… variables, as in a container."""
    flags = {"model": model, "host": host, "port": port, "bind": bind}
    settings, _ = lazy("settings", "load_settings")(config, **flags)
    exit_with(lazy("gateway.process", "run_gateway")(settings))


@app.command()
def ask(
    parts: Annotated[
        list[str],
        typer.Argument(metavar="[IMAGE]... QUESTION", help="Image files, then a question."),
    ],
    url: Annotated[
        str | None, typer.Option(envvar="EPD_URL", help="A running server; none: the local one.")
    ] = None,
    stream: Annotated[bool, typer.Option(help="Print the answer as it comes.")] = True,
    max_tokens: Annotated[int, typer.Option(min=1)] = 256,
    api_key: Annotated[str | None, typer.Option(envvar="EPD_API_KEY", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """Ask about pictures; without a server the built-in model answers in this process."""
    exit_with(lazy("cli.ask", "ask")(
        parts, url=url, stream=stream, max_tokens=max_tokens, api_key=api_key, as_json=as_json
    ))  # fmt: skip


@app.command()
def doctor(config: Config = None, as_json: Json = False) -> None:
    """Check this machine and these settings; exit code 1 if something will not work."""
    exit_with(lazy("cli.doctor", "doctor")(config, as_json=as_json))


@config_app.command("show")
def config_show(config: Config = None, as_json: Json = False) -> None:
    """Every setting, its value and where it comes from: flag, env, file or default."""
    lazy("cli.settings_table", "show")(config, as_json=as_json)


@config_app.command("validate")
def config_validate(
    file: Annotated[Path, typer.Argument(help="TOML file with settings.")], as_json: Json = False
) -> None:
    """Check a TOML file: known keys, values in range, a possible topology."""
    lazy("cli.settings_table", "validate")(file, as_json=as_json)


@app.command()
def demo(
    questions: Annotated[int, typer.Option(min=1, max=5000)] = 8,
    topology: Topology = None,
    out: Annotated[Path, typer.Option(help="Where the pictures are left.")] = Path("demo-out"),
    seed: Annotated[int, typer.Option(min=0, max=2047, help="Which held-out set.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the results here.")
    ] = None,
    multi: Annotated[bool, typer.Option(help="Also ask about two and three pictures.")] = False,
    concurrency: Annotated[
        int | None, typer.Option(min=1, max=64, help="In flight; none: 1, or 8 for long runs.")
    ] = None,
) -> None:
    """Serve the built-in model, ask it about pictures it has never seen, show what happened."""
    exit_with(lazy("demo", "demo")(
        questions=questions, topology=topology or "1E1P1D", out=out, seed=seed,
        json_file=json_file, multi=multi, concurrency=concurrency,
    ))  # fmt: skip


@app.command()
def bench(
    offline: Annotated[
        Path | None, typer.Option(metavar="CONFIG_DIR", help="One process, no network.")
    ] = None,
    random_weights: Annotated[bool, typer.Option("--random-weights")] = False,
    quantize_to: Annotated[
        str | None,
        typer.Option("--quantize", help="Offline: w4a8-fp8, w4a8-int8, w4a16 or fp8."),
    ] = None,
    kv: KV = None,
    pruning: Annotated[
        str | None, typer.Option(help='Offline: JSON like {"method":"script","keep":64}.')
    ] = None,
    out: Annotated[Path | None, typer.Option(help="CSV file for the rows.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    seed: Annotated[int, typer.Option(min=0, max=2047)] = 0,
    rates: Annotated[str | None, typer.Option(help="Requests per second, like 2,6.")] = None,
    requests: Annotated[int, typer.Option(min=1, max=4096, help="Per rate and burst.")] = 24,
    output_tokens: Annotated[int, typer.Option(min=1, max=1024)] = 24,
    repeat_images: Annotated[
        float, typer.Option(min=0.0, max=0.95, help="Share of requests with an image seen before.")
    ] = 0.25,
    topologies: Annotated[str | None, typer.Option(help="Like 1EPD,1E1P1D.")] = None,
    switches: Annotated[int, typer.Option(min=0, max=1000, help="Role switches under load.")] = 0,
) -> None:
    """Measure the services of this machine beside transformers, or (--offline) the engine alone."""
    if offline is not None:
        lazy("offline_bench", "run_from_cli")(
            offline, random_weights=random_weights, out=out, device=device, dtype=dtype, seed=seed,
            kv=kv, quantize=quantize_to, pruning=pruning,
        )  # fmt: skip
        return
    asked = {"--quantize": quantize_to, "--kv": kv, "--pruning": pruning}
    if unused := [flag for flag, value in asked.items() if value is not None]:
        raise usage_error(
            f"Cannot take {', '.join(unused)} without --offline.",
            "The services are measured as their settings say.",
            "epd bench --offline CONFIG_DIR --random-weights, or set EPD_KV or EPD_PRUNING",
        )
    given = {"output_tokens": output_tokens, "repeat_images": repeat_images, "seed": seed,
             "out": out, "device": device, "dtype": dtype}  # fmt: skip
    if switches:
        exit_with(lazy("switch_bench", "switch_bench")(
            switches, rates=rates, topology=topologies or "2E2P2D", **given
        ))  # fmt: skip
        return
    topologies = topologies or "1EPD,1E1P1D"
    exit_with(lazy("bench", "bench")(
        rates=rates or "2,6", requests=requests, topologies=topologies, **given
    ))  # fmt: skip


@app.command()
def simulate(
    out: Annotated[Path | None, typer.Option(help="CSV file for the rows.")] = None,
) -> None:
    """Try the elastic controller on simulated workers, beside static splits and a simpler rule."""
    exit_with(lazy("elastic.report", "simulate_all")(out))


app.command("eval")(evaluate)
app.command()(calibrate)
app.command()(quantize)


def main() -> None:
    """Run the command line; what nobody foresaw ends in one line and exit code 1."""
    try:
        app()
    except Exception as error:
        if os.environ.get("EPD_LOG_LEVEL", "").lower() == "debug":
            raise
        typer.echo(
            f"error: epd broke.\n  why: {type(error).__name__}: {str(error)[:300]}\n"
            " next: run it again with EPD_LOG_LEVEL=debug for the whole story",
            err=True,
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
