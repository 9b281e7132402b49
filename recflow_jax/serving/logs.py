"""What the server writes to stderr: one event a line, as JSON or, for people, as text."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Literal

LogFormat = Literal["json", "text"]
LogLevel = Literal["debug", "info", "warning", "error"]

_STANDARD = {*vars(logging.makeLogRecord({})), "message", "asctime", "color_message"}


class _Lines(logging.Formatter):
    """Time, level, logger and message, then whatever was given as `extra`."""

    def __init__(self, style: LogFormat) -> None:
        super().__init__()
        self._json = style == "json"

    def format(self, record: logging.LogRecord) -> str:
        """One line; a traceback is a field of it, or follows as text."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        extra = {name: value for name, value in vars(record).items() if name not in _STANDARD}
        trace = self.formatException(record.exc_info) if record.exc_info else None
        if self._json:
            head = {"time": time, "level": record.levelname.lower(), "logger": record.name}
            fields = {**head, "event": record.getMessage(), **extra}
            return json.dumps({**fields, "traceback": trace} if trace else fields, default=str)
        words = [time, record.levelname.lower(), record.getMessage()]
        line = " ".join([*words, *(f"{name}={value}" for name, value in extra.items())])
        return f"{line}\n{trace}" if trace else line


def set_up(level: LogLevel, style: LogFormat | None) -> None:
    """Sends the server's log and its libraries' to stderr. style None: text on a terminal."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines(style or ("text" if sys.stderr.isatty() else "json")))
    for name, own in {"recflow": level, "uvicorn": "warning", "grpc": "warning"}.items():
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(own.upper())
