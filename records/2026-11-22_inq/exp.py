"""Experiment: quantise group after group, training what is left in between. python exp.py CHECKPOINT PART PARTS"""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
import torch

sys.path.insert(0, "/opt/repo" if Path("/opt/repo").exists() else "/work/main")
import train_gpt as t


def log(*a):
    print(*a, flush=True)


class Exp:
    def __init__(self, checkpoint, seconds):
        self.deadline = time.time() + seconds
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
        if checkpoint != "-":
            from safetensors.torch import load_file

            t.import_weights(self.model, {n: w.float() for n, w in load_file(checkpoint).items()}, checkpoint)
        self.shards = [t.read_shard(p, c.vocab_size) for p in t.find_shards(c, "train")]
        self.val = t.load_validation(c, lambda *_: None)
        self.views = t.export_weights(dict(self.model.named_parameters()), c.num_layers)
        self.ema = {n: w.detach().clone() for n, w in self.views.items()}
        self.trainer = t.Trainer(self.run, self.model, self.shards)
        s = time.time()
        self.base = self.score()
        log(f"ema bpb {self.base:.5f} ({time.time() - s:.1f} s)")
        s = time.time()
        self.q = t.calibrate(self.run, self.model, self.ema, self.shards, c.gptq_calibration_batches, c.fisher_batches)
        log(f"calibrated {time.time() - s:.1f} s")
        self.names = list(self.q.bits)
        self.steps = {}
        m = 2.0 ** float(os.environ.get("AT", "0"))
        if "AT" not in os.environ:
            t.Log(None, quiet=False)
            packed = t.fit_bytes(self.run._replace(log=log), self.q, 49_400)
            coded = packed.coded
            self.fixed_steps = {n: coded[n].step.to(world.device) for n in self.names}
        else:
            self.fixed_steps = {n: s for b in self.q.batches for n, s in zip(b.names, self.q.steps(b, m))}
        self.where = {n: (b, i) for b in self.q.batches for i, n in enumerate(b.names)}
        self.control()

    def score(self):
        return t.evaluate(self.run, self.model, self.val, "x").bpb

    @torch.no_grad()
    def load(self, weights):
        for n, w in weights.items():
            self.views[n].copy_(w)

    @torch.no_grad()
    def quantise(self, names):
        out = {}
        for b in self.q.batches:
            idx = [i for i, n in enumerate(b.names) if n in names]
            if not idx:
                continue
            w = torch.stack([self.views[b.names[i]].detach().float() for i in idx])
            step = torch.stack([self.fixed_steps[b.names[i]] for i in idx])
            f = t.Factor(*(x[idx] for x in b.factor))
            q = self.q.round(w, f, step, b.bits).float() * step.float()[:, :, None]
            for j, i in enumerate(idx):
                out[b.names[i]] = q[j]
        self.load(out)
        return out

    def bytes_now(self):
        bits = 0.0
        for n in self.names:
            b, i = self.where[n]
            sq = (self.views[n].detach().float().square().mean(1) / (self.q.union * self.fixed_steps[n].float()).square()).double()
            bits += (0.5 * (1 + 2 * 3.14159265 * 2.718281828 * sq).log2()).sum().item() * self.views[n].shape[1]
        return bits / 8

    def batches(self):
        s = self.trainer.stream()
        s.cursor = 10_000_000
        return t.Prefetcher(s, self.run.world.device)

    sgd = None

    def tune(self, batches, n, lr, frozen):
        tr = self.trainer
        if self.sgd is not None:
            return self.tune_sgd(batches, n, lr, frozen)
        for i in range(n):
            tr.take_step(batches, self.c.num_loops, lr * (1 - i / n))
            self.load(frozen)
        tr.settle()

    def tune_sgd(self, batches, n, lr, frozen):
        tr, params = self.trainer, list(self.model.parameters())
        for p in params:
            p.grad = None
        norm = 0.0
        for i in range(n):
            for _ in range(tr.accumulate):
                tr.micro_step(batches.next(), self.c.num_loops)
            with torch.no_grad():
                g = [p.grad.float() if p.grad is not None else torch.zeros_like(p) for p in params]
                norm = torch.stack(torch._foreach_norm(g)).norm()
                if self.momentum is None:
                    self.momentum = [torch.zeros_like(p) for p in params]
                torch._foreach_mul_(self.momentum, self.sgd)
                torch._foreach_add_(self.momentum, g)
                torch._foreach_add_(params, self.momentum, alpha=-lr * (1 - i / n) if self.decay else -lr)
            for p in params:
                p.grad = None
            self.load(frozen)
        self.norm = float(norm)

    decay, momentum, norm = True, None, 0.0

    def groups(self, order, count):
        size = {n: self.views[n].numel() for n in self.names}
        layer = lambda n: -1 if not n.startswith("blocks") else int(n.split(".")[1])
        kinds = ["tok_emb", "mlp.fc", "mlp.proj", "c_q", "c_k", "c_v", "attn.proj"]
        kind = lambda n: next(i for i, k in enumerate(kinds) if k in n)
        key = {
            "layer": layer,
            "reverse": lambda n: -layer(n),
            "type": kind,
            "rtype": lambda n: -kind(n),
            "embfirst_rev": lambda n: (layer(n) >= 0, -layer(n)),
            "mix": lambda n: (layer(n) % count, layer(n)),
        }[order]
        names, total = sorted(self.names, key=key), sum(size.values())
        out, done = [[] for _ in range(count)], 0
        for n in names:
            out[min(int((done + size[n] / 2) * count / total), count - 1)].append(n)
            done += size[n]
        return [g for g in out if g]

    def fresh(self):
        self.momentum = None
        self.load(self.ema)
        self.trainer.optimizers.reset()
        self.trainer.step = 0

    def report(self, label, began, tuned=None):
        bpb = self.score()
        log(
            f"{label:44s} bpb {bpb:.5f} penalty {1000 * (bpb - self.base):6.2f} ratio {(bpb - self.base) / self.p0 if self.p0 else 1:.3f} "
            f"bytes {self.bytes_now() - self.b0:+.0f} {time.time() - began:.1f} s"
            + (f" tuned-float {1000 * (tuned - self.base):+.2f}" if tuned else "")
        )
        return bpb

    def control(self):
        s = time.time()
        self.p0, self.b0 = 0, self.bytes_now()
        self.fresh()
        self.quantise(self.names)
        self.p0 = self.report("direct", s) - self.base
        # kernels of a step
        s = time.time()
        b = self.batches()
        self.fresh()
        self.tune(b, 3, 1e-6, {})
        b.close()
        log(f"warm {time.time() - s:.1f} s")

    def plain(self, n, lr):
        s = time.time()
        self.fresh()
        b = self.batches()
        self.tune(b, n, lr, {})
        b.close()
        f = self.score()
        self.quantise(self.names)
        self.report(f"train {n} lr {lr} sgd {self.sgd}, then all", s, f)

    def settle(self, order, count, n, lr, refit=0, refit_lr=1e-3, tail=0, tail_lr=0.01, momentum=None):
        s = time.time()
        self.fresh()
        b, frozen = self.batches(), {}
        groups = self.groups(order, count)
        if momentum is not None:
            self.trainer.optimizers.c = replace(self.c, muon_momentum_warmup_start=momentum)
        for g in groups[:-1]:
            frozen |= self.quantise(g)
            self.tune(b, n, lr, frozen)
        frozen |= self.quantise(groups[-1])
        self.report(f"settle {order} x{len(groups)} {n} lr {lr} sgd {self.sgd} |g| {self.norm:.3f}", s)
        if momentum is not None:
            log("   momentum", momentum)
            self.trainer.optimizers.c = self.c
        if tail:
            s = time.time()
            self.tune(b, tail, tail_lr, frozen)
            self.report(f"   then small tensors {tail} {tail_lr}", s)
        if refit:
            self.refit(b, refit, refit_lr)
        b.close()

    def refit_all(self, n, lr, scal=1.0):
        self.fresh()
        self.quantise(self.names)
        b = self.batches()
        self.refit(b, n, lr, scal)
        b.close()

    def refit(self, b, n, lr, scal=1.0):
        """Row steps and the small tensors by Adam."""
        s, tr, banks = time.time(), self.trainer, []
        quant = {id(self.views[x]._base if self.views[x]._base is not None else self.views[x]) for x in self.names}
        for p in self.model.parameters():
            if id(p) in quant:
                d = torch.zeros(*p.shape[:-1], 1, device=p.device)
                d.grad = torch.zeros_like(d)
                banks.append((p, p.detach().clone(), d))
        small = [p for p in self.model.parameters() if id(p) not in quant]
        opt = torch.optim.Adam(
            [{"params": [d for *_, d in banks], "base": lr}, {"params": small, "base": lr * scal}], lr=lr, betas=(0.9, 0.95)
        )
        for i in range(n):
            for p in self.model.parameters():
                p.grad = None
            for _ in range(tr.accumulate):
                tr.micro_step(b.next(), self.c.num_loops)
            with torch.no_grad():
                for p, w, d in banks:
                    d.grad.copy_((p.grad.float() * w).sum(-1, keepdim=True))
                for g in opt.param_groups:
                    g["lr"] = g["base"] * (1 - i / n)
                opt.step()
                for p, w, d in banks:
                    p.copy_(w * d.exp())
        for p in self.model.parameters():
            p.grad = None
        for p, _, d in banks:
            log("   delta", list(p.shape), f"mean {d.mean().item():+.5f} std {d.std().item():.5f}")
        self.report(f"   refit {n} lr {lr} small x{scal}", s)


e = Exp(sys.argv[1], float(os.environ.get("EXP_SECONDS", "400")))
for line in sys.argv[2].split(";"):
    if time.time() > e.deadline:
        break
    try:
        exec("e." + line)
    except Exception as x:
        log("failed", line, type(x), x)
log("done")
