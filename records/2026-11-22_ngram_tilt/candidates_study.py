"""What other hints would save, from what candidates.py wrote: python candidates_study.py OUT.npz"""

import sys

import numpy as np

from study import fit

z = np.load(sys.argv[1])
out = z["out"].astype(np.float64)
cand = z["cands"].astype(np.int64)
cnt, tot, pos = z["cnt"].astype(np.int64), z["tot"].astype(np.int64), z["pos"]
bits = np.log(2) * z["bytes"]
K = (1, 2, 3, 4, 5, 6, 8, 12, 16)
n = out.shape[1]
part = np.minimum((pos - pos.min()) * 13 // (pos.max() - pos.min() + 1), 12)
tok = cand[0]


class S:
    def __init__(s):
        s.fresh()

    def fresh(s):
        s.loss = out[0].copy()
        s.p = {}

    def say(s, what):
        print(f"{what:80s} {1000 * (out[0] - s.loss).sum() / bits:7.3f}", flush=True)
        s.fresh()

    def prob(s, i):  # i: row of cands, current probability
        if i not in s.p:
            s.p[i] = np.exp(-out[i])
        return s.p[i]

    def tilt(s, row, kind, kinds, all_rows=()):
        """row[n]: candidate row used at each place (0: none)"""
        for i in all_rows:
            s.prob(i)
        at = np.flatnonzero(row > 0)
        r = row[at]
        p = np.zeros(len(at))
        for i in np.unique(r):
            p[r == i] = s.prob(i)[at[r == i]]
        p = np.clip(p, 1e-7, 1 - 1e-5)
        hint = cand[r, at]
        y = (hint == tok[at]).astype(float)
        zz = np.log(p / (1 - p))
        zc = zz.clip(-12, 12)
        x = np.stack((np.ones_like(zz), zc / 4, zc * zc / 16), 1)
        k = kind[at]
        q = p.copy()
        w = np.zeros((kinds, 3))
        for m in range(1, 13):
            b, nw = part[at] < m, part[at] == m
            if not nw.any():
                continue
            w = fit(x[b], y[b], zz[b], k[b], kinds, w)
            q[nw] = 1 / (1 + np.exp(-zz[nw] - (x[nw] * w[k[nw]]).sum(1)))
        q = np.clip(q, 1e-7, 1 - 1e-6)
        rest = (1 - q) / (1 - p)
        s.loss[at] -= np.log(np.where(y > 0, q / p, rest))
        for i in s.p:
            s.p[i][at] = np.where(cand[i][at] == hint, q, s.p[i][at] * rest)


s = S()
rec = [1 + 3 * j for j in range(9)]
frq = [2 + 3 * j for j in range(9)]
sec = [3 + 3 * j for j in range(9)]


def longest(js, kind):
    row = np.zeros(n, int)
    lev = np.zeros(n, int)
    for j in js:  # ascending
        ok = cand[kind[j]] >= 0
        row[ok] = kind[j]
        lev[ok] = j
    return row, lev


def bucket(lev):
    c, t = cnt[lev, np.arange(n)], tot[lev, np.arange(n)]
    tb = np.digitize(t, (2, 4, 16))
    rb = np.digitize(c / np.maximum(t, 1), (0.34, 0.67, 0.999))
    return tb * 4 + rb


base = out[0].sum() / bits
print(n, "tokens", round(base, 5))
for what, orders, source, counted in (
    ("most recent, longest of 2..16, kinds by order", range(1, 9), rec, False),
    ("most recent, kinds by order, count, share", range(1, 9), rec, True),
    ("most frequent, kinds by order", range(1, 9), frq, False),
    ("most frequent, kinds by order, count, share", range(1, 9), frq, True),
    ("the same with order 1", range(9), frq, True),
):
    row, lev = longest(orders, source)
    s.tilt(row, lev * 16 + bucket(lev) * counted, 144)
    s.say(what)
for groups in (
    ((0,), (1, 2), (3, 4, 5), (6, 7, 8)),
    ((1,), (2,), (3, 4, 5), (6, 7, 8)),
    ((1, 2), (3, 4, 5, 6, 7, 8)),
    ((1, 2), (3, 4, 5), (6, 7, 8)),
):
    rows = [i for i in frq]
    for g in groups:
        row, lev = longest(g, frq)
        s.tilt(row, lev * 16 + bucket(lev), 144, rows)
    s.say(f"most frequent, groups {[[K[j] for j in g] for g in groups]}")
for groups in (((1, 2), (3, 4, 5), (6, 7, 8)),):
    rows = frq + sec + rec
    for g in groups:
        row, lev = longest(g, frq)
        s.tilt(row, lev * 16 + bucket(lev), 144, rows)
        row, lev = longest(g, sec)
        s.tilt(row, lev * 16 + bucket(lev), 144, rows)
    s.say("and the second most frequent of each")
