#!/usr/bin/env python3
"""Compare two logs or two sets of seeds: differences with Welch intervals, and what differs in configuration.

    python tools/compare.py logs/A.txt logs/B.txt                       two runs: differences, no intervals
    python tools/compare.py a1.txt,a2.txt,a3.txt b1.txt,b2.txt,b3.txt   two sets of seeds
    python tools/compare.py records/…/OLD records/…/NEW --json          two folders; skips what has no settings (console output)

The difference is B − A. Its interval and p-value are Welch's (unequal variances, both sets need two runs or more; the
p-value is two-sided). Configurations are compared without what is particular to a run (seed, run id, log file).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from textwrap import fill
from typing import NamedTuple

from parse_log import METRICS, RUN_KEYS, LogError, arguments, fail, finite, parse, run_tool, table

LOG_SUFFIXES = (".log", ".txt")


class Sample(NamedTuple):
    """n values by their mean and sample standard deviation (nan for one value)."""

    n: int
    mean: float
    sd: float

    @classmethod
    def of(cls, values) -> Sample:
        values = list(values)
        n, mean = len(values), math.fsum(values) / len(values)
        if min(values) == max(values):  # the mean's rounding must not make a spread where there is none
            return cls(n, values[0], 0.0 if n > 1 else math.nan)
        return cls(n, mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1)))


def welch(a: Sample, b: Sample, margin: float = 0.0, confidence: float = 0.95) -> dict:
    """Welch's test on b.mean − a.mean.

    Returns difference, se, df, low and high (the confidence interval), p (two-sided, difference ≠ 0) and p_margin
    (one-sided, the chance of such a difference or a larger one if the true one were `margin`). A set of one value has
    no variance: everything but the difference is None then.
    >>> w = welch(Sample.of([1, 2, 3]), Sample.of([2, 3, 4]));  round(w["difference"], 3), round(w["df"], 3)
    (1.0, 4.0)
    """
    from scipy.stats import t

    out = {"difference": b.mean - a.mean} | dict.fromkeys(("se", "df", "low", "high", "p", "p_margin"))
    if a.n < 2 or b.n < 2:
        return out
    va, vb = a.sd**2 / a.n, b.sd**2 / b.n
    se = math.sqrt(va + vb)
    if se == 0:  # no spread at all: the limits of the formulas below
        d = out["difference"]
        limit = {"se": 0.0, "df": float(a.n + b.n - 2), "low": d, "high": d}
        return out | limit | {"p": 1.0 if d == 0 else 0.0, "p_margin": 0.0 if d > margin else 1.0}
    df = (va + vb) ** 2 / (va**2 / (a.n - 1) + vb**2 / (b.n - 1))
    half = float(t.ppf(0.5 + confidence / 2, df)) * se
    d = out["difference"]
    return out | {
        "se": se, "df": df, "low": d - half, "high": d + half,
        "p": float(2 * t.sf(abs(d) / se, df)), "p_margin": float(t.sf((d - margin) / se, df)),
    }  # fmt: skip


def collect(argument: str) -> list[dict]:
    """The logs that an argument names: files and folders, separated by commas. Leaves with code 2 if there are none."""
    runs = []
    for part in filter(None, argument.split(",")):
        path = Path(part)
        try:
            if not path.is_dir():
                runs.append(parse(path))
                continue
            files = [f for f in sorted(path.iterdir()) if f.suffix in LOG_SUFFIXES and f.is_file()]
        except (LogError, OSError) as e:
            fail(str(e))
        for f in files:
            try:
                run = parse(f)
            except LogError:
                continue
            if run["config"] and run["steps"] is not None:  # console output of the same run has no settings
                runs.append(run)
    if not runs:
        fail(f"{argument}: no logs there")
    return runs


def measures(run: dict) -> dict:
    """Every figure of a run that can be averaged: the result first, then METRICS, then the stages' seconds."""
    final = run["final"]
    out = {"result_bpb": run[f"{final}_bpb"], "result_loss": run[f"{final}_loss"]} if final else {}
    out |= {k: run[k] for k in METRICS if k not in ("seed", "stages") and run[k] is not None}
    return out | {f"{k}_seconds": v for k, v in run["stages"].items() if k not in ("train",)}


def differences(a: list[dict], b: list[dict], confidence: float = 0.95) -> list[dict]:
    """One row a figure: {name, a, b: {n, mean, sd} or None, and what `welch` returns}."""
    ma, mb = [measures(r) for r in a], [measures(r) for r in b]
    present = dict.fromkeys(k for m in ma + mb for k in m)
    ordered = [k for k in ("result_bpb", "result_loss", *METRICS) if k in present]
    names = ordered + [k for k in present if k not in ordered]  # then the stages, as they came
    rows = []
    for name in names:
        va, vb = ([m[name] for m in ms if name in m] for ms in (ma, mb))
        sa, sb = (Sample.of(v) if v else None for v in (va, vb))
        test = welch(sa, sb, confidence=confidence) if sa and sb else {"difference": None}
        rows.append({"name": name, "a": sa and sa._asdict(), "b": sb and sb._asdict()} | test)
    return rows


