"""What a server may be told, and what it is not."""

from pathlib import Path
from typing import Any

import pytest

from recflow_jax.serving.options import ServerOptions


def test_it_listens_on_this_machine_alone_unless_told_otherwise() -> None:
    assert ServerOptions().host == "127.0.0.1"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"http_port": -1}, "http_port is -1"),
        ({"grpc_port": 65536}, "grpc_port is 65536"),
        ({"max_body_bytes": 0}, "max_body_bytes is 0"),
        ({"max_requests": 0}, "max_requests is 0"),
        ({"default_timeout_s": float("inf")}, "default_timeout_s is inf"),
        ({"drain_s": 0}, "drain_s is 0"),
        ({"tls_key": Path("key.pem")}, "a certificate and a key, not one of them"),
        ({"token": ""}, "token is empty or not ASCII"),
        ({"token": "geheim\u00e4"}, "token is empty or not ASCII"),
    ],
)
def test_what_is_wrong_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServerOptions(**options)
