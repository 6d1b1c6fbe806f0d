"""Does theory foretell the penalty? Loss growth by sensitivities against the loss of quantised weights (CPU, 20 minutes).

    python records/2026-11-21_quantisation/predict.py CHECKPOINT.safetensors TRAIN.bin VAL.bin TOKENIZER [--tokens 16384]

For each rule: sum over rows of step^2 / 24 * E|g V^T|^2 (see collect_sensitivity), by role, in 0.001 bpb; then measured on
validation tokens in float32: the hand-set rule, fisher's steps for the embedding alone, and for the matrices alone.
"""
import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_gpt as t  # noqa: E402

parser = argparse.ArgumentParser()
for name in ("checkpoint", "train", "val", "tokenizer"):
    parser.add_argument(name)
parser.add_argument("--tokens", type=int, default=16384)
parser.add_argument("--fisher-batches", type=int, default=12)
args = parser.parse_args()
config, _ = t.load_config({"TOKENIZER_PATH": args.tokenizer, "TRAIN_BATCH_TOKENS": "65536", "TARGET_BYTES": "0"})
world, log = t.World(), t.Log(None, quiet=True)
run = t.Run(config, world, log, t.Ledger(log, world, 0), Path("."))
model = t.GPT(config, world.device)
t.import_weights(model, {n: w.float() for n, w in load_file(args.checkpoint).items()})
weights = {n: w.detach().clone() for n, w in t.export_weights(dict(model.named_parameters()), config.num_layers).items()}
names = [n for n, w in weights.items() if t.is_quantised(n, w)]
shards = [np.memmap(args.train, "<u2", "r", t.HEADER_BYTES)]
val = np.memmap(args.val, "<u2", "r", t.HEADER_BYTES)
counted = t.count_bytes(np.asarray(val), t.token_byte_table(t.load_tokenizer(config)))
t.FISHER_TOKENS = 2048
hessians = t.collect_hessians(run, model, shards, 3)
factors = t.prepare_all(run, hessians)
sensitivity = t.collect_sensitivity(run, model, shards, names, factors, args.fisher_batches)
known = t.Calibration(weights, hessians, sensitivity, t.token_counts(shards, config.vocab_size))
starts = [a for p in np.linspace(0.05, 0.75, 4) for a in range(int(p * len(val)), int(p * len(val)) + args.tokens // 4, 4096)]
bytes_ = sum(counted[a + 1: a + 4097].sum() for a in starts)
milli = 1000 / math.log(2) / counted.mean()         # nats a token -> 0.001 bpb


@torch.no_grad()
def losses():
    batches = [t.to_batch(np.asarray(val[a: a + 4097]), 2048) for a in starts]
    return torch.cat([model.losses(b.ids, b.targets, b.segments)[0].double() for b in batches]) / math.log(2)


before, coded = losses(), {}
for rule in ("hand", "fisher"):
    q = t.Quantizer(run._replace(config=replace(config, clip_rule=rule)), known, factors)
    expected = {}
    for batch in q.batches:
        for name, steps in zip(batch.names, q.steps(batch, 1.0).double()):
            growth = (steps ** 2 / 24 * sensitivity[name].rows.mean(0)).sum().item() / t.FISHER_TOKENS * milli
            expected[t.coding_group(name)] = expected.get(t.coding_group(name), 0.0) + growth
    coded[rule] = q()
    print(rule, "predicted", {n: round(x, 3) for n, x in expected.items()}, "sum", round(sum(expected.values()), 3), flush=True)
embedding = "tok_emb.weight"
mixed = lambda rest, first: coded[rest] | {embedding: coded[first][embedding]}
for label, codes in (("hand", coded["hand"]), ("hand, fisher for the embedding", mixed("hand", "fisher")),
                     ("fisher, hand for the embedding", mixed("fisher", "hand")), ("fisher", coded["fisher"])):
    t.import_weights(model, t.restore(codes))
    d = losses() - before
    size = sum(map(len, t.encode(codes, "entropy").values()))
    error = 1000 * d.std().item() * len(d) ** 0.5 / bytes_
    print(f"{label}: {size:,} bytes, penalty {1000 * d.sum().item() / bytes_:.2f} +- {error:.2f}", flush=True)
