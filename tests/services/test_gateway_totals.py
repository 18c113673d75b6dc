"""Totals over workers never fall: a counter that falls looks like one that began again."""

from __future__ import annotations

from epd_services.gateway import metrics as metrics_module
from epd_services.gateway.metrics import GatewayMetrics


def worker(name, life, count):
    return {"name": name, "life": life, "cache_queries": count, "cache_hits": 1,
            "prefix_queries": 10 * count, "prefix_hits": 0, "preemptions": count}  # fmt: skip


def report(*workers):
    total = sum(w["cache_queries"] for w in workers)
    return {"workers": list(workers), "token_cache": {"queries": total, "hits": len(workers)}}


def scraped(metrics, name):
    (line,) = [x for x in metrics.exposition().decode().splitlines() if x.startswith(name + "{")]
    return float(line.split()[-1])


def test_a_lost_worker_takes_nothing_back(monkeypatch):
    monkeypatch.setattr(metrics_module, "_MOST_LIVES", 3)
    now = {}
    metrics = GatewayMetrics("m", lambda: now)
    names = {"vllm:mm_cache_queries_total": 1, "vllm:prefix_cache_queries_total": 10,
             "vllm:num_preemptions_total": 1}  # fmt: skip
    steps = [
        (report(worker("a", "1", 5), worker("b", "1", 7)), 12),
        (report(worker("b", "1", 9)), 14),
        (report(worker("a", "1", 6), worker("b", "1", 9)), 15),
        (report(worker("a", "2", 1), worker("b", "1", 9)), 16),
        *(
            (report(worker("a", str(life), 1), worker("b", "1", 9)), 14 + life)
            for life in range(3, 9)
        ),
    ]
    for told, wanted in steps:
        now.clear()
        now.update(told)
        for name, times in names.items():
            assert scraped(metrics, name) == wanted * times
