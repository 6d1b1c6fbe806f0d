"""make_record: every planted violation is named, a clean set becomes a whole folder, the statistics are Welch's."""

import json
import math
import os
import shutil
import subprocess
import sys

import make_record
import pytest
from tools_logs import ROOT, SOURCE, WRAPPED, ours, reference_a, tool

SEEDS = (42, 314, 1337)
WHO = ("--name", "Trellis: GPTQ / 2", "--author", "Ada Lovelace", "--github-id", "ada", "--date", "2026-11-21")


@pytest.fixture
def place(tmp_path):
    """A working folder with the wrapped script and a function that writes the logs of three seeds."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "final_model.train_gpt.py").write_bytes(WRAPPED)

    def write(each: dict | None = None, only: dict | None = None, seeds=SEEDS) -> list[str]:
        """Logs of `seeds`: `each` changes all of them, `only` the last."""
        for k, seed in enumerate(seeds):
            change = (each or {}) | ((only or {}) if k == len(seeds) - 1 else {})
            (tmp_path / "logs" / f"s{k}.txt").write_text(ours(**({"seed": seed} | change)))
        return [str(tmp_path / "logs" / f"s{k}.txt") for k in range(len(seeds))]

    write.folder = tmp_path
    return write


def record(place, *args):
    got = tool("make_record.py", *args, *WHO, "--out", place.folder / "records", "--json", cwd=place.folder)
    return got.returncode, json.loads(got.stdout)


def test_a_clean_set_becomes_a_folder(place):
    code, out = record(place, *place())
    assert code == 0 and out["ok"] and out["reasons"] == [] and out["caveats"] == []
    folder = place.folder / "records" / "track_10min_16mb" / "2026-11-21_Trellis_GPTQ_2"
    assert out["folder"] == str(folder)
    assert sorted(f.name for f in folder.iterdir()) == sorted(
        ["README.md", "submission.json", "train_gpt.py", "train_gpt_readable.py", "requirements.txt", "config.env"]
        + [f"train_seed{s}.log" for s in SEEDS]
    )
    assert (folder / "train_gpt.py").read_bytes() == WRAPPED
    assert (folder / "train_gpt_readable.py").read_text() == SOURCE
    assert (folder / "train_seed314.log").read_text() == ours(314)
    assert oct((folder / "README.md").stat().st_mode)[-3:] == "644" and oct(folder.stat().st_mode)[-3:] == "755"
    sub = json.loads((folder / "submission.json").read_text())
    assert sub == out["submission"]
    for key in ("author github_id name blurb date track val_loss val_bpb val_loss_std val_bpb_std seeds seed_results "
                "bytes_total hardware pytorch_version cuda_version technique_summary").split():  # fmt: skip
        assert sub[key] not in (None, ""), key
    bpb = [1.05 + 0.0001 * (s % 7) for s in SEEDS]
    mean = sum(bpb) / 3
    assert sub["val_bpb"] == pytest.approx(mean) and sub["seeds"] == list(SEEDS)
    assert sub["val_bpb_std"] == pytest.approx(math.sqrt(sum((b - mean) ** 2 for b in bpb) / 2))
    row = {"val_loss", "val_bpb", "artifact_bytes", "steps", "step_avg_ms", "eval_time_s"}
    assert row <= set(sub["seed_results"]["42"]) and sub["seed_results"]["42"]["eval_time_s"] == 423.45
    readme = (folder / "README.md").read_text()
    for text in ("| 1337 |", "**mean**", "| 0 | 8.74 | 9.25 |", "nproc_per_node=8 train_gpt.py", "#1689", "Polar"):
        assert text in readme, text
    assert "LQER" not in readme, "credits name only what is switched on"
    assert not list(folder.parent.glob(".record-*"))
    code, out = record(place, *place())
    assert code == 3 and "exists already" in out["reasons"][0]


@pytest.mark.parametrize("config, stages, wanted, absent", [
    ({"clip_rule": "fisher", "quantizer": "trellis32", "compressor": "entropy"}, (),
     ["GPTQ", "steps by Fisher information", "trellis-coded quantisation", "Gaussian entropy coder"], ["SDClip", "Brotli"]),
    ({"clip_rule": "adaptive", "quantizer": "scalar", "compressor": "pergroup"}, (),
     ["GPTQ", "SDClip", "per-group compression"], ["steps by Fisher information", "trellis-coded quantisation"]),
    ({"train_seq_schedule": "1024@0.1"}, (), ["context schedule"], []), ({"train_seq_schedule": ""}, (), [], ["context schedule"]),
    ({"inq_steps": 4, "ngram_tilt_enabled": True}, (), ["GPTQ"], ["incremental network quantization", "learnt n-gram tilt"]),
    ({"inq_steps": 4, "ngram_tilt_enabled": True}, ("inq", "eval_ttt"), ["incremental network quantization", "learnt n-gram tilt"], []),
    ({}, (), ["GPTQ", "SDClip"], ["steps by Fisher information"])])  # the references
def test_credits_follow_what_was_used(config, stages, wanted, absent):
    run = {"config": {"matrix_clip_sigmas": 12.85} | config, "stages": dict.fromkeys(stages, 1.0)}
    titles = [title for title, _ in make_record.techniques(run)]
    assert not set(wanted) - set(titles) and not set(absent) & set(titles)


def test_config_env_can_be_sourced_and_holds_no_run_or_path(place):
    code, out = record(place, *place({"config": {"name_with": "a b'c"}}))
    assert code == 0
    shell = ["bash", "-c", "set -a; . ./config.env; env"]
    env = dict(line.split("=", 1) for line in subprocess.check_output(shell, cwd=out["folder"], text=True).splitlines()
               if "=" in line)  # fmt: skip
    assert env["NAME_WITH"] == "a b'c" and env["ADAPTIVE_HESSIAN_CLIP"] == "1" and env["ADAM_EPS"] == "1e-08"
    assert not {"SEED", "RUN_ID", "DATA_DIR", "ARTIFACT_DIR"} & set(env)


VIOLATIONS = {
    "fewer than 3": dict(seeds=(42, 314)),
    "seed 42 is given 2 times": dict(seeds=(42, 314, 1337, 42)),
    "training took 601.20 s": dict(only={"train_s": 601.2}),
    "evaluation took 600.01 s": dict(only={"eval_s": 600.01}),
    "reports a budget violation: train used 601": dict(only={"extra": "budget_violation: train used 601 s"}),
    "over the cap": dict(each={"model_bytes": 15_999_984}),
    "is not code": dict(only={"total_bytes": 15_000_000}),
    "not fully scored (after TTT): 3,560,000 of 3,560,456": dict(only={"scored": 3_560_000}),
    "the evaluation counts 3,000,000": dict(each={"scored": 3_000_000, "total": 3_000_000}),
    "different scripts": dict(only={"source": SOURCE + "# changed\n"}),
    "different configurations: matrix_lr = 0.026 (s0, s1), 0.028 (s2)": dict(only={"config": {"matrix_lr": 0.028}}),
    "different input files": dict(only={"val_tokens": 3_560_456, "config": {}, "extra": "input file:/x sha256:cc"}),
    "did not finish": dict(only={"complete": False}),
    "do not keep one ratio": dict(only={"ttt_loss": 2.0}),
    "stage hessians (3.6 s) is charged to none": dict(only={"hessian_budget": "none"}),
    "stage inq (2.0 s) is charged to none": dict(only={"inq_budget": "none"}),
    "ledger's train stages take 598.03 s, the budget line says 590.00 s": dict(only={"train_s": 590.0}),
    "counts 33 bytes of code": dict(only={"code_bytes": 33}),
    "records are timed on 8": dict(each={"device": "count:1 name:NVIDIA H100 80GB HBM3"}),
}


@pytest.mark.parametrize("reason", VIOLATIONS)
def test_every_planted_violation_is_named(place, reason, monkeypatch, capsys):
    args = place(**VIOLATIONS[reason])
    monkeypatch.chdir(place.folder)
    code = make_record.main([*args, *WHO, "--json"])
    out = json.loads(capsys.readouterr().out)
    assert code == 3 and not out["ok"] and any(reason in r for r in out["reasons"]), out["reasons"]
    assert not (place.folder / "records").exists()


def test_all_reasons_are_listed_at_once(place):
    only = {"train_s": 700.0, "scored": 5, "complete": False}
    args = place(each={"model_bytes": 16_000_000}, only=only, seeds=(1, 2))
    got = tool("make_record.py", *args, *WHO, cwd=place.folder)
    assert got.returncode == 3 and "refused, 6 reasons" in got.stdout
    for text in ("fewer than 3", "over the cap", "training took", "not fully scored", "did not finish"):
        assert text in got.stdout


def test_tampered_source_and_wrapped_script(place):
    args = place()
    changed = (place.folder / "logs/s0.txt").read_text().replace("stands in", "stood in")
    (place.folder / "logs/s0.txt").write_text(changed)
    (place.folder / "final_model.train_gpt.py").write_bytes(b"exec('print(1)'\n\n")
    code, out = record(place, *args)
    assert code == 3
    text = "\n".join(out["reasons"])
    assert "source dump does not have the script's SHA-256" in text and "is not valid Python" in text
    (place.folder / "final_model.train_gpt.py").unlink()
    assert "no final_model.train_gpt.py" in "\n".join(record(place, *args)[1]["reasons"])


def test_non_record_relaxes_budgets_and_says_so_but_no_contradiction(place):
    device = "count:1 name:NVIDIA H100 80GB HBM3"
    args = place(each={"device": device}, only={"train_s": 700.0, "eval_s": 800.0})
    code, out = record(place, *args, "--non-record")
    assert code == 0 and len(out["caveats"]) == 5 and "track_non_record_16mb" in out["folder"]
    readme = (place.folder / out["folder"] / "README.md").read_text()
    assert "Not a record" in readme and "training took 700.00 s of 600 s" in readme and "SEED=42 python" in readme
    shutil.rmtree(place.folder / "records")
    for change in ({"scored": 5}, {"complete": False}, {"model_bytes": 16_000_000}, {"config": {"matrix_lr": 1}}):
        assert record(place, *place(only=change), "--non-record", "--check")[0] == 3, change
    one = place(seeds=(42,))
    assert record(place, *one, "--non-record", "--check")[0] == 3
    code, out = record(place, *one, "--non-record", "--min-seeds", 1, "--check")
    assert code == 0 and out["folder"] is None and out["submission"]["val_bpb_std"] is None


def baseline_file(place, **change):
    rows = {str(s): {"val_loss": 2.3200 + s / 1e4, "val_bpb": (2.3200 + s / 1e4) / 2.1885} for s in (1, 2, 3)}
    data = {"name": "old", "seed_results": rows} | change
    path = place.folder / "baseline.json"
    path.write_text(json.dumps(data))
    return path


def test_lead_over_a_baseline(place):
    from scipy.stats import ttest_ind

    args = place()
    code, out = record(place, *args, "--baseline", baseline_file(place), "--check")
    assert code == 0
    lead = out["submission"]["comparison"]
    mine = [(1.05 + 0.0001 * (s % 7)) * 2.1885 for s in SEEDS]
    theirs = [2.3201, 2.3202, 2.3203]
    assert lead["lead_nats"] == pytest.approx(sum(theirs) / 3 - sum(mine) / 3, abs=1e-7)
    assert lead["welch_p"] == pytest.approx(ttest_ind(theirs, mine, equal_var=False).pvalue, rel=1e-3)
    one_sided = ttest_ind([x - 0.005 for x in theirs], mine, equal_var=False, alternative="greater").pvalue
    assert lead["p_margin"] == pytest.approx(one_sided, rel=1e-3) and lead["p_margin"] < 0.01
    # too small a lead: refused as a record, stated otherwise
    near = place(each={"bpb": 1.0585})
    code, out = record(place, *near, "--baseline", baseline_file(place), "--check")
    assert code == 3 and "lead over old: +0.00" in out["reasons"][0] and "p = " in out["reasons"][0]
    code, out = record(place, *near, "--baseline", baseline_file(place), "--non-record", "--check")
    assert code == 0 and "lead over old" in out["caveats"][0]


def test_baseline_forms(place):
    args = place()
    means = {"seed_results": {}, "val_loss": 2.3202, "val_loss_std": 0.0001, "val_bpb": 2.3202 / 2.1885,
             "val_bpb_std": 0.0001 / 2.1885, "seeds": [1, 2, 3]}  # fmt: skip
    a = record(place, *args, "--baseline", baseline_file(place), "--check")[1]["submission"]["comparison"]
    b = record(place, *args, "--baseline", baseline_file(place, **means), "--check")[1]["submission"]["comparison"]
    assert b["p_margin"] == pytest.approx(a["p_margin"], rel=1e-6)
    other = {"1": {"val_loss": 2.9, "val_bpb": 1.08}, "2": {"val_loss": 2.901, "val_bpb": 1.0803}}
    c = record(place, *args, "--baseline", baseline_file(place, seed_results=other), "--check")[1]
    lead = c["submission"]["comparison"]
    assert lead["tested_on"] == "val_bpb" and lead["lead_nats"] is None
    assert lead["margin"] == pytest.approx(0.005 / 2.1885, rel=1e-4)
    single = {"1": {"val_loss": 2.32, "val_bpb": 2.32 / 2.1885}}
    code, out = record(place, *args, "--baseline", baseline_file(place, seed_results=single), "--check")
    assert code == 3 and "no spread to test" in out["reasons"][0]


def test_references_are_read_and_refused_for_what_they_do_not_state(place):
    for k in (1, 2, 3):
        (place.folder / f"logs/r{k}.txt").write_text(reference_a(k))
    logs = [place.folder / f"logs/r{k}.txt" for k in (1, 2, 3)]
    code, out = record(place, *logs)
    text = "\n".join(out["reasons"])
    assert code == 3 and "SHA-256" in text and "validation tokens scored" in text and "source" in text
    (place.folder / "w.py").write_bytes(b"pass" + b"\n" * 32996)
    extra = ("--non-record", "--wrapped", place.folder / "w.py", "--script", place.folder / "w.py")
    code, out = record(place, *logs, *extra)
    assert code == 0, out["reasons"]
    assert out["submission"]["val_bpb"] == 1.06226 and len(out["caveats"]) == 9


def test_mistakes_in_the_command_are_one_line(place):
    args = place()
    for extra, word in (
        (["--baseline", "nope.json"], "nope.json"),
        (["--wrapped", "nope.py"], "nope.py"),
        (["--min-seeds", "1"], "--non-record"),
        (["--date", "yesterday"], "YYYY-MM-DD"),
        (["--baseline", args[0]], "not a submission.json"),
        (["--requirements", "nope.txt"], "nope.txt"),
    ):
        got = tool("make_record.py", *args, *WHO, *extra, cwd=place.folder)
        assert got.returncode == 2 and got.stderr.count("\n") == 1 and word in got.stderr, (extra, got.stderr)
    assert not (place.folder / "records").exists()


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "train_gpt.py").is_file(), reason="train_gpt.py is not there yet")
def test_the_folder_runs_elsewhere(tmp_path):
    """Train at toy size, make the folder, move it, and run its wrapped script on the demo data."""
    env = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "LANG", "OMP_NUM_THREADS")}
    for line in (ROOT / "recipes" / "demo.env").read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            key, value = line.split("=", 1)
            env[key] = value.replace("./data", str(ROOT / "data"))
    if not list((ROOT / "data" / "sample").glob("*_train_*.bin")):
        pytest.skip("data/sample is not made yet")
    env |= {"ITERATIONS": "4", "MAX_WALLCLOCK_SECONDS": "0", "TRAIN_LOG_EVERY": "1", "WARMUP_STEPS": "0",
            "GPTQ_CALIBRATION_BATCHES": "1", "SLIDING_WINDOW_ENABLED": "0"}  # fmt: skip
    small = {"TRAIN_BATCH_TOKENS": "1024"}
    run = lambda script, **more: subprocess.run([sys.executable, script], env=env | small | more, cwd=tmp_path,
                                                capture_output=True, text=True)  # fmt: skip
    first = run(ROOT / "train_gpt.py", SEED="42", RUN_ID="one", ARTIFACT_DIR=str(tmp_path / "a"))
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-2000:]
    args = (tmp_path / "a" / "one.txt", *WHO, "--non-record", "--min-seeds", 1, "--out", tmp_path / "records", "--json")
    made = tool("make_record.py", *args)
    assert made.returncode == 0, made.stdout
    moved = tmp_path / "elsewhere"
    shutil.move(json.loads(made.stdout)["folder"], moved)
    shutil.rmtree(tmp_path / "a")
    again = run(moved / "train_gpt.py", SEED="42", RUN_ID="two", ARTIFACT_DIR=str(tmp_path / "b"))
    assert again.returncode == 0, again.stdout[-2000:] + again.stderr[-2000:]
    figures = [json.loads(tool("parse_log.py", p, "--json").stdout)
               for p in (moved / "train_seed42.log", tmp_path / "b" / "two.txt")]  # fmt: skip
    assert figures[1]["complete"] and figures[0]["artifact_bytes"] == figures[1]["artifact_bytes"]
    assert figures[0]["quantized_loss"] == pytest.approx(figures[1]["quantized_loss"], abs=1e-6)
