#!/usr/bin/env python3
"""Read training logs: ours, and those of both reference scripts (PR #1962 and PR #1412).

    python tools/parse_log.py logs/RUN.txt                  a readable table
    python tools/parse_log.py logs/*.txt --json             one JSON object a line, one line a log
    python tools/parse_log.py logs/RUN.txt --json --all     also every logged point and the source dump

The other tools import `parse` from here, so a log line is understood in exactly one place.

Where a figure comes from, first that the log has:
  train_seconds   "budget train USED/…"; the stopping line's train_time; the last train line
  eval_seconds    "budget eval USED/…";  eval_time of the final evaluation, or "total_eval_time:" if that is more
  code_bytes      "Code size (wrapped)"; "(compressed)"; plain "Code size" (what PR #1412 logged: the raw script)
  artifact_bytes  "Total submission size"; else code + model
A figure that the log lacks is null, never a guess. Exit codes: 0, or 2 with one line on stderr.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import sys
from pathlib import Path

EVALS = ("prequant", "quantized", "sliding", "ttt")  # in pipeline order: the last one present is the result
METRICS = (
    "seed", "steps", "step_avg_ms",
    *(f"{e}_bpb" for e in EVALS), *(f"{e}_loss" for e in EVALS),
    "artifact_bytes", "code_bytes", "train_seconds", "eval_seconds", "stages",
)  # fmt: skip
# Knobs that may differ between the seeds of one configuration: identity and place, not method.
RUN_KEYS = frozenset(
    "seed run_id logfile artifact_dir rank local_rank is_main_process model_path quantized_model_path "
    "config_check resume".split()
)
PATH_KEYS = frozenset(
    "data_dir data_path datasets_dir tokenizer_path train_files val_files val_bytes_files".split()
)  # compared by the SHA-256 of the inputs where the log has them

NUMBER = r"[-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|nan|inf)"
EVAL_NAMES = {
    "pre-quantization post-ema": "prequant",
    "quantized": "quantized",
    "quantized_sliding_window": "sliding",
    "quantized_ttt_phased": "ttt",
    "quantized_ttt": "ttt",  # PHASED_TTT_ENABLED=0
}


class LogError(ValueError):
    """A file that cannot be read as a log; the message is one line that names the file."""


def parse(path: str | Path) -> dict:
    """Parse one log file. Keys: METRICS, then `name`, `config`, `series`, … (see `parse_text`).

    Raises LogError when the file cannot be read or holds no line of a training log.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as e:
        raise LogError(f"{path}: {e.strerror or e}") from None
    run = parse_text(data.decode("utf-8", errors="replace"), name=Path(path).stem)
    if not run["config"] and run["steps"] is None:
        raise LogError(f"{path}: no line of a training log found")
    run["path"] = str(path)
    return run


def parse_text(text: str, name: str = "") -> dict:
    """Parse the text of a log; unknown lines are ignored.

    Beside METRICS the result has:
      config {knob: value}, versions, device {count, name}, git, script {sha256, bytes}, wrapped {sha256, bytes},
      inputs [{file, sha256, tokens}], source (text or None), coverage {eval: [scored, total]},
      eval_times {eval: s}, budgets {train|eval: used s}, ledger [[stage, s, budget]],
      model_bytes, compressor, sigmas {tensor: σ}, sigma_rule, gptq {…}, loops [{name, step, frac}],
      series {train: [{step, loss, seconds, lr_mul, …}], val: [{step, loss, bpb}]},
      violations [text] the run itself reported, problems [text] found while parsing,
      complete (bool), final (name of the last evaluation: the result).
    """
    return _Reader(name).read(text)


def config_value(text: str):
    """A knob's value as the log prints it: '1e-08' → 1e-08, 'True' → True, './data' stays text."""
    if re.fullmatch(r"[-+]?\d+", text):
        return int(text)
    if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", text):
        return float(text)
    return {"True": True, "False": False}.get(text, text)


def comparable_config(run: dict) -> dict:
    """The knobs that must agree between seeds: all but identity; paths only where the inputs are not hashed."""
    drop = RUN_KEYS | PATH_KEYS if run["inputs"] else RUN_KEYS
    return {k: v for k, v in run["config"].items() if k not in drop}


def config_sha256(run: dict) -> str:
    """SHA-256 of the comparable configuration (sorted JSON)."""
    return hashlib.sha256(json.dumps(comparable_config(run), sort_keys=True).encode()).hexdigest()


