"""Bits per byte of EMA weights on the targets that the reference's script drops (after the first 3,407,872), on a CPU.

    PARALLEL_START_LAYER=8 python tail.py EMA.safetensors VAL_SHARD.bin TOKENIZER.model

With the score of all targets (the log beside this file) it gives the score of the first 3,407,872 alone, which is what
the reference's published 1.27919 covers. Rows begin at multiples of 65,536, so the windows are those of the full run.
"""
import math
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_gpt as t  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

FIRST, ALL_BPB = 3_407_872, float(os.environ.get("ALL_BPB", "nan"))
config, _ = t.load_config({**os.environ, "TOKENIZER_PATH": sys.argv[3]})
world, log = t.World(), t.Log(None, quiet=False)
model = t.GPT(config, world.device)
t.import_weights(model, load_file(sys.argv[1]))
tokens = t.read_shard(Path(sys.argv[2]), config.vocab_size, sample=False)
counts = t.count_bytes(tokens, t.token_byte_table(t.load_tokenizer(config)))
run = t.Run(config, world, log, t.Ledger(log, world, 0), Path("."))
score = t.evaluate(run, model, t.Validation(tokens[FIRST:], counts[FIRST:]), "tail")
total, tail = int(counts[1:].sum()), int(counts[FIRST + 1:].sum())
print(f"tail: {score.tokens} targets, {tail} bytes, loss {score.loss:.5f} bpb {score.bpb:.5f}")
print(f"all: {total} bytes, bpb {ALL_BPB:.5f}; first {FIRST}: bpb {(ALL_BPB * total - score.bpb * tail) / (total - tail):.5f}"
      if math.isfinite(ALL_BPB) else "set ALL_BPB to the full run's score")
