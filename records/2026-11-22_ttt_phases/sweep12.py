"""Experiment: the global phases of test-time training with other optimizers, without adapters. python sweep12.py ARTIFACT "VARIANTS"

VARIANTS as for sweep3.py: load('val','FOLDER');go('val','none');go('val','muon',0.03,6,65536,65536,False,False)
"""

import math
import time
from dataclasses import replace

import numpy as np
import sweep3
import torch
from sweep3 import log, t


class Glob(t.GlobalTrainer):
    def one_pass(self, tokens, documents, opt, lr, batch, micro, sgd=None, cosine=True):
        stream = np.concatenate([tokens[a : a + size] for a, size in documents])
        total = len(stream) - 1
        steps = max(total // batch, 1)
        for i in range(steps):
            first, last = i * batch, min((i + 1) * batch, total)
            f = 0.5 * (1 + math.cos(math.pi * i / steps)) if cosine else 1 - i / steps
            for p in self.parameters:
                p.grad = None
            for a in range(first, last, micro):
                g = self.gradient(stream, a, min(a + micro, last), last - first)
                with torch.no_grad():
                    for p, x in zip(self.parameters, g):
                        if x is not None:
                            if p.grad is None:
                                p.grad = x.clone()
                            else:
                                p.grad.add_(x)
            with torch.no_grad():
                if sgd is not None:
                    for p in self.parameters:
                        if p.grad is None:
                            p.grad = torch.zeros_like(p)
                    torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
                    for gr in sgd.param_groups:
                        gr["lr"] = lr * f
                    sgd.step()
                else:
                    opt.start_reduce()
                    self.norm = opt.step(lr * f, self.done)
                    self.done += 1
        return steps

    done = 0


class Exp(sweep3.Exp):
    def load(self, name, path, limit=0):
        super().load(name, path, limit)
        d = self.data[name]
        docs = t.find_documents(d.tokens)
        self.docs[name] = docs = docs[np.argsort(-docs[:, 1], kind="stable")]
        log(f"{len(docs)} documents, longest 2,500: {docs[:2500, 1].sum() / len(d.tokens):.3f} of the tokens")

    docs = {}

    def cuts(self, docs, how):
        if isinstance(how, list):
            return how  # documents
        share = np.cumsum(docs[:, 1]) / docs[:, 1].sum()
        return [int(np.searchsorted(share, (i + 1) / (how + 1))) + 1 for i in range(how)]

    def go(self, name, kind, lr=0.0, phases=3, batch=32768, micro=32768, cumulative=True, fresh=True, momentum=None, cosine=True, epochs=1):
        s = time.time()
        with torch.no_grad():
            for p, b in zip(self.model.parameters(), self.base):
                p.copy_(b)
        d, docs = self.data[name], self.docs[name]
        cuts = self.cuts(docs, phases) if kind != "none" else []
        total, parts, last, steps, trained = t.Sums(), [], 0, 0, 0.0
        c = self.c if momentum is None else replace(self.c, muon_momentum_warmup_start=momentum)
        opt = t.Optimizers(self.model, c, self.run.world) if kind == "muon" else None
        g = Glob(self.run, self.model, None)
        for cut in [*cuts, len(docs)]:
            part = self.score(d, docs[last:cut])
            total += part
            parts.append(part.bpb)
            if cut < len(docs):
                torch.cuda.synchronize() if torch.cuda.is_available() else None
                u = time.time()
                sgd = torch.optim.SGD(self.model.parameters(), lr=lr, momentum=0.9) if kind == "sgd" else None
                if fresh and opt:
                    opt.reset()
                    g.done = 0
                with t.compiling(self.model, False):
                    for _ in range(epochs):
                        steps += g.one_pass(d.tokens, docs[:cut] if cumulative else docs[last:cut], opt, lr, batch, micro, sgd, cosine)
                torch.cuda.synchronize() if torch.cuda.is_available() else None
                trained += time.time() - u
            last = cut
        if kind == "none":
            self.zero = total.bpb
        log(
            f"{name:6s} {kind:5s} lr {lr:<7g} phases {phases} batch {batch} cum {cumulative} fresh {fresh} mom {momentum} ep {epochs}: bpb {total.bpb:.5f} "
            f"gain {1000 * (self.zero - total.bpb):+.2f} steps {steps} |g| {float(getattr(g, 'norm', 0)):.3f} trained {trained:.1f} s of {time.time() - s:.1f} | "
            + " ".join(f"{p:.4f}" for p in parts)
        )
        del g, opt


if __name__ == "__main__":
    sweep3.main(Exp)
