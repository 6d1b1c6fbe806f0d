"""Experiment: global phases of test-time training as the product has them, without adapters. python sweep3.py ARTIFACT "VARIANTS"

VARIANTS: calls of Exp's methods between semicolons, as load('val','FOLDER');go('val',phased_ttt_num_phases=0);go('val',global_ttt_lr_mul=0.04)
"""

import os
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_gpt as t


def log(*a):
    print(*a, flush=True)


class Exp:
    def __init__(self, artifact):
        c, _ = t.load_config(dict(os.environ))
        self.c = c
        world, L = t.World(), t.Log(None, quiet=True)
        t.select_kernels(c)
        torch._dynamo.config.cache_size_limit = 64
        torch._dynamo.config.automatic_dynamic_shapes = False
        att = t.choose_attention(c, world.device)
        cuda = world.device.type == "cuda"
        self.run = t.Run(c, world, L, t.Ledger(L, world, 0), Path("/tmp"))
        self.model = t.GPT(c, world.device, att, cuda)
        t.import_weights(self.model, t.restore(t.read_artifact(Path(artifact), c)), artifact)
        self.base = [p.detach().clone() for p in self.model.parameters()]
        self.data = {}
        self.model.requires_grad_(True)

    def load(self, name, path, limit=0):
        d = t.load_validation(replace(self.c, data_path=path), lambda *_: None)
        if limit:
            d = t.Validation(d.tokens[:limit], d.byte_counts[:limit])
        self.data[name] = d
        log(f"{name}: {len(d.tokens)} tokens")

    def score(self, d, documents):
        longest = self.c.eval_seq_len
        w = [(a, min(a + longest, s + n), a) for s, n in documents for a in range(s, s + n, longest)]
        row = t.plain_row(self.c, d)
        return t.sum_windows(self.run, self.model, d, t.pack_windows(np.array(w), row), row, t.Segments(None, longest), "x")

    zero = {}

    def go(self, name, **settings):
        s = time.time()
        torch.cuda.is_available() and torch.cuda.reset_peak_memory_stats()
        with torch.no_grad():
            for p, b in zip(self.model.parameters(), self.base):
                p.copy_(b)
        c = replace(self.c, **settings)
        d, run = self.data[name], self.run._replace(config=c)
        batches, phases = t.plan_phases(t.document_batches(t.find_documents(d.tokens), c), c)
        documents = np.concatenate([b.documents for b in batches])
        trainer, total, parts, trained, lines = t.GlobalTrainer(run, self.model, None), t.Sums(), [], 0.0, []
        trainer.run = run._replace(log=lambda x, **_: lines.append(x))
        for phase in phases:
            part = self.score(d, np.concatenate([b.documents for b in batches[phase.first : phase.last]]))
            total += part
            parts.append(part.bpb)
            if phase.documents:
                u = time.time()
                with t.compiling(self.model, False):
                    trainer(d.tokens, documents[: phase.documents], lambda: False)
                torch.cuda.is_available() and torch.cuda.synchronize()
                trained += time.time() - u
        self.zero.setdefault(name, total.bpb)
        peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0
        log(
            f"{name:5s} {settings}: bpb {total.bpb:.5f} gain {1000 * (self.zero[name] - total.bpb):+.2f} chunks {sum(x.startswith('tttg: ') for x in lines)} "
            f"trained {trained:.1f} s of {time.time() - s:.1f}, {peak:.1f} GiB | " + " ".join(f"{p:.4f}" for p in parts)
        )
        del trainer


def main(experiment):
    e = experiment(sys.argv[1])
    deadline = time.time() + float(os.environ.get("EXP_SECONDS", "400"))
    for line in sys.argv[2].split(";"):
        if time.time() > deadline:
            log("out of time")
            break
        try:
            exec("e." + line.strip(), {"e": e})
        except Exception as x:
            traceback.print_exc()
            log("failed", line, type(x), x)
    log("done")


if __name__ == "__main__":
    main(Exp)
