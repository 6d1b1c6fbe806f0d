"""parse_log: our format, both references', and everything that tries to mislead it."""

import hashlib
import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parse_log import METRICS, LogError, budget_used, config_sha256, config_value, parse, parse_text
from tools_logs import ROOT, SOURCE, ours, reference_a, reference_b, tool

SHARED = Path(os.environ.get("SHARED_LOGS", ROOT.parent / "shared" / "logs"))


def test_ours_gives_every_metric():
    run = parse_text(ours(42, bpb=1.05))
    assert run["seed"] == 42 and run["steps"] == 4835 and run["complete"] and run["format"] == "ours"
    assert run["step_avg_ms"] == pytest.approx(586033 / 4835, abs=1e-3)
    assert run["ttt_bpb"] == 1.05 and run["ttt_loss"] == pytest.approx(1.05 * 2.1885)
    assert run["quantized_bpb"] == 1.06 and run["prequant_bpb"] == 1.052
    assert run["sliding_bpb"] is None and run["sliding_loss"] is None
    assert run["artifact_bytes"] == run["code_bytes"] + run["model_bytes"] == 15_800_017
    assert run["train_seconds"] == 598.12 and run["eval_seconds"] == 423.45
    assert list(run["stages"]) == ["warmup", "train", "hessians", "gptq", "unpack", "eval_ttt"]
    assert list(run["stages"].values()) == [32.345, 586.033, 3.6, 8.4, 2.1, 400.0]
    assert run["coverage"]["ttt"] == [3_560_456, 3_560_456] and run["final"] == "ttt"
    assert run["versions"]["torch"] == "2.11.0" and run["device"] == {"count": 8, "name": "NVIDIA H100 80GB HBM3"}
    assert list(run["sigmas"].values()) == [8.74, 9.25, 12.09] and "blocks.0.attn.c_q.weight" in run["sigmas"]
    assert run["gptq"]["entropy_bytes"] == 15_855_000
    assert run["problems"] == [] and run["violations"] == []
    assert run["series"]["train"][1] == {
        "step": 500, "loss": 2.5628, "minutes": 0.8, "tok_s": 8099629, "seconds": 48.21, "lr_mul": 1.0,
        "grad_norm": 0.12,
    }  # fmt: skip


def test_adapting_without_phases_is_test_time_training_too():
    run = parse_text(ours(42, bpb=1.05).replace("quantized_ttt_phased val_loss", "quantized_ttt val_loss"))
    assert run["ttt_bpb"] == 1.05 and run["final"] == "ttt"


def test_source_dump_is_kept_exactly_and_never_read_as_log_lines():
    run = parse_text(ours(42))
    assert run["source"] == SOURCE and "\x0c" in SOURCE and "\u2028" in SOURCE
    assert run["seed"] == 42 and run["runs_in_log"] == 1
    no_newline = SOURCE.rstrip("\n")
    text = ours(42, source=no_newline + "\n").replace(sha(no_newline + "\n"), sha(no_newline))
    assert parse_text(text)["source"] == no_newline


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_source_dump_that_was_changed_or_cut_is_reported():
    assert "SHA-256" in parse_text(ours(42).replace("stands in", "stood in"))["problems"][0]
    cut = re.sub(r"\| import os\n", "", ours(42))
    assert "source dump has" in parse_text(cut)["problems"][0]
    unfinished = "\n".join(ours(42).split("\n")[:32])
    assert any("source dump has" in p for p in parse_text(unfinished)["problems"])


def test_lines_of_other_processes_inside_the_dump_do_no_harm():
    text = ours(42).replace("| import os\n", "W0430 noise from torchrun\n| import os\n")
    run = parse_text(text)
    assert run["source"] == SOURCE and run["problems"] == []


def test_reference_a():
    run = parse_text(reference_a(7))
    assert run["format"] == "reference" and run["complete"] and run["final"] == "ttt"
    assert (run["steps"], run["train_seconds"], run["eval_seconds"]) == (4800, 596.0, 590.0)
    assert run["step_avg_ms"] == pytest.approx(596000 / 4800, abs=1e-3)
    assert (run["code_bytes"], run["artifact_bytes"]) == (33000, 15833000)
    assert run["stages"]["unpack"] == 40.5 and run["stages"]["hessians"] == 3.5 and run["stages"]["compile"] == 100.0
    assert budget_used(run, "train") == 599.5, "Hessians read training data"
    assert run["sigmas"]["blocks.10.mlp.proj.weight"] == 19.6
    assert run["config"]["artifact_dir"] == "" and run["config"]["caseops_enabled"] is True
    assert run["series"]["train"][1]["seconds"] == pytest.approx(500 * 786432 / 8099629, abs=1e-3)


def test_reference_b():
    run = parse_text(reference_b(7))
    assert run["complete"] and run["final"] == "sliding" and run["ttt_bpb"] is None
    assert run["prequant_bpb"] == 1.088 and run["quantized_bpb"] == 1.0996 and run["sliding_bpb"] == 1.0837
    assert run["code_bytes"] == 80000 and run["artifact_bytes"] == 16_050_000
    assert [(p["name"], p["step"]) for p in run["loops"]] == [("phase1", 2800), ("phase2", 3600)]
    assert run["eval_seconds"] == 83.0 and run["stages"]["eval_sliding"] == 83.0


