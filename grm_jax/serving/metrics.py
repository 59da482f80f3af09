"""Counters, gauges and histograms for Prometheus, with the names that start with `grm_`."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from grm_jax.serving.groups import Groups
from grm_jax.serving.service import Service

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 600)


class RequestMetrics:
    """HTTP requests by route, and what the service and the groups of rollouts count."""

    media_type = CONTENT_TYPE_LATEST

    def __init__(self, service: Service, groups: Groups):
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "grm_requests", "HTTP requests", ["route", "method", "status"], registry=self.registry
        )
        self._seconds = Histogram(
            "grm_request_seconds", "From a request's head to the end of its reply", ["route"],
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        ProcessCollector(registry=self.registry)
        self.registry.register(_Collector(service, groups))

    def add(self, scope: MutableMapping[str, Any], status: int, seconds: float) -> None:
        """Count a request that ended; one without a route counts as `unmatched`, since any path
        can be asked for."""
        route = getattr(scope.get("route"), "path", "unmatched")
        method = scope["method"] if route != "unmatched" else "any"
        self._requests.labels(route, method, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self.registry)


class _Collector(Collector):
    """Reads the counts when it is asked."""

    def __init__(self, service: Service, groups: Groups):
        self.service, self.groups = service, groups

    def collect(self) -> Iterator[Metric]:
        service, stats = self.service, self.service.stats
        yield GaugeMetricFamily("grm_ready", "Whether requests are taken", int(service.ready))
        yield GaugeMetricFamily("grm_pending_samples", "Samples that wait or run", service.pending)
        yield GaugeMetricFamily("grm_pending_jobs", "Distinct requests at work", service.jobs)
        waiting = self.groups.waiting
        yield GaugeMetricFamily(
            "grm_waiting_rollouts", "Rollouts that wait for others of their group", waiting
        )
        ended = CounterMetricFamily("grm_jobs", "Requests to the engine", labels=["ended"])
        for name in ("finished", "cancelled", "refused", "expired", "shared", "cached"):
            ended.add_metric([name], getattr(stats, name))
        yield ended
        yield CounterMetricFamily("grm_samples", "Texts sampled", stats.samples)
        yield CounterMetricFamily("grm_sampled_tokens", "Tokens sampled", stats.tokens)
        yield CounterMetricFamily("grm_engine_busy_seconds", "In steps", stats.busy_seconds)
        failures = CounterMetricFamily("grm_critique_failures", "By name", labels=["failure"])
        for name, count in sorted(stats.failures.items()):
            failures.add_metric([name], count)
        yield failures
