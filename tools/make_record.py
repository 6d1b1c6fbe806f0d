#!/usr/bin/env python3
"""Build a records folder from the logs of one configuration's seeds, or say why there can be none.

    python tools/make_record.py logs/s42.txt logs/s1337.txt logs/s314.txt \\
        --name "Trellis GPTQ" --author "Ada Lovelace" --github-id ada --baseline records/…/submission.json
    python tools/make_record.py logs/*.txt --name … --author … --github-id … --check      only judge

Writes OUT/TRACK/DATE_Name/ with README.md, submission.json, the logs, train_gpt.py (the wrapped script that was
counted), train_gpt_readable.py, config.env and requirements.txt. Nothing is written when a rule is broken: every
reason is listed and the exit code is 3 (2: a mistake in the command or an unreadable file).

A record has: three or more different seeds; one script and one configuration, by SHA-256; finished runs; training and
evaluation within 600 s each on 8 × H100; code + model within 16,000,000 bytes; every validation token scored; with
--baseline, a lead of 0.005 nats at p < 0.01.

--non-record turns overruns of time, other hardware, facts that a log does not state, and a lead that is too small into
caveats that the README prints. Contradictions are always refused.

The wrapped script is looked for as final_model.train_gpt.py in the run's ARTIFACT_DIR, beside each log and in the
folder above (or --wrapped); the readable one is read from the log's source dump (or --script).
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import tempfile
from pathlib import Path

from compare import Sample, short, welch
from parse_log import (
    EVALS,
    PATH_KEYS,
    RUN_KEYS,
    arguments,
    budget_used,
    comparable_config,
    fail,
    finite,
    parse_all,
    run_tool,
)

CAP_BYTES = 16_000_000
BUDGET_SECONDS = 600.0
MIN_SEEDS = 3
MARGIN_NATS = 0.005
P_VALUE = 0.01
TRACKS = ("track_10min_16mb", "track_non_record_16mb")
WRAPPED_NAME = "final_model.train_gpt.py"
EVAL_TITLES = {"prequant": "before quant.", "quantized": "quantised", "sliding": "sliding window", "ttt": "after TTT"}
TRAIN_STAGES = ("train", "hessians", "fisher", "gptq", "inq")  # they touch training data, so the training budget pays

# (knob, its values that count as used or a test of a number, what it is, whom to thank). Facts from the founding
# documents and their papers.
TECHNIQUES = [
    ("num_loops", lambda v: v > 0, "depth recurrence", "@msisovic (PR #1204), @clarkkev (PR #1394)"),
    ("loop_phase2_at", lambda v: v > 0, "progressive recurrence", "@Robby955 (PR #1412)"),
    ("train_seq_schedule", bool, "context schedule", "PR #2014"),
    ("parallel_residual_start", lambda v: v >= 0, "parallel residuals", "GPT-J, @Robby955 (PR #1412)"),
    ("parallel_start_layer", lambda v: v > 0, "two-lane parallel decoder", "the lineage of PR #1855"),
    ("smear_gate_enabled", bool, "smear gate", "the lineage of PR #1855"),
    ("sparse_attn_gate_enabled", bool, "sparse attention gate", "the lineage of PR #1855"),
    ("muon_row_normalize", bool, "row-normalised Muon", "Keller Jordan (Muon), @bigbag (PR #1217)"),
    ("polar_express", bool, "Polar Express steps", "Amsel et al. (arXiv 2505.16932)"),
    ("matrix_clip_sigmas", lambda v: v > 0, "GPTQ", "Frantar et al. (arXiv 2210.17323)"),
    ("clip_rule", ("hand", "adaptive"), "SDClip", "@clarkkev (PR #1394)"),
    ("clip_rule", ("fisher",), "steps by Fisher information", "ours"),
    ("quantizer", tuple(f"trellis{n}" for n in (4, 8, 16, 32, 64)), "trellis-coded quantisation",
     "Marcellin & Fischer (1990), Ungerboeck (1982)"),
    ("hessian_clip_lambda", lambda v: v > 0, "Hessian-aware row clips", "@Robby955 (PR #1412)"),
    ("adaptive_hessian_clip", bool, "adaptive Hessian clip", "@chris-colinsky (PR #1689, #1962)"),
    ("mixed_precision_hessian", bool, "Hessian-driven mixed precision", "@chris-colinsky (PR #1962)"),
    ("inq_steps", lambda v: v > 0, "incremental network quantization", "Zhou et al. (arXiv 1702.03044)"),
    ("lqer_enabled", bool, "LQER correction", "Zhang et al. (arXiv 2402.02446), the lineage of PR #1855"),
    ("compressor", ("entropy",), "Gaussian entropy coder", "ours"),
    ("compressor", ("brotli",), "Brotli", "Alakuijala et al. (RFC 7932)"),
    ("compressor", ("lzma",), "LZMA", "Igor Pavlov (7-Zip)"),
    ("compressor", ("pergroup",), "per-group compression", "the lineage of PR #1855"),
    ("caseops_enabled", bool, "CaseOps tokenisation", "romeerp/parameter-golf-caseops-v1"),
    ("sliding_window_enabled", bool, "sliding-window evaluation", "@abaybektursun (PR #1019)"),
    ("ttt_enabled", bool, "phased score-first test-time training", "the lineage of PR #1855; Hu et al. (LoRA)"),
    ("ngram_tilt_enabled", bool, "learnt n-gram tilt", "PR #1514, #2135, Mahoney (2005, PAQ)"),
]
NEEDED_STAGES = {"inq_steps": "inq", "ngram_tilt_enabled": "eval_ttt"}  # switched on is not yet used


class Verdict:
    """Reasons to refuse; with `lenient` (--non-record) the ones that may be relaxed become caveats instead."""

    def __init__(self, lenient: bool):
        self.lenient = lenient
        self.reasons: list[str] = []
        self.caveats: list[str] = []

    def broken(self, text: str):
        self.reasons.append(text)

    def over(self, text: str):
        """A rule of records that --non-record relaxes."""
        (self.caveats if self.lenient else self.reasons).append(text)

    def note(self, text: str):
        self.caveats.append(text)


# --- judging ---------------------------------------------------------------------------------------------------------


def judge(runs: list[dict], verdict: Verdict, min_seeds: int = MIN_SEEDS) -> None:
    """Put everything that speaks against these logs into the verdict."""
    seeds = [r["seed"] for r in runs]
    if len(set(seeds) - {None}) < min_seeds:
        named = ", ".join(map(str, sorted(set(seeds) - {None}))) or "none"
        verdict.broken(f"fewer than {min_seeds} different seeds: {named}")
    for seed in sorted({s for s in seeds if s is not None and seeds.count(s) > 1}):
        verdict.broken(f"seed {seed} is given {seeds.count(seed)} times: {names(r for r in runs if r['seed'] == seed)}")
    for run in runs:
        judge_run(run, verdict)
    judge_agreement(runs, verdict)


def judge_run(run: dict, verdict: Verdict) -> None:
    """The rules that one log can break by itself."""
    at = f"{run['name']}: "
    if run["seed"] is None:
        verdict.broken(at + "the log names no seed")
    if not run["complete"]:
        verdict.broken(at + "the run did not finish")
    for problem in run["problems"]:
        verdict.broken(at + problem)
    for text in run["violations"]:
        verdict.over(at + f"the run reports a budget violation: {text}")
    for name, label in (("train", "training"), ("eval", "evaluation")):
        used = budget_used(run, name)
        if used is None:
            verdict.over(at + f"the log does not state the seconds of {label}")
        elif not used <= BUDGET_SECONDS:
            verdict.over(at + f"{label} took {used:.2f} s of {BUDGET_SECONDS:.0f} s")
    judge_ledger(run, verdict)
    if run["artifact_bytes"] is None:
        verdict.broken(at + "the log does not state the artifact's bytes")
    elif run["artifact_bytes"] > CAP_BYTES:
        over = run["artifact_bytes"] - CAP_BYTES
        verdict.broken(at + f"artifact of {run['artifact_bytes']:,} bytes is {over:,} over the cap of {CAP_BYTES:,}")
    judge_coverage(run, verdict)
    final = run["final"]
    if final is None or run[f"{final}_loss"] is None:
        verdict.broken(at + "no evaluation of the quantised model")
    ratios = [run[f"{e}_loss"] / run[f"{e}_bpb"] for e in EVALS if run[f"{e}_loss"] and run[f"{e}_bpb"]]
    if ratios and max(ratios) > 1.001 * min(ratios):
        verdict.broken(at + "nats and bits per byte do not keep one ratio over the stages: the bytes are miscounted")
    if run["script"] is None:
        verdict.over(at + "the log does not state the script's SHA-256")
    device = run["device"]
    if device is None:
        verdict.over(at + "the log does not state the hardware")
    elif device["count"] != 8 or "H100" not in device["name"]:
        verdict.over(at + f"ran on {hardware(run)}; records are timed on 8 × H100")
    if run["git"] and run["git"].endswith("+dirty"):
        verdict.note(at + f"the working tree had uncommitted changes on {run['git'].removesuffix('+dirty')[:12]}")


def judge_ledger(run: dict, verdict: Verdict) -> None:
    """The ledger must add up to what the budget lines claim, and charge the stages that the rules charge."""
    at = f"{run['name']}: "
    if not run["ledger"]:
        if run["format"] == "ours":
            verdict.over(at + "the log has no ledger of stages")
        return
    for name in ("train", "eval"):
        spent = math.fsum(s for _, s, budget in run["ledger"] if budget == name)
        claimed = run["budgets"].get(name)
        if claimed is not None and spent > claimed + 1.0:
            verdict.broken(at + f"the ledger's {name} stages take {spent:.2f} s, the budget line says {claimed:.2f} s")
    due = {stage: "train" for stage in TRAIN_STAGES} | ({f"eval_{run['final']}": "eval"} if run["final"] else {})
    for stage, seconds, budget in run["ledger"]:
        if due.get(stage, budget) != budget and seconds > 0:
            verdict.broken(at + f"stage {stage} ({seconds:.1f} s) is charged to {budget}, not to {due[stage]}")


def judge_coverage(run: dict, verdict: Verdict) -> None:
    at = f"{run['name']}: "
    if run["final"] and run["final"] not in run["coverage"]:
        verdict.over(at + f"the log does not state the validation tokens scored ({EVAL_TITLES[run['final']]})")
    for stage, (scored, total) in run["coverage"].items():
        if scored != total:
            title = EVAL_TITLES.get(stage, stage)
            verdict.broken(at + f"validation not fully scored ({title}): {scored:,} of {total:,} tokens")
    val = [i for i in run["inputs"] if "val" in Path(i["file"]).name and "bytes" not in Path(i["file"]).name]
    if run["final"] in run["coverage"] and val and all(i["tokens"] is not None for i in val):
        total, held = run["coverage"][run["final"]][1], sum(i["tokens"] for i in val)
        if not held - len(val) - 1 <= total <= held:  # the last token of a shard may have no target
            verdict.broken(at + f"the validation shards hold {held:,} tokens, the evaluation counts {total:,}")


def judge_agreement(runs: list[dict], verdict: Verdict) -> None:
    """The rules that hold between the logs: one script, one configuration, one data set."""
    scripts = group(runs, lambda r: r["script"] and r["script"]["sha256"])
    if len(set(scripts) - {None}) > 1:
        verdict.broken("logs from different scripts: " + listed({s[:12]: n for s, n in scripts.items() if s}))
    configs = {run["name"]: comparable_config(run) for run in runs}
    by_knob = {k: group(runs, lambda r, k=k: configs[r["name"]].get(k)) for k in sorted(set().union(*configs.values()))}
    knobs = {k: by for k, by in by_knob.items() if len(by) > 1}
    if knobs:
        texts = [f"{k} = {listed({short(v, 32): n for v, n in by.items()})}" for k, by in list(knobs.items())[:8]]
        more = f"; and {len(knobs) - 8} more" if len(knobs) > 8 else ""
        verdict.broken("logs from different configurations: " + "; ".join(texts) + more)
    inputs = group(runs, lambda r: tuple(sorted((Path(i["file"]).name, i["sha256"]) for i in r["inputs"])))
    if len(inputs) > 1:
        verdict.broken("logs from different input files: " + "; ".join(inputs.values()))
    for label, key in (
        ("different kinds of final evaluation", lambda r: r["final"]),
        ("different numbers of validation tokens", lambda r: r["coverage"].get(r["final"], [None, None])[1]),
        ("different code sizes", lambda r: r["code_bytes"]),
    ):
        by = group(runs, key)
        if len(by) > 1:
            verdict.broken(f"logs with {label}: {listed(by)}")
    for label, key in (
        ("hardware differs", hardware),
        ("versions differ", lambda r: " ".join(f"{k} {v}" for k, v in r["versions"].items())),
        ("git revisions differ", lambda r: r["git"]),
    ):
        by = group(runs, key)
        if len(by) > 1:
            verdict.note(f"{label} between the runs: {listed(by)}")


def group(runs, key) -> dict:
    """{value: names of the runs that have it}."""
    out: dict = {}
    for run in runs:
        out.setdefault(key(run), []).append(run["name"])
    return {value: ", ".join(n) for value, n in out.items()}


def listed(by: dict) -> str:
    return ", ".join(f"{value} ({n})" for value, n in by.items())


def names(runs) -> str:
    return ", ".join(r["name"] for r in runs)


def hardware(run: dict) -> str | None:
    return f"{run['device']['count']} × {run['device']['name']}" if run["device"] else None


# --- the scripts that ship -------------------------------------------------------------------------------------------


def find_wrapped(runs: list[dict], given: str | None, verdict: Verdict) -> bytes | None:
    """The wrapped script, checked to be one file for all runs, of the size that each log counted, and to be Python."""
    files: dict[Path, bytes] = {}
    for run in runs if given is None else ():
        beside = Path(run["path"]).resolve().parent
        folders = [beside, beside.parent]
        if run["config"].get("artifact_dir"):
            folders = [Path(run["config"]["artifact_dir"]), beside / run["config"]["artifact_dir"], *folders]
        found = next((f / WRAPPED_NAME for f in folders if (f / WRAPPED_NAME).is_file()), None)
        if found is None:
            verdict.broken(f"{run['name']}: no {WRAPPED_NAME} in its ARTIFACT_DIR, beside the log or above")
        else:
            files[found] = found.read_bytes()
    if given is not None:
        try:
            files[Path(given)] = Path(given).read_bytes()
        except OSError as e:
            fail(f"--wrapped {given}: {e.strerror or e}")
    if not files:
        return None
    if len(set(files.values())) > 1:
        verdict.broken("the runs' wrapped scripts differ: " + ", ".join(map(str, files)))
    path, code = next(iter(files.items()))
    for run in runs:
        if run["code_bytes"] is not None and run["code_bytes"] != len(code):
            verdict.broken(f"{run['name']}: counts {run['code_bytes']:,} bytes of code, {path} has {len(code):,}")
        if run["wrapped"] and run["wrapped"]["sha256"] != sha256(code):
            verdict.broken(f"{run['name']}: {path} does not have the SHA-256 that the log states")
    check_python(path, code, verdict)
    return code


def find_script(runs: list[dict], given: str | None, verdict: Verdict) -> bytes | None:
    """The readable script: --script, or the first log's source dump. Its SHA-256 must be the one in every log."""
    if given is not None:
        try:
            label, code = given, Path(given).read_bytes()
        except OSError as e:
            fail(f"--script {given}: {e.strerror or e}")
    else:
        run = next((r for r in runs if r["source"] is not None), None)
        if run is None:
            verdict.broken("no log holds the script's source: give it with --script")
            return None
        label, code = f"the source in {run['name']}", run["source"].encode()
    for run in runs:
        if run["script"] and run["script"]["sha256"] != sha256(code):
            verdict.broken(f"{run['name']}: {label} does not have the SHA-256 that the log states")
    check_python(label, code, verdict)
    return code