def test_unfinished_logs_are_not_complete():
    cuts = [(ours(1), "\nrun_complete"), (reference_a(1), "quantized_ttt"), (reference_b(1), "quantized_sliding")]
    for text, cut in cuts:
        assert parse_text(text)["complete"] and not parse_text(text.rsplit(cut, 1)[0])["complete"]
    # killed in the middle of the last number: no truncated result
    text = reference_a(1).split("val_bpb:1.06226000")[0] + "val_bpb:1.06"
    assert parse_text(text)["ttt_bpb"] is None


def test_no_figure_is_null_not_a_guess():
    run = parse_text("Hyperparameters:\n  seed: 3\n10/20 train_loss: 3.5 train_time: 0.1m tok/s: 100\n")
    assert run["seed"] == 3 and run["steps"] == 10
    for key in set(METRICS) - {"seed", "steps", "train_seconds", "step_avg_ms", "stages"}:
        assert run[key] is None, key
    assert run["train_seconds"] == 6.0 and run["stages"] == {}


def test_problems_are_found():
    assert "is not code" in parse_text(ours(1, total_bytes=15_000_000))["problems"][0]
    assert any("holds 2 runs" in p for p in parse_text(ours(1) + ours(2))["problems"])
    assert "σ table" in parse_text(ours(1).replace("sensitivity, 3 tensors", "sensitivity, 4 tensors"))["problems"][0]
    run = parse_text(ours(1) + "3/9 train_loss: nan train_time: 0.1m tok/s: 5\n")
    assert any("train_loss is nan" in p for p in run["problems"])
    assert parse_text(ours(1, extra="budget_violation: train used 601.20 s of 600 s"))["violations"] == [
        "train used 601.20 s of 600 s"
    ]


def test_config_hash_ignores_the_run_and_nothing_else():
    a = parse_text(ours(1))
    assert config_sha256(a) == config_sha256(parse_text(ours(2)))
    assert config_sha256(a) != config_sha256(parse_text(ours(1, config={"matrix_lr": 0.028})))
    assert config_value("1e-08") == 1e-08 and config_value("12") == 12 and config_value("1_000") == "1_000"
    assert config_value("nan") == "nan" and config_value("") == ""


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_damage_is_survived(data):
    """Cut, repeated and shuffled logs never raise, and what is returned is JSON."""
    lines = ours(1).split("\n")
    keep = data.draw(st.lists(st.integers(0, len(lines) - 1), max_size=80))
    text = "\n".join(lines[i] for i in keep)[data.draw(st.integers(0, 30)) :]
    run = parse_text(text + data.draw(st.text(max_size=40)))
    json.dumps(run)


def test_parse_names_the_file_it_cannot_read(tmp_path):
    with pytest.raises(LogError, match="nothing.log: No such file"):
        parse(tmp_path / "nothing.log")
    (tmp_path / "x.log").write_bytes(b"\xff\xfe\x00binary\n")
    with pytest.raises(LogError, match="x.log: no line of a training log"):
        parse(tmp_path / "x.log")


def test_command_line(tmp_path):
    for name, text in (("a", ours(1)), ("b", reference_b(2))):
        (tmp_path / f"{name}.log").write_text(text)
    got = tool("parse_log.py", tmp_path / "a.log", tmp_path / "b.log", "--json")
    objects = [json.loads(line) for line in got.stdout.splitlines()]
    assert got.returncode == 0 and [o["seed"] for o in objects] == [1, 2]
    assert all(set(METRICS) <= set(o) for o in objects) and "series" not in objects[0]
    everything = json.loads(tool("parse_log.py", tmp_path / "a.log", "--json", "--all").stdout)
    assert everything["source"] == SOURCE and everything["series"]["val"]
    table = tool("parse_log.py", tmp_path / "a.log")
    assert "artifact_bytes" in table.stdout and "15,800,017" in table.stdout
    bad = tool("parse_log.py", tmp_path / "nope.log", "--json")
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1 and "nope.log" in bad.stderr and not bad.stdout
    for name in ("parse_log.py", "plot_log.py", "compare.py", "make_record.py"):
        bad = tool(name)
        assert bad.returncode == 2 and bad.stderr.count("\n") == 1 and "required" in bad.stderr
        assert "--json" in tool(name, "--help").stdout


@pytest.mark.skipif(not SHARED.is_dir(), reason="the published logs are not beside the repository")
@pytest.mark.parametrize(
    "name, steps, bpb, total, train_s, eval_s",
    [
        ("reference_a_seed42", 4835, 1.06214044, 15_905_000, 596.033, 592.904),
        ("reference_a_seed1337", 4807, 1.06416566, 15_918_827, 596.053, 521.122),
        ("reference_b_seed42", 5178, 1.08362987, 16_058_494, 588.098, 83.408),
    ],
)
def test_published_logs(name, steps, bpb, total, train_s, eval_s):
    run = parse(SHARED / f"{name}.log")
    assert run["complete"] and run["problems"] == [] and run["steps"] == steps
    assert run[f"{run['final']}_bpb"] == bpb and run["artifact_bytes"] == total
    assert (run["train_seconds"], run["eval_seconds"]) == (train_s, eval_s)
    assert len(run["sigmas"]) == (66 if "_a_" in name else 0)
