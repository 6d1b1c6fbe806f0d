#!/usr/bin/env python3
"""What is in an artifact: header, tensors, bits, bytes of every stream, entropy; every checksum is verified.

    python tools/inspect_artifact.py final_model.int6.pglf            # a readable table
    python tools/inspect_artifact.py final_model.int6.pglf --json     # one object

Nothing in the file is run: the container is read by train_gpt.py's own checked reader. A damaged file is one line that
names the field, exit code 2.
"""
from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as t  # noqa: E402


def inspect(path: Path) -> dict:
    """Path of an artifact -> its contents as plain values. Raises train_gpt.UserError if unreadable or damaged."""
    try:
        data = path.read_bytes()
    except OSError as e:
        raise t.UserError(f"artifact {path} cannot be read: {e.strerror}") from None
    header, streams = t.read_artifact_header(data, path)
    coded = t.decode_checked(header, streams, path)
    tensors = []
    for name, x in coded.items():
        row = {"name": name, "shape": list(x.q.shape if isinstance(x, t.IntTensor) else x.values.shape)}
        if isinstance(x, t.IntTensor):
            q = x.q.numpy().astype(np.int64).reshape(-1)
            entropy = 8 * t.entropy_bytes({name: x}) / max(q.size, 1)
            row |= {"bits": x.bits, "states": x.states, "entropy_bits": round(entropy, 4), "largest": int(np.abs(q).max(initial=0)),
                    "median_step": float(np.median(x.step.numpy().astype(np.float64)))}
        else:
            row |= {"bits": 16, "states": 0, "entropy_bits": None, "largest": float(x.values.float().abs().max()), "median_step": None}
        tensors.append(row)
    integers = sum(math.prod(r["shape"]) for r in tensors if r["entropy_bits"] is not None)
    entropy_bytes = t.entropy_bytes(coded)
    return {"file": str(path), "bytes": len(data), "version": t.ARTIFACT_VERSION, "compressor": header["compressor"],
            "model": header["model"], "streams": {name: len(stream) for name, stream in streams.items()},
            "header_bytes": len(data) - sum(map(len, streams.values())), "integers": integers,
            "float16_values": sum(math.prod(r["shape"]) for r in tensors if r["entropy_bits"] is None),
            "order0_entropy_bytes": round(entropy_bytes), "bits_per_integer": round(8 * len(data) / max(integers, 1), 4),
            "checks": "magic, version, lengths, header and stream checksums, decoding: all passed", "tensors": tensors}


def table(report: dict) -> str:
    """The report as text."""
    model = ", ".join(f"{name}={value}" for name, value in report["model"].items())
    lines = [f"{report['file']}: {report['bytes']:,} bytes, container version {report['version']}, packed with {report['compressor']}",
             f"checks: {report['checks']}",
             f"integers {report['integers']:,} ({report['bits_per_integer']} bits each, all bytes counted), order-0 entropy "
             f"{report['order0_entropy_bytes']:,} bytes, float16 values {report['float16_values']:,}",
             "bytes: " + ", ".join(f"{name} {size:,}" for name, size in {"header": report["header_bytes"], **report["streams"]}.items()),
             f"model: {model}", f"{'tensor':34} {'shape':>14} {'bits':>4} {'states':>6} {'entropy':>8} {'largest':>9} {'median step':>12}"]
    for row in report["tensors"]:
        entropy = "" if row["entropy_bits"] is None else f"{row['entropy_bits']:.3f}"
        step = "" if row["median_step"] is None else f"{row['median_step']:.3e}"
        shape, states = "x".join(map(str, row["shape"])), row["states"] or ""
        lines.append(f"{row['name']:34} {shape:>14} {row['bits']:>4} {states:>6} {entropy:>8} {row['largest']:>9.4g} {step:>12}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    args = parser.parse_args()
    try:
        report = inspect(args.artifact)
    except t.UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.code
    print(json.dumps(report) if args.json else table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