def check_python(label, code: bytes, verdict: Verdict) -> None:
    try:
        compile(code, str(label), "exec")
    except (SyntaxError, ValueError) as e:
        verdict.broken(f"{label}: is not valid Python ({e.args[0]})")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# --- statistics ------------------------------------------------------------------------------------------------------


def read_baseline(path: str) -> dict:
    """{name, loss: Sample, bpb: Sample} of a submission.json: from its seeds, or from its means and deviations."""
    try:
        data = json.loads(Path(path).read_text())
        seeds = data.get("seed_results") or {}
        rows = list(seeds.values()) if isinstance(seeds, dict) else seeds
        samples = {}
        for key in ("val_loss", "val_bpb"):
            if rows:
                samples[key] = Sample.of([float(r[key]) for r in rows])
            else:
                std = data.get(f"{key}_std")
                count = len(data.get("seeds") or [0]) if std is not None else 1
                samples[key] = Sample(count, float(data[key]), math.nan if std is None else float(std))
        return {"name": data.get("name", path), "loss": samples["val_loss"], "bpb": samples["val_bpb"]}
    except OSError as e:
        fail(f"--baseline {path}: {e.strerror or e}")
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        fail(f"--baseline {path}: not a submission.json with seed results ({type(e).__name__}: {e})")


