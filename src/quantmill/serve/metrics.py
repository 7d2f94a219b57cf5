"""What a monitor reads: counters and histograms of requests, and the engines' figures of the moment."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from quantmill.runtime.engine_types import EngineStats
from quantmill.serve.bandwidth import measured
from quantmill.serve.models import ModelService

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 5, 10, 30, 60, 120)


class Metrics:
    """One registry per server, so that several can live in a process."""

    def __init__(self, service: ModelService) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "quantmill_requests", "Requests by path and status", ["path", "status"], registry=self.registry
        )
        self.first = self._seconds(
            "quantmill_time_to_first_token_seconds", "From the request to the first token"
        )
        self.between = self._seconds("quantmill_inter_token_seconds", "Between two tokens of an answer")
        self.whole = self._seconds("quantmill_request_seconds", "From the request to its end")
        self.registry.register(EngineCollector(service))

    def _seconds(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, ["model"], buckets=SECONDS, registry=self.registry)

    def text(self) -> bytes:
        return bytes(generate_latest(self.registry))


class EngineCollector(Collector):
    """The figures of every model that is loaded. Shares of bandwidth are of what was measured on this machine."""

    def __init__(self, service: ModelService) -> None:
        self.service = service
        self._before: dict[str, EngineStats] = {}

    def collect(self) -> Iterator[Metric]:
        models = self.service.ready()
        stats = [(name, llm.engine.stats()) for name, llm in models]
        for name, text, read in GAUGES:
            gauge = GaugeMetricFamily(f"quantmill_{name}", text, labels=["model"])
            for model, figures in stats:
                gauge.add_metric([model], read(figures))
            yield gauge
        for name, text, read in COUNTERS:
            counter = CounterMetricFamily(f"quantmill_{name}", text, labels=["model"])
            for model, figures in stats:
                counter.add_metric([model], read(figures))
            yield counter
        finished = CounterMetricFamily(
            "quantmill_answers", "Answers by how they ended", labels=["model", "reason"]
        )
        for model, figures in stats:
            for reason, count in figures.finished.items():
                finished.add_metric([model, str(reason)], count)
        yield finished
        share = GaugeMetricFamily(
            "quantmill_memory_bandwidth_share",
            "Weights read per second of work, of the memory bandwidth measured here, since the last look",
            labels=["model"],
        )
        for (model, llm), (_, figures) in zip(models, stats, strict=True):
            if (rate := measured(llm.facts.name)) is not None:
                share.add_metric([model], self._read_per_second(model, figures) / rate)
        yield share

    def _read_per_second(self, model: str, now: EngineStats) -> float:
        """Bytes of weights per second of work since the last look."""
        before = self._before.get(model)
        self._before[model] = now
        old = before if before is not None and before.passes <= now.passes else None
        seconds = now.busy_seconds - (old.busy_seconds if old else 0)
        read = now.weight_bytes - (old.weight_bytes if old else 0)
        return read / seconds if seconds > 0 else 0.0


Read = Callable[[EngineStats], float]
GAUGES: tuple[tuple[str, str, Read], ...] = (
    ("waiting_requests", "Requests of which no answer has begun", lambda s: s.waiting),
    ("running_answers", "Answers in the next pass", lambda s: s.running),
    ("kv_pages", "Pages of the cache", lambda s: s.pages.pages),
    ("kv_pages_held", "Pages in use", lambda s: s.pages.held),
    ("kv_pages_kept", "Pages in nobody's use whose content can be taken over", lambda s: s.pages.kept),
    ("kv_use", "Share of the cache in use", lambda s: s.pages.held / max(1, s.pages.pages)),
)
COUNTERS: tuple[tuple[str, str, Read], ...] = (
    ("passes", "Passes over the model", lambda s: s.passes),
    ("prompt_tokens", "Prompt tokens computed", lambda s: s.prompt_tokens),
    ("cached_tokens", "Prompt tokens taken over from the prefix cache", lambda s: s.cached_tokens),
    ("answer_tokens", "Tokens generated", lambda s: s.answer_tokens),
    ("preemptions", "Answers put aside for want of pages", lambda s: s.preemptions),
    ("busy_seconds", "Time spent in passes", lambda s: s.busy_seconds),
)
