"""Where to spend the bytes that quantisation saves: finer steps, a wider MLP, one more layer? Short runs at one size.

    set -a; . recipes/h100x1.env; set +a
    MAX_WALLCLOCK_SECONDS=100 python bench/capacity.py runs/capacity --seeds 42,0,1234 --json capacity.json

Every variant is trained with train_gpt.py for the same seconds, quantised to the same TARGET_BYTES, read back and scored:
what counts is the quantised bits per byte. Settings come from the environment; a variant adds its own. Runs that have
finished in the folder are not run again.
"""
from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from parse_log import parse_all  # noqa: E402

VARIANTS = {"finer steps": {}, "wider MLP": {"MLP_MULT": "4.25"}, "one more layer": {"NUM_LAYERS": "12", "XSA_LAST_N": "12"}}
COLUMNS = ("steps", "step_avg_ms", "prequant_bpb", "quantized_bpb", "artifact_bytes")


def run(folder: Path, label: str, settings: dict[str, str], seed: str) -> dict:
    """The parsed log of one run, trained now unless it has finished before; exits with the run's own error line."""
    name = f"{label.replace(' ', '_')}_{seed}"
    log = folder / name / f"{name}.txt"
    if not (log.is_file() and "\nrun_complete " in log.read_text()):
        log.unlink(missing_ok=True)
        env = {**os.environ, **settings, "SEED": seed, "RUN_ID": name, "ARTIFACT_DIR": str(folder / name)}
        done = subprocess.run([sys.executable, ROOT / "train_gpt.py"], env=env, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            sys.exit(f"error: {name} ended with exit code {done.returncode}: {' '.join(last)}")
    return parse_all([log])[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the runs")
    parser.add_argument("--seeds", default="42")
    parser.add_argument("--only", default=";".join(VARIANTS), help="variants, split by semicolons")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    labels = args.only.split(";")
    if unknown := set(labels) - set(VARIANTS):
        parser.error(f"--only {sorted(unknown)[0]!r}: expected some of {'; '.join(VARIANTS)}")
    rows = []
    print(f"{'variant':16s} {'seed':>6s} " + " ".join(f"{c:>14s}" for c in COLUMNS), flush=True)
    for seed in args.seeds.split(","):
        for label in labels:
            found = run(args.folder, label, VARIANTS[label], seed)
            rows.append({"variant": label, "seed": seed, "settings": VARIANTS[label], **{c: found[c] for c in COLUMNS}})
            cells = (f"{found[c]:>14,}" if isinstance(found[c], int) else f"{found[c]:>14,.5f}" for c in COLUMNS)
            print(f"{label:16s} {seed:>6s} " + " ".join(cells), flush=True)
            if args.json:
                args.json.write_text(json.dumps(rows, indent=1) + "\n")
    for label in labels:
        scores = [r["quantized_bpb"] for r in rows if r["variant"] == label]
        spread = f" +- {statistics.stdev(scores):.5f}" if len(scores) > 1 else ""
        print(f"{label}: {statistics.mean(scores):.5f}{spread} bpb quantised (n={len(scores)})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