def against(baseline: dict, loss: Sample, bpb: Sample) -> dict:
    """Our lead over the baseline (positive = better), with Welch's test and the one-sided test of the margin.

    The margin is 0.005 nats per token. Where the tokenisations differ (another ratio of nats to bits per byte), nats
    cannot be compared: the test is then on bits per byte, with the margin converted at our own ratio.
    """
    ours, theirs = bpb.mean / loss.mean, baseline["bpb"].mean / baseline["loss"].mean
    same = abs(ours / theirs - 1) < 1e-3
    nats, bits = welch(loss, baseline["loss"], MARGIN_NATS), welch(bpb, baseline["bpb"], MARGIN_NATS * ours)
    test = nats if same else bits
    return {
        "baseline": baseline["name"],
        "baseline_val_loss": baseline["loss"].mean,
        "baseline_val_bpb": baseline["bpb"].mean,
        "tested_on": "val_loss" if same else "val_bpb",
        "margin": MARGIN_NATS if same else MARGIN_NATS * ours,
        "lead_nats": nats["difference"] if same else None,
        "lead_bpb": bits["difference"],
        "lead_interval_95": [test["low"], test["high"]],
        "welch_df": test["df"],
        "welch_p": test["p"],
        "p_margin": test["p_margin"],
    }