class _Reader:
    """One pass over the lines; every handler is named after the line it reads and listed in LINES."""

    def __init__(self, name: str):
        self.run = dict.fromkeys(METRICS) | {
            "stages": {}, "name": name, "path": None, "complete": False, "final": None, "format": None,
            "config": {}, "versions": {}, "device": None, "git": None, "script": None, "wrapped": None, "inputs": [],
            "source": None, "model_params": None, "model_bytes": None, "compressor": None, "peak_memory_mib": None,
            "eval_times": {}, "coverage": {}, "budgets": {}, "ledger": [], "sigmas": {}, "sigma_rule": None, "gptq": {},
            "overrides": None, "loops": [], "stopped_early": False, "runs_in_log": 0, "run_seconds": None,
            "violations": [], "problems": [], "series": {"train": [], "val": []},
        }  # fmt: skip
        self.code_sizes: dict[str, int] = {}
        self.train_ms = self.total_bytes = self.last_step = self.total_eval_s = None
        self.source: list[str] | None = None
        self.source_lines = self.sigma_count = 0
        self.block = ""  # the indented list we are in: "", "config" or "sigmas"
        self.in_source = False

    def read(self, text: str) -> dict:
        lines = text.split("\n")  # not splitlines: a source dump may hold form feeds and other exotic separators
        for line in lines:
            if self.in_source and line.startswith("|"):
                self.source.append(line[2:])
                continue
            line = line.rstrip("\r")
            if self.block and self.indented(line):
                continue
            self.block = ""
            if not line or line[0] == " ":
                continue
            for pattern, handler in LINES:
                if m := pattern.match(line):
                    handler(self, m)
                    break
        self.finish()
        return self.run

    # --- indented lists -------------------------------------------------------------------------------------------

    def indented(self, line: str) -> bool:
        if self.block == "config" and (m := re.match(r" {2}(\w+):(?: (.*))?$", line)):
            self.run["config"][m[1]] = config_value((m[2] or "").strip())
            return True
        if self.block == "sigmas" and (m := re.match(rf" {{2,}}([\w.]+): ({NUMBER})$", line)):
            self.run["sigmas"][m[1]] = float(m[2])
            return True
        return False

    def hyperparameters(self, m):
        self.run["runs_in_log"] += 1
        self.run["config"] = {}
        self.block = "config"

    def sigma_header(self, m):
        self.run["sigma_rule"], self.sigma_count = m[1].removeprefix("rule:"), int(m[2])
        self.run["sigmas"] = {}
        self.block = "sigmas"

    # --- provenance -----------------------------------------------------------------------------------------------

    def version(self, m):
        self.run["versions"] = dict(pair.split(":", 1) for pair in m[1].split() if ":" in pair)

    def device(self, m):
        self.run["device"] = {"count": int(m[1]), "name": m[2].strip()}

    def git(self, m):
        self.run["git"] = m[1]

    def script(self, m):
        self.run[m[1]] = {"sha256": m[2].lower(), "bytes": int(m[3])}

    def input_file(self, m):
        self.run["inputs"].append({"file": m[1], "sha256": m[2].lower(), "tokens": int(m[3]) if m[3] else None})

    def overrides(self, m):
        self.run["overrides"] = m[1].strip()

    def source_begin(self, m):
        self.source, self.source_lines, self.in_source = [], int(m[1]), True

    def source_end(self, m):
        self.in_source = False

    def model_params(self, m):
        self.run["model_params"] = int(m[1])

    # --- training -------------------------------------------------------------------------------------------------

    def train_line(self, m):
        pairs = {key: float(value) for key, value in re.findall(rf"(\S+): ?({NUMBER})", m[3])}
        point = {"step": int(m[1]), "loss": float(m[2])}
        point |= {"minutes": pairs.get("train_time"), "tok_s": pairs.get("tok/s")}
        point |= {key: pairs.get(key) for key in ("seconds", "lr_mul", "grad_norm")}
        self.run["series"]["train"].append(point)
        if not math.isfinite(point["loss"]):
            self.run["problems"].append(f"train_loss is {m[2]} at step {m[1]}")

    def val_line(self, m):
        self.run["series"]["val"].append({"step": int(m[1]), "loss": float(m[2]), "bpb": float(m[3])})

    def loop(self, m):
        self.run["loops"].append({"name": m[1], "step": int(m[2]), "frac": float(m[3])})

    def stopping(self, m):
        self.run["stopped_early"] = True
        self.train_ms, self.last_step = float(m[1]), int(m[2])

    def memory(self, m):
        self.run["peak_memory_mib"] = int(m[1])

    # --- quantisation and bytes -----------------------------------------------------------------------------------

    def gptq_summary(self, m):
        self.run["gptq"] = {k: config_value(v) for k, v in re.findall(r"(\w+):(\S+)", m[1])}

    def hessians(self, m):
        self.add_stage("hessians", float(m[1]))

    def model_size(self, m):
        self.run["compressor"], self.run["model_bytes"] = m[1], int(m[2])

    def total_size(self, m):
        self.total_bytes = int(m[1])

    def code_size(self, m):
        self.code_sizes[m[1] or "plain"] = int(m[2])

    def packed(self, m):
        self.add_stage("pack", float(m[1]))

    def unpacked(self, m):
        self.add_stage("unpack", float(m[1]))

    def ttt_compile(self, m):
        self.add_stage("compile", float(m[1]))

    # --- evaluation and ledger ------------------------------------------------------------------------------------

    def evaluation(self, m):
        name, loss, bpb, seconds = EVAL_NAMES[m[1]], float(m[2]), float(m[3]), float(m[4]) / 1000
        self.run["eval_times"][name] = seconds
        for key, value in ((f"{name}_loss", loss), (f"{name}_bpb", bpb)):
            if math.isfinite(value):
                self.run[key] = value
            else:
                self.run["problems"].append(f"{key} is {value}")

    def coverage(self, m):
        stage = m[3] or "quantized"
        hints = (("ttt", "ttt"), ("slid", "sliding"), ("pre", "prequant"), ("training", "training"))
        name = next((e for hint, e in hints if hint in stage), "quantized")
        self.run["coverage"][name] = [int(m[1]), int(m[2])]

    def ledger(self, m):
        self.run["ledger"].append([m[1], float(m[2]), m[3]])

    def budget(self, m):
        self.run["budgets"][m[1]] = float(m[2])

    def violation(self, m):
        self.run["violations"].append(m[1].strip())

    def total_eval(self, m):
        self.total_eval_s = float(m[1])

    def run_complete(self, m):
        self.run["complete"] = True
        self.run["run_seconds"] = float(m[1])

    # --- the sums -------------------------------------------------------------------------------------------------

    def add_stage(self, name: str, seconds: float):
        stages = self.run["stages"]
        stages[name] = round(stages.get(name, 0.0) + seconds, 6)

    def finish(self):
        run = self.run
        train, val = run["series"]["train"], run["series"]["val"]
        exact_seconds(train, run["config"].get("train_batch_tokens"))
        run["seed"] = run["config"].get("seed")
        ours = bool(run["versions"] or run["script"] or self.source or run["ledger"] or run["complete"])
        run["format"] = "ours" if ours else "reference"
        steps = [p["step"] for p in train + val]
        run["steps"] = self.last_step if self.last_step is not None else max(steps, default=None)
        self.finish_source()
        self.finish_bytes()
        if run["ledger"]:
            run["stages"] = {}  # the ledger is complete; the hints of other lines would count twice
            for stage, seconds, _ in run["ledger"]:
                self.add_stage(stage, seconds)
        else:
            if self.train_ms is not None:
                self.add_stage("train", self.train_ms / 1000)
            for name, seconds in run["eval_times"].items():
                self.add_stage(f"eval_{name}", seconds)
        loop_s = self.train_ms / 1000 if self.train_ms is not None else run["stages"].get("train")
        if loop_s is None and train and train[-1]["step"] == run["steps"]:
            loop_s = train[-1]["seconds"]
        if loop_s is not None and run["steps"]:
            run["step_avg_ms"] = round(1000 * loop_s / run["steps"], 3)
        run["train_seconds"] = run["budgets"].get("train", loop_s)
        run["final"] = next((e for e in reversed(EVALS) if run[f"{e}_bpb"] is not None and e != "prequant"), None)
        final_s = run["eval_times"].get(run["final"])
        run["eval_seconds"] = run["budgets"].get("eval", final_s)
        if "eval" not in run["budgets"] and (self.total_eval_s or 0) > (final_s or 0) + 0.05:  # printed to 0.1 s
            run["eval_seconds"] = self.total_eval_s
        if not ours:  # the references print no closing line: finished = the last evaluation asked for is there
            switches = (("ttt_enabled", "ttt"), ("sliding_window_enabled", "sliding"))
            wanted = next((e for knob, e in switches if run["config"].get(knob)), "quantized")
            run["complete"] = run["final"] is not None and EVALS.index(run["final"]) >= EVALS.index(wanted)
        if run["sigmas"] and len(run["sigmas"]) != self.sigma_count:
            run["problems"].append(f"σ table announces {self.sigma_count} tensors and has {len(run['sigmas'])}")
        if run["runs_in_log"] > 1:
            run["problems"].append(f"the file holds {run['runs_in_log']} runs; the figures mix them")

    def finish_bytes(self):
        run, sizes = self.run, self.code_sizes
        run["code_bytes"] = next((sizes[k] for k in ("wrapped", "compressed", "plain") if k in sizes), None)
        parts = None if None in (run["code_bytes"], run["model_bytes"]) else run["code_bytes"] + run["model_bytes"]
        run["artifact_bytes"] = parts if self.total_bytes is None else self.total_bytes
        if parts is not None and parts != run["artifact_bytes"]:
            sum_ = f"code {run['code_bytes']:,} + model {run['model_bytes']:,}"
            run["problems"].append(f"total submission size {run['artifact_bytes']:,} is not {sum_}")

    def finish_source(self):
        """Join the dump; the hash in the log decides whether the script ended with a newline."""
        if self.source is None:
            return
        run, body = self.run, "\n".join(self.source)
        run["source"] = body + "\n"
        if self.in_source or len(self.source) != self.source_lines:
            run["problems"].append(f"source dump has {len(self.source)} lines of {self.source_lines}")
        elif run["script"]:
            texts = {hashlib.sha256(t.encode()).hexdigest(): t for t in (body, body + "\n")}
            if run["script"]["sha256"] in texts:
                run["source"] = texts[run["script"]["sha256"]]
            else:
                run["problems"].append("the source dump does not have the script's SHA-256")


