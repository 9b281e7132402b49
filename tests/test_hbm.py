"""What ncu writes is read whatever its units, and why nothing was counted is said."""

import stat
from pathlib import Path

import pytest

import small_models as models
from recflow_jax.measure.hbm import (
    BYTES,
    PEAK_PCT,
    TIME,
    HbmTraffic,
    NotCounted,
    count_hbm,
    hbm_use,
    read_csv,
)

HEADER = f'"ID","Process ID","Kernel Name","Block Size","{BYTES}","{PEAK_PCT}","{TIME}"'
CSV = f"""==PROF== Connected to process 7 (/usr/bin/python3.12)
==PROF== Profiling "mlp_layer_kernel" - 0: 0%....50%....100% - 1 pass
==PROF== Disconnected from process 7
{HEADER}
"","","","","byte","%","ns"
"0","7","mlp_layer_kernel","(384, 1, 1)","40,000,000","20.5","20,000"
"1","7","void cublas<1, 2>(float, int)","(128, 1, 1)","10000000","60.5","5000.0"
"2","7","wrapped_cbrt","(128, 1, 1)","8192","1","1000"
"3","7","mlp_layer_with_gather_kernel","(640, 1, 1)","90,000,000","75","30,000"
==WARNING== something else
"""


def test_kernels_before_and_behind_the_boundary_are_added_up() -> None:
    use = hbm_use(read_csv(CSV.splitlines()))
    assert (len(use.dnn.kernels), use.dnn.dram_bytes, use.dnn.us) == (2, 50e6, 25.0)
    assert use.dnn.peak_pct == pytest.approx((20.5 * 20 + 60.5 * 5) / 25)
    assert use.dnn.tb_per_s == pytest.approx(2.0)
    assert (len(use.co_run.kernels), use.co_run.tb_per_s) == (1, pytest.approx(3.0))


@pytest.mark.parametrize(
    ("bytes_unit", "time_unit", "number", "time"),
    [("byte", "nsecond", "40,000,000", "20,000"), ("Mbyte", "usecond", "40", "20"),
     ("Kbyte", "us", "40,000", "20.0"), ("Gbyte", "ms", "0.04", "0.02")],
)  # fmt: skip
def test_units_are_those_of_the_row_below_the_header(
    bytes_unit: str, time_unit: str, number: str, time: str
) -> None:
    units = f'"","","","","{bytes_unit}","%","{time_unit}"'
    row = f'"0","7","k","(1, 1, 1)","{number}","50","{time}"'
    (kernel,) = read_csv([HEADER, units, row])
    assert (kernel.name, kernel.peak_pct) == ("k", 50)
    assert (kernel.dram_bytes, kernel.us) == pytest.approx((40e6, 20))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "ncu wrote no Kernel Name"),
        ("==WARNING== No kernels were profiled.", "ncu wrote no Kernel Name"),
        (CSV.replace(TIME, "other"), f"ncu wrote no {TIME}"),
        (CSV.replace('"%","ns"', '"%","hours"'), "ncu counts time in 'hours'"),
        (CSV.replace('"byte"', '"sector"'), "ncu counts bytes in 'sector'"),
        (CSV.replace('"8192"', '"n/a"'), "ncu wrote 'n/a', not a number"),
        (CSV.replace("wrapped_cbrt", "loop"), "0 of 4 kernels are the boundary"),
        (CSV.replace("mlp_layer_with_gather_kernel", "cbrt"), "2 of 4 kernels are the boundary"),
        (HEADER, "0 of 0 kernels are the boundary"),
    ],
)
def test_what_cannot_be_read_is_said(text: str, reason: str) -> None:
    with pytest.raises(NotCounted, match=reason):
        hbm_use(read_csv(text.splitlines()))


def test_no_kernels_are_no_traffic() -> None:
    with pytest.raises(NotCounted, match="counted no kernel"):
        HbmTraffic(kernels=[])


def count() -> None:
    count_hbm(models.DCN, batch=8, ride="deep/all", ids="uniform", seed=3)


def pretend(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An `ncu` on PATH that is this shell script."""
    program = folder / "ncu"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_without_ncu_nothing_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotCounted, match="ncu is not on PATH"):
        count()


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo '==ERROR== ERR_NVGPUCTRPERM'; exit 1", "ended with 1: ==ERROR== ERR_NVGPUCTRPERM$"),
        ("exit 2", "ended with 2: nothing was said"),
        ("echo 'no such device' >&2; exit 9", "ended with 9: no such device"),
        ('for log; do case $log in *.csv) break;; esac; done; echo "==ERROR== no" > "$log"', "no$"),
    ],
)
def test_why_ncu_failed_is_said(
    script: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(tmp_path, script, monkeypatch)
    with pytest.raises(NotCounted, match=reason):
        count()


def test_what_ncu_logs_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Called with a log and with the launches of the same model, which is read back."""
    (tmp_path / "csv").write_text(CSV)
    script = f'for log; do case $log in *.csv) break;; esac; done; cat {tmp_path}/csv > "$log"\n'
    script += f'echo "$@" > {tmp_path}/called; for a; do case $a in *.toml) cat "$a";; esac; done'
    pretend(tmp_path, f"{script} > {tmp_path}/model.toml", monkeypatch)
    use = count_hbm(models.DCN, batch=8, ride="deep/all", ids="uniform", seed=3)
    assert use.dnn.dram_bytes == 50e6
    called = (tmp_path / "called").read_text()
    assert called.endswith(" 8 deep/all uniform 3\n") and "--profile-from-start off" in called
    assert type(models.DCN).load(tmp_path / "model.toml") == models.DCN
