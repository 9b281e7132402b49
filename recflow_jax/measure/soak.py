"""A server under load for long, among clients that leave, cancel and ask for what is wrong: whether
its memory stays flat, every request ends once and every answer is right.
"""

import heapq
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from recflow_jax.batch import JaggedBatch
from recflow_jax.config import DLRMConfig
from recflow_jax.measure.agreement import TOLERANCES
from recflow_jax.measure.encoded import http_request, packed_tensors
from recflow_jax.measure.load import LoadError, Submit, poisson_arrivals_s

KINDS = {"asked": 0.85, "cancelled": 0.06, "wrong": 0.05, "left": 0.04}
CANCELLED_WITHIN_S = 0.01
ENDS_WITHIN_S = 60


@dataclass(frozen=True, kw_only=True)
class Crowd:
    """Who asks: submits by protocol, requests with their right scores, one that is wrong, and what
    connections are for that are closed before their answer.
    """

    submits: Sequence[Submit]
    requests: Sequence[JaggedBatch]
    expected: Sequence[np.ndarray]
    wrong: JaggedBatch
    http_port: int
    model: str
    tolerance: float


def wrong_request(request: JaggedBatch) -> JaggedBatch:
    """The same with ids that no table has."""
    return replace(request, values=np.full_like(request.values, -1))


def tolerance(config: DLRMConfig, expected: Sequence[np.ndarray]) -> float:
    """How far scores may be off."""
    return TOLERANCES[config.compute_dtype] * (float(np.concatenate(expected).std()) or 1.0)


def send_crowd(crowd: Crowd, qps: float, seconds: float, *, seed: int) -> "Ends":
    """Poisson arrivals of all kinds; waits until each has its end. Raises LoadError."""
    ends, random_ = Ends(), random.Random(seed)
    start_s = time.perf_counter()
    for due_s, act in _acts(crowd, ends, random_, qps, seconds, seed):
        time.sleep(max(start_s + due_s - time.perf_counter(), 0))
        act()
    ends.wait()
    return ends


class Ends:
    """How requests ended, counted on any thread."""

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()
        self.ends: Counter[str] = Counter()
        self._changed = threading.Condition()

    def watch(self, kind: str, future: "Future[Any]", told: Callable[["Future[Any]"], str]) -> None:
        """Counts a request of that kind, and later what `told` makes of its end."""
        self.sent[kind] += 1
        future.add_done_callback(lambda done: self._count(told(done)))

    def _count(self, end: str) -> None:
        with self._changed:
            self.ends[end] += 1
            self._changed.notify()

    def wait(self) -> None:
        """Until all that were watched have ended. Raises LoadError."""
        watched = self.sent.total() - self.sent["left"]
        with self._changed:
            if not self._changed.wait_for(lambda: self.ends.total() >= watched, ENDS_WITHIN_S):
                raise LoadError(f"{watched - self.ends.total()} requests had no end")


def _acts(
    crowd: Crowd, ends: Ends, random_: random.Random, qps: float, seconds: float, seed: int
) -> Iterator[tuple[float, Callable[[], Any]]]:
    """What to do when, in order; a request to be cancelled is sent and cancelled later."""
    kinds = random_.choices([*KINDS], [*KINDS.values()], k=max(int(qps * seconds), 1))
    due_s = poisson_arrivals_s(qps, len(kinds), seed=seed).tolist()
    later: list[tuple[float, int, Callable[[], Any]]] = []
    for index, (due, kind) in enumerate(zip(due_s, kinds, strict=True)):
        while later and later[0][0] < due:
            at, _, cancel = heapq.heappop(later)
            yield at, cancel
        if kind == "left":
            yield due, partial(_leave, crowd, ends, random_)
            continue
        sent: list[Future[Any]] = []
        yield due, partial(_send, crowd, ends, kind, index, sent)
        if kind == "cancelled":
            heapq.heappush(
                later, (due + CANCELLED_WITHIN_S * random_.random(), index, sent[0].cancel)
            )
    yield from ((at, cancel) for at, _, cancel in later)


def _send(crowd: Crowd, ends: Ends, kind: str, index: int, sent: "list[Future[Any]]") -> None:
    submit = crowd.submits[index % len(crowd.submits)]
    place = index % len(crowd.requests)
    request = crowd.wrong if kind == "wrong" else crowd.requests[place]
    sent.append(submit(request))
    told = _wrongs_end if kind == "wrong" else partial(_end, crowd, crowd.expected[place])
    ends.watch(kind, sent[0], told)


def _end(crowd: Crowd, expected: np.ndarray, done: "Future[Any]") -> str:
    if done.cancelled():
        return "cancelled"
    if error := done.exception():
        return type(error).__name__
    found = done.result()
    right = found.shape == expected.shape and np.abs(found - expected).max() <= crowd.tolerance
    return "right" if right else "wrong scores"


def _wrongs_end(done: "Future[Any]") -> str:
    return "told so" if "id -1 is not in" in str(done.exception()) else "a wrong one was not told"


def _leave(crowd: Crowd, ends: Ends, random_: random.Random) -> None:
    """Sends a request, or a part of it, and goes."""
    ends.sent["left"] += 1
    path = f"/v2/models/{crowd.model}/infer"
    request = http_request(path, packed_tensors(random_.choice(crowd.requests)))
    with socket.create_connection(("127.0.0.1", crowd.http_port), ENDS_WITHIN_S) as client:
        client.sendall(request[: random_.choice([len(request), random_.randrange(len(request))])])
