"""The ledger cannot say something else than the results, nor the README than the ledger."""

import json
from pathlib import Path

import pytest

from tools import claims

LEDGER = """
[[claim]]
id = "gather"
group = "kernels"
claim = "The gather alone"
value = 2.72
target = 2.4
better = "higher"
unit = "TB/s"
command = "recflow bench kernels --kernel gather"
results = "gather.json"
source = "rows[batch=4096].tb_s"
device = "NVIDIA H100 80GB HBM3"
date = 2026-01-31
"""
RESULTS = {
    "device": "NVIDIA H100 80GB HBM3",
    "rows": [{"batch": 256, "tb_s": 1.5}, {"batch": 4096, "tb_s": 2.7184}],
}
README = "before\n<!-- claims: kernels -->\n<!-- end of claims -->\nafter\n"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose one claim holds and whose README has been written."""
    (tmp_path / claims.RESULTS).mkdir(parents=True)
    (tmp_path / claims.LEDGER).write_text(LEDGER)
    (tmp_path / claims.RESULTS / "gather.json").write_text(json.dumps(RESULTS))
    (tmp_path / claims.README).write_text(README)
    claims.write(tmp_path)
    return tmp_path


def change_ledger(checkout: Path, old: str, new: str) -> None:
    path = checkout / claims.LEDGER
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def test_a_ledger_that_fits_its_results_passes(checkout: Path) -> None:
    assert claims.check(checkout) == []


def test_the_table_shows_value_target_and_command(checkout: Path) -> None:
    text = (checkout / claims.README).read_text()
    assert text.startswith("before\n<!-- claims: kernels -->\n| claim |")
    assert (
        "| The gather alone | 2.72 TB/s | at least 2.4 TB/s | yes "
        "| NVIDIA H100 80GB HBM3, 2026-01-31 | (1) |\n\n"
        "Made by\n\n1. `recflow bench kernels --kernel gather`\n"
        "<!-- end of claims -->\nafter\n"
    ) in text


def test_each_row_names_its_command_by_number(checkout: Path) -> None:
    def named(name: str, command: str) -> str:
        return LEDGER.replace('"gather"', f'"{name}"').replace("--kernel gather", command)

    claimed = [LEDGER, named("dense", "--kernel dense"), named("again", "--kernel gather")]
    (checkout / claims.LEDGER).write_text("".join(claimed))
    claims.write(checkout)
    text = (checkout / claims.README).read_text()
    rows = [line for line in text.splitlines() if line.startswith("| The gather")]
    assert [row.split(" | ")[-1] for row in rows] == ["(1) |", "(2) |", "(1) |"]
    assert "2. `recflow bench kernels --kernel dense`\n<!-- end" in text


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("value = 2.72", "value = 2.73", "value is 2.73, gather.json has 2.7184"),
        ("value = 2.72", "value = 2.7", "value is 2.7, gather.json has 2.7184"),
        ("value = 2.72", 'value = "2.72"', "value is '2.72'"),
        ("4096", "512", "0 elements fit '[batch=512]', not one"),
        (".tb_s", ".gb_s", "nothing stands at '.gb_s'"),
        (".tb_s", "", "has {'batch': 4096, 'tb_s': 2.7184}"),
        ('"gather.json"', '"gone.json"', "no file benchmarks/results/gone.json"),
        ('"NVIDIA H100 80GB HBM3"', '"NVIDIA H200"', "device is 'NVIDIA H200', not 'NVIDIA H100"),
        ('"higher"', '"more"', "better is 'more'"),
        ("date = 2026-01-31", 'date = "soon"', "date is 'soon'"),
        ('unit = "TB/s"\n', "", "unit"),
        ('unit = "TB/s"', 'unit = "TB/s"\nnote = "x"', "note"),
        ("[[claim]]", "[[claims]]", "has no entry claims"),
        ('"kernels"', '"engine"', "README.md has no <!-- claims: engine -->"),
        ("target = 2.4", "target = 3", "tables differ from the ledger"),
    ],
)
def test_every_drift_is_found(checkout: Path, old: str, new: str, problem: str) -> None:
    change_ledger(checkout, old, new)
    found = claims.check(checkout)
    assert any(problem in line for line in found), found


def test_two_claims_of_one_id_are_refused(checkout: Path) -> None:
    change_ledger(checkout, LEDGER, LEDGER + LEDGER)
    assert claims.check(checkout) == ["claims.toml: claim 'gather' stands there twice"]


def test_a_missed_target_is_shown_as_missed(checkout: Path) -> None:
    change_ledger(checkout, "target = 2.4", "target = 3")
    claims.write(checkout)
    assert claims.check(checkout) == []
    assert "| at least 3 TB/s | **no** |" in (checkout / claims.README).read_text()


def test_rates_of_a_trillion_and_more_are_shown_in_tera(checkout: Path) -> None:
    change_ledger(checkout, "target = 2.4", "target = 2.4e12")
    change_ledger(checkout, '"TB/s"', '"B/s"')
    claims.write(checkout)
    assert "| 2.72 B/s | at least 2.4 TB/s |" in (checkout / claims.README).read_text()


@pytest.mark.parametrize(("target", "met"), [("2.72", "yes"), ("2.71", "**no**")])
def test_lower_can_be_better(checkout: Path, target: str, met: str) -> None:
    change_ledger(checkout, "target = 2.4", f"target = {target}")
    change_ledger(checkout, '"higher"', '"lower"')
    claims.write(checkout)
    assert f"| at most {target} TB/s | {met} |" in (checkout / claims.README).read_text()


def test_an_empty_ledger_is_legal(checkout: Path) -> None:
    (checkout / claims.LEDGER).write_text("# none yet\n")
    claims.write(checkout)
    assert claims.check(checkout) == []
    assert "Not measured yet." in (checkout / claims.README).read_text()


def test_look_up_narrows_and_indexes() -> None:
    rows = [{"batch": 1, "mode": "a", "v": [5, 6]}, {"batch": 1, "mode": "b", "v": [7, 8]}]
    assert claims.look_up({"x": {"rows": rows}}, "x.rows[batch=1][mode=b].v[1]") == 8
    with pytest.raises(claims.ClaimError, match="2 elements fit"):
        claims.look_up(rows, "[batch=1].v")
    with pytest.raises(claims.ClaimError, match="cannot be read from"):
        claims.look_up(rows, "[0]]")


def test_exit_codes(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert claims.main(["check"], checkout) == 0
    change_ledger(checkout, "value = 2.72", "value = 2.8")
    assert claims.main(["check"], checkout) == 1
    assert "tools.claims: error: claim 'gather': value is 2.8" in capsys.readouterr().err


def test_each_command_is_printed_once(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = LEDGER.replace('id = "gather"', 'id = "gather again"')
    (checkout / claims.LEDGER).write_text(LEDGER + again)
    claims.write(checkout)
    assert claims.main(["commands"], checkout) == 0
    assert capsys.readouterr().out == "recflow bench kernels --kernel gather\n"


def test_this_projects_own_ledger_holds() -> None:
    assert claims.check(claims.ROOT) == []
