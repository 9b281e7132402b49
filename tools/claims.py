"""The ledger of measured claims: `python -m tools.claims check`, `write` and `commands`.

benchmarks/claims.toml says what is claimed, what was demanded and which number of which results
file it rests on. `check` finds every claim that differs from its results and every README table
that differs from the ledger; `write` makes the README's tables anew; `commands` prints what makes
all results again, each command once.
"""

import argparse
import dataclasses
import datetime
import json
import math
import re
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LEDGER = "benchmarks/claims.toml"
RESULTS = "benchmarks/results"
README = "README.md"

TABLE = re.compile(r"(<!-- claims: (\S+) -->\n)(.*?)(<!-- end of claims -->)", re.DOTALL)
STEP = re.compile(
    r"\.?(?P<key>[^.\[\]]+)|\[(?P<index>\d+)\]|\[(?P<name>[^=\]]+)=(?P<value>[^\]]+)\]"
)
HEADER = "| claim | measured | target | met | device, date | made by |\n|---|---|---|---|---|---|\n"


class ClaimError(ValueError):
    """A claim that does not hold as it is written; the message names it."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One measured number and the one demanded, in `unit`.

    results: a file of benchmarks/results; source: where in it the value stands, see `look_up`.
    group: which of the README's tables shows it.
    """

    id: str
    claim: str
    value: float
    target: float
    better: str  # "lower" or "higher"
    unit: str
    command: str
    results: str
    source: str
    device: str
    date: datetime.date
    group: str = "all"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            kinds: Any = (float, int) if field.type is float else field.type
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, kinds):
                raise ClaimError(f"claim {self.id!r}: {field.name} is {value!r}")
        if self.better not in ("lower", "higher"):
            raise ClaimError(f"claim {self.id!r}: better is {self.better!r}, not lower or higher")

    @property
    def met(self) -> bool:
        """Whether the value is at least as good as the target."""
        return self.value >= self.target if self.better == "higher" else self.value <= self.target


def read_ledger(path: Path) -> tuple[Claim, ...]:
    """The claims of a ledger file. Raises ClaimError, naming claim and field."""
    data = tomllib.loads(path.read_text())
    if unknown := sorted(set(data) - {"claim"}):
        raise ClaimError(f"{path.name}: has no entry {', '.join(unknown)}, only [[claim]]")
    claims = tuple(_read_claim(entry) for entry in data.get("claim", []))
    ids = [claim.id for claim in claims]
    if twice := sorted({name for name in ids if ids.count(name) > 1}):
        raise ClaimError(f"{path.name}: claim {twice[0]!r} stands there twice")
    return claims


def _read_claim(entry: dict[str, Any]) -> Claim:
    try:
        return Claim(**entry)
    except TypeError as error:
        raise ClaimError(f"claim {entry.get('id')!r}: {error}") from error


def look_up(results: Any, source: str) -> Any:
    """What stands at `source`, as in `rows[batch=4096][mode=offline].ratio` or `rows[0].ratio`.

    [name=value] takes the one element of a list whose field of that name reads so. Raises
    ClaimError where there is none, or more than one.
    """
    place = 0
    while place < len(source):
        step = STEP.match(source, place)
        if step is None:
            raise ClaimError(f"{source!r} cannot be read from {source[place:]!r} on")
        # Several conditions in a row narrow the same list down.
        narrows = source.startswith("[", step.end()) and step["name"] is not None
        results = _take(results, step, narrows=narrows)
        place = step.end()
    return results


def _take(results: Any, step: re.Match[str], *, narrows: bool) -> Any:
    if step["name"] is not None:
        return _select(results, step, narrows=narrows)
    key = step["key"] if step["index"] is None else int(step["index"])
    try:
        return results[key]
    except (LookupError, TypeError):
        raise ClaimError(f"nothing stands at {step[0]!r}") from None


def _select(results: Any, step: re.Match[str], *, narrows: bool) -> Any:
    if not isinstance(results, list):
        raise ClaimError(f"{step[0]!r} selects from a list, not from {type(results).__name__}")
    found = [item for item in results if str(item.get(step["name"])) == step["value"]]
    if narrows:
        return found
    if len(found) != 1:
        raise ClaimError(f"{len(found)} elements fit {step[0]!r}, not one")
    return found[0]


