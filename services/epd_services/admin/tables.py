"""What operators see: the workers as a table, a switch phase by phase, the history."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from epd_services.cli.terminal import table, width
from epd_services.gateway.switches import PHASES

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["cache_table", "history_table", "preview_lines", "record_line", "status_table"]

_WORKERS = (
    "worker", "stages", "state", "epoch", "queues E/P/D", "running", "KV blocks", "leases",
    "cache hits", "weights MiB", "heard s ago",
)  # fmt: skip
_HISTORY = ("when", "worker", "switch", "state", *PHASES, "moved", "why")
_WIDE = 110
_NARROW_WORKERS = ("worker", "stages", "state", "epoch", "queues E/P/D", "running", "KV blocks")
_NARROW_HISTORY = ("when", "worker", "switch", "state", "total", "why")


def status_table(status: dict[str, Any]) -> Table:
    """The workers of a status report, and a caption with what concerns all of them."""
    title = (
        f"{status['topology']}, {'ready' if status['ready'] else 'NOT READY'}, "
        f"{status['inflight']} in flight"
    )
    rows = [_worker_row(worker) for worker in status["workers"]]
    made = table(title, *_fitting(_WORKERS, _NARROW_WORKERS, rows))
    lines = [record_line(record) for record in status["switches"]]
    lines += [f"{name} is refused: {why}" for name, why in status["refused"].items()]
    made.caption = "\n".join(lines) or None
    made.caption_justify = "left"
    return made


def _worker_row(worker: dict[str, Any]) -> tuple[object, ...]:
    used = worker["blocks_total"] - worker["blocks_free"]
    return (
        worker["name"],
        worker["stages"],
        worker["state"],
        worker["epoch"],
        f"{worker['encode_queue']}/{worker['prefill_waiting']}/{worker['handoff_queue']}",
        worker["running"],
        f"{used}/{worker['blocks_total']}" if worker["blocks_total"] else "",
        worker["kv_leases"],
        share(worker["cache_hits"], worker["cache_queries"]),
        f"{worker['resident_bytes'] / (1 << 20):.1f}",
        f"{worker['heartbeat_age_s']:.2f}",
    )


def share(part: int, whole: int) -> str:
    """A percentage; empty of nothing."""
    return f"{100 * part / whole:.0f} %" if whole else ""


def history_table(records: Sequence[dict[str, Any]]) -> Table:
    """One line a switch; phases in seconds."""
    rows = [_history_row(record) for record in records]
    return table("", *_fitting(_HISTORY, _NARROW_HISTORY, rows))


def _fitting(
    columns: Sequence[str], few: Sequence[str], rows: Sequence[tuple[object, ...]]
) -> tuple[Sequence[str], list[tuple[object, ...]]]:
    """All columns, or on a narrow terminal the `few` that matter most; `--json` has all of them."""
    if width() >= _WIDE:
        return columns, list(rows)
    chosen = [columns.index(name) for name in few]
    return few, [tuple(row[index] for index in chosen) for row in rows]


def _history_row(record: dict[str, Any]) -> tuple[object, ...]:
    started = datetime.datetime.fromtimestamp(record["started_at"])
    phases = [f"{record['phases'][n]:.3f}" if n in record["phases"] else "" for n in PHASES]
    why = record["error"] or record["reason"]
    change = f"{record['old']} → {record['new']}"
    when = started.strftime("%H:%M:%S")
    return (when, record["worker"], change, record["state"], *phases, record["moved"], why)


def record_line(record: dict[str, Any]) -> str:
    """A switch in one line: where it stands, why, and the seconds of its phases."""
    phases = ", ".join(f"{n} {s:.3f} s" for n, s in _in_order(record["phases"]))
    error = f": {record['error']}" if record["error"] else ""
    return f"{record['worker']} {record['old']} → {record['new']} {record['state']}{error}" + (
        f" ({phases})" if phases else ""
    )


def _in_order(phases: dict[str, float]) -> list[tuple[str, float]]:
    known = [name for name in PHASES if name in phases]
    return [(n, phases[n]) for n in (*known, *(n for n in phases if n not in known))]


def preview_lines(preview: dict[str, Any]) -> Iterator[str]:
    """What a switch would do, line by line."""
    yield (
        f"{preview['worker']}: {preview['old'] or '?'} → {preview['new']}, "
        f"from epoch {preview['epoch']}"
    )
    for line in preview["moves"]:
        yield f"  {line}"
    if preview["cost"]:
        times = ", ".join(f"{n} {s:.3f} s" for n, s in _in_order(preview["cost"]))
        yield f"  cost: {times} (medians of {preview['measured']} such switches)"
    else:
        yield "  cost: not known yet; no such switch has been measured since the gateway started"
    for refusal in preview["refused"]:
        yield f"  refused: {refusal['what']} {refusal['why']}"
        yield f"     next: {refusal['next']}"


def cache_table(report: dict[str, Any]) -> Table:
    """What each worker asked of the token cache."""
    rows = [
        (w["name"], w["cache_queries"], w["cache_hits"], share(w["cache_hits"], w["cache_queries"]),
         w["cache_errors"])
        for w in report["workers"]
    ]  # fmt: skip
    held = "?" if report["entries"] is None else report["entries"]
    title = (
        f"{held} images held, breaker {report['breaker']}"
        if report["shared"]
        else ("no cache server: every worker keeps its own")
    )
    return table(title, ("worker", "queries", "hits", "hit rate", "errors"), rows)
