"""Most recent, most frequent and second most frequent continuations of the last k tokens in all text before, and the network's probabilities
of them, on a CPU: python candidates.py ARTIFACT OUT.npz SHARE SECONDS (settings: recipes/h100x1.env and PARALLEL_START_LAYER=8)."""

import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_gpt as t

artifact, target, share, limit = sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4])
c, _ = t.load_config(dict(os.environ))
d = t.load_validation(c, lambda *_: None)
tok = d.tokens.astype(np.int64)
n = len(tok)
doc = np.cumsum(tok == 1)
start = np.flatnonzero(tok == 1)
pos = np.arange(n) - start[np.maximum(doc - 1, 0)]
chosen = np.random.default_rng(1).random(doc.max() + 2) < share
s = time.time()
C = []
N = []
tl = tok.tolist()
pl = pos.tolist()
for k in (1, 2, 3, 4, 5, 6, 8, 12, 16):
    h = np.zeros(n, np.uint64)
    for j in range(k):
        sh = np.zeros(n, np.uint64)
        sh[j + 1:] = tok[: n - j - 1] + 1
        h = h * np.uint64(0x9E3779B97F4A7C15) + sh
    hl = h.tolist()
    rec = np.full(n, -1, np.int32)
    freq = np.full(n, -1, np.int32)
    cnt = np.zeros(n, np.int32)
    tot = np.zeros(n, np.int32)
    sec = np.full(n, -1, np.int32)
    D = {}
    for i in range(n):
        if pl[i] < k:
            continue
        e = D.get(hl[i])
        x = tl[i]
        if e is None:
            D[hl[i]] = [x, x, 1, {x: 1}, 1, -1]
            continue
        rec[i] = e[0]
        freq[i] = e[1]
        cnt[i] = e[2]
        tot[i] = e[4]
        sec[i] = e[5]
        e[0] = x
        m = e[3]
        v = m.get(x, 0) + 1
        m[x] = v
        e[4] += 1
        if x == e[1]:
            e[2] = v
        elif v >= e[2]:
            e[5] = e[1]
            e[1] = x
            e[2] = v
        elif e[5] == -1 or v >= m.get(e[5], 0):
            e[5] = x
    del D
    C += [rec, freq, sec]
    N.append((cnt, tot))
    print(k, time.time() - s, (rec >= 0).mean(), (rec == tok)[rec >= 0].mean(), (freq == tok)[rec >= 0].mean(), flush=True)
keep = chosen[doc] & (pos > 0)
print(keep.sum(), "tokens")
torch.set_num_threads(2)
world, L = t.World(), t.Log(None, quiet=True)
t.select_kernels(c)
model = t.GPT(c, world.device, "sdpa", False)
t.import_weights(model, t.restore(t.read_artifact(Path(artifact), c)), "x")
cands = np.stack([tok.astype(np.int32)] + C)  # [28,n]
out = np.zeros((len(cands), n), np.float16)
done = 0
s = time.time()
W = model.tok_emb.detach()
used = np.zeros(n, bool)
with torch.no_grad():
    for b in np.random.default_rng(2).permutation(np.flatnonzero(chosen[1: doc.max() + 1])):
        a = start[b]
        e = start[b + 1] if b + 1 < len(start) else n
        for x in range(a, e - 1, 2048):
            y = min(x + 2048, e - 1)
            ids = torch.from_numpy(tok[x:y])[None]
            hidden = model(ids)
            z = torch.nn.functional.linear(t.norm(hidden), W)[0].float()
            z = 30 * torch.tanh(z / 30)
            lse = z.logsumexp(1)
            cc = torch.from_numpy(cands[:, x + 1: y + 1].astype(np.int64)).clamp(min=0)
            out[:, x + 1: y + 1] = (lse - z.gather(1, cc.T).T).numpy()
            used[x + 1: y + 1] = True
            done += y - x
        if time.time() - s > limit:
            break
print(done, "tokens", time.time() - s, "s", out[0][used].astype(np.float64).mean())
np.savez(
    target,
    out=out[:, used],
    cands=cands[:, used],
    cnt=np.stack([x[0] for x in N])[:, used],
    tot=np.stack([x[1] for x in N])[:, used],
    pos=np.flatnonzero(used),
    bytes=d.byte_counts[used].sum(),
)