def check_claim(claim: Claim, root: Path) -> None:
    """Raises ClaimError if `claim` says something else than its results file."""
    path = root / RESULTS / claim.results
    if not path.is_file():
        raise ClaimError(f"claim {claim.id!r}: no file {RESULTS}/{claim.results}")
    results = json.loads(path.read_text())
    try:
        found = look_up(results, claim.source)
    except ClaimError as error:
        raise ClaimError(f"claim {claim.id!r}: {claim.results}: {error}") from error
    if not _is_rounded(claim.value, found):
        raise ClaimError(f"claim {claim.id!r}: value is {claim.value}, {claim.results} has {found}")
    measured_on = results.get("device") if isinstance(results, dict) else None
    if isinstance(measured_on, str) and measured_on != claim.device:
        raise ClaimError(f"claim {claim.id!r}: device is {claim.device!r}, not {measured_on!r}")


def _is_rounded(value: float, found: Any) -> bool:
    """Whether `value` is the number `found`, rounded to no fewer than three significant digits."""
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        return False
    return any(float(f"{found:.{digits}g}") == value for digits in range(3, 18))


def with_tables(text: str, claims: Sequence[Claim]) -> str:
    """`text` with the table between each pair of markers made from `claims`.

    <!-- claims: GROUP --> starts the table of one group. Raises ClaimError if a claim has no table.
    """
    shown = {match[2] for match in TABLE.finditer(text)}
    for claim in claims:
        if claim.group not in shown:
            raise ClaimError(f"claim {claim.id!r}: {README} has no <!-- claims: {claim.group} -->")

    def table(match: re.Match[str]) -> str:
        return match[1] + _table([c for c in claims if c.group == match[2]]) + match[4]

    return TABLE.sub(table, text)


def _table(claims: Sequence[Claim]) -> str:
    """A row for each, and below the commands that made them, by the numbers in the rows."""
    if not claims:
        return "Not measured yet.\n"
    commands = _commands(claims)
    rows = [_row(claim, commands.index(claim.command) + 1) for claim in claims]
    made_by = [f"{number}. `{command}`\n" for number, command in enumerate(commands, start=1)]
    return "".join([HEADER, *rows, "\nMade by\n\n", *made_by])


def _quantity(number: float, unit: str) -> str:
    """The number and its unit; rates from 10^12 a second on in tera."""
    if unit.endswith("/s") and number >= 1e12:
        number, unit = number / 1e12, f"T{unit}"
    return f"{number:g} {unit}".rstrip()


def _row(claim: Claim, command: int) -> str:
    bound = "at least" if claim.better == "higher" else "at most"
    cells = (
        claim.claim,
        _quantity(claim.value, claim.unit),
        f"{bound} {_quantity(claim.target, claim.unit)}",
        "yes" if claim.met else "**no**",
        f"{claim.device}, {claim.date}",
        f"({command})",
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def check(root: Path) -> list[str]:
    """What is wrong with the ledger or the README's tables under `root`, one line each."""
    try:
        claims = read_ledger(root / LEDGER)
    except ValueError as error:
        return [str(error)]
    problems = [problem for claim in claims if (problem := _problem(claim, root))]
    text = (root / README).read_text()
    try:
        if with_tables(text, claims) != text:
            problems.append(f"{README}: its tables differ from the ledger (tools.claims write)")
    except ClaimError as error:
        problems.append(str(error))
    return problems


def _problem(claim: Claim, root: Path) -> str | None:
    try:
        check_claim(claim, root)
    except ValueError as error:
        return str(error)
    return None


def write(root: Path) -> None:
    """Makes the README's tables under `root` from the ledger."""
    path = root / README
    path.write_text(with_tables(path.read_text(), read_ledger(root / LEDGER)))


def commands(root: Path) -> list[str]:
    """The commands that made the results, in the ledger's order, each once."""
    return _commands(read_ledger(root / LEDGER))


def _commands(claims: Sequence[Claim]) -> list[str]:
    return list(dict.fromkeys(claim.command for claim in claims))


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Runs `check`, `write` or `commands`; 1 if something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tools.claims", description=__doc__)
    parser.add_argument("action", choices=("check", "write", "commands"))
    action = parser.parse_args(arguments).action
    if action == "write":
        write(root)
    if action == "commands":
        print(*commands(root), sep="\n")
    problems = check(root)
    for problem in problems:
        print(f"tools.claims: error: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
