"""Prometheus series of the gateway: our own, and the names existing vLLM dashboards query."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from epd.request import Usage

__all__ = ["Exchange", "GatewayMetrics"]

_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_LONG = (*_SHORT, 60.0, 120.0)
_COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
_STAGES = frozenset({"queue", "encode", "transfer", "prefill", "decode", "intake"})
_METHODS = frozenset({"GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE"})


class GatewayMetrics:
    """Every series of one gateway on a registry of its own."""

    def __init__(self, model_name: str, pipeline: Callable[[], dict[str, Any]]) -> None:
        self.registry = CollectorRegistry()
        self.model_name = model_name
        self._histograms: dict[str, Histogram] = {}
        self._requests = self._counter(
            "http_requests", "HTTP requests.", ("method", "handler", "status")
        )
        self._request_seconds = Histogram(
            "http_request_duration_seconds", "Seconds per HTTP request.", ("handler",),
            buckets=_LONG, registry=self.registry,
        )  # fmt: skip
        self.errors = self._counter("epd_errors", "Requests that ended in an error.", ("code",))
        self.shed = self._counter("epd_shed", "Requests turned away.", ("reason",))
        self.cancelled = self._counter("epd_cancelled", "Generations cancelled.", ("reason",))
        self._decodes = self._counter("epd_image_decodes", "Images decoded.", ("outcome",))
        self._decode_seconds = Histogram(
            "epd_image_decode_seconds", "Seconds to decode an image.",
            buckets=_SHORT, registry=self.registry,
        )  # fmt: skip
        self._stage_seconds = Histogram(
            "epd_stage_seconds", "Seconds a request spent per stage.", ("stage",),
            buckets=_LONG, registry=self.registry,
        )  # fmt: skip
        self.waiting = self._gauge("vllm:num_requests_waiting", "Accepted, no token yet.")
        self.running = self._gauge("vllm:num_requests_running", "Producing tokens.")
        self._success = self._counter(
            "vllm:request_success", "Completed requests.", ("model_name", "finished_reason")
        )
        self._prompt = self._counter("vllm:prompt_tokens", "Prompt tokens.", ("model_name",))
        self._generated = self._counter(
            "vllm:generation_tokens", "Generated tokens.", ("model_name",)
        )
        for name, text, buckets in _VLLM_HISTOGRAMS:
            self._histograms[name] = Histogram(
                f"vllm:{name}", text, ("model_name",), buckets=buckets, registry=self.registry
            )
        self.registry.register(_PipelineCollector(model_name, pipeline))

    def _counter(self, name: str, text: str, labels: tuple[str, ...]) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        gauge = Gauge(name, text, ("model_name",), registry=self.registry)
        return gauge.labels(self.model_name)

    def http(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count one HTTP exchange."""
        known = method if method in _METHODS else "OTHER"
        self._requests.labels(known, route, str(status)).inc()
        self._request_seconds.labels(route).observe(seconds)

    def image(self, seconds: float, outcome: str) -> None:
        """Count one image decode."""
        self._decodes.labels(outcome).inc()
        self._decode_seconds.observe(seconds)

    def observe(self, name: str, value: float) -> None:
        """Add a value to the histogram `vllm:<name>`."""
        self._histograms[name].labels(self.model_name).observe(value)

    def stages(self, timings: dict[str, float]) -> None:
        """Add the seconds per stage of one request."""
        for stage in _STAGES & timings.keys():
            self._stage_seconds.labels(stage).observe(timings[stage])
        for stage in ("queue", "prefill", "decode"):
            if stage in timings:
                self.observe(f"request_{stage}_time_seconds", timings[stage])

    def complete(self, reason: str, usage: Usage, timings: dict[str, float]) -> None:
        """Count one complete answer."""
        self._success.labels(self.model_name, reason).inc()
        self._prompt.labels(self.model_name).inc(usage.prompt_tokens)
        self._generated.labels(self.model_name).inc(usage.completion_tokens)
        self.observe("request_prompt_tokens", usage.prompt_tokens)
        self.observe("request_generation_tokens", usage.completion_tokens)
        self.stages(timings)
        self.observe("e2e_request_latency_seconds", timings["total"])
        if "tpot" in timings:
            self.observe("request_time_per_output_token_seconds", timings["tpot"])

    def exposition(self) -> bytes:
        """All series in Prometheus' text format."""
        return generate_latest(self.registry)


_VLLM_HISTOGRAMS: tuple[tuple[str, str, tuple[float, ...]], ...] = (
    ("time_to_first_token_seconds", "Arrival to the first token.", _LONG),
    ("inter_token_latency_seconds", "Gap between tokens, the first one excluded.", _SHORT),
    ("request_time_per_output_token_seconds", "Mean gap between a request's tokens.", _SHORT),
    ("e2e_request_latency_seconds", "Arrival to the end of the answer.", _LONG),
    ("request_queue_time_seconds", "Seconds waiting in stage queues.", _LONG),
    ("request_prefill_time_seconds", "Seconds in prefill.", _LONG),
    ("request_decode_time_seconds", "Seconds in decode.", _LONG),
    ("request_prompt_tokens", "Prompt tokens per request.", _COUNTS),
    ("request_generation_tokens", "Generated tokens per request.", _COUNTS),
    ("request_max_num_generation_tokens", "Generated tokens asked for per request.", _COUNTS),
)


