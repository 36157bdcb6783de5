"""Counts and times of a server, in the format of Prometheus."""

from collections.abc import Callable
from typing import Any

from pnc.data.image_files import required

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})
"""Others count as one: a client may invent any number."""


class Meters:
    """What a server counts; each server has its own.

    Args:
        queued: Returns the number of requests that are being answered.
        attached: Returns the number of attached clones.
        generation: Returns how often the set of clones changed.
    """

    def __init__(
        self, queued: Callable[[], float], attached: Callable[[], float], generation: Callable[[], float]
    ) -> None:
        self._prometheus: Any = required("prometheus_client", "serve", "serve")
        kinds = self._prometheus
        self._registry = kinds.CollectorRegistry()
        kinds.ProcessCollector(registry=self._registry)
        own = {"registry": self._registry}
        self._requests = kinds.Counter(
            "pnc_requests", "Requests by route, method and status", ("route", "method", "status"), **own
        )
        self._seconds = kinds.Histogram("pnc_predict_seconds", "Time to answer /predict", buckets=_SECONDS, **own)
        self._batches = kinds.Histogram("pnc_batch_images", "Images computed together", buckets=_SIZES, **own)
        self._answers = kinds.Counter(
            "pnc_answers", "Images by the clone whose class was most probable", ("clone",), **own
        )
        kinds.Gauge("pnc_queue", "Requests that are being answered", **own).set_function(queued)
        kinds.Gauge("pnc_clones", "Attached clones", **own).set_function(attached)
        kinds.Gauge("pnc_generation", "Changes of the set of clones", **own).set_function(generation)

    @property
    def content_type(self) -> str:
        """Of `text`."""
        found: str = self._prometheus.CONTENT_TYPE_LATEST
        return found

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count a request."""
        self._requests.labels(route, method if method in _METHODS else "other", status).inc()
        if route == "/predict" and status == 200:
            self._seconds.observe(seconds)

    def batch(self, n_images: int) -> None:
        """Count a batch."""
        self._batches.observe(n_images)

    def answer(self, clone: str | None) -> None:
        """Count an image; clone None is the target."""
        self._answers.labels("" if clone is None else clone).inc()

    def text(self) -> bytes:
        """All counts."""
        found: bytes = self._prometheus.generate_latest(self._registry)
        return found
