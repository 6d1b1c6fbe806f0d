"""Error against bits of a unit Gaussian: scalar rounding, trellises, and the bound that nobody can pass.

    python bench/trellis.py [--samples 200000] [--json FILE] [--picture FILE.png]

Rows of independent Gaussian weights with the identity as Hessian go through the very functions that quantise a model
(round_scalar, round_trellis). bits: entropy of the integers per weight, of a trellis given the state (which tells even
from odd); dB: mean squared error above the rate-distortion bound 2^(-2 bits). About two minutes on two CPU cores.
"""
from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as t  # noqa: E402

STEPS = (0.30, 0.36, 0.42, 0.50)        # of a scalar quantiser; a trellis has half of each, at about the same bits


def measure(w_RC: torch.Tensor, states: int, size: float, rate: float) -> dict:
    """Bits and mean squared error of one quantiser with steps of `size` deviations."""
    columns = w_RC.shape[1]
    factor = t.Factor(torch.arange(columns)[None], torch.eye(columns)[None], torch.ones(1, columns, dtype=torch.bool))
    step = torch.full((1, len(w_RC)), size / (2 if states else 1))
    start = time.perf_counter()
    q = t.round_trellis(w_RC[None], factor, step, states, rate) if states else t.round_scalar(w_RC[None], factor, step, 8)
    seconds = time.perf_counter() - start
    bits = 8 * t.entropy_bytes({"w": t.IntTensor(q[0], step[0], 8, states)}) / q.numel()
    error = (w_RC - q[0].float() * step[0, 0]).double().square().mean().item()
    return {"states": states, "lambda": rate if states else 0.0, "step": step[0, 0].item(), "bits": bits, "error": error,
            "db": 10 * math.log10(error) + 20 * bits * math.log10(2), "seconds": seconds}


def draw(rows: list[dict], path: Path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(7, 4))
    for states in sorted({r["states"] for r in rows}):
        mine = [r for r in rows if r["states"] == states]
        ax.plot([r["bits"] for r in mine], [r["db"] for r in mine], "o-", label=f"trellis of {states} states" if states else "scalar")
    ax.axhline(0, color="black", label="rate-distortion bound")
    ax.set(xlabel="bits per weight", ylabel="error above the bound (dB)", title="Gaussian weights, entropy-coded", ylim=(-0.1, 1.7))
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    fig.tight_layout()
    fig.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=200_000)
    parser.add_argument("--states", default="0,4,8,16,32,64", help="numbers of states (0: scalar)")
    parser.add_argument("--rate", type=float, default=t.Config().trellis_lambda, help="TRELLIS_LAMBDA")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    states = [int(s) for s in args.states.split(",")]
    if unknown := set(states) - {0, *t.TRELLIS_CODES}:
        parser.error(f"--states {sorted(unknown)[0]}: expected 0 or one of {', '.join(map(str, t.TRELLIS_CODES))}")
    if args.samples < 512:
        parser.error(f"--samples {args.samples}: expected at least 512")
    w = torch.randn(args.samples // 512, 512, generator=torch.Generator().manual_seed(0))
    rows = []
    print(f"{'states':>6s} {'step':>6s} {'bits':>7s} {'error':>9s} {'dB':>6s} {'seconds':>8s}")
    for s in states:
        for size in STEPS:
            rows.append(r := measure(w, s, size, args.rate))
            print(f"{s:6d} {r['step']:6.3f} {r['bits']:7.4f} {r['error']:9.6f} {r['db']:6.3f} {r['seconds']:8.1f}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"samples": w.numel(), "torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    if args.picture:
        draw(rows, args.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