class Exchange:
    """One accepted request on its way: waiting, then running, then gone. All on one clock."""

    def __init__(
        self, metrics: GatewayMetrics, clock: Callable[[], float], *, arrived: float
    ) -> None:
        self._metrics = metrics
        self._clock = clock
        self._arrived = arrived
        self._first: float | None = None
        self._last = 0.0
        self._tokens = 0
        self._gauge = metrics.waiting
        self._gauge.inc()

    def tokens(self, count: int) -> None:
        """Note that `count` tokens came, as one event."""
        if count == 0:
            return
        now = self._clock()
        if self._first is None:
            self._first = now
            self._metrics.observe("time_to_first_token_seconds", now - self._arrived)
            self._gauge.dec()
            self._gauge = self._metrics.running
            self._gauge.inc()
            count, self._tokens = count - 1, 1
        for _ in range(count):
            self._metrics.observe("inter_token_latency_seconds", (now - self._last) / count)
        self._last = now
        self._tokens += count

    def timings(self) -> dict[str, float]:
        """TTFT, TPOT and total so far, in seconds since arrival."""
        now = self._clock()
        out = {"total": now - self._arrived}
        if self._first is not None:
            out["ttft"] = self._first - self._arrived
            if self._tokens > 1:
                out["tpot"] = (self._last - self._first) / (self._tokens - 1)
        return out

    def close(self) -> None:
        """Leave the gauges."""
        self._gauge.dec()


_TOTALS = (
    ("prefix_queries", "prefix_cache_queries", "Prefix cache."),
    ("prefix_hits", "prefix_cache_hits", "Prefix cache."),
    ("preemptions", "num_preemptions", "Preemptions."),
)
_MOST_LIVES = 1024


class _PipelineCollector(Collector):
    """Series read from the pipeline's own report at scrape time; what it omits is left out."""

    def __init__(self, model_name: str, pipeline: Callable[[], dict[str, Any]]) -> None:
        self._model_name = model_name
        self._pipeline = pipeline
        self._lives: dict[str, OrderedDict[tuple[str, str], float]] = {}
        self._before: defaultdict[str, float] = defaultdict(float)

    def collect(self) -> Iterator[Metric]:
        report = self._pipeline()
        workers = [w for w in report.get("workers") or [] if isinstance(w, dict)]
        cache = report.get("token_cache") or {}
        for key in ("queries", "hits"):
            if isinstance(cache.get(key), int):
                name = f"cache_{key}"
                summed = any(name in worker for worker in workers)
                total = self._total(name, workers) if summed else cache[key]
                yield self._counter(f"vllm:mm_cache_{key}", "Token cache.", total)
        for key, name, text in _TOTALS:
            if any(key in worker for worker in workers):
                yield self._counter(f"vllm:{name}", text, self._total(key, workers))
        yield from _worker_gauges(workers)

    def _total(self, key: str, workers: list[dict[str, Any]]) -> float:
        """The sum over all lives of workers: one that left takes nothing back, because a counter
        that falls looks like one that began again.
        """
        lives = self._lives.setdefault(key, OrderedDict())
        for worker in workers:
            life = str(worker.get("name")), str(worker.get("life"))
            lives[life] = _number(worker.get(key))
            lives.move_to_end(life)
        while len(lives) > _MOST_LIVES:
            _, count = lives.popitem(last=False)
            self._before[key] += count
        return self._before[key] + sum(lives.values())

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=("model_name",))
        family.add_metric((self._model_name,), value)
        return family


def _worker_gauges(workers: list[dict[str, Any]]) -> Iterator[Metric]:
    up = GaugeMetricFamily("epd_worker_up", "Workers that serve.", labels=("worker", "stages"))
    epoch = GaugeMetricFamily("epd_role_epoch", "Epoch of the stage set.", labels=("worker",))
    for worker in workers:
        name = str(worker.get("name", ""))[:128]
        serving = worker.get("state") == "serving"
        up.add_metric((name, str(worker.get("stages", ""))[:8]), float(serving))
        epoch.add_metric((name,), _number(worker.get("epoch")))
    yield up
    yield epoch
    sent = CounterMetricFamily(
        "epd_handoff_bytes", "Bytes of vision tokens and KV sent to peers.", labels=("worker",)
    )
    for worker in workers:
        if "handoff_bytes" in worker:
            sent.add_metric((str(worker.get("name", ""))[:128],), _number(worker["handoff_bytes"]))
    if sent.samples:
        yield sent


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