STEP = r"(\d+)/\d+"
LINES = [
    (re.compile(p), handler)
    for p, handler in [
        (r"Hyperparameters:\s*$", _Reader.hyperparameters),
        (rf"{STEP} train_loss: ?({NUMBER})(?= |$)(.*)$", _Reader.train_line),
        (rf"{STEP} val_loss: ?({NUMBER}) val_bpb: ?({NUMBER})\s*$", _Reader.val_line),
        (rf"layer_loop:(\w+) step:(\d+) frac:({NUMBER})", _Reader.loop),
        (rf"stopping_early: .*?train_time: ?({NUMBER})ms step: ?{STEP}", _Reader.stopping),
        (r"peak memory allocated: (\d+) MiB", _Reader.memory),
        (
            rf"(?:diagnostic )?({'|'.join(EVAL_NAMES)})"
            rf" val_loss:({NUMBER}) val_bpb:({NUMBER}) eval_time:({NUMBER})ms\s*$",
            _Reader.evaluation,
        ),
        (r"GPTQ (?:adaptive )?clip_sigmas \((.*), (\d+) tensors\):\s*$", _Reader.sigma_header),
        (r"gptq_summary (.*)$", _Reader.gptq_summary),
        (rf"GPTQ:collected \d+ Hessians in ({NUMBER})s", _Reader.hessians),
        (r"Serialized model quantized\+(\S+): (\d+) bytes", _Reader.model_size),
        (r"Total submission size quantized\+\S+: (\d+) bytes", _Reader.total_size),
        (r"Code size(?: \((\w+)\))?: (\d+) bytes", _Reader.code_size),
        (rf"Serialize: .*?done in ({NUMBER})s", _Reader.packed),
        (rf"Deserialize: .*?done in ({NUMBER})s", _Reader.unpacked),
        (rf"ttt_lora:compile warmup done \(({NUMBER})s\)", _Reader.ttt_compile),
        (r"val_tokens scored: ?(\d+) total: ?(\d+)(?: stage:(\S+))?", _Reader.coverage),
        (rf"ledger stage:(\S+) seconds:({NUMBER}) budget:(\w+)", _Reader.ledger),
        (rf"budget (train|eval) ({NUMBER})/(?:{NUMBER}|none)", _Reader.budget),
        (r"budget_violation: ?(.*)$", _Reader.violation),
        (rf"total_eval_time:({NUMBER})s", _Reader.total_eval),
        (rf"run_complete seconds:({NUMBER})", _Reader.run_complete),
        (r"version (python:.*)$", _Reader.version),
        (r"device count:(\d+) name:(.*)$", _Reader.device),
        (r"git revision:(\S+)", _Reader.git),
        (r"(script|wrapped) sha256:([0-9a-fA-F]{64}) bytes:(\d+)", _Reader.script),
        (r"input file:(.+?) sha256:([0-9a-fA-F]+)(?: tokens:(\d+))?\s*$", _Reader.input_file),
        (r"overrides:(.*)$", _Reader.overrides),
        (r"source_begin lines:(\d+)", _Reader.source_begin),
        (r"source_end\s*$", _Reader.source_end),
        (r"model_params:(\d+)", _Reader.model_params),
    ]
]


