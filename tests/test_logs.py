"""Log lines: one event each, as JSON for machines and text for people."""

import json
import logging
from collections.abc import Iterator

import pytest

from recflow_jax.serving import logs


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """The loggers that are set up, as they were."""
    loggers = [logging.getLogger(name) for name in ("recflow", "uvicorn", "grpc")]
    before = [(log, log.handlers, log.propagate, log.level) for log in loggers]
    yield
    for log, log.handlers, log.propagate, level in before:
        log.setLevel(level)


def test_json_has_one_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("info", "json")
    log = logging.getLogger("recflow.serving")
    log.debug("not told")
    log.info("listening", extra={"http_port": 8000})
    try:
        raise ValueError("broken\nin two lines")
    except ValueError:
        log.exception("request failed")
    first, second = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert first.pop("time").endswith("+00:00")
    assert first == {
        "level": "info",
        "logger": "recflow.serving",
        "event": "listening",
        "http_port": 8000,
    }
    assert second["level"] == "error" and "ValueError: broken" in second["traceback"]


def test_text_is_the_same_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("debug", "text")
    logging.getLogger("recflow.serving").debug("request", extra={"outcome": "ok"})
    assert capsys.readouterr().err.partition(" ")[2] == "debug request outcome=ok\n"


def test_of_libraries_only_warnings_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("debug", "text")
    logging.getLogger("uvicorn.error").info("started")
    assert capsys.readouterr().err == ""
