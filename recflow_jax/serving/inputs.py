"""Which tensors a model takes and gives, and how those of a request become its samples."""

import numpy as np

from recflow_jax.batch import InputError, JaggedBatch
from recflow_jax.config import DLRMConfig
from recflow_jax.serving.bags import PackedBags
from recflow_jax.serving.packed import PackedForm, Tensors
from recflow_jax.serving.plain import PlainForm
from recflow_jax.serving.tensors import TensorSpec, require

DENSE = "dense"
SCORES = "scores"


class ModelInputs:
    """The tensors of one model; a request has at most `max_samples` with `max_ids_in_all` ids, a
    sample `max_ids`.

    `dense` [n, dense_width], and ids in one of two forms: see `packed` and `plain`.
    """

    def __init__(
        self, config: DLRMConfig, *, max_samples: int, max_ids: int, max_ids_in_all: int
    ) -> None:
        self._config = config
        self._max_samples = max_samples
        self._max_ids = max_ids
        self._max_ids_in_all = max_ids_in_all
        self._packed = PackedForm(config)
        reserved = {DENSE, *(spec.name for spec in self._packed.specs)}
        self._plain = PlainForm(config, reserved)
        self._packed_names = reserved - {DENSE}
        self._plain_names = {f.name for f in config.features} if self._plain.possible else set()

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """All tensors that a request may have."""
        shape = (-1, self._config.dense_width)
        dense = [TensorSpec(name=DENSE, datatype="FP32", shape=shape)] if shape[1] else []
        return (*dense, *self._packed.specs, *self._plain.specs)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What an answer has."""
        shape = (-1, self._config.outputs)
        return (TensorSpec(name=SCORES, datatype="FP32", shape=shape),)

    def batch(self, tensors: Tensors) -> JaggedBatch:
        """The samples of a request, whose ids and numbers the engine will check.

        Raises InputError for tensors that are missing, unknown or of wrong shapes, and for lengths
        that are not those of the ids.
        """
        form = self._form(tensors)
        dense = self._dense(tensors)
        samples = form.samples(tensors) if dense is None else len(dense)
        if samples > self._max_samples:
            raise InputError(f"{samples} samples, a request may have {self._max_samples}")
        if dense is None:
            dense = np.zeros((samples, 0), np.float32)
        bags = form.bags(tensors, samples) if self._config.features else _no_bags(samples)
        self._check_ids(bags)
        return bags.batch(dense)

    def _form(self, tensors: Tensors) -> PackedForm | PlainForm:
        dense = {DENSE} if self._config.dense_width else set()
        ids = tensors.keys() - dense
        if ids <= self._packed_names:
            return self._packed
        if ids <= self._plain_names:
            return self._plain
        known = self._packed_names | self._plain_names
        for name in sorted(ids - known):
            raise InputError(f"input {name!r} is not one of the model's")
        raise InputError("ids come packed or one tensor per feature, not both")

    def _dense(self, tensors: Tensors) -> np.ndarray | None:
        if not self._config.dense_width:
            return None
        return require(tensors, DENSE, kind="f", shape=(None, self._config.dense_width))

    def _check_ids(self, bags: PackedBags) -> None:
        """Before the ids are laid out: a user's long bag, given to all, could fill the memory."""
        ids = bags.lengths.sum(axis=0)
        if ids.max(initial=0) > self._max_ids:
            s = int(ids.argmax())
            raise InputError(f"sample {s} has {ids[s]} ids in all, more than {self._max_ids}")
        if ids.sum() > self._max_ids_in_all:
            raise InputError(
                f"{ids.sum()} ids, the user's counted for every sample: a request may have "
                f"{self._max_ids_in_all}"
            )


def _no_bags(samples: int) -> PackedBags:
    return PackedBags.packed(np.zeros(0, np.int32), np.zeros((0, samples), np.int64))