def judge_lead(lead: dict, verdict: Verdict) -> None:
    value = lead["lead_nats"] if lead["tested_on"] == "val_loss" else lead["lead_bpb"]
    unit = "nats" if lead["tested_on"] == "val_loss" else "bpb"
    what = f"lead over {lead['baseline']}: {value:+.5f} {unit}, needed {lead['margin']:.5f} at p < {P_VALUE:g}"
    if lead["p_margin"] is None:
        verdict.over(f"{what}; one run on a side has no spread to test")
    elif not lead["p_margin"] < P_VALUE:
        verdict.over(f"{what}; p = {lead['p_margin']:.3g}")


# --- what is written -------------------------------------------------------------------------------------------------


def submission(runs: list[dict], args, lead: dict | None, verdict: Verdict) -> dict:
    """submission.json. val_loss and val_bpb are the final evaluation's means, bytes_total the largest artifact."""
    loss, bpb = samples(runs)
    first = runs[0]
    seeds = {
        str(r["seed"]): {
            "val_loss": r[f"{r['final']}_loss"],
            "val_bpb": r[f"{r['final']}_bpb"],
            "artifact_bytes": r["artifact_bytes"],
            "steps": r["steps"],
            "step_avg_ms": r["step_avg_ms"],
            "train_time_s": budget_used(r, "train"),
            "eval_time_s": budget_used(r, "eval"),
        }
        for r in runs
    }
    out = {
        "author": args.author,
        "github_id": args.github_id,
        "name": args.name,
        "blurb": args.blurb or default_blurb(runs),
        "date": args.date,
        "track": track(args),
        "val_loss": loss.mean,
        "val_bpb": bpb.mean,
        "val_loss_std": loss.sd,
        "val_bpb_std": bpb.sd,
        "seeds": [r["seed"] for r in runs],
        "seed_results": seeds,
        "bytes_total": max(r["artifact_bytes"] for r in runs),
        "bytes_code": first["code_bytes"],
        "hardware": hardware(first),
        "pytorch_version": first["versions"].get("torch"),
        "cuda_version": first["versions"].get("cuda"),
        "git_revision": first["git"],
        "script_sha256": first["script"] and first["script"]["sha256"],
        "technique_summary": args.summary or ", ".join(t for t, _ in techniques(first)),
    }
    if lead:
        out["comparison"] = lead
    if verdict.caveats:
        out["caveats"] = verdict.caveats
    return finite(out)