def config_differences(a: list[dict], b: list[dict]) -> dict:
    """{knob: [values in A, values in B]} where the two sets do not hold the same values; versions and device too."""

    def facts(run):
        device = run["device"] and f"{run['device']['count']} × {run['device']['name']}"
        script = run["script"] and run["script"]["sha256"][:12]
        extra = {f"({k})": v for k, v in run["versions"].items()} | {"(device)": device, "(script)": script}
        return {k: v for k, v in run["config"].items() if k not in RUN_KEYS} | extra

    fa, fb = [facts(r) for r in a], [facts(r) for r in b]
    out = {}
    for knob in sorted({k for f in fa + fb for k in f}):
        va, vb = (sorted({json.dumps(f.get(knob)) for f in fs}) for fs in (fa, fb))
        if va != vb or len(va) > 1:
            out[knob] = [[json.loads(v) for v in values] for values in (va, vb)]
    return out


def digits(name: str) -> int:
    """Decimals worth printing: six for losses, none for bytes and steps."""
    if name.endswith(("_bpb", "_loss")):
        return 6
    return 0 if name.endswith("_bytes") or name == "steps" else 2


def pm(sample: dict | None, name: str) -> str:
    if sample is None:
        return "–"
    d = digits(name)
    spread = f" ± {sample['sd']:,.{d}f}" if sample["n"] > 1 else ""
    return f"{sample['mean']:,.{d}f}{spread}"


def report(a: list[dict], b: list[dict], rows: list[dict], config: dict, confidence: float) -> str:
    def cells(row):
        d, name = digits(row["name"]), row["name"]
        diff = "–" if row["difference"] is None else f"{row['difference']:+,.{d}f}"
        ci = "–" if row.get("low") is None else f"[{row['low']:+,.{d}f}, {row['high']:+,.{d}f}]"
        p = "–" if row.get("p") is None else f"{row['p']:.2g}"
        return [name, pm(row["a"], name), pm(row["b"], name), diff, ci, p]

    def names(runs):
        return ", ".join(f"{r['name']} (seed {r['seed']}{'' if r['complete'] else ', UNFINISHED'})" for r in runs)

    head = ["", "A", "B", "B − A", f"{100 * confidence:g}% interval", "p"]
    problems = [f"problem: {r['path'] or r['name']}: {p}" for r in a + b for p in r["problems"]]
    lines = [f"A: {names(a)}", f"B: {names(b)}", *problems, "", table([head] + [cells(r) for r in rows]), ""]
    if min(len(a), len(b)) < 2:
        lines += ["One run has no spread: give two or more seeds on both sides for intervals.", ""]
    if len({r["final"] for r in a + b}) > 1:
        lines += ["The results come from different kinds of evaluation: compare them stage by stage.", ""]
    ratios = [r["result_loss"] / r["result_bpb"] for r in map(measures, a + b) if r.get("result_bpb")]
    if ratios and max(ratios) > 1.001 * min(ratios):
        lines += ["Nats per token are over different tokenisations: compare bits per byte.", ""]
    if not config:
        return "\n".join(lines + ["Configurations: no difference."])
    missing = {k: [v == [None] for v in pair] for k, pair in config.items()}
    both = {k: pair for k, pair in config.items() if not any(missing[k])}
    if both:
        rows = [[f"  {k}", *(" | ".join(map(short, values)) for values in pair)] for k, pair in both.items()]
        lines += ["Configurations differ:", table([["", "A", "B"]] + rows, 9)]
    for side, name in ((1, "A"), (0, "B")):
        only = [f"{k}={' | '.join(map(short, config[k][1 - side]))}" for k in config if missing[k][side]]
        if only:
            lines += fill(f"  only {name} has: " + ", ".join(only), 118, subsequent_indent="    ").split("\n")
    return "\n".join(lines)


def short(value, width: int = 48) -> str:
    """A knob's value for a column: long paths lose their middle."""
    text = "–" if value is None or value == "" else str(value)
    return text if len(text) <= width else f"{text[: width // 2 - 1]}…{text[-(width // 2) :]}"


def main(argv=None) -> int:
    ap = arguments(__doc__)
    ap.add_argument("a", metavar="A", help="a log, a comma list of logs, or a folder")
    ap.add_argument("b", metavar="B", help="the same")
    ap.add_argument("--confidence", type=float, default=0.95, help="of the intervals (0.95)")
    ap.add_argument("--json", action="store_true", help="one JSON object: a, b (files), problems, rows, config")
    args = ap.parse_args(argv)
    if not 0 < args.confidence < 1:
        fail(f"--confidence {args.confidence:g}: must lie between 0 and 1")
    a, b = collect(args.a), collect(args.b)
    rows, config = differences(a, b, args.confidence), config_differences(a, b)
    if args.json:
        files = {"a": [r["path"] for r in a], "b": [r["path"] for r in b]}
        files["problems"] = {r["path"]: r["problems"] for r in a + b if r["problems"]}
        print(json.dumps(finite(files | {"confidence": args.confidence, "rows": rows, "config": config})))
    else:
        print(report(a, b, rows, config, args.confidence))
    return 0


if __name__ == "__main__":
    run_tool(main)
