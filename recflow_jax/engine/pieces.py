"""More samples than the queue holds, scored piece by piece."""

from collections import deque
from collections.abc import Callable

import numpy as np

from recflow_jax.engine.answer import Answer
from recflow_jax.engine.errors import QueueFull
from recflow_jax.engine.prepared import Prepared

PIECES_WAITING = 2


def predict_in_pieces(
    samples: Prepared, size: int, outputs: int, submit: Callable[[Prepared], Answer]
) -> np.ndarray:
    """Scores, float32 [samples, outputs], of pieces of `size` samples, two of them at a time.

    So the device always has the next piece. Where others fill the queue a piece waits for the one
    before it; QueueFull is raised if there is none to wait for.
    """
    scores = np.empty((samples.samples, outputs), np.float32)
    starts = deque(range(0, samples.samples, size))
    waiting: deque[tuple[int, Answer]] = deque()
    try:
        while starts or waiting:
            if starts and len(waiting) < PIECES_WAITING:
                piece = samples.part(starts[0], min(starts[0] + size, samples.samples))
                if (answer := _try(submit, piece, must=not waiting)) is not None:
                    waiting.append((starts.popleft(), answer))
                    continue
            start, answer = waiting.popleft()
            scores[start : start + size] = answer.result()
    finally:
        for _, answer in waiting:
            answer.cancel()
    return scores


def _try(submit: Callable[[Prepared], Answer], piece: Prepared, *, must: bool) -> Answer | None:
    try:
        return submit(piece)
    except QueueFull:
        if must:
            raise
        return None
