"""Seconds and memory of finding hints on the CPU, in a text as long as all SHARDs together, twelve parts of documents in random order.

    python hints_at_scale.py SHARD...
"""
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(next(p for p in Path(__file__).resolve().parents if (p / "train_gpt.py").is_file())))
import train_gpt as t  # noqa: E402

torch.set_num_threads(2)
tokens = np.concatenate([np.fromfile(path, "<u2")[t.HEADER_BYTES // 2:] for path in sys.argv[1:]])
documents = np.random.default_rng(0).permutation(t.find_documents(tokens))
start = time.perf_counter()
hints = t.find_hints(tokens, documents, np.arange(len(documents)) * 12 // len(documents), torch.device("cpu"))
seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
print(f"{len(tokens):,} tokens in {len(documents):,} documents: {(hints.kinds >= 0).sum():,} hints in {seconds:.1f} s, {peak:.2f} GB at most")
