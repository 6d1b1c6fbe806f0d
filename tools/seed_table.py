#!/usr/bin/env python3
"""The seeds of one configuration side by side: speed, seconds, bytes, bits per byte, beside the published figures.

    python tools/seed_table.py runs/h100x8/seed*/seed*.txt

ms per step: the training loop's seconds over its steps, so the mean over both looping states. Published: PR #1855's and
#1962's logs on 8 H100, another text; bits per byte do not compare with ours. Exit codes: 0, or 2 for an unreadable log.
"""

from __future__ import annotations

import statistics

from parse_log import arguments, parse_all, run_tool, table

PUBLISHED = ["published", "–", "121.7", "≤ 600", "455 to 593", "≤ 16,000,000", "–"]


def cell(value, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def main(argv=None) -> int:
    ap = arguments(__doc__)
    ap.add_argument("logs", nargs="+", metavar="LOG", help="the log of one seed")
    runs = parse_all(ap.parse_args(argv).logs)
    rows = [["seed", "steps", "ms/step", "train s", "eval s", "bytes", "bpb"]]
    columns = []
    for r in runs:
        bpb = r[f"{r['final']}_bpb"] if r["final"] else None
        columns.append([r["steps"], r["step_avg_ms"], r["train_seconds"], r["eval_seconds"], r["artifact_bytes"], bpb])
        rows.append([str(r["seed"]) + ("" if r["complete"] else " (unfinished)"),
                     *(cell(v, d) for v, d in zip(columns[-1], (0, 1, 2, 1, 0, 5)))])
    means, spread = [], None
    for values, digits in zip(zip(*columns), (0, 1, 2, 1, 0, 5)):
        known = [v for v in values if v is not None]
        means.append(cell(statistics.mean(known) if known else None, digits))
        spread = statistics.stdev(known) if len(known) > 1 else None        # of the last column, the score
    rows += [["mean", *means], PUBLISHED]
    print(table(rows))
    if spread is not None:
        print(f"standard deviation of bpb: {spread:.5f} (n={len(runs)})")
    for r in runs:
        for violation in r["violations"]:
            print(f"seed {r['seed']}: budget_violation: {violation}")
    return 0


if __name__ == "__main__":
    run_tool(main)
