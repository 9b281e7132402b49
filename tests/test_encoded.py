"""Requests encoded ahead are those that clients would make bag by bag."""

import numpy as np
import pytest

from recflow_jax.config import DLRMConfig
from recflow_jax.measure.encoded import packed_tensors
from request_tensors import packed, request
from small_models import CONCAT, DOT, NO_DENSE, NO_SPARSE


@pytest.mark.parametrize("config", [CONCAT, DOT, NO_DENSE], ids=lambda config: config.name)
@pytest.mark.parametrize("samples", [1, 7])
def test_ids_come_feature_by_feature(config: DLRMConfig, samples: int) -> None:
    batch = request(config, samples, seed=1)
    expected, found = packed(config, batch), packed_tensors(batch)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, strict=True)


def test_without_sparse_features_dense_ones_come_alone() -> None:
    assert packed_tensors(request(NO_SPARSE, 3, seed=1)).keys() >= {"dense"}