def samples(runs: list[dict]) -> tuple[Sample, Sample]:
    return tuple(Sample.of([r[f"{r['final']}_{unit}"] for r in runs]) for unit in ("loss", "bpb"))


def track(args) -> str:
    return args.track or TRACKS[args.non_record]


def techniques(run: dict) -> list[tuple[str, str]]:
    """(technique, credit) for what the configuration switches on."""
    out, config = [], run["config"]
    if "matrix_clip_sigmas" in config:
        config = {"clip_rule": "hand"} | config  # the references know no other
    for knob, used, title, credit in TECHNIQUES:
        value = config.get(knob) if NEEDED_STAGES.get(knob) in (None, *run["stages"]) else None
        if value in used if isinstance(used, tuple) else (used is bool or isinstance(value, (int, float))) and used(value):
            out.append((title, credit))
    return out


def default_blurb(runs: list[dict]) -> str:
    bpb = samples(runs)[1]
    spread = f", standard deviation {bpb.sd:.5f}" if bpb.n > 1 else ""
    return f"{bpb.mean:.5f} bpb, mean of {bpb.n} seed{'s' if bpb.n > 1 else ''}{spread}."


def config_env(run: dict) -> str:
    """Every knob as the run resolved it, for `set -a; . ./config.env`, without the seed and what names this one run."""
    skip = RUN_KEYS | {"distributed", "world_size"}
    lines = [f"# resolved configuration of {run['name']}; the seed is set on the command line"]
    for knob, value in run["config"].items():
        text = str(int(value)) if isinstance(value, bool) else str(value)
        if knob not in skip and text not in ("", "None"):
            place = "# " if knob in PATH_KEYS else ""  # paths of the run's machine: shown, not set
            lines.append(f"{place}{knob.upper()}={shlex.quote(text)}")
    return "\n".join(lines) + "\n"


