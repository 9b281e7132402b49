"""A server in front of a device that can be held and broken, and someone who asks it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from fake_clients import Outcome, asking, tensors
from fake_segments import FakeSegments
from recflow_jax.engine.engine import Engine
from running_server import SOON_S, RunningServer, serving, wait_for


@dataclass(frozen=True)
class FakeServer:
    """All four, from the device to the asker."""

    device: FakeSegments
    engine: Engine
    server: RunningServer
    asker: Any

    def ask(self, *dense: float, **terms: Any) -> Any:
        return self.asker.ask(tensors(*dense), **terms)

    def outcome(self, *dense: float, **terms: Any) -> Outcome:
        return self.ask(*dense, **terms).result(SOON_S)

    def wait_until_accepted(self, requests: int) -> None:
        wait_for(lambda: self.engine.stats().requests_accepted == requests)


Start = Callable[..., FakeServer]


@contextmanager
def starting(protocol: str) -> Iterator[Start]:
    """Starts servers with options and an asker over one protocol; they end in the end."""
    with ExitStack() as stack:

        def start(**options: Any) -> FakeServer:
            device = FakeSegments()
            engine = Engine.from_segments(device)
            server = stack.enter_context(serving(lambda: engine, **options))
            asker = stack.enter_context(asking(server, protocol))
            stack.callback(device.go_on)
            return FakeServer(device, engine, server, asker)

        yield start
