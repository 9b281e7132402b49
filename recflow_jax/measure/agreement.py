"""Answers first: contenders that disagree are not timed."""

from collections.abc import Mapping
from functools import partial

import jax
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from recflow_jax import model
from recflow_jax.batch import JaggedBatch
from recflow_jax.config import DLRMConfig
from recflow_jax.layout import Layout
from recflow_jax.measure.contenders import Contender, device_batches
from recflow_jax.model import DeviceBatch, Params

CHECKED_SAMPLES = 64

TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 2e-1, "float8_e4m3fn": 9e-1}
"""Largest difference from the float32 reference, as a share of the standard deviation of its
scores. float32: sums in another order. 16 bit: every layer rounds to 11 bits (float16) or
8 (bfloat16), and a contender may round in other places than the next one: eager torch, which
rounds after every operation, was 0.11 off on one of 256 samples of dlrm-v2. float8: operands of
4 bits; dlrm-v2's scores are 0.12 off in the root mean square, 0.6 on the worst of a thousand
samples. Scores of another sample are 1.4 off in the mean.
"""

MEAN_SHARE = 1 / 3
"""Of the tolerance, what the root mean square of the differences may be."""

Scores = Float[np.ndarray, "samples outputs"]


class WrongAnswers(RuntimeError):
    """A contender whose scores are not the model's: who, on which sample, by how much."""


def reference_scores(
    config: DLRMConfig, params: Params, batch: JaggedBatch, *, samples: int = CHECKED_SAMPLES
) -> Scores:
    """float32 scores of the first `samples` samples by the reference in full precision."""
    head = batch.part(0, min(samples, batch.samples))
    exact = config.with_dtypes(compute="float32")
    layout = Layout.of(exact)
    ids = 1 << max(len(head.values) - 1, 0).bit_length()  # few shapes, few compilations
    (inputs,) = device_batches(layout, [head], ids=ids)
    return np.asarray(_reference(params, inputs, exact, layout))


@partial(jax.jit, static_argnums=(2, 3))
def _reference(params: Params, batch: DeviceBatch, config: DLRMConfig, layout: Layout) -> Array:
    return model.forward(
        params, batch, config=config, layout=layout, precision=lax.Precision.HIGHEST
    )


def check_answers(
    reference: Float[np.ndarray, "checked outputs"],
    answers: Mapping[str, Scores],
    *,
    dtype: str,
) -> dict[str, float]:
    """The largest error of each contender: over the samples that `reference` has from it, over
    the others from the first contender; as a share of the reference's standard deviation.

    Raises WrongAnswers beyond TOLERANCES[dtype], for a root mean square beyond MEAN_SHARE of it,
    and for scores that are not finite.
    """
    tolerance = TOLERANCES[dtype]
    scale = float(reference.std()) or 1.0
    first = next(iter(answers.values()))
    expected = np.concatenate([reference, first[len(reference) :]])
    errors = {}
    for name, scores in answers.items():
        off = np.abs(scores - expected).max(axis=1) / scale
        worst = int(np.argmax(np.where(np.isfinite(off), off, np.inf)))
        errors[name] = float(off[worst])
        if not errors[name] <= tolerance:
            raise WrongAnswers(
                f"{name} gives {scores[worst]} for sample {worst}, expected {expected[worst]}: "
                f"{errors[name]:.2g} standard deviations off, more than {tolerance:g}"
            )
        mean = float(np.sqrt(np.mean(off**2)))
        if mean > MEAN_SHARE * tolerance:
            raise WrongAnswers(
                f"{name}'s scores are {mean:.2g} standard deviations off in the root mean square, "
                f"more than {MEAN_SHARE * tolerance:.2g}"
            )
    return errors


def checked(
    config: DLRMConfig,
    params: Params,
    sample_set: JaggedBatch,
    contenders: Mapping[str, Contender],
) -> dict[str, float]:
    """`check_answers` of the contenders' scores for their first input set."""
    reference = reference_scores(config, params, sample_set)
    answers = {name: contender.answer(0) for name, contender in contenders.items()}
    return check_answers(reference, answers, dtype=config.compute_dtype)