def command(run: dict, given: str | None) -> str:
    """The lines that repeat the run."""
    if given:
        return given
    count = run["device"]["count"] if run["device"] else run["config"].get("world_size") or 1
    launch = f"torchrun --standalone --nproc_per_node={count}" if count > 1 else "python"
    start = f"SEED={run['seed']} {launch} train_gpt.py"
    if run["overrides"] is not None:
        rest = [o for o in run["overrides"].split() if not o.startswith("SEED=")]
        return " ".join([*rest, start])
    return f"set -a; . ./config.env; set +a\n{start}"


def requirements(run: dict, given: str | None) -> str:
    """--requirements, the repository's requirements.txt, or pins from the versions in the log."""
    default = Path(__file__).resolve().parent.parent / "requirements.txt"
    path = Path(given) if given else default
    if given or path.is_file():
        try:
            return path.read_text()
        except OSError as e:
            fail(f"--requirements {given}: {e.strerror or e}")
    pins = [f"{p}=={run['versions'][p].split('+')[0]}" for p in ("torch", "triton", "numpy") if p in run["versions"]]
    return "\n".join([*pins, *(["numpy"] if "numpy" not in run["versions"] else []), "sentencepiece"]) + "\n"


def markdown(rows: list[list[str]]) -> str:
    head, *body = rows
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] + ["---:"] * (len(head) - 1)) + " |"]
    return "\n".join(lines + ["| " + " | ".join(r) + " |" for r in body])


def results_table(runs: list[dict]) -> str:
    """One row a seed, then mean and deviation."""
    evals = [e for e in EVALS if any(r[f"{e}_bpb"] is not None for r in runs)]
    columns = [("steps", ",.0f", lambda r: r["steps"]), ("ms/step", ",.1f", lambda r: r["step_avg_ms"])]
    columns += [(f"{EVAL_TITLES[e]} bpb", ".5f", lambda r, e=e: r[f"{e}_bpb"]) for e in evals]
    columns += [("final nats", ".5f", lambda r: r[f"{r['final']}_loss"])]
    columns += [("artifact bytes", ",.0f", lambda r: r["artifact_bytes"])]
    columns += [(f"{n} s", ".1f", lambda r, n=n: budget_used(r, n)) for n in ("train", "eval")]
    cell = lambda value, spec: "–" if value is None else format(value, spec)
    rows = [["seed"] + [c[0] for c in columns]]
    rows += [[str(r["seed"])] + [cell(get(r), spec) for _, spec, get in columns] for r in runs]
    stats = [Sample.of(v) if (v := [get(r) for r in runs if get(r) is not None]) else None for *_, get in columns]
    rows += [["**mean**"] + [cell(s and s.mean, spec) for s, (_, spec, _) in zip(stats, columns)]]
    if len(runs) > 1:
        rows += [["std"] + [cell(s.sd if s and s.n > 1 else None, spec) for s, (_, spec, _) in zip(stats, columns)]]
    return markdown(rows)


def stages_table(runs: list[dict]) -> str:
    stages = list(dict.fromkeys(s for r in runs for s in r["stages"]))
    charged = {s: b for r in runs for s, _, b in r["ledger"]}
    rows = [["stage (s)"] + [f"seed {r['seed']}" for r in runs] + ["budget"]]
    for s in stages:
        rows.append([s] + [f"{r['stages'][s]:.1f}" if s in r["stages"] else "–" for r in runs] + [charged.get(s, "–")])
    return markdown(rows)


def sigma_tables(runs: list[dict]) -> str:
    """The clip σ that each seed chose: layers down, roles across, one table a seed."""
    parts = []
    for run in runs:
        cells, rest = {}, []
        for name, sigma in run["sigmas"].items():
            if m := re.fullmatch(r"blocks\.(\d+)\.(?:attn\.)?(.+?)(?:\.weight)?", name):
                cells[int(m[1]), m[2]] = sigma
            else:
                rest.append(f"{name}: {sigma:.2f}")
        roles = list(dict.fromkeys(role for _, role in cells))
        rows = [["layer", *roles]]
        for layer in sorted({k for k, _ in cells}):
            rows.append([str(layer)] + [f"{cells[layer, r]:.2f}" if (layer, r) in cells else "–" for r in roles])
        text = (markdown(rows) if cells else "") + ("\n\n" + ", ".join(rest) if rest else "")
        parts.append(f"Seed {run['seed']} ({run['sigma_rule']}):\n\n{text.strip()}")
    return "\n\n".join(parts)


