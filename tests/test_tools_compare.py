"""compare: the statistics against scipy and closed forms, the tables, the configuration differences."""

import json
import math
import statistics

import pytest
from compare import Sample, config_differences, differences, welch
from hypothesis import given, settings
from hypothesis import strategies as st
from parse_log import parse_text
from tools_logs import ours, reference_a, reference_b, tool

values = st.lists(st.floats(-100, 100, allow_nan=False), min_size=2, max_size=8)


@settings(max_examples=60, deadline=None)
@given(values, values)
def test_welch_agrees_with_scipy(a, b):
    from scipy.stats import ttest_ind

    sa, sb = Sample.of(a), Sample.of(b)
    assert sa.mean == pytest.approx(statistics.mean(a), abs=1e-9)
    assert sa.sd == pytest.approx(statistics.stdev(a), abs=1e-9)
    if min(sa.sd, sb.sd) < 1e-6:
        return
    ours_, theirs = welch(sa, sb, margin=0.5), ttest_ind(b, a, equal_var=False)
    assert ours_["p"] == pytest.approx(theirs.pvalue, rel=1e-6, abs=1e-12)
    assert ours_["df"] == pytest.approx(theirs.df, rel=1e-6)
    low, high = theirs.confidence_interval(0.95)
    assert [ours_["low"], ours_["high"]] == pytest.approx([low, high], rel=1e-6, abs=1e-9)
    shifted = ttest_ind([x - 0.5 for x in b], a, equal_var=False, alternative="greater")
    assert ours_["p_margin"] == pytest.approx(shifted.pvalue, rel=1e-6, abs=1e-12)


def test_welch_closed_form():
    """Equal n and variance: the pooled test with 2n − 2 = 4 degrees, where p = 1 − x(3 − x²)/2, x = t/√(4 + t²)."""
    w = welch(Sample.of([1, 2, 3]), Sample.of([3, 4, 5]))
    t = 2 / math.sqrt(2 / 3)
    x = t / math.sqrt(4 + t * t)
    assert w["df"] == pytest.approx(4)
    assert w["p"] == pytest.approx(1 - x * (3 - x * x) / 2)
    assert w["se"] == pytest.approx(math.sqrt(2 / 3))


def test_welch_without_spread():
    one, same = Sample.of([1.0]), Sample.of([0.1, 0.1, 0.1])
    assert math.isnan(one.sd) and same.sd == 0 and same.mean == 0.1
    assert welch(one, same) == {"difference": pytest.approx(-0.9)} | dict.fromkeys(
        ("se", "df", "low", "high", "p", "p_margin")
    )
    w = welch(same, Sample.of([0.2, 0.2]), margin=0.05)
    assert (w["p"], w["p_margin"], w["low"]) == (0.0, 0.0, pytest.approx(0.1))
    assert welch(same, same)["p"] == 1.0


def test_rows_and_config_differences():
    a = [parse_text(ours(s, bpb=1.05 + s / 1e5)) for s in (1, 2, 3)]
    b = [parse_text(ours(s, bpb=1.04 + s / 1e5, config={"matrix_lr": 0.028, "new": 1})) for s in (4, 5, 6)]
    rows = {r["name"]: r for r in differences(a, b)}
    assert rows["result_bpb"]["difference"] == pytest.approx(-0.01 + 3e-5)
    assert rows["result_bpb"]["low"] < -0.00997 < rows["result_bpb"]["high"] and rows["result_bpb"]["p"] < 1e-6
    assert rows["artifact_bytes"]["difference"] == 0 and rows["hessians_seconds"]["a"]["mean"] == 3.6
    assert config_differences(a, b) == {
        "data_dir": [["/data/1", "/data/2", "/data/3"], ["/data/4", "/data/5", "/data/6"]],
        "matrix_lr": [[0.026], [0.028]],
        "new": [[None], [1]],
    }


def test_console_output_in_a_folder_is_no_second_run_and_problems_are_shown(tmp_path):
    for s in (1, 2):
        folder = tmp_path / "a" / f"seed{s}"
        folder.mkdir(parents=True)
        (folder / f"seed{s}.txt").write_text(ours(s))
        (folder / "console.txt").write_text("".join(x for x in ours(s).splitlines(True) if x[0] not in " |H"))
    args = f"{tmp_path}/a/seed1", f"{tmp_path}/a/seed2"
    assert [len(json.loads(tool("compare.py", *args, "--json").stdout)[k]) for k in "ab"] == [1, 1]
    twice = tmp_path / "twice.txt"
    twice.write_text(ours(1) + ours(1, bpb=2.0))
    assert f"problem: {twice}: the file holds 2 runs" in tool("compare.py", twice, args[1]).stdout
    assert list(json.loads(tool("compare.py", twice, args[1], "--json").stdout)["problems"]) == [str(twice)]


def test_command_line(tmp_path):
    folder = tmp_path / "b"
    folder.mkdir()
    for s in (1, 2):
        (tmp_path / f"a{s}.log").write_text(ours(s, bpb=1.05 + s / 1e5))
        (folder / f"b{s}.txt").write_text(ours(s, bpb=1.04 + s / 1e5, config={"matrix_lr": 0.028}))
    (folder / "requirements.txt").write_text("numpy\n")
    pair = f"{tmp_path}/a1.log,{tmp_path}/a2.log"
    got = tool("compare.py", pair, folder)
    assert got.returncode == 0, got.stderr
    assert "matrix_lr  0.026" in got.stdout and "-0.010000" in got.stdout and "95% interval" in got.stdout
    data = json.loads(tool("compare.py", pair, folder, "--json").stdout)
    assert len(data["a"]) == len(data["b"]) == 2 and data["config"]["matrix_lr"] == [[0.026], [0.028]]
    (tmp_path / "x.log").write_text(reference_a())
    (tmp_path / "y.log").write_text(reference_b())
    single = tool("compare.py", tmp_path / "x.log", tmp_path / "y.log")
    assert "One run has no spread" in single.stdout and "different tokenisations" in single.stdout
    assert "only A has: caseops_enabled=True" in single.stdout and "NaN" not in single.stdout
    empty = tmp_path / "empty"
    empty.mkdir()
    for bad in ([empty, pair], [pair, tmp_path / "nope.log"], [pair, folder, "--confidence", "2"]):
        got = tool("compare.py", *bad)
        assert got.returncode == 2 and got.stderr.count("\n") == 1, got.stderr
