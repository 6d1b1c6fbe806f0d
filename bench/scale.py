"""Training on two GPUs against one of the same machine: tokens/s, and the communication that a step does not hide.

    python bench/scale.py --json scaling.json                 # DATA_PATH's shards; --synthetic: random tokens
    python bench/scale.py --ranks 1 2 4 8 --ttt               # other numbers of ranks; test-time training too
    python bench/scale.py --cpu                               # a rehearsal at toy size with gloo, no figures worth keeping
    python bench/scale.py --bytes 2 8 16                      # on paper: what a step sends, for these numbers of ranks

Each number of ranks is one torchrun of this file that drives train_gpt.py's Trainer.take_step: its prefetcher, forward,
backward, collectives, optimizers and average. Every rank has --tokens a micro-step; a step has 1 or 8 micro-steps, with
and without loops. A step's time is that between the ends of consecutive steps on the device (CUDA events; the clock on a
CPU), median over the steps. Exposed communication is the median step less the median with every collective replaced by a
copy of the same shape on this device: waiting for the slower rank is a part of it.

The JSON's own tokens_per_second_1, _2 and ratio are of the case with the lowest ratio; `cases` has all. ttt_ratio is
null without --ttt.
"""
from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as t  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
TOY = dict(VOCAB_SIZE=384, NUM_LAYERS=6, MODEL_DIM=64, NUM_HEADS=4, NUM_KV_HEADS=2, XSA_LAST_N=6, ROPE_DIMS=4, LOOP_START=1, LOOP_END=2,
           PARALLEL_START_LAYER=4, TRAIN_SEQ_LEN=128, EVAL_SEQ_LEN=128, TTT_EVAL_SEQ_LEN=128, VAL_BATCH_TOKENS=8192, TTT_BATCH_SIZE=8,
           TTT_LORA_RANK=4, PHASED_TTT_PREFIX_DOCS=16)


class Alone(t.World):
    """The same rank of as many, with local copies for collectives: what a step costs when communication is free."""

    def __init__(self, world: t.World):
        self.__dict__.update(world.__dict__)

    def sum(self, tensor, op=None):
        return tensor

    def reduce_scatter(self, out, tensor):
        out.copy_(tensor[: len(out)])
        return self

    def all_gather(self, out, tensor):
        out.view(self.size, *tensor.shape).copy_(tensor.expand(self.size, *tensor.shape))
        return self

    def wait(self):
        """It is its own finished handle."""


