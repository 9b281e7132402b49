"""A front end in a process of its own, which asks what it is told to; it has no use for JAX."""

from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from recflow_jax.batch import JaggedBatch
from recflow_jax.measure.load import open_loop
from recflow_jax.measure.requests import arrivals_at, request_pool, saturated
from recflow_jax.remote.front_end import FrontEnd


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Where front ends find their engine, and what they ask: see `request_pool`. seed: of the first
    one's requests; the others' are drawn from those that follow.
    """

    path: Path
    ids: str
    seed: int
    request_samples: int | None

    def requests(self, config: Any, number: int) -> list[JaggedBatch]:
        """Of front end `number`."""
        return request_pool(
            config, ids=self.ids, seed=self.seed + number, request_samples=self.request_samples
        )


def call_engine(pool: Pool, number: int, pipe: Connection) -> None:
    """In a process of its own: says what it asked and was answered, then does as it is told."""
    with FrontEnd(pool.path) as front_end:
        requests = pool.requests(front_end.config, number)
        answers = [front_end.submit(request) for request in requests]
        pipe.send((requests, [answer.result() for answer in answers]))
        while True:
            try:
                what, *how = pipe.recv()
            except EOFError:
                return
            if what == "saturate":
                in_flight, seconds = how
                limits = {"in_flight_samples": in_flight, "seconds": seconds}
                pipe.send(saturated(front_end.submit, requests, **limits))
            else:
                qps, seconds, seed, arrivals_s = how
                due_s = arrivals_at(qps, seconds, seed + number, arrivals_s)
                pipe.send(open_loop(front_end.submit, requests, due_s))
