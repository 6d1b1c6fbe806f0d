"""Time attention by how heads are cut, by window and by the longest segment, on documents as long as those of a shard.

    python bench/attention.py [--shard FILE | --lengths FILE.npy] [--repeats 10] [--json FILE]

One micro-batch of 98,304 tokens, forward and backward through the backend that training uses; keys and values are repeated
for every query head, as training does under FlashAttention 3. Medians, variants interleaved; compare only within one run.
"""
from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
from step import median_ms  # noqa: E402

import train_gpt as t  # noqa: E402

TOKENS, WIDTH = 98304, 512
# query heads, head size, longest segment, window (0: all before)
VARIANTS = [(heads, WIDTH // heads, longest, window)
            for longest, window in ((2048, 0), (2048, 1024), (2048, 512), (2048, 256), (1024, 0), (1024, 512))
            for heads in (8, 4)]


def document_lengths(args) -> np.ndarray:
    """Tokens of documents, in order: read, or exponential with mean 760."""
    if args.shard:
        tokens = np.fromfile(args.shard, "<u2")[t.HEADER_BYTES // 2:]
        return np.diff(np.flatnonzero(tokens == t.BOS), append=len(tokens))
    if args.lengths:
        return np.load(args.lengths)
    return np.random.default_rng(0).exponential(760, 1000).astype(int) + 2


def packed_segments(lengths: np.ndarray, longest: int, device) -> t.Segments:
    """The first TOKENS positions of these documents, cut as in training."""
    row = np.full(TOKENS, 2, np.uint16)
    starts = np.append(0, lengths.cumsum())
    row[starts[starts < TOKENS]] = t.BOS
    return t.Segments(torch.from_numpy(t.pad_cu_seqlens(t.segment_bounds(row, longest), TOKENS)).to(device), longest)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shard", type=Path)
    parser.add_argument("--lengths", type=Path, help="npy file of document lengths")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: bench/attention.py needs a CUDA GPU", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    try:
        backend = t.choose_attention(t.load_config(dict(os.environ))[0], device)
        lengths = document_lengths(args)
    except (t.UserError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    attend, inputs, segments = t.ATTENTION[backend], {}, {}
    for heads, size, longest, _ in VARIANTS:
        inputs[heads] = [torch.randn(1, TOKENS, heads, size, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
        segments[longest] = packed_segments(lengths, longest, device)
    times: dict[tuple, list[tuple[float, float]]] = {v: [] for v in VARIANTS}
    for repeat in range(args.repeats + 2):
        for v in VARIANTS:
            heads, size, longest, window = v
            qkv, y = inputs[heads], []
            forward = median_ms(lambda: y.append(attend(*qkv, segments[longest], window)), 1)  # noqa: B023
            grad = torch.ones_like(y[0])
            backward = median_ms(lambda: torch.autograd.grad(y[0], qkv, grad), 1)  # noqa: B023
            if repeat >= 2:
                times[v].append((forward, backward))
    rows = []
    print(f"{backend}, {torch.cuda.get_device_name()}, torch {torch.__version__}, {TOKENS:,} tokens, "
          f"documents of {lengths.mean():.0f} tokens in the mean")
    print(f"{'heads':>12} {'longest':>8} {'window':>7} {'forward ms':>11} {'backward ms':>12}")
    for v in VARIANTS:
        forward, backward = np.median(times[v], 0)
        rows.append(dict(zip(("heads", "head_size", "longest", "window"), v), forward_ms=forward, backward_ms=backward))
        print(f"{v[0]:>5} x {v[1]:>4} {v[2]:>8} {v[3] or 'all':>7} {forward:11.3f} {backward:12.3f}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
