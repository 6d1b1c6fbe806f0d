"""Attention (forward / backward ms of 98,304 tokens, heads of 128) where documents are cut at one length and the kernel is told another.

    python bounds.py SHARD
"""
import os
import sys
from pathlib import Path

import numpy as np
import torch

root = next(p for p in Path(__file__).resolve().parents if (p / "train_gpt.py").is_file())
sys.path[:0] = [str(root), str(root / "bench")]
from attention import TOKENS, packed_segments  # noqa: E402
from step import median_ms  # noqa: E402

import train_gpt as t  # noqa: E402

shard = np.fromfile(sys.argv[1], "<u2")[t.HEADER_BYTES // 2:]
lengths, device = np.diff(np.flatnonzero(shard == t.BOS)), torch.device("cuda")
attend = t.ATTENTION[t.choose_attention(t.load_config(dict(os.environ))[0], device)]
qkv = [torch.randn(1, TOKENS, 4, 128, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
variants = [(1024, 1024), (1024, 3072), (2048, 2048), (2048, 3072), (3072, 3072), (4096, 4096)]
begins = np.append(0, lengths.cumsum())
times = {v: [] for v in variants}
for repeat in range(22):
    first = int(np.searchsorted(begins, repeat * TOKENS))       # other documents every time
    for cut, told in variants:
        segments, y = packed_segments(lengths[first:], cut, device)._replace(longest=told), []
        forward = median_ms(lambda: y.append(attend(*qkv, segments, 0)), 1)  # noqa: B023
        backward = median_ms(lambda: torch.autograd.grad(y[0], qkv, torch.ones_like(y[0])), 1)  # noqa: B023
        if repeat >= 2:
            times[cut, told].append((forward, backward))
for (cut, told), ms in times.items():
    print(f"cut at {cut}, told {told}: {np.median(ms, 0)[0]:.3f} / {np.median(ms, 0)[1]:.3f}")
