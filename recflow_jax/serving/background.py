"""Blocking work beside the event loop."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future


def in_thread[T](function: Callable[[], T], name: str) -> "asyncio.Future[T]":
    """Runs `function` on a thread that keeps no process alive, as an executor's would."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return asyncio.wrap_future(future)
