"""The network's probabilities of n-gram hints, plain and after global phases: python dump.py ARTIFACT OUT FOLDER NAME SHARE RATE

Writes NAME_RATE_{a,b}.npz: nats of the targets and of the most recent continuations of the last ORDERS tokens, for a share of the documents.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_gpt as t

ORDERS = (16, 12, 8, 6, 5, 4, 3, 2)


def place_and_phase(tokens, config):
    """Of every token: its document, its place in it, the phase in which that is read; and batches and phases."""
    batches, phases = t.plan_phases(t.document_batches(t.find_documents(tokens), config), config)
    phase = np.zeros(len(tokens), np.int64)
    for i, p in enumerate(phases):
        for b in batches[p.first: p.last]:
            for a, size in b.documents:
                phase[a: a + size] = i
    doc = np.cumsum(tokens == t.BOS)
    return doc, np.arange(len(tokens)) - np.flatnonzero(tokens == t.BOS)[np.maximum(doc - 1, 0)], phase, batches, phases


def sources(tokens, phase, k, doc, pos, device):
    """Where what followed the last k tokens stood last: in the own document, else in earlier phases; -1: nowhere."""
    ids = torch.from_numpy(tokens.astype(np.int64)).to(device)
    n, key = len(ids), torch.zeros_like(ids)
    for j in range(k):
        shifted = torch.zeros_like(ids)
        shifted[j + 1:] = ids[: n - j - 1] + 1
        key = (key ^ shifted) * 0x1E3779B97F4A7C15
        key ^= key >> 29
    i = torch.arange(n, device=device)
    key = torch.where(torch.from_numpy(pos >= k).to(device), key, -1 - i)
    phase, doc = torch.from_numpy(phase).to(device), torch.from_numpy(doc).to(device)
    order = torch.sort(phase, stable=True).indices
    order = order[torch.sort(key[order], stable=True).indices]
    key, phase, doc = key[order], phase[order], doc[order]
    same, run, own = torch.zeros(n, dtype=torch.bool, device=device), torch.ones(n, dtype=torch.bool, device=device), None
    same[1:] = key[1:] == key[:-1]
    run[1:] = ~same[1:] | (phase[1:] != phase[:-1])
    first = torch.cummax(torch.where(run, i, 0), 0).values
    own = same.clone()
    own[1:] &= doc[1:] == doc[:-1]
    at = torch.where(own, i - 1, torch.where(same[first], first - 1, -1))
    out = torch.full_like(ids, -1)
    out[order] = torch.where(at >= 0, order[at.clamp(min=0)], -1)
    return out.cpu().numpy()


@torch.no_grad()
def losses_of(run, model, data, documents, targets, out):
    """Plain losses of `targets` (a token for every place of the text) in windows of EVAL_SEQ_LEN."""
    longest, row = run.config.eval_seq_len, t.plain_row(run.config, data)
    windows = np.array([(a, min(a + longest, s + n), a) for s, n in documents for a in range(s, s + n, longest)])
    for part in t.pack_windows(windows, row):
        at = np.concatenate([np.arange(a, b) for a, b, _ in part])
        padded = np.pad(at, (0, row - len(at)))
        starts = np.append(0, np.cumsum(part[:, 1] - part[:, 0]))
        fresh = np.zeros(row, bool)
        fresh[starts[1:-1][part[1:, 0] != part[:-1, 1]]] = True
        here = t.Segments(torch.from_numpy(t.pad_cu_seqlens(starts, row)), longest, fresh=torch.from_numpy(fresh)[None])
        as_row = lambda values: torch.from_numpy(values.astype(np.int64))[None]
        b = t.to_device(t.Batch(as_row(data.tokens[padded]), as_row(targets[padded + 1]), here), run.world.device)
        out[at + 1] = model.losses(b.ids, b.targets, b.segments)[0, : len(at)].float().cpu().numpy()


def main(artifact, folder, text, name, share, rate):
    c = replace(t.load_config(dict(os.environ))[0], data_path=text, global_ttt_lr_mul=float(rate))
    world, silent = t.World(), t.Log(None, quiet=True)
    t.select_kernels(c)
    torch._dynamo.config.cache_size_limit, torch._dynamo.config.automatic_dynamic_shapes = 64, False
    model = t.GPT(c, world.device, t.choose_attention(c, world.device), world.device.type == "cuda")
    t.import_weights(model, t.restore(t.read_artifact(Path(artifact), c)), artifact)
    run, data = t.Run(c, world, silent, t.Ledger(silent, world, 0), Path("/tmp")), t.load_validation(c, lambda *_: None)
    doc, pos, phase, batches, phases = place_and_phase(data.tokens, c)
    hints = []
    for k in ORDERS:
        source = sources(data.tokens, phase, k, doc, pos, world.device)
        hints.append(np.where(source >= 0, data.tokens[np.maximum(source, 0)], 0))
        hits = (hints[-1] == data.tokens) & (source >= 0)
        print(f"order {k}: cover {(source >= 0).mean():.4f} hit {hits.sum() / max(1, (source >= 0).sum()):.4f}", flush=True)
    chosen = np.random.default_rng(0).random(doc.max() + 2) < float(share)
    trainer, documents = t.GlobalTrainer(run, model, None), np.concatenate([b.documents for b in batches])
    arrays = np.zeros((1 + len(ORDERS), len(data.tokens)), np.float32)
    for p in phases:
        mine = np.concatenate([b.documents for b in batches[p.first: p.last]])
        few = mine[chosen[doc[mine[:, 0]]]]
        for out, targets in zip(arrays, (data.tokens, *hints)) if len(few) else ():
            losses_of(run, model, data, few, targets, out)
        if p.documents and c.global_ttt_lr_mul:
            with t.compiling(model, False):
                trainer(data.tokens, documents[: p.documents], lambda: False)
    keep = chosen[doc] & (pos > 0)              # a document's BOS is scored by the document before it: left out
    kept = arrays[:, keep].astype(np.float16)
    print(f"{name} at {rate}: {keep.sum()} tokens, mean nats {arrays[0, keep].mean():.5f}", flush=True)
    for part, rows in zip("ab", (kept[:5], kept[5:])):
        np.savez_compressed(f"{folder}/{name}_{rate}_{part}.npz", rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