def exact_seconds(train: list[dict], batch_tokens: int | None) -> None:
    """Fill each point's `seconds`. A log that gives only minutes to one decimal gives them better through tok/s, which
    both references count from the start: step 500 × 786432 tokens / 8099629 tok/s = 48.5 s, logged as 0.8m.
    """
    for p in train:
        if p["seconds"] is not None or p["minutes"] is None:
            continue
        p["seconds"] = coarse = 60 * p["minutes"]
        if p["tok_s"] and isinstance(batch_tokens, int):
            fine = p["step"] * batch_tokens / p["tok_s"]
            if abs(fine - coarse) <= 3.5:  # half of the last printed digit, and some rounding of tok/s
                p["seconds"] = round(fine, 3)


def budget_used(run: dict, name: str) -> float | None:
    """Seconds charged to the training or evaluation budget. Without a ledger, training is the loop plus Hessians."""
    if name in run["budgets"]:
        return run["budgets"][name]
    if name == "eval":
        return run["eval_seconds"]
    if run["train_seconds"] is None:
        return None
    return round(run["train_seconds"] + sum(run["stages"].get(s, 0.0) for s in ("hessians", "gptq")), 3)


# --- command line, shared by the other tools -----------------------------------------------------------------------


def fail(message: str, code: int = 2):
    """One line on stderr, then exit."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(code)


class OneLineParser(argparse.ArgumentParser):
    """Without the usage lines that argparse puts before an error."""

    def error(self, message):
        fail(f"{message} (see --help)")


def arguments(doc: str) -> argparse.ArgumentParser:
    """A parser whose --help is the tool's own docstring."""
    return OneLineParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def run_tool(main) -> None:
    """Call a tool's main; a reader that closes the pipe early (`… | head`) is no error."""
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)


