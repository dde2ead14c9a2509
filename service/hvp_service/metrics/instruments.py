"""What a server counts as it happens; the figures are the process', as Prometheus has them.

No label's values come from callers: methods, codes, reasons, operations and states are those that
the protos and the registry of questions declare.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
)

from hvp_service.calls.errors import CODES

disable_created_metrics()  # type: ignore[no-untyped-call] # a second series for each, which tells when it was first counted
REGISTRY = CollectorRegistry()

_METHOD = ("grpc_service", "grpc_method")
# From a row read to a product of a large model.
_CALL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 2.5, 10, 60, 600)
# From a tiny model's job to one that takes days.
_JOB_BUCKETS = (0.1, 0.5, 2, 10, 30, 60, 300, 900, 3600, 4 * 3600, 24 * 3600, 4 * 24 * 3600)
_TRANSACTION_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.5, 2.5, 10, 30)

CALLS_STARTED = Counter("grpc_server_started", "Calls that have begun.", _METHOD, registry=REGISTRY)
CALLS_HANDLED = Counter(
    "grpc_server_handled",
    "Calls that have ended, by their status code.",
    (*_METHOD, "grpc_code"),
    registry=REGISTRY,
)
CALL_SECONDS = Histogram(
    "grpc_server_handling_seconds",
    "How long calls took, streams to their end.",
    _METHOD,
    buckets=_CALL_BUCKETS,
    registry=REGISTRY,
)
CALLS_IN_FLIGHT = Gauge(
    "hvp_calls_in_flight",
    "Calls at present: prompt ones, those that wait for an event, those that bring bytes or wait "
    "for the ranks, and open ones, which are streams of health and reflection.",
    ("kind",),
    registry=REGISTRY,
)
RECEIVED_BYTES = Counter(
    "hvp_received_bytes", "Bytes of the messages received.", _METHOD, registry=REGISTRY
)
SENT_BYTES = Counter("hvp_sent_bytes", "Bytes of the messages sent.", _METHOD, registry=REGISTRY)
REFUSALS = Counter(
    "hvp_refusals",
    "Calls that were refused, by the reason of the error.",
    ("reason",),
    registry=REGISTRY,
)
JOBS_ENDED = Counter(
    "hvp_jobs_ended", "Jobs that have ended.", ("operation", "state"), registry=REGISTRY
)
ATTEMPTS_LOST = Counter(
    "hvp_job_attempts_lost",
    "Attempts of jobs that ended with the ranks or the server, and not with the job.",
    ("operation",),
    registry=REGISTRY,
)
JOB_WAIT_SECONDS = Histogram(
    "hvp_job_wait_seconds",
    "From a job's creation to its first attempt.",
    ("operation",),
    buckets=_JOB_BUCKETS,
    registry=REGISTRY,
)
JOB_RUN_SECONDS = Histogram(
    "hvp_job_run_seconds",
    "How long a job's last attempt took.",
    ("operation", "state"),
    buckets=_JOB_BUCKETS,
    registry=REGISTRY,
)
PRODUCTS = Counter(
    "hvp_products",
    "Products of an operator and a vector that were computed, for jobs and for calls.",
    ("asked_by",),
    registry=REGISTRY,
)
TOKENS = Counter(
    "hvp_tokens",
    "Positions of the batch that products went through: their number times the products'.",
    ("asked_by",),
    registry=REGISTRY,
)
GROUP_STARTS = Counter(
    "hvp_group_starts",
    "Times that the ranks were started: the number of their generation.",
    registry=REGISTRY,
)
GROUP_LOSSES = Counter(
    "hvp_group_losses", "Times that the ranks were lost while they served.", registry=REGISTRY
)
TRANSACTION_SECONDS = Histogram(
    "hvp_database_transaction_seconds",
    "How long transactions of the database took, with the wait for their turn.",
    ("kind",),
    buckets=_TRANSACTION_BUCKETS,
    registry=REGISTRY,
)
DATABASE_BUSY = Counter(
    "hvp_database_busy",
    "Transactions that were given up because the database was busy.",
    registry=REGISTRY,
)


class CallMeter:
    """The figures of the calls of one method, found once: finding them takes as long as counting.

    Args:
        method: The method, `/package.Service/Method`.
        kind: The pool that its calls count in.
    """

    def __init__(self, method: str, kind: str):
        service, _, name = method[1:].rpartition("/")
        self._labels = (service, name)
        self._handled: dict[str, Counter] = {}
        self.started = CALLS_STARTED.labels(service, name)
        self.in_flight = CALLS_IN_FLIGHT.labels(kind)
        self.seconds = CALL_SECONDS.labels(service, name)
        self.received_bytes = RECEIVED_BYTES.labels(service, name)
        self.sent_bytes = SENT_BYTES.labels(service, name)

    def handled(self, code: str) -> Counter:
        """The counter of calls that ended with a code."""
        if code not in self._handled:
            self._handled[code] = CALLS_HANDLED.labels(*self._labels, code)
        return self._handled[code]


def refused(reason: str) -> None:
    """Count a refusal; a reason that nobody has entered in the table is a fault."""
    REFUSALS.labels(reason if reason in CODES else "INTERNAL").inc()


def computed(asked_by: str, num_products: int, tokens_each: int) -> None:
    """Count products.

    Args:
        asked_by: `call` or `job`.
        num_products: Their number.
        tokens_each: Positions of the batch that one goes through.
    """
    PRODUCTS.labels(asked_by).inc(num_products)
    TOKENS.labels(asked_by).inc(num_products * tokens_each)


@contextmanager
def transaction(kind: str) -> Iterator[None]:
    """Time a transaction, `read` or `write`, whatever becomes of it."""
    started = time.perf_counter()
    try:
        yield
    finally:
        TRANSACTION_SECONDS.labels(kind).observe(time.perf_counter() - started)
