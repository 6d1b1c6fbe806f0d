"""Test-time training, measured: the published protocol against the cached one, same weights, same documents.

    python bench/ttt.py --checkpoint ema.safetensors --tokens fineweb_val_000000.bin --tokenizer fineweb_8192_bpe.model \\
        --json records/NAME/ttt.json                # one H100, about four minutes
    python bench/ttt.py ... --documents 16 --batch 8 --tune-documents 0 --longest 512 --only fast       # a look on a CPU

Chunk, live tokens and learning rate of the cached protocol are chosen on --tune-documents other documents: the lowest
loss among the settings of GRID that reach --floor tokens a second there. Gains are over one pass with windowed attention, which
is what both protocols come to at learning rate 0. Both protocols then read the same --documents, per-document adapters only
(--phases N: with N global phases). Seconds include everything but loading and the warm-up (compiling, capturing CUDA graphs),
whose seconds are given; memory is each row's own peak. The cached protocol runs eagerly with CUDA graphs (TTT_GRAPHS=0:
without), the published one compiled. Model settings come from the environment, as for train_gpt.py, but with --checkpoint
they begin as specified.py has them (the checkpoint of the specification).
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from specified import SPECIFIED

import train_gpt as tg

# chunk, live tokens, learning rate
GRID = [(24, 48, 2e-4), (24, 72, 2e-4), (24, 24, 2e-4), (24, 120, 2e-4), (16, 48, 2e-4), (32, 64, 2.5e-4), (24, 48, 2.5e-4), (16, 32, 2e-4),
        (24, 48, 1.5e-4), (48, 96, 3e-4), (16, 32, 1.5e-4), (32, 48, 2.5e-4), (12, 36, 1.5e-4), (48, 48, 3e-4), (12, 24, 1.5e-4)]


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--checkpoint", help="weights as safetensors")
    p.add_argument("--artifact", help="or a packed model of train_gpt.py")
    p.add_argument("--tokens", required=True, help="validation shard (.bin)")
    p.add_argument("--tokenizer", help="SentencePiece model, for bytes; without it: --bytes-per-token")
    p.add_argument("--bytes-per-token", type=float, default=3.7)
    p.add_argument("--documents", type=int, default=1024)
    p.add_argument("--published-documents", type=int, default=0, help="read only so many with the published protocol (0: all)")
    p.add_argument("--tune-documents", type=int, default=288)
    p.add_argument("--longest", type=int, default=0, help="cut documents to so many tokens (0: no)")
    p.add_argument("--batch", type=int, default=96, help="documents in a batch, cached protocol")
    p.add_argument("--published-batch", type=int, default=64)
    p.add_argument("--setting", help="chunk,live,lr: no search")
    p.add_argument("--rank", type=int, default=56)
    p.add_argument("--phases", type=int, default=0)
    p.add_argument("--floor", type=float, default=60000)
    p.add_argument("--compile", type=int, default=1, help="the published protocol: 0: eager; 1: compiled")
    p.add_argument("--only", choices=("published", "fast"), help="one protocol only")
    p.add_argument("--search-seconds", type=float, default=90, help="begin no new setting of the search after so many seconds of it")
    p.add_argument("--windows", action="store_true", help="also plain evaluation, and with a sliding window")
    p.add_argument("--profile", help="file for a table of the cached protocol's kernels (torch.profiler)")
    p.add_argument("--json", help="file for the result")
    return p.parse_args()


def choose_documents(tokens: np.ndarray, counts: np.ndarray, which: np.ndarray, longest: int) -> tg.Validation:
    """Some documents of a shard as a validation set of their own, closed by a BOS."""
    documents = tg.find_documents(tokens)[which]
    at = np.concatenate([np.arange(a, a + (min(n, longest) if longest else n)) for a, n in documents])
    return tg.Validation(np.append(tokens[at], tg.BOS).astype(np.uint16), np.append(counts[at], 0))


class Bench:
    def __init__(self, a):
        self.a, self.start = a, time.perf_counter()
        self.world = tg.World()
        config = self.configure()
        tg.select_kernels(config)
        attention = tg.choose_attention(config, self.world.device)
        torch._dynamo.config.cache_size_limit = 64
        torch._dynamo.config.automatic_dynamic_shapes = False
        self.model = tg.GPT(config, self.world.device, attention, bool(a.compile) and self.world.device.type == "cuda")
        if a.artifact:
            tensors = tg.restore(tg.read_artifact(Path(a.artifact), config))
        else:
            from safetensors.torch import load_file
            tensors = {name: t.float() for name, t in load_file(a.checkpoint).items()}
        self.tensors = tensors
        self.device_name = torch.cuda.get_device_name() if self.world.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        print(f"device {self.device_name}, torch {torch.__version__}, attention {attention}, loaded in {self.elapsed():.1f} s", flush=True)

    def elapsed(self) -> float:
        return time.perf_counter() - self.start

    def configure(self, **settings) -> tg.Config:
        fixed = {"TTT_ENABLED": 1, "EVAL_TIME_LIMIT": 0, "TTT_LORA_RANK": self.a.rank, "PHASED_TTT_ENABLED": int(self.a.phases > 0),
                 "PHASED_TTT_NUM_PHASES": self.a.phases, "NGRAM_TILT_ENABLED": 0}
        network = {} if self.a.artifact else SPECIFIED
        return tg.load_config({**network, **os.environ, **{k: str(v) for k, v in {**fixed, **settings}.items()}})[0]

    def run(self, config: tg.Config) -> tg.Run:
        """Settings for the next measurement, and the weights as they were loaded."""
        self.model.config = config
        tg.import_weights(self.model, self.tensors)
        self.lines = []
        log = lambda line, *_, **__: self.lines.append(line)
        return tg.Run(config, self.world, log, tg.Ledger(log, self.world, 0), Path("."))

    def plain(self, data: tg.Validation, **how) -> tg.Score:
        with tg.compiling(self.model, False):
            return tg.evaluate(self.run(self.configure()), self.model, data, "plain", **how)

    def protocol(self, data: tg.Validation, **settings) -> tg.Score:
        config = self.configure(**settings)
        run = self.run(config)
        self.world.sync()
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        score = tg.evaluate_adapted(run, self.model, data, "ttt", time.perf_counter(), 1e9)
        for line in self.lines:
            if line.startswith(("cuda_graphs", "ttt_non_finite")):
                print(line, flush=True)
        self.warm_up = sum(float(line.split()[-1].rstrip("s")) for line in self.lines if line.startswith("ttt_warm_up"))
        return score._replace(seconds=score.seconds - self.warm_up)

    def published(self, data) -> tg.Score:
        return self.protocol(data, TTT_PROTOCOL="published", TTT_CHUNK_SIZE=48, TTT_EVAL_SEQ_LEN=2048, TTT_LORA_LR=1e-4,
                             TTT_BATCH_SIZE=self.a.published_batch,
                             TTT_COMPILE=self.a.compile, PHASED_TTT_PREFIX_DOCS=self.prefix(), GLOBAL_TTT_OPTIMIZER="sgd",
                             GLOBAL_TTT_AGAIN=1, GLOBAL_TTT_CHUNK_TOKENS=32768)

    def prefix(self) -> int:
        """Documents before the last of the published global phases: some are left that profit."""
        return min(2500, self.a.documents * self.a.phases // (self.a.phases + 1))

    def cached(self, data, chunk, live, lr) -> tg.Score:
        return self.protocol(data, TTT_PROTOCOL="cached", TTT_BATCH_SIZE=self.a.batch, TTT_CHUNK_SIZE=chunk, TTT_LIVE_TOKENS=live,
                             TTT_LORA_LR=lr)


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def profile(bench: Bench, data, setting, path: str):
    """The kernels of reading; the warm-up is left out."""
    p, warm_up = torch.profiler.profile(activities=list(torch.profiler.supported_activities())), tg.Adaptation.warm_up
    tg.Adaptation.warm_up = lambda self: (warm_up(self), p.start())
    bench.cached(data, *setting)
    tg.Adaptation.warm_up = warm_up
    p.stop()
    sort = "cuda_time_total" if bench.world.device.type == "cuda" else "cpu_time_total"
    Path(path).write_text(p.key_averages().table(sort_by=sort, row_limit=50, max_name_column_width=90))


def main():
    a = arguments()
    b = Bench(a)
    tokens = tg.read_shard(Path(a.tokens), b.model.config.vocab_size)
    if a.tokenizer:
        import sentencepiece
        counts = tg.count_bytes(tokens, tg.token_byte_table(sentencepiece.SentencePieceProcessor(model_file=a.tokenizer)))
    else:
        counts = np.diff((np.cumsum(tokens != tg.BOS) * a.bytes_per_token).astype(np.int64), prepend=0)
    order = np.random.default_rng(0).permutation(len(tg.find_documents(tokens)))
    data = choose_documents(tokens, counts, order[: a.documents], a.longest)
    tune = choose_documents(tokens, counts, order[a.documents: a.documents + a.tune_documents], a.longest) if a.tune_documents else None
    cuda = b.world.device.type == "cuda"
    out = {"device": b.device_name, "torch": torch.__version__, "documents": a.documents, "tokens": len(data.tokens) - 1,
           "compile": a.compile, "batch": a.batch, "published_batch": a.published_batch, "rank": a.rank, "phases": a.phases}

    short = choose_documents(tokens, counts, order[: a.batch], 240)         # compiles, loads libraries; same rows as later
    begun = time.perf_counter()
    b.plain(short, windowed=True)
    if a.only != "fast":
        b.published(choose_documents(tokens, counts, order[: a.published_batch], 240))
    if a.only != "published":
        b.cached(short, 48, 48, 1e-4)
        out["graph_seconds"] = b.warm_up
    b.world.sync()
    out["warm_up_seconds"], known = time.perf_counter() - begun, graphs()
    print(f"warm-up {out['warm_up_seconds']:.1f} s, {known} compiled graphs; capture {out.get('graph_seconds', 0):.1f} s", flush=True)

    plain = b.plain(data, windowed=True)        # what either protocol comes to at learning rate 0
    out["windowed_bpb"], out["windowed_seconds"] = plain.bpb, plain.seconds
    print(f"{'protocol':<34} {'tokens':>9} {'tok/s':>8} {'nats':>9} {'bpb':>9} {'gain (0.001 bpb)':>17} {'GB':>6}", flush=True)

    def row(name, score, base):
        gb = torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0
        print(f"{name:<34} {score.tokens:>9} {score.tokens / score.seconds:>8.0f} {score.loss:>9.5f} {score.bpb:>9.5f} "
              f"{1000 * (base.bpb - score.bpb):>17.3f} {gb:>6.1f}   [{b.elapsed():.0f} s]", flush=True)

    row("no adapters, windowed", plain, plain)
    if a.windows:
        for name, how in (("plain", {}), ("sliding", {"sliding": True})):
            score = b.plain(data, **how)
            row(f"no adapters, {name}", score, plain)
            out.update({f"{name}_bpb": score.bpb, f"{name}_seconds": score.seconds})
    if a.only != "published":
        if a.setting or not a.tune_documents:
            chunk, live, lr = (a.setting or "24,48,2e-4").split(",")
            setting = int(chunk), int(live), float(lr)
        else:
            base, tried = b.plain(tune, windowed=True), []
            search_end = b.elapsed() + a.search_seconds
            for candidate in GRID:
                if b.elapsed() > search_end:
                    print("search cut short: --search-seconds", flush=True)
                    break
                score = b.cached(tune, *candidate)
                tried.append((score.tokens / score.seconds < a.floor, score.loss, candidate, score.bpb))
                row("search {}+{} lr {:g}".format(*candidate), score, base)
            setting = min(tried)[2] if tried else GRID[0]
            out["search"] = [{"chunk": c[0], "live": c[1], "lr": c[2], "bpb": bpb, "fast_enough": not slow} for slow, _, c, bpb in tried]
            out["search_plain_bpb"] = base.bpb
        if a.profile:
            profile(b, short, setting, a.profile)
        fast = b.cached(data, *setting)
        row("cached {}+{} lr {:g}".format(*setting), fast, plain)
        out.update(zip(("chunk", "live", "lr"), setting))
        out.update(fast_tok_s=fast.tokens / fast.seconds, fast_bpb=fast.bpb, fast_gain=plain.bpb - fast.bpb,
                   peak_memory_gb=torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0)
    if a.only != "fast":
        some, base = data, plain
        if a.published_documents:
            some = choose_documents(tokens, counts, order[: a.published_documents], a.longest)
            base = b.plain(some, windowed=True)
        published = b.published(some)
        row("published 48 lr 1e-4", published, base)
        out.update(published_tok_s=published.tokens / published.seconds, published_bpb=published.bpb,
                   published_gain=base.bpb - published.bpb, published_documents=a.published_documents or a.documents,
                   published_peak_memory_gb=torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0)
        if a.published_documents and a.only != "published":
            row("cached, the same documents", again := b.cached(some, *setting), base)
            out["fast_gain_same_documents"] = base.bpb - again.bpb
    out["recompilations"] = graphs() - known
    if not a.only:
        gain = out.get("fast_gain_same_documents", out["fast_gain"])
        out["gain_ratio"] = gain / out["published_gain"]
        print(f"gain ratio {out['gain_ratio']:.3f}, speed ratio {out['fast_tok_s'] / out['published_tok_s']:.2f}, "
              f"recompilations after warm-up {out['recompilations']}")
    out["seconds_total"] = b.elapsed()
    print(f"total {out['seconds_total']:.1f} s")
    if a.json:
        Path(a.json).parent.mkdir(parents=True, exist_ok=True)
        Path(a.json).write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except tg.UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(e.code)
