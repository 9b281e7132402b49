"""A flax.nnx module over a model's parameters, for training with optax."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from recflow_jax.config import QUANTISED, DLRMConfig
from recflow_jax.layout import Layout
from recflow_jax.model import DeviceBatch, Params, forward


def _require_trainable(config: DLRMConfig) -> None:
    """Raises ValueError if `config` has quantised tables or layers."""
    if config.float8_matmuls:
        raise ValueError(
            f"model {config.name!r}: its layers are float8, which cannot be trained: train float "
            "ones and calibrate them"
        )
    for table in config.tables:
        if table.dtype in QUANTISED:
            raise ValueError(
                f"model {config.name!r}: table {table.name!r} is {table.dtype}, which cannot be "
                "trained: train float tables and quantise them when they are loaded"
            )


class DLRM(nnx.Module):
    """The model as a flax.nnx module for training: `model(batch)` gives logits.

    `to_params()` gives the parameters that checkpoints and the engine take. Raises ValueError for
    quantised tables: rounded to 8 bits, they have no gradient.
    """

    def __init__(self, config: DLRMConfig, params: Params):
        _require_trainable(config)
        self.config = config
        self.layout = Layout.of(config)
        self.params = nnx.data(jax.tree.map(nnx.Param, params))

    def __call__(self, batch: DeviceBatch) -> Float[Array, "samples outputs"]:
        return forward(self.to_params(), batch, config=self.config, layout=self.layout)

    def to_params(self) -> Params:
        """The current values, without the nnx boxes."""
        return jax.tree.map(
            lambda p: p[...], self.params, is_leaf=lambda leaf: isinstance(leaf, nnx.Param)
        )
