"""docs/serving.md: its client runs, and it names every metric, limit and way to fail."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from recflow_jax.config import DLRMConfig, FeatureConfig, TableConfig
from recflow_jax.engine.engine import Engine
from recflow_jax.serving.failures import INTERNAL, KINDS
from running_server import RunningServer, serving
from small_models import JAGGED, compiled

TEXT = (Path(__file__).parents[1] / "docs" / "serving.md").read_text()
ROWS = {"user": 943, "age": 7, "gender": 2, "occupation": 21, "zip": 11, "item": 1682, "year": 80}
USER_SIDE = ("user", "age", "gender", "occupation", "zip")

# The demo's model, as far as a request sees it.
MOVIELENS = DLRMConfig(
    name="movielens-100k",
    tables=tuple(TableConfig(name=n, rows=r, dim=4) for n, r in {**ROWS, "genre": 19}.items()),
    features=(
        *(FeatureConfig(name=name, table=name, side="user") for name in USER_SIDE),
        FeatureConfig(name="liked", table="item", pooling="mean", side="user", bag=JAGGED),
        FeatureConfig(name="item", table="item"),
        FeatureConfig(name="year", table="year"),
        FeatureConfig(name="genres", table="genre", pooling="mean", bag=JAGGED),
    ),
    dense_width=17,
    top_mlp=(4, 1),
)


@pytest.fixture
def server() -> Iterator[RunningServer]:
    with serving(lambda: Engine.from_segments(compiled(MOVIELENS))) as server:
        yield server


def test_the_example_runs(server: RunningServer) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names: dict[str, Any] = {}
    exec(example.replace("localhost:8000", server.http_address), names)
    assert names["scores"].shape == (2, 1)


def test_every_way_to_fail_is_in_the_table() -> None:
    rows = set(re.findall(r"^\| (\d{3}) \| ([A-Z_]+) \|", TEXT, re.MULTILINE))
    kinds = {INTERNAL, *KINDS.values()}
    told = {(str(kind.http), kind.grpc.name) for kind in kinds if kind.reason != "cancelled"}
    assert rows == told
