"""What front ends in processes of their own do, which load no more than a caller has to."""

from pathlib import Path
from typing import Any

from recflow_jax.batch import JaggedBatch
from recflow_jax.remote.front_end import FrontEnd

PATIENCE_S = 60


def ask(path: Path, requests: list[JaggedBatch], found: Any) -> None:
    """Puts what the engine has for these, as lists, in `found`."""
    with FrontEnd(path) as front_end:
        answers = [front_end.submit(request) for request in requests]
        found.put([answer.result(PATIENCE_S).tolist() for answer in answers])


def ask_for_ever(path: Path, request: JaggedBatch) -> None:
    """One after the other."""
    with FrontEnd(path) as front_end:
        while True:
            front_end.submit(request).result(PATIENCE_S)
