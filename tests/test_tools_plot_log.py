"""plot_log: the curves that are drawn, and that a picture comes out."""

import json

import pytest
from parse_log import parse_text
from plot_log import curves, interpolate, loss_limits, schedule, smooth
from tools_logs import ours, reference_a, reference_b, tool


def test_interpolate_schedule_smooth():
    assert interpolate(5, [0, 10], [1, 2]) == 1.5 and interpolate(-1, [0, 10], [1, 2]) == 1
    assert interpolate(99, [0, 10], [1, 2]) == 2 and interpolate(1, [], []) is None
    config = {"warmdown_frac": 0.85, "min_lr": 0.1}
    assert [schedule(config, f) for f in (0, 0.149, 0.575, 1, 2)] == pytest.approx([1, 1, 0.5, 0.1, 0.1])
    assert schedule({}, 0.5) is None
    assert smooth([3.0] * 9, 2) == pytest.approx([3.0] * 9)
    assert smooth([9.0, 3, 3, 3, 9], 1) == pytest.approx([9, 5, 3, 5, 6])
    ramp = [float(i) for i in range(50)]
    assert smooth(ramp, 5)[:45] == pytest.approx(ramp[:45]), "no lag"


def test_curves_of_our_log_take_the_logged_learning_rate():
    c = curves(parse_text(ours(1)))
    assert [r[0] for r in c["train"]] == [1, 500, 2000, 4500] and c["train"][1] == [500, 48.21, 2.5628]
    assert [r[2] for r in c["lr"]] == [1.0, 1.0, 0.79, 0.1]
    ((step, seconds, loss),) = c["loops"]
    assert step == 2124 and 196.3 < seconds < 548 and 2.2644 < loss < 2.4497


def test_curves_of_reference_logs_compute_it():
    c = curves(parse_text(reference_a()))
    assert len(c["lr"]) == 201 and c["lr"][0][2] == 1.0 and c["lr"][-1][2] == pytest.approx(0.1)
    assert c["val"][-1][1] == pytest.approx(4000 * 786432 / 6599483, rel=1e-3)
    assert len(curves(parse_text(reference_b()))["loops"]) == 2
    low, high = loss_limits([c])
    assert low < 2.4 and high < 3.0, "the first step's loss of 9 does not set the axis"


def test_command_line(tmp_path):
    for name, text in (("a", ours(1)), ("b", reference_b()), ("short", "Hyperparameters:\n  seed: 1\n")):
        (tmp_path / f"{name}.log").write_text(text)
    out = tmp_path / "p.png"
    got = tool("plot_log.py", tmp_path / "a.log", tmp_path / "b.log", "-o", out, "--labels", "A,B", "--json")
    assert got.returncode == 0, got.stderr
    assert out.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and out.stat().st_size > 20_000
    assert [r["label"] for r in json.loads(got.stdout)["runs"]] == ["A", "B"]
    for args, word in (
        ([tmp_path / "short.log", "-o", out], "no loss to draw"),
        ([tmp_path / "a.log", "-o", tmp_path / "p.jpeg"], "suffix"),
        ([tmp_path / "a.log", "-o", tmp_path / "no" / "p.png"], "No such file"),
        ([tmp_path / "a.log", "-o", out, "--labels", "A,B"], "--labels"),
    ):
        got = tool("plot_log.py", *args)
        assert got.returncode == 2 and word in got.stderr and got.stderr.count("\n") == 1, got.stderr
