"""Metrics for Prometheus; labels have few values, whatever clients send."""

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serving.ranks.group import RankGroup

_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 150.0, 300.0)


class Metrics:
    """What one server has done, and does now."""

    def __init__(self, groups: Mapping[str, RankGroup]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Now(groups))
        self._requests = Counter(
            "tapir_requests", "Requests by route and status", ["route", "status"],
            registry=self._registry,
        )  # fmt: skip
        self._seconds = Histogram(
            "tapir_request_seconds", "Time of requests for pictures, waiting included", ["model"],
            buckets=_SECONDS, registry=self._registry,
        )  # fmt: skip
        self._pictures = Counter(
            "tapir_pictures", "Pictures that were drawn", ["model"], registry=self._registry
        )

    def count(self, route: str, status: int) -> None:
        """Count an answered request; `route` is its path as it is registered."""
        self._requests.labels(route, str(status)).inc()

    def drawn(self, model: str, pictures: int, seconds: float) -> None:
        """Count a finished request."""
        self._seconds.labels(model).observe(seconds)
        self._pictures.labels(model).inc(pictures)

    def text(self) -> bytes:
        """The page of /metrics."""
        return generate_latest(self._registry)


class _Now(Collector):
    """Reads the state of the ranks when the page is asked for."""

    def __init__(self, groups: Mapping[str, RankGroup]) -> None:
        self._groups = groups

    def collect(self) -> Iterable[Metric]:
        gauges = {
            "tapir_ready": ("1 if the model's ranks are ready", lambda g: g.state == "ready"),
            "tapir_unfinished_requests": ("Requests in progress", lambda g: g.unfinished),
            "tapir_busy_rows": ("Rows of the running batch in use", lambda g: g.busy_rows),
            "tapir_waiting_candidates": ("Candidates that wait for a row", lambda g: g.waiting),
        }
        for name, (what, read) in gauges.items():
            gauge = GaugeMetricFamily(name, what, labels=["model"])
            for model, group in self._groups.items():
                gauge.add_metric([model], float(read(group)))
            yield gauge
        restarts = CounterMetricFamily(
            "tapir_restarts", "Restarts of a model's ranks", labels=["model"]
        )
        for model, group in self._groups.items():
            restarts.add_metric([model], group.restarts)
        yield restarts
