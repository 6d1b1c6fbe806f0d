#!/usr/bin/env python3
"""Draw one or more training logs (ours or the references'): loss, learning rate, loop switch, results by stage.

    python tools/plot_log.py logs/RUN.txt -o run.png
    python tools/plot_log.py logs/A.txt logs/B.txt --labels "loops 2,loops 3" -o both.png
    python tools/plot_log.py logs/RUN.txt -o run.svg --json        what was drawn, as JSON

Left: loss and learning rate against the step; middle: against seconds of training; right: bits per byte after each
stage. Diamonds are validation losses, triangles mark where a layer loop switches on. The learning rate is what the log
says (lr_mul), or else follows from the log's own schedule knobs. The y axis starts below the first few steps, whose
losses (9 to 12) would flatten the rest: --full shows them.
"""

from __future__ import annotations

import bisect
import json
from pathlib import Path

from parse_log import EVALS, arguments, fail, finite, parse_all, run_tool

# Okabe–Ito: eight colours told apart with every common colour blindness; a second round changes the dashes too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C00")
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)))
STAGE_LABELS = {
    "prequant": "before\nquant.",
    "quantized": "quant-\nized",
    "sliding": "sliding\nwindow",
    "ttt": "test-time\ntraining",
}


def interpolate(x: float, xs: list[float], ys: list[float]) -> float | None:
    """Linear, flat outside the range; None without points."""
    if not xs:
        return None
    i = bisect.bisect_left(xs, x)
    if i == 0 or i == len(xs):
        return ys[min(i, len(xs) - 1)]
    t = (x - xs[i - 1]) / (xs[i] - xs[i - 1])
    return ys[i - 1] + t * (ys[i] - ys[i - 1])


def schedule(config: dict, frac: float) -> float | None:
    """lr multiplier at a fraction of the budget: 1, then linear from 1 - warmdown_frac down to at least min_lr."""
    warmdown = config.get("warmdown_frac")
    if not isinstance(warmdown, (int, float)) or frac < 0:
        return None
    if warmdown <= 0 or frac < 1 - warmdown:
        return 1.0
    return max((1 - frac) / warmdown, config.get("min_lr") or 0.0, 0.0)


def smooth(values: list[float], half: int) -> list[float]:
    """Mean over `half` neighbours on both sides. At the start, where loss falls steeply, the window stays centred
    (no lag); at the end it keeps its left half, so that the last point is not raw noise.
    """
    sums = [0.0]
    for v in values:
        sums.append(sums[-1] + v)
    out = []
    for i in range(len(values)):
        h = min(half, i)
        stop = min(i + h + 1, len(values))
        out.append((sums[stop] - sums[i - h]) / (stop - i + h))
    return out


def curves(run: dict) -> dict:
    """The series of one log, each as [step, seconds, value] rows: train, val, lr, loops."""
    train = [p for p in run["series"]["train"] if p["loss"] == p["loss"]]
    steps = [0.0] + [float(p["step"]) for p in train if p["seconds"] is not None]
    times = [0.0] + [p["seconds"] for p in train if p["seconds"] is not None]
    if run["steps"] and run["stopped_early"] and run["steps"] > steps[-1]:
        steps, times = steps + [float(run["steps"])], times + [run["step_avg_ms"] * run["steps"] / 1000]
    at = lambda step: interpolate(step, steps, times) if len(steps) > 1 else None

    config, budget = run["config"], run["config"].get("max_wallclock_seconds") or 0
    usable = budget - (config.get("gptq_reserve_seconds") or 0) if budget else 0
    lr = [[p["step"], at(p["step"]), p["lr_mul"]] for p in train if p["lr_mul"] is not None]
    if not lr and len(steps) > 1:
        for k in range(201):
            step = steps[-1] * k / 200
            total = usable or config.get("iterations") or 0
            value = schedule(config, (at(step) if usable else step) / total) if total else None
            if value is not None:
                lr.append([step, at(step), value])
    train_rows = [[p["step"], at(p["step"]), p["loss"]] for p in train]
    known = sorted((r[0], r[2]) for r in train_rows)
    loops = []
    for loop in run["loops"]:
        loss = interpolate(loop["step"], [k for k, _ in known], [v for _, v in known])
        loops.append([loop["step"], at(loop["step"]), loss])
    val = [[p["step"], at(p["step"]), p["loss"]] for p in run["series"]["val"] if p["loss"] == p["loss"]]
    return {"train": train_rows, "val": val, "lr": lr, "loops": loops}


