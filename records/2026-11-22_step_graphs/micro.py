"""Products with and without an addend, and one micro-step launched kernel by kernel against the same as a CUDA graph (micro.txt).

    python micro.py          # at revision b0802f9, on one H100 (tidied since: the same measurements)
"""
import os
import sys
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / part) for part in (".", "bench")]
import step as bench  # noqa: E402

import train_gpt as t  # noqa: E402

TOKENS = 98304
config, _ = t.load_config(dict(os.environ))
t.select_kernels(config)
device = torch.device("cuda")
random = lambda *shape: torch.randn(*shape, device=device, dtype=torch.bfloat16)


def ms(call):
    call(), call()
    return bench.median_ms(call, 20)


with torch.no_grad():
    for k, n, what in ((512, 512, "o fwd"), (2048, 512, "down fwd / up bwd"), (1024, 512, "qkv bwd"), (512, 1024, "qkv fwd"), (512, 2048, "up fwd")):
        a, w, c, out = random(TOKENS, k), random(n, k), random(TOKENS, n), random(TOKENS, n)
        times = (ms(lambda: torch.mm(a, w.T, out=out)), ms(lambda: torch.addmm(c, a, w.T, out=out)),  # noqa: B023
                 ms(lambda: out.addmm_(a, w.T)), ms(lambda: out.T @ a))  # noqa: B023
        print("{:20} mm {:.4f} addmm {:.4f} addmm in place {:.4f} dW mm {:.4f}".format(what, *times), flush=True)

torch._dynamo.config.cache_size_limit = 64
torch._dynamo.config.automatic_dynamic_shapes = False
model = t.GPT(config, device, t.choose_attention(config, device), True)
batch = t.to_device(bench.documents(TOKENS, 0, config.vocab_size, config.train_seq_len), device)
for loops in (0, 2):
    micro = lambda: model.losses(batch.ids, batch.targets, batch.segments, loops).mean().backward()  # noqa: B023
    for _ in range(3):
        micro()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        micro()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        micro()
    replayed, launched = zip(*((bench.median_ms(graph.replay, 1), bench.median_ms(micro, 1)) for _ in range(10)))
    print("loops", loops, "eager", np.median(launched), min(launched), "graph", np.median(replayed), min(replayed), "peak GiB",
          torch.cuda.max_memory_allocated() / 2**30, flush=True)
