"""`epd admin`: the workers of a running gateway, and their roles."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["admin_app"]

EXIT_CODES = """
Exit codes: 0 done, or nothing to do. 1 the switch failed or its worker was lost; it is back in its
old role or out of service. 2 refused, nothing was changed; three lines say why. 3 no gateway
answers. 130 interrupted; a switch that was begun goes on.
"""

admin_app = typer.Typer(
    no_args_is_help=True,
    help="See the workers of a running gateway and move their roles while it serves.\n"
    + EXIT_CODES,
)
cache_app = typer.Typer(no_args_is_help=True, help="The token cache that the workers share.")
admin_app.add_typer(cache_app, name="cache")

Worker = Annotated[str, typer.Argument(help="Its name, as in epd admin status.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
Force = Annotated[
    bool, typer.Option("--force", help="Even if a stage has no other worker: its requests get 503.")
]


def _run(name: str, context: typer.Context, *arguments: Any, **options: Any) -> None:
    """Call a function of `admin_commands` with an open client; exit with its code."""
    command = import_module("epd_services.cli.admin_commands").with_client
    if code := command(name, context.obj or {}, *arguments, **options):
        raise typer.Exit(code)


@admin_app.callback()
def admin(
    context: typer.Context,
    url: Annotated[
        str | None, typer.Option(envvar="EPD_ADMIN_URL", help="A gateway's admin API.")
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(envvar="EPD_ADMIN_TOKEN_FILE", help="Its token.")
    ] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(
            envvar="EPD_RUN_DIR", help="Find both here; none: the one gateway you run here."
        ),
    ] = None,
) -> None:
    """Which gateway."""
    context.obj = {"url": url, "token_file": token_file, "run_dir": run_dir}


@admin_app.command(epilog=EXIT_CODES)
def status(
    context: typer.Context,
    watch: Annotated[bool, typer.Option("--watch", help="Go on until interrupted.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, max=3600.0, help="Seconds.")] = 1.0,
    as_json: Json = False,
) -> None:
    """Workers: stages, state, epoch, queues, slots, KV blocks, cache hits, age of the heartbeat."""
    _run("status", context, watch=watch, interval=interval, as_json=as_json)


@admin_app.command(epilog=EXIT_CODES)
def switch(
    context: typer.Context,
    worker: Worker,
    stages: Annotated[str, typer.Argument(help="The new role: letters out of E, P, D.")],
    drain_timeout: Annotated[
        float, typer.Option(help="Seconds for what cannot move to finish; then it starts again.")
    ] = 10.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would happen.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Stay, and tell each phase.")] = False,
    force: Force = False,
    epoch: Annotated[
        int | None, typer.Option(min=0, help="Only if the worker is still at this epoch.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Move a worker to another role. The same command again is the same switch."""
    _run(
        "switch", context, worker, stages, drain_seconds=drain_timeout, dry_run=dry_run, wait=wait,
        force=force, epoch=epoch, as_json=as_json,
    )  # fmt: skip


@admin_app.command(epilog=EXIT_CODES)
def drain(
    context: typer.Context, worker: Worker, force: Force = False, as_json: Json = False
) -> None:
    """Give a worker no new work; what it has goes on, its role stays."""
    _run("drain", context, worker, force=force, as_json=as_json)


@admin_app.command(epilog=EXIT_CODES)
def resume(context: typer.Context, worker: Worker, as_json: Json = False) -> None:
    """Give a drained worker new work again."""
    _run("resume", context, worker, as_json=as_json)


@admin_app.command(epilog=EXIT_CODES)
def history(
    context: typer.Context,
    last: Annotated[int, typer.Option(min=1, max=1000, help="How many at most.")] = 20,
    as_json: Json = False,
) -> None:
    """The switches since the gateway started, with the seconds of each phase."""
    _run("history", context, last=last, as_json=as_json)


@cache_app.command("stats", epilog=EXIT_CODES)
def cache_stats(context: typer.Context, as_json: Json = False) -> None:
    """How many images the cache holds, and what each worker asked of it."""
    _run("cache_stats", context, as_json=as_json)


@cache_app.command("flush", epilog=EXIT_CODES)
def cache_flush(context: typer.Context, as_json: Json = False) -> None:
    """Forget every cached image; what is asked again is encoded again."""
    _run("cache_flush", context, as_json=as_json)
