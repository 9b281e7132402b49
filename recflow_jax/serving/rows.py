"""Rows of tables that clients change."""

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from typing import Any

import numpy as np

from recflow_jax.batch import InputError
from recflow_jax.engine.errors import DeadlineExceeded, EngineClosed
from recflow_jax.serving.background import in_thread
from recflow_jax.serving.failures import Forbidden
from recflow_jax.serving.model import ServedModel
from recflow_jax.serving.served import ServedHere
from recflow_jax.serving.tensors import require

IDS, VALUES = "ids", "values"


async def update(
    current: Callable[[], ServedModel],
    table: str,
    tensors: Mapping[str, np.ndarray],
    *,
    timeout_s: float,
) -> dict[str, Any]:
    """Writes the rows into the model that is current, and says how many into which version.

    Raises InputError, Forbidden, DeadlineExceeded and what `Engine.update_rows` does.
    """
    try:
        async with asyncio.timeout(timeout_s):
            model, done = await _accepted(current, table, tensors)
            await asyncio.wrap_future(done)
    except TimeoutError:
        raise DeadlineExceeded(
            f"the rows were not written within {1000 * timeout_s:.3f} ms; they may be later"
        ) from None
    return {"model_name": model.name, "model_version": model.version, "rows": len(tensors[IDS])}


async def _accepted(
    current: Callable[[], ServedModel], table: str, tensors: Mapping[str, np.ndarray]
) -> tuple[ServedModel, "Future[None]"]:
    """Checking takes the time of a thread, in which another model may have become current."""
    while True:
        model = current()
        engine = model.engine
        if not (isinstance(engine, ServedHere) and engine.options.update_sizes):
            raise Forbidden("rows are not to be changed here (--row-updates allows it)")
        ids, values = _rows(tensors)
        try:
            updating = partial(engine.update_rows, table, ids, values)
            return model, await in_thread(updating, "recflow-rows")
        except EngineClosed:
            if current() is model:
                raise


def _rows(tensors: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    for name in tensors.keys() - {IDS, VALUES}:
        raise InputError(f"input {name!r} is neither {IDS!r} nor {VALUES!r}")
    ids = require(tensors, IDS, kind="i", shape=(None,))
    return ids, require(tensors, VALUES, kind="f", shape=(None, None))
