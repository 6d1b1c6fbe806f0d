"""How small does each coder make one quantised model, and how fast?

    python bench/pack.py final_model.int6.pglf [MORE.pglf ...] [--coders entropy,brotli,lzma,pergroup] [--json pack.json]

Every coder packs the same integers, steps and float16 tensors and is read back and compared. bytes/entropy: all bytes to
the order-0 entropy of the integers by role; bits: of all bytes per integer. `parts`: where the bytes of our coder go.
"""
from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as t  # noqa: E402


def parts(coded: dict) -> dict[str, int]:
    """Bytes of our coder by what they stand for: the float16 tensors and the steps packed alone, the rest by difference."""
    size = lambda c: sum(map(len, t.encode(c, "entropy").values()))
    classes = {n: x for n, x in coded.items() if n.endswith(t.ORDER_SUFFIX)}
    whole, paths = size(coded), size(classes) if classes else 0
    halves = size({n: x for n, x in coded.items() if isinstance(x, t.HalfTensor)})
    steps = {n: x for n, x in coded.items() if isinstance(x, t.IntTensor)}
    ints = size({n: x._replace(step=torch.full_like(x.step, 1.0)) for n, x in steps.items()} | classes) - paths
    scales = t.SymbolCoder()
    groups: dict[str, list] = {}
    for n, x in steps.items():
        groups.setdefault(t.coding_group(n), []).append(t.measure_scales(x.q.numpy().reshape(len(x.step), -1)))
    for group in groups.values():
        for part in ("rows", "columns"):
            values = t.np.concatenate([getattr(s, part) for s in group])
            scales.integers(values, len(values))
    side = len(scales.finish())
    return {"integers": ints - side, "scales of rows and columns": side, "steps": whole - halves - ints, "float16": halves - paths,
            "classes of columns": paths}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", type=Path, nargs="+")
    parser.add_argument("--coders", default=",".join(t.COMPRESSORS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for path in args.artifacts:
        header, streams = t.read_artifact_header(path.read_bytes(), path)
        coded = t.decode(streams, header["tensors"], header["compressor"])
        entropy = t.entropy_bytes(coded)
        count = sum(x.q.numel() for x in coded.values() if isinstance(x, t.IntTensor))
        where = parts(coded)
        print(f"{path}: {count:,} integers, order-0 entropy {entropy:,.0f} bytes\n"
              + "".join(f"    {name}: {size:,}\n" for name, size in where.items())
              + f"{'coder':10s} {'bytes':>11s} {'bits':>7s} {'bytes/entropy':>14s} {'pack s':>7s} {'unpack s':>8s}", flush=True)
        for coder in args.coders.split(","):
            start = time.perf_counter()
            packed = t.encode(coded, coder)
            middle = time.perf_counter()
            back = t.decode(packed, t.specs_of(coded), coder)
            end = time.perf_counter()
            for name, x in coded.items():
                if not all(torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in zip(x, back[name])):
                    raise SystemExit(f"{coder}: {name} came back changed")
            size = sum(map(len, packed.values()))
            rows.append({"artifact": str(path), "coder": coder, "bytes": size, "entropy_bytes": round(entropy), "integers": count,
                         "bits": 8 * size / count, "ratio": size / entropy, "pack_seconds": middle - start, "unpack_seconds": end - middle,
                         "parts": where if coder == "entropy" else None})
            times = f"{middle - start:7.1f} {end - middle:8.1f}"
            print(f"{coder:10s} {size:>11,} {8 * size / count:7.4f} {size / entropy:14.4f} {times}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except t.UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
