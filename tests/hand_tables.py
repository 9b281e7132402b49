"""Profile tables of round numbers."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from scheduling import ProfileKey, ProfileRow, ProfileTable


def row(key: ProfileKey, us: float, launch_us: float = 0) -> ProfileRow:
    times: dict[str, Any] = {"median_us": us, "p10_us": us, "p90_us": us, "samples": 1}
    times["launch_us"] = launch_us
    return ProfileRow(**asdict(key), **times)


def table(rows: Sequence[ProfileRow], **names: Any) -> ProfileTable:
    texts: dict[str, Any] = dict.fromkeys(
        ("device", "backend", "model", "fingerprint", "created"), "x"
    )
    return ProfileTable(**texts | names, versions={}, rows=tuple(rows))
