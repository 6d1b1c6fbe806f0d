"""What n-gram hints could save, from what dump.py wrote: python study.py FOLDER_OF_TEXT DUMP SHARE (settings: recipes/h100x1.env)."""

import os
import sys
from dataclasses import replace

import numpy as np

from dump import ORDERS, place_and_phase, sources, t


def prepare(path: str, dump: str, share: float) -> dict:
    """The documents that dump.py chose: losses, and for each order its hint, the network's log-probability of it, and flags."""
    c = replace(t.load_config(dict(os.environ))[0], data_path=path)
    data = t.load_validation(c, lambda *_: None)
    doc, pos, phase, *_ = place_and_phase(data.tokens, c)
    keep = (np.random.default_rng(0).random(doc.max() + 2) < share)[doc] & (pos > 0)
    arrays = np.concatenate([np.load(f"{dump}_{part}.npz")["arr_0"] for part in "ab"]).astype(np.float64)
    out = {"loss": arrays[0], "p": np.exp(-arrays[1:]), "tokens": data.tokens[keep].astype(int), "phase": phase[keep],
           "bits": np.log(2) * data.byte_counts[keep].sum(), "hint": [], "own": [], "state": []}
    for k in ORDERS:
        source = sources(data.tokens, phase, k, doc, pos, "cpu")
        last, again = source[keep], source[np.maximum(source, 0)][keep]
        same = data.tokens[np.maximum(again, 0)] == data.tokens[np.maximum(last, 0)]
        out["hint"].append(np.where(last >= 0, data.tokens[np.maximum(last, 0)].astype(int), -1))
        out["own"].append((last >= 0) & (doc[np.maximum(last, 0)] == doc[keep]))
        out["state"].append(np.where((last < 0) | (again < 0), 0, 1 + same))
    return {name: np.array(value) for name, value in out.items()}


def fit(x, y, z, kind, kinds, w):
    """Ridge logistic regression of each kind by itself with offset z: Newton's method with steps that only ever help."""
    place = lambda values: np.stack([np.bincount(kind, v, kinds) for v in values.reshape(len(values), -1).T], 1).reshape(kinds, *values.shape[1:])
    nats = lambda w: place(np.logaddexp(0, s := z + (x * w[kind]).sum(1)) - y * s) + 0.5 * (w * w).sum(1)
    best = nats(w)
    for _ in range(10):
        q = 1 / (1 + np.exp(-z - (x * w[kind]).sum(1)))
        curvature = place((q * (1 - q))[:, None, None] * x[:, :, None] * x[:, None]) + np.eye(x.shape[1])
        step = np.linalg.solve(curvature, (place((q - y)[:, None] * x) + w)[:, :, None])[:, :, 0]
        for _ in range(5):
            now = nats(w - step)
            better = now < best
            w, best, step = np.where(better[:, None], w - step, w), np.where(better, now, best), np.where(better[:, None], 0, step / 4)
    return w


class Study:
    def __init__(self, d):
        self.d, self.orders = d, len(ORDERS)
        self.fresh()
        print(f"{len(d['loss'])} tokens, {d['loss'].sum() / d['bits']:.5f} bpb", flush=True)

    def fresh(self):
        self.loss, self.p = self.d["loss"].copy(), self.d["p"].copy()

    def say(self, what):
        print(f"{what:70s} {1000 * (self.d['loss'] - self.loss).sum() / self.d['bits']:7.3f}", flush=True)
        self.fresh()

    def longest(self, orders):
        """The first of some orders (numbers, longest first) with a hint at each place; none: self.orders."""
        out = np.full(len(self.loss), self.orders)
        for j in reversed(orders):
            out = np.where(self.d["hint"][j] >= 0, j, out)
        return out

    def move(self, at, hint, p, q):
        """The hints at places `at` get probability q, were p; everything else in proportion."""
        hit, rest = hint == self.d["tokens"][at], (1 - q) / (1 - p)
        self.loss[at] -= np.log(np.where(hit, q / p, rest))
        for j in range(self.orders):
            self.p[j, at] = np.where(self.d["hint"][j, at] == hint, q, self.p[j, at] * rest)

    def fixed(self, j, beta):
        at = np.flatnonzero(self.d["hint"][j] >= 0)
        p = np.clip(self.p[j, at], 1e-7, 1 - 1e-5)
        self.move(at, self.d["hint"][j, at], p, p * np.exp(beta) / (1 + p * (np.exp(beta) - 1)))

    def learnt(self, level, flags=True, terms=3, oracle=False):
        """One hint a place, of order number `level` (self.orders: none), with weights learnt from earlier phases."""
        d, at = self.d, np.flatnonzero(level < self.orders)
        j = level[at]
        kind = j * 6 + flags * (3 * d["own"][j, at] + d["state"][j, at])
        p = np.clip(self.p[j, at], 1e-7, 1 - 1e-5)
        z = np.log(p / (1 - p))
        x = np.stack((np.ones_like(z), z.clip(-12, 12) / 4, z.clip(-12, 12) ** 2 / 16)[:terms], 1)
        y, phase, q = d["hint"][j, at] == d["tokens"][at], d["phase"][at], p.copy()
        w = np.zeros((6 * self.orders, terms))
        for n in range(1, phase.max() + 1) if not oracle else [None]:
            before, now = (slice(None), slice(None)) if oracle else (phase < n, phase == n)
            w = fit(x[before], y[before], z[before], kind[before], len(w), w)
            q[now] = 1 / (1 + np.exp(-z[now] - (x[now] * w[kind[now]]).sum(1)))
        self.move(at, d["hint"][j, at], p, np.clip(q, 1e-7, 1 - 1e-6))


if __name__ == "__main__":
    s = Study(prepare(*sys.argv[1:3], float(sys.argv[3])))
    every = list(range(s.orders))
    s.fixed(0, 2.625)
    s.say("order 16, beta 2.625")
    for j, k in enumerate(ORDERS):
        s.learnt(s.longest([j]))
        s.say(f"order {k} alone, learnt")
    for flags in (False, True):
        for terms in (1, 2, 3):
            s.learnt(s.longest(every), flags, terms)
            s.say(f"longest match, {terms} weights a kind, kinds by order{' and flags' if flags else ''}")
    s.learnt(s.longest(every), oracle=True)
    s.say("the same with weights learnt from the whole text (not allowed: a bound)")
    for orders in ((6, 7), (3, 4, 5), (0, 1, 2)):
        s.learnt(s.longest(list(orders)))
    s.say("three hints: of orders 2 and 3, then of 4 to 6, then of 8 to 16")
    for j in reversed(every):
        s.learnt(s.longest([j]))
    s.say("eight hints, shortest first")
