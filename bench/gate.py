"""Is this the specified network? Score a reference checkpoint and compare with figures measured elsewhere.

    python bench/gate.py CHECKPOINT.safetensors VAL_SHARD.bin TOKENIZER.model

On a CPU: float32 losses over the first 4,096 and 16,384 targets (65,536 with --long) as one packed row, to 2e-4.
On a GPU: bits per byte of a plain evaluation in bfloat16 over the first 3,407,872 targets, to 0.001.
The expected figures belong to the checkpoint of the specification (reference A's script, 300 s on one H100), whose
two lanes start at layer 8.
"""
from __future__ import annotations

import argparse
import math
import os
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from specified import SPECIFIED  # noqa: E402

import train_gpt as t  # noqa: E402

FLOAT32 = {4096: (3.17552, 1.25864), 16384: (3.19389, 1.26270), 65536: (3.15761, 1.25973)}
BFLOAT16_TARGETS, BFLOAT16_BPB = 3_407_872, 1.27919


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("shard", type=Path)
    parser.add_argument("tokenizer")
    parser.add_argument("--long", action="store_true")
    args = parser.parse_args()
    from safetensors.torch import load_file
    config, _ = t.load_config({**SPECIFIED, **os.environ, "TOKENIZER_PATH": args.tokenizer})
    world = t.World()
    t.select_kernels(config)
    torch._dynamo.config.automatic_dynamic_shapes = False
    attention = t.choose_attention(config, world.device)
    model = t.GPT(config, world.device, attention, world.device.type == "cuda")
    t.import_weights(model, load_file(args.checkpoint), str(args.checkpoint))
    tokens = t.read_shard(args.shard, config.vocab_size, sample=False)
    counts = t.count_bytes(tokens, t.token_byte_table(t.load_tokenizer(config)))
    worst = 0.0
    if world.device.type == "cuda":
        log = t.Log(None, quiet=False)
        run = t.Run(config, world, log, t.Ledger(log, world, 0), Path("."))
        n = BFLOAT16_TARGETS + 1
        for _ in range(2):          # the second without compilation
            score = t.evaluate(run, model, t.Validation(tokens[:n], counts[:n]), "gate")
            print(f"bfloat16 {BFLOAT16_TARGETS} targets, {attention}: loss {score.loss:.5f} bpb {score.bpb:.5f} "
                  f"(expected {BFLOAT16_BPB}), {score.seconds:.1f} s, {score.tokens / score.seconds:,.0f} tok/s")
        worst = abs(score.bpb - BFLOAT16_BPB) / 0.001
    else:
        for n, (loss, bpb) in FLOAT32.items():
            if n == 65536 and not args.long:
                continue
            batch, start = t.to_batch(tokens[: n + 1], config.train_seq_len), time.perf_counter()
            with torch.no_grad():
                losses = model.losses(batch.ids, batch.targets, batch.segments)[0].double()
            got = losses.mean().item(), losses.sum().item() / math.log(2) / counts[1: n + 1].sum()
            print(f"float32 {n} targets: loss {got[0]:.5f} (expected {loss}) bpb {got[1]:.5f} (expected {bpb}), "
                  f"first eight {[round(x, 4) for x in losses[:8].tolist()]}, {time.perf_counter() - start:.0f} s")
            worst = max(worst, abs(got[0] - loss) / 2e-4, abs(got[1] - bpb) / 2e-4)
    print("gate passed" if worst <= 1 else f"gate FAILED: {worst:.1f} times the tolerance")
    return int(worst > 1)


if __name__ == "__main__":
    sys.exit(main())
