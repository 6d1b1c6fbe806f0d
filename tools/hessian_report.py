"""Compare the quantisation statistics of runs: what is stable across seeds, and where the bits went.

    python tools/hessian_report.py RUN/hessian_report.safetensors [MORE ...] [-o sigma.png]

Each train_gpt.py run that quantises writes hessian_report.safetensors beside its artifact. For every pair of runs: the
correlation of the traces of layer groups (early 0-2, loop, mid, late 8+), of single matrices, and of the importance of
single rows (mean over matrices). PR 1412 found r = 0.997, 0.994 and 0.12 across seeds. The picture: sigma by layer and type.
"""
from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open


def fail(message: str):
    print(message, file=sys.stderr)
    raise SystemExit(2)


def load(path: Path) -> tuple[dict[str, dict[str, np.ndarray]], dict]:
    """{matrix: {what: array}} and the run's settings. Ends with one line, exit code 2, on anything else."""
    if path.is_dir():
        path = path / "hessian_report.safetensors"
    try:
        with safe_open(path, "np") as f:
            state = json.loads(f.metadata()["state"])
            out: dict[str, dict[str, np.ndarray]] = {}
            for key in f.keys():
                name, what = key.rsplit(":", 1)
                out.setdefault(name, {})[what] = f.get_tensor(key).astype(np.float64)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as e:
        fail(f"error: {path} is not a Hessian report: {str(e).splitlines()[0]}")
    if not out:
        fail(f"error: {path} has no matrices: nothing was quantised in this run")
    return out, state


def group_of(name: str, state: dict) -> str:
    """early, loop, mid, late, or head (PR 1412's groups)."""
    found = re.match(r"blocks\.(\d+)\.", name)
    if not found:
        return "head"
    i = int(found[1])
    looped = state.get("num_loops") and state["loop_start"] <= i <= state["loop_end"]
    return "early" if i <= 2 else "loop" if looped else "late" if i >= 8 else "mid"


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's r; nan where one side does not vary."""
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def compare(a: dict, b: dict, state: dict) -> dict[str, float]:
    """The three correlations of two runs over the matrices that both have."""
    names = [n for n in a if n in b and a[n]["rows"].shape == b[n]["rows"].shape]
    if not names:
        fail("error: the two runs share no matrix of equal shape")
    traces = lambda run: np.array([float(run[n]["trace"]) for n in names])
    groups = sorted({group_of(n, state) for n in names})
    sums = lambda run: np.array([sum(float(run[n]["trace"]) for n in names if group_of(n, state) == g) for g in groups])
    rows = [correlation(a[n]["rows"], b[n]["rows"]) for n in names]
    rows = [r for r in rows if not np.isnan(r)]
    return {"group traces": correlation(sums(a), sums(b)), "matrix traces": correlation(traces(a), traces(b)),
            "row importance": float(np.mean(rows)) if rows else float("nan")}


def table(report: dict, state: dict) -> str:
    """One line a group: trace, mean sigma, relative weighted error, bits."""
    lines = [f"{'group':8s} {'matrices':>8s} {'trace':>12s} {'sigma':>7s} {'error':>10s}"]
    for group in ("early", "loop", "mid", "late", "head"):
        names = [n for n in report if group_of(n, state) == group]
        if names:
            error = sum(report[n]["error"][0] for n in names) / max(sum(report[n]["error"][1] for n in names), 1e-30)
            sigma = np.exp(np.mean(np.log(np.concatenate([report[n]["sigma"].ravel() for n in names]).clip(1e-9))))
            lines.append(f"{group:8s} {len(names):8d} {sum(float(report[n]['trace']) for n in names):12.5g} {sigma:7.2f} {error:10.3g}")
    return "\n".join(lines)


def draw(reports: list[tuple[str, dict]], target: Path):
    """Sigma by layer, one panel a type; bars from the 10th to the 90th percentile of the rows."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    kinds = ["attn.c_q", "attn.c_k", "attn.c_v", "attn.proj", "mlp.fc", "mlp.proj"]
    figure, axes = plt.subplots(2, 3, figsize=(11, 6), sharex=True, layout="constrained")
    for axis, kind in zip(axes.flat, kinds):
        for label, report in reports:
            names = sorted((n for n in report if f".{kind}." in n), key=lambda n: int(n.split(".")[1]))
            if names:
                rows = [report[n]["sigma"].ravel() for n in names]
                middle, low, high = (np.array([np.percentile(r, q) for r in rows]) for q in (50, 10, 90))
                axis.errorbar([int(n.split(".")[1]) for n in names], middle, [middle - low, high - middle], marker="o", ms=3, lw=1,
                              capsize=2, label=label)
        if not axis.lines:
            axis.text(0.5, 0.5, "none is quantised", ha="center", transform=axis.transAxes)
            axis.set_yticks([])
        axis.set_title(kind)
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("layer")
    figure.supylabel("σ: step in row deviations × q_max")
    handles = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", fontsize=8)
    try:
        figure.savefig(target, dpi=120)
    except (OSError, ValueError) as e:          # a ValueError lists the suffixes that matplotlib writes
        fail(f"error: -o {target}: {getattr(e, 'strerror', None) or str(e).splitlines()[0]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", type=Path, nargs="+")
    parser.add_argument("-o", "--output", type=Path, help="picture of sigma by layer and type")
    args = parser.parse_args()
    loaded = [(str(path), *load(path)) for path in args.reports]
    for name, report, state in loaded:
        print(f"{name}: rule {state.get('clip_rule')}, seed {state.get('seed')}, {len(report)} matrices\n{table(report, state)}")
    for (name_a, a, state), (name_b, b, _) in itertools.combinations(loaded, 2):
        print(f"{name_a} against {name_b}: " + ", ".join(f"{what} r = {r:.3f}" for what, r in compare(a, b, state).items()))
    if args.output:
        draw([(name, report) for name, report, _ in loaded], args.output)
        print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
