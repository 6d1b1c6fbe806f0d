"""Loss of an artifact on long documents by how many positions each sees, from position 2,048 on and in all. Float32 on the CPU.

    python windows.py ARTIFACT VALIDATION_SHARD WINDOW... [--yarn]     (settings of the network from the environment)

Documents of 4,500 to 9,000 tokens, every fifth of the shard, eight at most. Every position sees the WINDOW positions before it.
"""
import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(next(p for p in Path(__file__).resolve().parents if (p / "train_gpt.py").is_file())))
import train_gpt as t  # noqa: E402

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("artifact", type=Path)
parser.add_argument("shard", type=Path)
parser.add_argument("windows", type=int, nargs="+")
parser.add_argument("--yarn", action="store_true")
args = parser.parse_args()
torch.set_num_threads(1)
config = t.load_config({**os.environ, "TOKENIZER_PATH": "unused"})[0]
model = t.GPT(replace(config, rope_yarn=args.yarn), torch.device("cpu"))
t.import_weights(model, t.restore(t.read_artifact(args.artifact, config)))
tokens = np.fromfile(args.shard, "<u2")[t.HEADER_BYTES // 2:]
documents = t.find_documents(tokens)
documents = documents[(documents[:, 1] >= 4500) & (documents[:, 1] <= 9000)][::5][:8]
for window in args.windows:
    losses = []
    with torch.no_grad():
        for start, size in documents:
            ids, targets = (torch.from_numpy(tokens[a: a + size].astype(np.int64))[None] for a in (start, start + 1))
            segments = t.Segments(torch.tensor([0, size], dtype=torch.int32), int(size), None, window)
            losses.append(model.losses(ids, targets, segments)[0].double())
    beyond = torch.cat([x[2048:] for x in losses])
    print(f"{args.artifact.stem} window {window}{' yarn' * args.yarn}: all {torch.cat(losses).mean():.5f} ({sum(map(len, losses))}), "
          f"from 2,048 on {beyond.mean():.5f} ({len(beyond)})", flush=True)
