"""Codes of the shared checkpoint under hand-set sigmas, as an artifact for bench/pack.py (CPU, some minutes).

    python records/2026-11-21_quantisation/coders.py CHECKPOINT.safetensors TRAIN.bin OUT.pglf [--grid 8]
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_gpt as t  # noqa: E402

parser = argparse.ArgumentParser()
parser.add_argument("checkpoint", type=Path)
parser.add_argument("train", type=Path)
parser.add_argument("out", type=Path)
parser.add_argument("--grid", default="0")
args = parser.parse_args()
config, _ = t.load_config({"CLIP_RULE": "hand", "STEP_GRID": args.grid, "TRAIN_BATCH_TOKENS": "65536", "TARGET_BYTES": "0"})
world, log = t.World(), t.Log(None, quiet=False)
run = t.Run(config, world, log, t.Ledger(log, world, 0), Path("."))
model = t.GPT(config, world.device)
t.import_weights(model, {n: w.float() for n, w in load_file(args.checkpoint).items()})
weights = {n: w.detach().clone() for n, w in t.export_weights(dict(model.named_parameters()), config.num_layers).items()}
shard = np.memmap(args.train, "<u2", "r", t.HEADER_BYTES)
torch.set_grad_enabled(False)
coded = t.quantize(run, weights, t.collect_hessians(run, model, [shard], 3))
args.out.write_bytes(t.write_artifact(coded, config))
