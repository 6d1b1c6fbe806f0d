#!/usr/bin/env python3
"""The seeds of one configuration side by side: speed, seconds, bytes, bits per byte, beside the published figures.

    python tools/seed_table.py runs/h100x8/seed*/seed*.txt

The mean is over the finished runs whose result comes from the evaluation that most of them have; the others are named.
ms per step: the training loop's seconds over its steps, so the mean over both looping states. Published: PR #1855's and
#1962's logs on 8 H100, another text; bits per byte do not compare with ours. Exit codes: 0, or 2 for an unreadable log.
"""

from __future__ import annotations

import statistics

from parse_log import EVALS, arguments, parse_all, run_tool, table

DIGITS = (0, 1, 2, 1, 0, 5)
PUBLISHED = ["published", "–", "121.7", "≤ 600", "455 to 593", "≤ 16,000,000", "–"]


def cell(value, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def main(argv=None) -> int:
    ap = arguments(__doc__)
    ap.add_argument("logs", nargs="+", metavar="LOG", help="the log of one seed")
    runs = parse_all(ap.parse_args(argv).logs)
    rows, columns, left_out = [["seed", "steps", "ms/step", "train s", "eval s", "bytes", "bpb"]], [], []
    finals = [r["final"] for r in runs if r["complete"]]
    usual = max((*reversed(EVALS), None), key=finals.count)
    for r in runs:
        bpb = r[f"{r['final']}_bpb"] if r["final"] else None
        values = [r["steps"], r["step_avg_ms"], r["train_seconds"], r["eval_seconds"], r["artifact_bytes"], bpb]
        rows.append([str(r["seed"]) + ("" if r["complete"] else " (unfinished)"), *map(cell, values, DIGITS)])
        if r["complete"] and r["final"] == usual:
            columns.append(values)
        else:
            why = f"its result is {r['final'] or 'missing'}, not {usual or 'missing'}" if r["complete"] else "unfinished"
            left_out.append(f"left out of the mean: seed {r['seed']}, {why}")
    known = [[v for v in values if v is not None] for values in zip(*columns)] or [[]] * len(DIGITS)
    rows += [["mean", *(cell(statistics.mean(v) if v else None, d) for v, d in zip(known, DIGITS))], PUBLISHED]
    print("\n".join([table(rows), *left_out]))
    if len(known[-1]) > 1:
        print(f"standard deviation of bpb: {statistics.stdev(known[-1]):.5f} (n={len(known[-1])})")
    for r in runs:
        for violation in r["violations"]:
            print(f"seed {r['seed']}: budget_violation: {violation}")
        for problem in r["problems"]:
            print(f"seed {r['seed']}: problem: {problem}")
    return 0


if __name__ == "__main__":
    run_tool(main)
