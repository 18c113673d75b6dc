"""The `epd` command. Importing it loads no torch and no HTTP: each command imports its own room.

Exit codes: 0 done; 1 the work failed or broke; 2 it could not start as asked (three lines say why).
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from epd.errors import EPDError
from epd_services.cli.admin import admin_app
from epd_services.cli.terminal import three_lines

if TYPE_CHECKING:
    from collections.abc import Callable

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

Config = Annotated[Path | None, typer.Option("--config", help="TOML file with settings.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
Model = Annotated[str | None, typer.Argument(help="Directory or hub id; none: the built-in model.")]
Topology = Annotated[
    str | None, typer.Option(help="Workers by stages, like 1E1P1D, 2E1PD or 1EPD.")
]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")]
KV = Annotated[str | None, typer.Option("--kv", help="Keys and values: bf16, fp8, int4 or auto.")]


def _lazy(module: str, name: str) -> Callable[..., Any]:
    """A function of a room that is imported only now."""
    found: Callable[..., Any] = getattr(import_module(f"epd_services.{module}"), name)
    return found


def _exit(code: int) -> None:
    if code:
        raise typer.Exit(code)


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
    settings, _ = _lazy("settings", "load_settings")(config, **flags)
    _exit(_lazy("cli.serve", "serve")(settings))


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
    settings, _ = _lazy("settings", "load_settings")(config, **flags)
    given = name or f"{format_stages(stages).lower()}-{os.uname().nodename}"[:64]
    _exit(_lazy("worker_process", "run_worker")(settings, given, stages))


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
    settings, _ = _lazy("settings", "load_settings")(config, **flags)
    _exit(_lazy("gateway.process", "run_gateway")(settings))


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
    _exit(_lazy("cli.ask", "ask")(
        parts, url=url, stream=stream, max_tokens=max_tokens, api_key=api_key, as_json=as_json
    ))  # fmt: skip


@app.command()
def doctor(config: Config = None, as_json: Json = False) -> None:
    """Check this machine and these settings; exit code 1 if something will not work."""
    _exit(_lazy("cli.doctor", "doctor")(config, as_json=as_json))


@config_app.command("show")
def config_show(config: Config = None, as_json: Json = False) -> None:
    """Every setting, its value and where it comes from: flag, env, file or default."""
    _lazy("cli.settings_table", "show")(config, as_json=as_json)


@config_app.command("validate")
def config_validate(
    file: Annotated[Path, typer.Argument(help="TOML file with settings.")], as_json: Json = False
) -> None:
    """Check a TOML file: known keys, values in range, a possible topology."""
    _lazy("cli.settings_table", "validate")(file, as_json=as_json)


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
    _exit(_lazy("demo", "demo")(
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
        _lazy("offline_bench", "run_from_cli")(
            offline, random_weights=random_weights, out=out, device=device, dtype=dtype, seed=seed,
            kv=kv, quantize=quantize_to, pruning=pruning,
        )  # fmt: skip
        return
    given = {"output_tokens": output_tokens, "repeat_images": repeat_images, "seed": seed,
             "out": out, "device": device, "dtype": dtype}  # fmt: skip
    if switches:
        _exit(_lazy("switch_bench", "switch_bench")(
            switches, rates=rates, topology=topologies or "2E2P2D", **given
        ))  # fmt: skip
        return
    topologies = topologies or "1EPD,1E1P1D"
    _exit(_lazy("bench", "bench")(
        rates=rates or "2,6", requests=requests, topologies=topologies, **given
    ))  # fmt: skip


@app.command()
def simulate(
    out: Annotated[Path | None, typer.Option(help="CSV file for the rows.")] = None,
) -> None:
    """Try the elastic controller on simulated workers, beside static splits and a simpler rule."""
    _exit(_lazy("elastic.report", "simulate_all")(out))


@app.command("eval")
def evaluate(
    model: Model = None,
    bench: Annotated[
        str, typer.Option(help="scenes, or a directory with questions.jsonl and images.")
    ] = "scenes",
    methods: Annotated[
        str, typer.Option(help="Comma-separated, like script[tau=0.5]+fastv; all: every one.")
    ] = "all",
    budgets: Annotated[str, typer.Option(help="Shares of the vision tokens.")] = "0.25,0.11,0.056",
    questions: Annotated[int, typer.Option(min=1, max=100000)] = 1020,
    seed: Annotated[int, typer.Option(min=0, max=2047, help="Which held-out set.")] = 1,
    device: Device = None,
    dtype: Dtype = None,
    batch: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Questions in flight; none: by device.")
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the rows here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw accuracy over budget (PNG).")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Journal of finished cells; taken up if it exists.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Prune by every method at every budget and compare the answers with the dense run's."""
    asked = _lazy("evaluation.command", "Evaluation")(
        model=model, bench=bench, methods=methods, budgets=budgets, questions=questions, seed=seed,
        device=device or "auto", dtype=dtype or "auto", batch=batch, csv=csv, plot=plot,
        resume=resume, as_json=as_json,
    )  # fmt: skip
    _exit(_lazy("evaluation.command", "evaluate")(asked))


@app.command()
def calibrate(
    model: Model = None,
    out: Annotated[Path, typer.Option(help="Where the schedule is written.")] = Path(
        "pruning_schedule.json"
    ),
    samples: Annotated[int, typer.Option(min=1, max=100000, help="Scenes to look at.")] = 340,
    seed: Annotated[int, typer.Option(min=0, max=2047, help="Which held-out set.")] = 1001,
    average: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of the tokens a layer processes.")
    ] = 0.25,
    shares: Annotated[
        str, typer.Option(help="What each stage keeps, in proportion; one stage each.")
    ] = "133,27,3",
    device: Device = None,
) -> None:
    """Find the layers after which AdaptInfer prunes this model, and write a schedule file."""
    _exit(_lazy("evaluation.calibrate", "calibrate")(
        model, out=out, samples=samples, seed=seed, average=average, shares=shares, device=device
    ))  # fmt: skip


@app.command()
def quantize(
    out: Annotated[Path, typer.Option("-o", "--out", help="A directory that is not there yet.")],
    scheme: Annotated[str, typer.Option(help="w4a16, qqq, fireq or fp8.")],
    kv: Annotated[str, typer.Option("--kv", help="Keys and values: bf16, fp8 or int4.")] = "bf16",
    model: Model = None,
    calib: Annotated[
        str, typer.Option(help="scenes, or a directory of pictures and .txt questions.")
    ] = "scenes",
    samples: Annotated[int, typer.Option(min=1, max=4096)] = 64,
    group_size: Annotated[int | None, typer.Option(help="32, 64, 128; 0: whole rows.")] = None,
    nearest: Annotated[bool, typer.Option("--nearest", help="Only round: the baseline.")] = False,
    rotate: Annotated[bool, typer.Option("--rotate", help="Hadamard-rotate the values.")] = False,
    head: Annotated[
        str | None, typer.Option(help="LM head: fp8 or bf16, as it is; none: fp8 for fireq, fp8.")
    ] = None,
    vision: Annotated[bool, typer.Option("--vision", help="The vision side as well.")] = False,
) -> None:
    """Quantise a model; started again, it goes on where it was stopped."""
    _exit(_lazy("cli.quantize", "quantize")(
        model, out, scheme=scheme, calib=calib, samples=samples, group_size=group_size,
        nearest=nearest, rotate=rotate, kv=kv, head=head, vision=vision,
    ))  # fmt: skip


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