def parse_all(paths) -> list[dict]:
    """Parse every path, or leave with exit code 2 at the first that cannot be read."""
    try:
        return [parse(p) for p in paths]
    except LogError as e:
        fail(str(e))


def show(value) -> str:
    """A cell: 15,905,000 · 1.06214044 · – for nothing."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.8f}".rstrip("0").rstrip(".")


def table(rows: list[list[str]], right_from: int = 1) -> str:
    """Columns padded to one width; from column `right_from` on aligned to the right."""
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    lines = []
    for r in rows:
        cells = [c.rjust(w) if i >= right_from else c.ljust(w) for i, (c, w) in enumerate(zip(r, widths))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def report(run: dict) -> str:
    rows = [[k, show(run[k])] for k in METRICS if k != "stages"]
    rows += [[f"stage {k}", f"{v:.1f} s"] for k, v in run["stages"].items()]
    rows += [["complete", "yes" if run["complete"] else "NO"]]
    notes = [f"  violation: {v}" for v in run["violations"]] + [f"  problem: {p}" for p in run["problems"]]
    return "\n".join([f"{run['path']} ({run['format']})", table(rows), *notes])


def main(argv=None) -> int:
    ap = arguments(__doc__)
    ap.add_argument("logs", nargs="+", metavar="LOG", help="a log file")
    ap.add_argument("--json", action="store_true", help="one JSON object a line, one line a log")
    ap.add_argument("--all", action="store_true", help="with --json: also the logged points and the source dump")
    args = ap.parse_args(argv)
    runs = parse_all(args.logs)
    if not args.json:
        print("\n\n".join(report(r) for r in runs))
        return 0
    for run in runs:
        if not args.all:
            run = {k: v for k, v in run.items() if k not in ("series", "source")}
        print(json.dumps(finite(run), ensure_ascii=False))
    return 0


def finite(value):
    """NaN and infinities as null, since JSON has neither."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    run_tool(main)
