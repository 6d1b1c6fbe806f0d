"""Change of the loss when an artifact's logits are capped elsewhere, or scaled, in evaluation. Float32 on the CPU.

    python caps.py ARTIFACT SHARD...            (settings of the network from the environment)

Reads 8,192 tokens of every shard from the first document after its millionth token, in segments of 2,048.
"""
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(next(p for p in Path(__file__).resolve().parents if (p / "train_gpt.py").is_file())))
import train_gpt as t  # noqa: E402

TOKENS, START, CAPS, SCALES = 8192, 1_000_000, (28, 28.5, 29, 29.5, 30.5, 31), (0.97, 1.03)
torch.set_num_threads(1)
config = t.load_config({**os.environ, "TOKENIZER_PATH": "unused"})[0]
model = t.GPT(config, torch.device("cpu"))
t.import_weights(model, t.restore(t.read_artifact(Path(sys.argv[1]), config)))
for path in sys.argv[2:]:
    tokens = np.fromfile(path, "<u2")[t.HEADER_BYTES // 2:]
    first = START + int(np.flatnonzero(tokens[START:] == t.BOS)[0])
    batch = t.to_batch(tokens[first: first + TOKENS + 1], 2048)
    with torch.no_grad():
        stream = t.norm(model(batch.ids, batch.segments)[0])
        logits = torch.cat([part @ model.tok_emb.float().T for part in stream.split(2048)])
        loss = {(cap, scale): F.cross_entropy(cap * torch.tanh(logits * scale / cap), batch.targets[0]).item()
                for cap, scale in [(30, 1), *((cap, 1) for cap in CAPS), *((30, scale) for scale in SCALES)]}
    print(f"{Path(sys.argv[1]).stem} {Path(path).stem} loss {loss[30, 1]:.4f}",
          *(f"cap {cap} scale {scale}: {value - loss[30, 1]:+.5f}" for (cap, scale), value in loss.items() if (cap, scale) != (30, 1)), flush=True)
