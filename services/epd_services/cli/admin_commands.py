"""What the commands of `epd admin` do, each with an open client; they return their exit code."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from epd_services.admin.client import AdminClient, UnreachableError, open_client
from epd_services.admin.tables import (
    cache_table,
    history_table,
    preview_lines,
    record_line,
    status_table,
)
from epd_services.cli.terminal import note, print_json, show_table, three_lines
from epd_services.gateway.switches import PHASES

__all__ = ["FAILED", "INTERRUPTED", "REFUSED", "UNREACHABLE", "with_client"]

FAILED, REFUSED, UNREACHABLE, INTERRUPTED = 1, 2, 3, 130
_POLL = 0.1


def with_client(name: str, where: dict[str, Any], *arguments: Any, **options: Any) -> int:
    """The exit code of the command `name`, run against the gateway that `where` names."""
    try:
        with open_client(**where) as client:
            return _COMMANDS[name](client, *arguments, **options)
    except UnreachableError as error:
        note(three_lines(error))
        return UNREACHABLE
    except KeyboardInterrupt:
        return INTERRUPTED


def _status(client: AdminClient, *, watch: bool, interval: float, as_json: bool) -> int:
    if not watch:
        status = client.status()
        if as_json:
            print_json(status)
        else:
            show_table(status_table(status))
        return 0
    if as_json:
        while True:
            print(json.dumps(client.status()), flush=True)
            time.sleep(interval)
    _watch(client, interval)
    return 0


def _watch(client: AdminClient, interval: float) -> None:
    """A live table; a gateway that restarts is waited for."""
    from rich.live import Live
    from rich.text import Text

    with Live(status_table(client.status()), auto_refresh=False) as live:
        while True:
            time.sleep(interval)
            try:
                live.update(status_table(client.status()), refresh=True)
            except UnreachableError as error:
                live.update(Text(three_lines(error)), refresh=True)


def _switch(
    client: AdminClient, worker: str, stages: str, *, dry_run: bool, wait: bool, force: bool,
    as_json: bool, **wish: Any,
) -> int:  # fmt: skip
    preview = client.preview(worker, stages, force=force)
    if dry_run:
        return _told(preview, as_json)
    record = client.switch(worker, stages, force=force, **wish)
    if not as_json and record["state"] != "unchanged":
        print("\n".join(preview_lines(preview | {"refused": []})), flush=True)
    if wait:
        record = _follow(client, record, quiet=as_json)
    if as_json:
        print_json(record)
    elif not wait or record["state"] == "unchanged":
        print(record_line(record))
    if not record["final"] and not as_json:
        note("it goes on by itself; epd admin history tells how it ends")
    return FAILED if record["state"] in ("failed", "lost") else 0


def _told(preview: dict[str, Any], as_json: bool) -> int:
    if as_json:
        print_json(preview)
    else:
        print("\n".join(preview_lines(preview)))
    return REFUSED if preview["refused"] else 0


def _follow(client: AdminClient, record: dict[str, Any], *, quiet: bool) -> dict[str, Any]:
    """Tell each phase as it ends; the record at the end. An interrupt leaves the switch alone."""
    told: set[str] = set()
    try:
        while True:
            for phase in (p for p in PHASES if p in record["phases"].keys() - told - {"total"}):
                told.add(phase)
                if not quiet:
                    print(f"  {phase:<8}{record['phases'][phase]:8.3f} s", flush=True)
            if record["final"]:
                break
            time.sleep(_POLL)
            record = client.get(record["switch_id"])
    except KeyboardInterrupt:
        note("\ninterrupted; the switch goes on: epd admin history tells how it ends")
        raise
    if not quiet and record["state"] != "unchanged":
        print(record_line(record))
    return record


def _drain(client: AdminClient, worker: str, *, force: bool, as_json: bool) -> int:
    changed = client.drain(worker, force=force)
    return _say(as_json, worker, changed, "gets no new work", "got no new work already")


def _resume(client: AdminClient, worker: str, *, as_json: bool) -> int:
    changed = client.resume(worker)
    return _say(as_json, worker, changed, "gets new work again", "was not drained")


def _say(as_json: bool, worker: str, changed: bool, now: str, before: str) -> int:
    if as_json:
        print_json({"worker": worker, "changed": changed})
    else:
        print(f"{worker} {now if changed else before}")
    return 0


def _history(client: AdminClient, *, last: int, as_json: bool) -> int:
    records = client.history()[-last:]
    if as_json:
        print_json(records)
    elif records:
        show_table(history_table(records))
    else:
        print("no switch since the gateway started")
    return 0


def _cache_stats(client: AdminClient, *, as_json: bool) -> int:
    report = client.cache()
    if as_json:
        print_json(report)
    else:
        show_table(cache_table(report))
    return 0


def _cache_flush(client: AdminClient, *, as_json: bool) -> int:
    flushed = client.flush()
    if as_json:
        print_json({"flushed": flushed})
    else:
        print(f"{flushed} images forgotten")
    return 0


_COMMANDS: dict[str, Callable[..., int]] = {
    "status": _status,
    "switch": _switch,
    "drain": _drain,
    "resume": _resume,
    "history": _history,
    "cache_stats": _cache_stats,
    "cache_flush": _cache_flush,
}
