"""What a server serves: an `Engine` of this process, or a `FrontEnd` of another one's.

Both by what they can do: a server of another process's engine loads no JAX, and so must not import
`Engine`.
"""

from concurrent.futures import Future
from typing import Any, Protocol, runtime_checkable

from recflow_jax.config import DLRMConfig
from recflow_jax.engine.answer import Answer
from recflow_jax.engine.options import EngineOptions


@runtime_checkable
class Served(Protocol):
    """What both can."""

    @property
    def config(self) -> DLRMConfig:
        """The model."""
        ...

    @property
    def max_queued_samples(self) -> int:
        """Accepted and not yet answered, at most."""
        ...

    @property
    def max_ids_per_sample(self) -> int:
        """Of all features together, at most."""
        ...

    @property
    def backend_name(self) -> str:
        """Which kernels run."""
        ...

    def submit(self, dense: Any, *, deadline_ms: float | None = None, priority: int = 0) -> Answer:
        """See `Engine.submit`."""
        ...

    def stats(self) -> Any:
        """Counts: EngineStats or FrontEndStats."""
        ...

    def close(self, drain: bool = True) -> None:
        """See `Engine.close`."""
        ...


@runtime_checkable
class ServedHere(Served, Protocol):
    """What an engine of this process can."""

    @property
    def options(self) -> EngineOptions:
        """What it was told."""
        ...

    def update_rows(self, table: str, ids: Any, values: Any) -> Future[None]:
        """See `Engine.update_rows`."""
        ...