def lead_text(lead: dict) -> str:
    low, high = lead["lead_interval_95"]
    nats = lead["tested_on"] == "val_loss"
    value, unit = (lead["lead_nats"], "nats") if nats else (lead["lead_bpb"], "bpb")
    base = f"{lead['baseline_val_bpb']:.5f} bpb, {lead['baseline_val_loss']:.5f} nats"
    bits = f" ({lead['lead_bpb']:+.5f} bpb)" if nats else ""
    lines = [f"Baseline: {lead['baseline']} ({base}).", "", f"- Lead: {value:+.5f} {unit}{bits}."]
    if not nats:
        lines += ["- The two tokenisations differ, so nats per token do not compare: tested on bits per byte."]
    if lead["p_margin"] is None:
        return "\n".join(lines + ["- One run on a side: no test is possible."])
    welch_text = f"Welch's two-sided p = {lead['welch_p']:.3g} ({lead['welch_df']:.1f} degrees of freedom)"
    lines += [f"- 95% interval [{low:+.5f}, {high:+.5f}], {welch_text}."]
    lines += [f"- One-sided test of a lead over {lead['margin']:.5f} {unit}: p = {lead['p_margin']:.3g}."]
    return "\n".join(lines)


def readme(runs: list[dict], sub: dict, lead: dict | None, verdict: Verdict, args, files: dict) -> str:
    first, tech = runs[0], techniques(runs[0])
    spread = f" ± {sub['val_bpb_std']:.5f}" if sub["val_bpb_std"] is not None else ""
    seeds = f"mean of {len(runs)} seeds ± sample standard deviation" if len(runs) > 1 else "one seed"
    facts = [f"{sub['val_loss']:.5f} nats", f"{sub['bytes_total']:,} bytes", sub["hardware"] or "hardware not stated"]
    relaxed = " Not a record: what it relaxes is under *Caveats*." if args.non_record else ""
    parts = [
        f"# {args.name}",
        f"**val_bpb {sub['val_bpb']:.5f}{spread}** ({seeds}) · {' · '.join(facts)}.{relaxed}",
        args.blurb,
        "## Results",
        results_table(runs),
    ]
    if first["stages"]:
        parts += ["Seconds of every stage:", stages_table(runs)]
    parts += ["## Statistics", lead_text(lead) if lead else "No baseline was given, so no significance is claimed."]
    if verdict.caveats:
        parts += ["## Caveats", "\n".join(f"- {c}" for c in verdict.caveats)]
    if any(r["sigmas"] for r in runs):
        parts += ["## Clip σ of every tensor", sigma_tables([r for r in runs if r["sigmas"]])]
    digests = [["file", "bytes", "SHA-256"]] + [[f"`{n}`", f"{len(b):,}", f"`{sha256(b)}`"] for n, b in files.items()]
    versions = ", ".join(f"{k} {v}" for k, v in first["versions"].items()) or "versions not stated"
    parts += [
        "## Reproduce",
        f"```bash\npip install -r requirements.txt\n{command(first, args.command)}\n```",
        "`train_gpt.py` is the wrapped script whose bytes are counted, `train_gpt_readable.py` the source it was "
        "packed from, `config.env` the resolved configuration (data paths commented out: set your own).",
        "## Provenance",
        markdown(digests),
        f"Git revision {'`' + first['git'] + '`' if first['git'] else 'not stated'}; {versions}.",
    ]
    credits = [f"{title}: {credit}" for title, credit in tech] + list(args.credit or [])
    parts += ["## Credits", f"By {args.author} (@{args.github_id})." + "".join(f"\n- {c}" for c in credits)]
    return "\n\n".join(p for p in parts if p) + "\n"