def loss_limits(drawn: list[dict]) -> tuple[float, float] | None:
    """From under the lowest loss to over the highest, without the first 5% of each run; None for too few points."""
    kept = []
    for c in drawn:
        points = c["train"] + c["val"]
        start = 0.05 * max((p[0] for p in points), default=0)
        kept += [p[2] for p in points if p[0] >= start]
    if len(kept) < 2 or max(kept) == min(kept):
        return None
    margin = 0.08 * (max(kept) - min(kept))
    return min(kept) - margin, max(kept) + margin


def result(run: dict) -> str:
    """The end of a legend line: '4,835 steps · 1.06214 bpb'."""
    parts = [f"{run['steps']:,} step{'s' if run['steps'] > 1 else ''}"] if run["steps"] else []
    if run["final"]:
        parts.append(f"{run[run['final'] + '_bpb']:.5f} bpb")
    return " · ".join(parts)


def style(k: int) -> dict:
    """Colour and dashes of the k-th run."""
    return {"color": COLOURS[k % len(COLOURS)], "ls": DASHES[k // len(COLOURS) % len(DASHES)]}


def draw_run(c: dict, column: int, loss, lr, crowded: bool, color: str, ls) -> None:
    """One run's curves in the loss and learning-rate axes; `column` 0 = over steps, 1 = over seconds."""
    points = lambda name: zip(*[(r[column], r[2]) for r in c[name] if r[column] is not None and r[2] is not None])
    xs, ys = map(list, tuple(points("train")) or ((), ()))
    if len(ys) > 60:  # often logged: the raw points pale, their running mean over them
        if not crowded:
            loss.plot(xs, ys, color=color, alpha=0.25, lw=0.8)
        ys = smooth(ys, max(2, len(ys) // 50))
    dot = {"marker": "o", "ms": 3.5} if len(ys) < 4 else {}  # a line of one point would not show
    loss.plot(xs, ys, color=color, ls=ls, lw=1.5, **dot)
    diamond = {"marker": "D", "ms": 4.5 if crowded else 6, "mec": "white", "mew": 0.8, "zorder": 4}
    triangle = {"marker": "^", "ms": 7 if crowded else 8.5, "mec": color, "mew": 1.6, "zorder": 5}
    loss.plot(*(tuple(points("val")) or ((), ())), ls="", color=color, **diamond)
    for x in (tuple(points("loops")) or ((),))[0]:
        loss.plot([x], [interpolate(x, xs, ys)], color="white", **triangle)
        for ax in (loss, lr):
            ax.axvline(x, color=color, ls=":", lw=0.9, alpha=0.8, zorder=1)
    lr.plot(*(tuple(points("lr")) or ((), ())), color=color, ls=ls, lw=1.5, **dot)


def draw(runs: list[dict], labels: list[str], out: Path, full: bool = False, title: str = "") -> list[dict]:
    """Draw `runs` into `out` (the suffix names the format); returns the curves drawn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                         "grid.color": "#DDDDDD", "grid.linewidth": 0.7, "axes.axisbelow": True})  # fmt: skip
    drawn = [curves(run) for run in runs]
    staged = [[e for e in EVALS if run[f"{e}_bpb"] is not None] for run in runs]
    with_stages = any(staged)
    legend_columns = 1 if len(runs) <= 5 else 2
    head = 0.12 + 0.235 * -(-len(runs) // legend_columns) + (0.36 if title else 0.0)  # inches: legend and title
    width, height = (13.5 if with_stages else 10.5), 5.5 + head
    fig = plt.figure(figsize=(width, height), dpi=140)
    outer = fig.add_gridspec(
        1, 2 if with_stages else 1, width_ratios=(6, 1.7)[: 2 if with_stages else 1], wspace=0.15,
        top=1 - (head + 0.12) / height, bottom=0.6 / height, left=0.75 / width, right=1 - 0.3 / width,
    )  # fmt: skip
    grid = outer[0].subgridspec(2, 2, height_ratios=(3.2, 1), hspace=0.09, wspace=0.09)
    panels = []
    for col, label in ((0, "step"), (1, "seconds of training")):
        loss = fig.add_subplot(grid[0, col], sharey=panels[0][0] if panels else None)
        lr = fig.add_subplot(grid[1, col], sharex=loss, sharey=panels[0][1] if panels else None)
        loss.tick_params(labelbottom=False, labelleft=not panels)
        lr.tick_params(labelleft=not panels)
        lr.set_xlabel(label)
        lr.xaxis.set_major_locator(MaxNLocator(7, integer=True, steps=[1, 2, 5, 10]))
        lr.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
        panels.append((loss, lr))
    panels[0][0].set_ylabel("loss (nats per token)")
    panels[0][1].set_ylabel("lr multiplier")
    for k, c in enumerate(drawn):
        for column, pair in enumerate(panels):
            draw_run(c, column, *pair, crowded=len(runs) > 4, **style(k))
    limits = None if full else loss_limits(drawn)
    if limits:
        panels[0][0].set_ylim(*limits)
    panels[0][1].set_ylim(0, max([1.0] + [r[2] for c in drawn for r in c["lr"]]) * 1.08)
    for pair in panels:
        pair[1].set_xlim(left=0)

    if with_stages:
        ax = fig.add_subplot(outer[1])
        order = [e for e in EVALS if any(e in s for s in staged)]
        for k, (run, stages) in enumerate(zip(runs, staged)):
            ys = [run[f"{e}_bpb"] for e in stages]
            ax.plot([order.index(e) for e in stages], ys, lw=1.3, marker="o", ms=6.5, mec="white", mew=0.8, **style(k))
        ax.set_xticks(range(len(order)), [STAGE_LABELS[e] for e in order])
        ax.set_xlim(-0.4, len(order) - 0.6)
        ax.set_ylabel("bits per byte")
        ax.yaxis.set_major_locator(MaxNLocator(9, steps=[1, 2, 5, 10]))
        ax.margins(y=0.08)
        low, high = ax.get_ylim()
        if high - low < 2e-3:  # ticks of four decimals stay distinct and short
            ax.set_ylim((low + high) / 2 - 1e-3, (low + high) / 2 + 1e-3)
        ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.4f}" if high - low < 0.02 else f"{v:.3f}"))

    handles = []
    for k, (run, label) in enumerate(zip(runs, labels)):
        text = " · ".join(filter(None, (label, result(run), "" if run["complete"] else "unfinished")))
        handles.append(Line2D([], [], lw=2.2, label=text, **style(k)))
    keys = [
        Line2D([], [], ls="", marker="D", color="#555555", ms=6, label="validation"),
        Line2D([], [], ls="", marker="^", color="white", mec="#555555", mew=1.6, ms=8, label="layer loop on"),
    ]
    top = 1 - (0.44 if title else 0.1) / height
    plain = {"frameon": False, "borderpad": 0}
    at = (0.55 / width, top)
    left = fig.legend(handles=handles, loc="upper left", bbox_to_anchor=at, ncols=legend_columns, **plain)
    fig.add_artist(left)
    fig.legend(handles=keys, loc="upper right", bbox_to_anchor=(0.99, top), ncols=2, **plain)
    if title:
        fig.suptitle(title, x=0.58 / width, y=1 - 0.1 / height, ha="left", va="top", fontsize=12, fontweight="bold")
    fig.savefig(out)
    plt.close(fig)
    return drawn


def main(argv=None) -> int:
    ap = arguments(__doc__)
    ap.add_argument("logs", nargs="+", metavar="LOG", help="a log file")
    ap.add_argument("-o", "--out", required=True, metavar="FILE", help="picture to write: .png, .svg or .pdf")
    ap.add_argument("--labels", help="comma list of names for the legend (default: the file names)")
    ap.add_argument("--title", default="", help="a line over the picture")
    ap.add_argument("--full", action="store_true", help="show the first steps' losses too")
    ap.add_argument("--json", action="store_true", help="print what was drawn as JSON")
    args = ap.parse_args(argv)
    out = Path(args.out)
    if out.suffix not in (".png", ".svg", ".pdf"):
        fail(f"{out}: the suffix must be .png, .svg or .pdf")
    runs = parse_all(args.logs)
    labels = args.labels.split(",") if args.labels else [run["name"] for run in runs]
    if len(labels) != len(runs):
        fail(f"--labels names {len(labels)} runs, {len(runs)} logs are given")
    for run in runs:
        if not run["series"]["train"] and not run["series"]["val"]:
            fail(f"{run['path']}: no loss to draw")
    try:
        drawn = draw(runs, labels, out, full=args.full, title=args.title)
    except OSError as e:
        fail(f"{out}: {e.strerror or e}")
    if args.json:
        print(json.dumps(finite({"out": str(out), "runs": [{"label": n, **c} for n, c in zip(labels, drawn)]})))
    else:
        print(f"{out}: {len(runs)} run{'s' if len(runs) > 1 else ''}")
    return 0


if __name__ == "__main__":
    run_tool(main)