def random_documents(count: int, seed: int, vocab: int) -> np.ndarray:
    """Random tokens in documents of exponential length, mean 760 as in the English shards."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, vocab, count).astype(np.uint16)
    ends = np.cumsum(rng.exponential(760, count // 100 + 2).astype(int) + 2)
    tokens[np.append(0, ends[ends < count])] = t.BOS
    return tokens


def step_ms(trainer: t.Trainer, loops: int, warm: int, steps: int) -> list[float]:
    """Milliseconds between the ends of consecutive steps."""
    batches, ends = t.Prefetcher(trainer.stream(), trainer.run.world.device), []
    try:
        for _ in range(warm + steps):
            trainer.take_step(batches, loops, 1.0)
            if trainer.run.world.device.type == "cuda":
                ends.append(torch.cuda.Event(enable_timing=True))
                ends[-1].record()
            else:
                ends.append(time.perf_counter())
        trainer.settle()
        trainer.run.world.sync()
    finally:
        batches.close()
    pairs = list(zip(ends[warm - 1:], ends[warm:]))
    return [a.elapsed_time(b) if trainer.run.world.device.type == "cuda" else 1000 * (b - a) for a, b in pairs]


def measure(run: t.Run, model: t.GPT, shards: list[np.ndarray], args) -> list[dict]:
    """One row for every number of micro-steps and every looping state."""
    rows = []
    for accumulation in args.accumulation:
        c = dataclasses.replace(run.config, grad_accum_steps=accumulation,
                                train_batch_tokens=args.tokens * run.world.size * accumulation)
        trainer = t.Trainer(run._replace(config=c), model, shards)
        for loops in args.loops:
            ms = float(np.median(step_ms(trainer, loops, 3 if accumulation == 1 else 1, args.steps)))
            row = {"ranks": run.world.size, "accumulation": accumulation, "loops": loops, "step_ms": ms,
                   "tokens_per_second": 1000 * c.train_batch_tokens / ms}
            if run.world.size > 1 and accumulation == min(args.accumulation):     # the same tensors whatever the accumulation
                world = trainer.optimizers.world
                trainer.optimizers.world = trainer.optimizers.muon.world = Alone(world)
                row["step_ms_without_communication"] = float(np.median(step_ms(trainer, loops, 3, args.steps)))
                trainer.optimizers.world = trainer.optimizers.muon.world = world
                row["exposed_ms"] = ms - row["step_ms_without_communication"]
                for p in model.parameters():                                      # the replicas went their own ways
                    world.broadcast(p.data)
            rows.append(row)
    return rows


def adapt_seconds(run: t.Run, model: t.GPT, documents: int) -> float:
    """Seconds of test-time training over random documents, by the settings of the environment."""
    tokens = random_documents(760 * documents, 7, run.config.vocab_size)
    data = t.Validation(tokens, np.ones(len(tokens), np.int64))
    run = run._replace(config=dataclasses.replace(run.config, eval_time_limit=0.0))
    return t.evaluate_adapted(run, model, data, "quantized_ttt_phased", time.perf_counter(), 1e9).seconds


def worker(args):
    """One rank; rank 0 writes its figures."""
    torch._dynamo.config.cache_size_limit = 64
    torch._dynamo.config.automatic_dynamic_shapes = False
    world = t.World()
    config, _ = t.load_config({"TRAIN_LOG_EVERY": "0", **os.environ})
    t.select_kernels(config)
    attention = world.together(lambda: t.choose_attention(config, world.device))
    model = t.GPT(config, world.device, attention, config.compile_enabled and world.device.type == "cuda" and attention != "sdpa")
    log = t.Log(None, quiet=True)
    run = t.Run(config, world, log, t.Ledger(log, world, 0), Path("."))
    if args.synthetic:
        shards = [random_documents(max(1 << 22, 4 * args.tokens * world.size), 1, config.vocab_size)]
    else:
        shards = world.together(lambda: [t.read_shard(p, config.vocab_size) for p in t.find_shards(config, "train")])
    args.loops = sorted({0, config.num_loops}) if args.loops is None else args.loops
    result = {"cases": measure(run, model, shards, args), "attention": attention,
              "device": torch.cuda.get_device_name() if world.device.type == "cuda" else "cpu"}
    if args.ttt:
        result["ttt_seconds"] = adapt_seconds(run, model, args.ttt_documents)
    if world.rank == 0:
        args.json.write_text(json.dumps(result))
    world.close()


def launch(ranks: int, args, folder: Path) -> dict:
    """The worker's figures with so many ranks; UserError if it fails."""
    out = folder / f"{ranks}.json"
    # one cache for all: the second number of ranks finds the first one's kernels
    cache = {name: os.environ.get(name, str(folder / name)) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    toy = {**{k: str(v) for k, v in TOY.items()}, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if args.cpu else {}
    options = ["--tokens", args.tokens, "--steps", args.steps, "--ttt-documents", args.ttt_documents]
    options += ["--accumulation", *args.accumulation]
    options += ["--loops", *args.loops] if args.loops is not None else []
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", __file__, "--worker",
               "--json", out, *options, *["--synthetic"] * args.synthetic, *["--ttt"] * args.ttt]
    start = time.perf_counter()
    done = subprocess.run(list(map(str, command)), env={**os.environ, **cache, **toy}, stdout=sys.stderr)
    if done.returncode or not out.is_file():
        raise t.UserError(f"the run on {ranks} ranks ended with exit code {done.returncode}: see above", code=1)
    return {**json.loads(out.read_text()), "seconds": round(time.perf_counter() - start, 1)}


def compare(results: dict[int, dict]) -> dict:
    """Every case of the larger numbers of ranks against the smallest; the worst of the next number on top."""
    base, *others = sorted(results)
    alone = {(r["accumulation"], r["loops"]): r for r in results[base]["cases"]}
    cases = list(results[base]["cases"])
    for ranks in others:
        for row in results[ranks]["cases"]:
            row["ratio"] = row["tokens_per_second"] / alone[row["accumulation"], row["loops"]]["tokens_per_second"]
            cases.append(row)
    worst = min((r for r in cases if r["ranks"] == others[0]), key=lambda r: r["ratio"])
    seconds = [results[n].get("ttt_seconds") for n in (base, others[0])]
    first = alone[worst["accumulation"], worst["loops"]]
    return {f"tokens_per_second_{base}": first["tokens_per_second"], f"tokens_per_second_{others[0]}": worst["tokens_per_second"],
            "ratio": worst["ratio"], "accumulation": worst["accumulation"], "loops": worst["loops"],
            "ttt_ratio": seconds[0] / seconds[1] if all(seconds) else None, "device": results[base]["device"],
            "attention": results[base]["attention"], "cases": cases, "seconds": {n: r["seconds"] for n, r in results.items()},
            "torch": torch.__version__}


def wire_bytes(config: t.Config, size: int) -> list[tuple[str, int, int]]:
    """(what, bytes of the tensors, bytes that one rank sends) of one step's collectives, by the ring algorithm."""
    meta = t.GPT(config, torch.device("meta"))
    one = t.World.__new__(t.World)
    one.rank, one.size, one.device = 0, 1, torch.device("meta")
    o = t.Optimizers(meta, config, one)
    padded = sum(-(-len(p) // size) * size * p[0].numel() for p in o.muon.banks)
    part = (size - 1) / size
    numbers = lambda params: sum(p.numel() for p in params)
    rows = [("banks' gradients, reduce-scatter, bfloat16", 2 * padded, part), ("banks' updates, all-gather, bfloat16", 2 * padded, part),
            ("embedding's gradient, all-reduce, float32", 4 * numbers(o.large), 2 * part),
            ("small tensors' gradients, packed, all-reduce, float32", 4 * numbers(o.small), 2 * part),
            ("gradient norm, all-reduce, float32", 4, 2 * part)]
    return [(name, held, round(held * share)) for name, held, share in rows]


def print_bytes(sizes: list[int]):
    config, _ = t.load_config(dict(os.environ))
    for size in sizes:
        rows = wire_bytes(config, size)
        print(f"{size} ranks")
        for name, held, sent in [*rows, ("all", sum(r[1] for r in rows), sum(r[2] for r in rows))]:
            print(f"  {name:56} {held:12,} bytes, a rank sends {sent:12,}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, help="of a rank's micro-step (98304; 512 with --cpu)")
    parser.add_argument("--steps", type=int, default=12, help="timed steps of each case")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--accumulation", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--loops", type=int, nargs="+", help="extra passes (default: 0 and NUM_LOOPS)")
    parser.add_argument("--synthetic", action="store_true", help="random tokens instead of DATA_PATH's shards")
    parser.add_argument("--ttt", action="store_true", help="also test-time training")
    parser.add_argument("--ttt-documents", type=int, default=1024)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--bytes", type=int, nargs="+", metavar="RANKS", help="print what a step sends and stop")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cpu:
        args.synthetic, args.tokens, args.ttt_documents = True, args.tokens or 512, min(args.ttt_documents, 48)
    args.tokens = args.tokens or 98304
    try:
        if args.bytes:
            print_bytes(args.bytes)
            return 0
        if args.worker:
            worker(args)
            return 0
        if len(set(args.ranks)) < 2:
            raise t.UserError(f"--ranks {args.ranks}: expected two numbers or more, to compare")
        if not args.cpu and torch.cuda.device_count() < max(args.ranks):
            raise t.UserError(f"{torch.cuda.device_count()} GPUs are visible, {max(args.ranks)} needed (--cpu: a rehearsal)")
        with tempfile.TemporaryDirectory() as folder:
            result = compare({ranks: launch(ranks, args, Path(folder)) for ranks in sorted(set(args.ranks))})
    except t.UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.code
    print(f"{'ranks':>5} {'micro-steps':>11} {'loops':>5} {'ms/step':>9} {'tok/s':>12} {'ratio':>6} {'exposed ms':>10}")
    for r in result["cases"]:
        print(f"{r['ranks']:5} {r['accumulation']:11} {r['loops']:5} {r['step_ms']:9.2f} {r['tokens_per_second']:12,.0f} "
              f"{r.get('ratio', 1):6.3f} {r.get('exposed_ms', float('nan')):10.2f}")
    print(f"device {result['device']}, attention {result['attention']}, ttt_ratio {result['ttt_ratio']}, seconds {result['seconds']}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