def build(runs: list[dict], wrapped: bytes, script: bytes, sub: dict, lead, verdict: Verdict, args) -> dict[str, bytes]:
    """{file name: content} of the whole folder."""
    files = {f"train_seed{r['seed']}.log": Path(r["path"]).read_bytes() for r in runs}
    files |= {"train_gpt.py": wrapped, "train_gpt_readable.py": script, "config.env": config_env(runs[0]).encode()}
    files["requirements.txt"] = requirements(runs[0], args.requirements).encode()
    files["submission.json"] = (json.dumps(sub, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
    return {"README.md": readme(runs, sub, lead, verdict, args, files).encode()} | files


def write(folder: Path, files: dict[str, bytes]) -> None:
    """All or nothing: written beside its place, then renamed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".record-", dir=folder.parent))
    try:
        for name, data in files.items():
            (temporary / name).write_bytes(data)
            os.chmod(temporary / name, 0o644)
        os.chmod(temporary, 0o755)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# --- command line ----------------------------------------------------------------------------------------------------


def parse_arguments(argv):
    ap = arguments(__doc__)
    ap.add_argument("logs", nargs="+", metavar="LOG", help="the log of one seed")
    ap.add_argument("--name", required=True, help="title; the folder is DATE_ and its letters and digits")
    ap.add_argument("--author", required=True)
    ap.add_argument("--github-id", required=True)
    ap.add_argument("--blurb", default="", help="a sentence or a paragraph for the top of the README")
    ap.add_argument("--summary", default="", help="technique_summary (default: what the configuration switches on)")
    ap.add_argument("--credit", action="append", help="a line for the credits; may be repeated")
    ap.add_argument("--command", help="the reproduction command (default: from the log)")
    ap.add_argument("--baseline", metavar="FILE", help="the submission.json to beat")
    ap.add_argument("--non-record", action="store_true", help="relax budgets, hardware and lead, and say so")
    ap.add_argument("--min-seeds", type=int, default=MIN_SEEDS, help="with --non-record: fewer seeds than three")
    ap.add_argument("--track", help=f"default: {TRACKS[0]}, or {TRACKS[1]} with --non-record")
    ap.add_argument("--date", default=datetime.date.today().isoformat(), help="YYYY-MM-DD (today)")
    ap.add_argument("--out", default="records", help="folder of the tracks (records)")
    ap.add_argument("--wrapped", metavar="FILE", help=f"the wrapped script (default: {WRAPPED_NAME} near each log)")
    ap.add_argument("--script", metavar="FILE", help="the readable script (default: from the log's source dump)")
    ap.add_argument("--requirements", metavar="FILE", help="default: the repository's requirements.txt")
    ap.add_argument("--check", action="store_true", help="judge only, write nothing")
    ap.add_argument("--json", action="store_true", help="one JSON object: ok, folder, reasons, caveats, submission")
    args = ap.parse_args(argv)
    if args.min_seeds < MIN_SEEDS and not args.non_record:
        fail(f"--min-seeds {args.min_seeds}: a record has {MIN_SEEDS} or more; use --non-record")
    if args.min_seeds < 1:
        fail(f"--min-seeds {args.min_seeds}: at least 1")
    try:
        datetime.date.fromisoformat(args.date)
    except ValueError:
        fail(f"--date {args.date}: not a date as YYYY-MM-DD")
    args.folder_name = re.sub(r"[^A-Za-z0-9._+-]+", "_", args.name).strip("._")
    if not args.folder_name:
        fail(f"--name {args.name!r}: needs letters or digits")
    if args.track and not re.fullmatch(r"\w+", args.track):
        fail(f"--track {args.track}: only letters, digits and _")
    return args


def main(argv=None) -> int:
    args = parse_arguments(argv)
    runs = sorted(parse_all(args.logs), key=lambda r: (r["seed"] is None, str(r["seed"]).zfill(20)))
    baseline = read_baseline(args.baseline) if args.baseline else None
    verdict = Verdict(lenient=args.non_record)
    judge(runs, verdict, args.min_seeds)
    wrapped = find_wrapped(runs, args.wrapped, verdict)
    script = find_script(runs, args.script, verdict)
    lead = None
    if baseline and all(r["final"] and r[f"{r['final']}_loss"] for r in runs):
        lead = against(baseline, *samples(runs))
        judge_lead(lead, verdict)
    folder = Path(args.out) / track(args) / f"{args.date}_{args.folder_name}"
    if folder.exists():
        verdict.broken(f"{folder} exists already")
    sub = None if verdict.reasons else submission(runs, args, lead, verdict)
    if sub and not args.check:
        try:
            write(folder, build(runs, wrapped, script, sub, lead, verdict, args))
        except OSError as e:
            fail(f"{folder}: {e.strerror or e}")
    announce(folder, sub, verdict, args)
    return 0 if sub else 3


def announce(folder: Path, sub: dict | None, verdict: Verdict, args) -> None:
    written = str(folder) if sub and not args.check else None
    if args.json:
        found = {"ok": sub is not None, "folder": written, "reasons": verdict.reasons, "caveats": verdict.caveats}
        print(json.dumps(finite(found | {"submission": sub}), ensure_ascii=False))
        return
    for caveat in verdict.caveats:
        print(f"caveat: {caveat}")
    if sub is None:
        print(f"refused, {len(verdict.reasons)} reason{'s' if len(verdict.reasons) > 1 else ''}:")
        print("\n".join(f"  {i}. {r}" for i, r in enumerate(verdict.reasons, 1)))
        return
    spread = f" ± {sub['val_bpb_std']:.5f}" if sub["val_bpb_std"] is not None else ""
    print(f"{written or 'nothing against it'}: val_bpb {sub['val_bpb']:.5f}{spread}, {sub['bytes_total']:,} bytes")


if __name__ == "__main__":
    run_tool(main)
