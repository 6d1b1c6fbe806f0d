"""Which rule shares the bytes out best? One checkpoint, every rule at the same artifact size, scored after a round trip.

    python bench/quantize.py CHECKPOINT.safetensors --val VAL.bin --train TRAIN.bin --tokenizer T.model --json quantize.json

CHECKPOINT, shards and tokenizer may be .xz. First the hand-set row as published (float16 steps, fixed sigmas), then every
row of ROWS with its steps bisected until code (--code-bytes) and model are just under TARGET_BYTES, packed by our coder,
unpacked, and scored in bits per byte over the first --targets validation tokens. penalty: bpb less that of the EMA weights,
in 0.001 bpb; ratio: to the hand-set rule's at equal bytes. --minutes: no new row is begun after that; the table so far is
written after each row. About 5 minutes on one H100. --coders: every row's integers through these coders too (bench/pack.py
does that to saved artifacts). Model settings come from the environment; they begin as specified.py has them
(the checkpoint of the specification).
"""
from __future__ import annotations

import argparse
import json
import lzma
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from specified import SPECIFIED  # noqa: E402

import train_gpt as t  # noqa: E402

FISHER = {"clip_rule": "fisher", "quantizer": "scalar"}
HAND = {"clip_rule": "hand", "quantizer": "scalar"}
HALF = {**FISHER, "fisher_row_power": 0.25, "fisher_tensor_power": 0.25}
LQER = {"lqer_enabled": True}
T4, T8 = {"quantizer": "trellis4"}, {"quantizer": "trellis8"}
# label -> settings; fisher: steps by squared gradients, both powers 1/2. `statistic`: "plain" (mean squared gradients) or
# "gptq" (as GPTQ's error sees them, the default)
ROWS = [
    ("hand-set", HAND),
    ("fisher", FISHER),
    ("hand-set, trellis8", {**HAND, **T8}),
    ("fisher, trellis4", {**FISHER, **T4}),
    ("fisher, trellis8", {**FISHER, **T8}),
    ("fisher, trellis16", {**FISHER, "quantizer": "trellis16"}),
    ("fisher, trellis32", {**FISHER, "quantizer": "trellis32"}),
    ("fisher, trellis64", {**FISHER, "quantizer": "trellis64"}),
    ("hand-set + LQER", {**HAND, **LQER}),
    ("fisher + LQER", {**FISHER, **LQER}),
    ("hand-set, trellis8 + LQER", {**HAND, **T8, **LQER}),
    ("fisher, trellis4 + LQER", {**FISHER, **T4, **LQER}),
    ("fisher, trellis8 + LQER", {**FISHER, **T8, **LQER}),
    *((f"fisher, trellis8, lambda {x}", {**FISHER, **T8, "trellis_lambda": x}) for x in (0.0, 0.1, 0.2, 0.35, 0.5)),
    ("fisher, trellis8, 128 batches", {**FISHER, **T8, "fisher_batches": 128}),
    ("fisher row 1/4, tensor 1/4", HALF),
    ("fisher row 1/2, tensor 1/4", {**FISHER, "fisher_tensor_power": 0.25}),
    ("fisher row 1/4, tensor 1/2", {**FISHER, "fisher_row_power": 0.25}),
    ("fisher row 3/8, tensor 3/8", {**FISHER, "fisher_row_power": 0.375, "fisher_tensor_power": 0.375}),
    ("fisher row 0, tensor 1/2", {**FISHER, "fisher_row_power": 0.0}),
    ("fisher row 1/2, tensor 0", {**FISHER, "fisher_tensor_power": 0.0}),
    ("fisher, steps to 3x", {**FISHER, "fisher_coarsest": 3.0}),
    ("fisher, steps to 1.5x", {**FISHER, "fisher_coarsest": 1.5}),
    ("plain fisher", {**FISHER, "statistic": "plain"}),
    ("plain fisher row 1/4, tensor 1/4", {**HALF, "statistic": "plain"}),
    ("adaptive (PR 1962)", {**HAND, "clip_rule": "adaptive"}),
    ("hand-set, lambda 0.175 (PR 1412)", {**HAND, "hessian_clip_lambda": 0.175}),
    ("hand-set, mixed precision", {**HAND, "mixed_precision_hessian": True}),
]
# these settings on top of the best row so far
ON_BEST = [
    ("best, 10 bits of mantissa", {"small_mantissa_bits": 10}),
    ("best, 5 bits of mantissa", {"small_mantissa_bits": 5}),
    ("best, steps on 1/4 octaves", {"step_grid": 4}),
    ("best, steps on 1/16 octaves", {"step_grid": 16}),
    ("best + LQER", {"lqer_enabled": True}),
]


def opened(path: Path) -> bytes:
    return lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()


def tokens_of(path: Path) -> np.ndarray:
    return np.frombuffer(opened(path), "<u2", offset=t.HEADER_BYTES)


class Bench:
    """The model, its statistics (each collected once) and the table."""

    def __init__(self, args):
        self.args, self.start = args, time.perf_counter()
        env = {**SPECIFIED, **os.environ, "TOKENIZER_PATH": args.tokenizer, "SEED": "1337"}
        if args.train_batch_tokens:
            env["TRAIN_BATCH_TOKENS"] = str(args.train_batch_tokens)
        self.config, _ = t.load_config(env)
        for coder in args.coders:
            if coder not in t.COMPRESSORS:
                raise t.UserError(f"--coders {coder}: expected names of {', '.join(t.COMPRESSORS)}")
            t.COMPRESSORS[coder].probe()
        world, log = t.World(), t.Log(None, quiet=False)
        t.select_kernels(self.config)
        torch._dynamo.config.automatic_dynamic_shapes = False
        self.attention = t.choose_attention(self.config, world.device)
        cuda = world.device.type == "cuda"
        self.model = t.GPT(self.config, world.device, self.attention, cuda and not args.eager)
        self.run = t.Run(self.config, world, log, t.Ledger(log, world, 0), Path(tempfile.mkdtemp(prefix="quantize.")))
        from safetensors.torch import load
        t.import_weights(self.model, {name: w.float() for name, w in load(opened(args.checkpoint)).items()}, str(args.checkpoint))
        exported = t.export_weights(dict(self.model.named_parameters()), self.config.num_layers)
        self.weights = {n: w.detach().clone() for n, w in exported.items()}
        self.names = [n for n, w in self.weights.items() if t.is_quantised(n, w)]
        tokens = tokens_of(args.val)[: args.targets + 1]
        self.validation = t.Validation(tokens, t.count_bytes(tokens, t.token_byte_table(t.load_tokenizer(self.config))))
        self.shards = [tokens_of(path) for path in args.train]
        name = torch.cuda.get_device_name() if cuda else "CPU"
        self.table = {"checkpoint": str(args.checkpoint), "device": name, "torch": torch.__version__, "attention": self.attention,
                      "targets": len(tokens) - 1, "code_bytes": args.code_bytes, "rows": []}
        self.statistics = {}

    def seconds(self, action):
        self.run.world.sync()
        start = time.perf_counter()
        out = action()
        self.run.world.sync()
        return out, time.perf_counter() - start

    def score(self) -> t.Score:
        return t.evaluate(self.run._replace(log=t.Log(None, quiet=True)), self.model, self.validation, "bench")

    def quantizer(self, config: t.Config, statistic: str) -> t.Quantizer:
        """Statistics are collected with the unquantised weights in the model, and kept for later rows."""
        run = self.run._replace(config=config, log=t.Log(None, quiet=True))
        keep = self.statistics
        if "hessians" not in keep:
            t.import_weights(self.model, self.weights)
            t.collect_hessians(run, self.model, self.shards, 1)         # warm-up
            keep["hessians"], self.table["hessian_seconds"] = self.seconds(
                lambda: t.collect_hessians(run, self.model, self.shards, self.args.hessian_batches))
            t.prepare_all(run, keep["hessians"])
            _, self.table["factor_seconds"] = self.seconds(lambda: t.prepare_all(run, keep["hessians"]))
            self.counts = t.token_counts(self.shards, config.vocab_size)
            print(f"hessians {self.table['hessian_seconds']:.2f} s, factors {self.table['factor_seconds']:.2f} s", flush=True)
        factors, sensitivity = t.prepare_all(run, keep["hessians"]), {}
        collect = lambda factors: t.collect_sensitivity(run, self.model, self.shards, self.names, factors, config.fisher_batches)
        if config.clip_rule == "fisher":
            # the order of columns hardly changes these: one collection serves scalar and trellis
            key = statistic, config.fisher_batches
            if key not in keep:
                t.import_weights(self.model, self.weights)
                t.collect_sensitivity(run, self.model, self.shards, self.names, {}, 2)      # warm-up
                keep[key], seconds = self.seconds(lambda: collect(factors if statistic == "gptq" else {}))
                self.table[f"fisher_seconds_{statistic}_{config.fisher_batches}"] = seconds
                print(f"fisher ({statistic}, {config.fisher_batches} batches) {seconds:.2f} s", flush=True)
            sensitivity = keep[key]
        return t.Quantizer(run, t.Calibration(self.weights, keep["hessians"], sensitivity, self.counts), factors)

    def row(self, label: str, settings: dict, fixed: bool = False):
        settings = dict(settings)
        statistic = settings.pop("statistic", "gptq")
        config = replace(self.config, compressor="entropy", **settings, **({"target_bytes": 0} if fixed else {}))
        quantizer, calibration = self.seconds(lambda: self.quantizer(config, statistic))
        times = {}
        ledger = t.Ledger(t.Log(None, quiet=True), self.run.world, 0)
        ledger.charge = lambda name, seconds, budget="none": times.update({name: seconds})
        passes = []
        log = lambda text, console=True: passes.append(text) if text.startswith("byte_budget") else None
        run = self.run._replace(config=config, log=log, ledger=ledger)
        packed = t.fit_bytes(run, quantizer, self.args.code_bytes)
        path = self.run.folder / "artifact.pglf"
        path.write_bytes(packed.artifact)
        coded, unpack = self.seconds(lambda: t.read_artifact(path, config))
        t.import_weights(self.model, t.restore(coded))
        bpb = self.score().bpb
        count = max(len(passes), 1)
        result = {"label": label, "rule": config.clip_rule, "quantizer": config.quantizer, "coder": config.compressor,
                  "entropy_bytes": round(t.entropy_bytes(packed.coded)), "total_bytes": packed.size, "bpb": round(bpb, 6),
                  "penalty": round(1000 * (bpb - self.table["ema_bpb"]), 3), "ratio": None, "seconds": round(times["gptq"], 2),
                  "passes": count, "pack_seconds": round(times["pack"] / count, 2), "unpack_seconds": round(unpack, 2),
                  "calibration_seconds": round(calibration, 2), "settings": {**settings, "statistic": statistic}}
        rows = self.table["rows"]
        hand = next((r for r in [*rows, result] if r["label"] == "hand-set"), None)
        if hand and not fixed:
            result["ratio"] = round(result["penalty"] / hand["penalty"], 4)
        rows.append(result)
        print(f"{label:46s} {result['entropy_bytes']:>11,} {result['total_bytes']:>11,} {bpb:.5f} {result['penalty']:+6.2f} "
              f"{result['ratio'] or 0:6.3f}  gptq {result['seconds']:5.1f} s in {count}  pack {result['pack_seconds']:4.1f}  "
              f"unpack {unpack:4.1f}  at {time.perf_counter() - self.start:4.0f} s", flush=True)
        rows += [self.other_coder(result, packed.coded, coder) for coder in self.args.coders]
        if self.args.json:
            self.args.json.write_text(json.dumps(self.table, indent=1) + "\n")
        if self.args.save:
            self.args.save.mkdir(parents=True, exist_ok=True)
            best = min((r for r in rows if r["ratio"]), key=lambda r: r["bpb"], default=None)
            for name, wanted in (("hand.pglf", result["label"] == "hand-set"), ("best.pglf", result is best)):
                if wanted:
                    (self.args.save / name).write_bytes(packed.artifact)
            if result is best:
                quiet = []
                quantizer.run = quantizer.run._replace(log=lambda text, console=True: quiet.append(text))
                quantizer.log_table(packed.coded)
                (self.args.save / "best_sigmas.txt").write_text(f"{label}\n" + "\n".join(quiet) + "\n")

    def other_coder(self, row: dict, coded: dict, coder: str) -> dict:
        """The same integers through another coder: the same bpb in other bytes, so without a ratio at equal bytes."""
        streams, pack = self.seconds(lambda: t.encode(coded, coder, self.run.folder))
        back, unpack = self.seconds(lambda: t.decode(streams, t.specs_of(coded), coder, self.run.folder))
        if any(not torch.equal(a, b) for name in coded for a, b in zip(coded[name], back[name]) if torch.is_tensor(a)):
            raise t.UserError(f"{coder}: the integers came back changed")
        size = sum(map(len, streams.values())) + self.args.code_bytes
        print(f"{'  through ' + coder:46s} {'':>11s} {size:>11,}{'':25s}pack {pack:4.1f}  unpack {unpack:4.1f}", flush=True)
        return {**row, "coder": coder, "total_bytes": size, "ratio": None, "pack_seconds": round(pack, 2),
                "unpack_seconds": round(unpack, 2)}

    def main(self):
        score, cold = self.seconds(self.score)
        score, warm = self.seconds(self.score)
        self.table["ema_bpb"] = score.bpb
        print(f"EMA bpb {score.bpb:.5f} over {score.tokens} targets ({cold:.0f} s cold, {warm:.1f} s warm)\n"
              f"{'rule':46s} {'entropy':>11s} {'total':>11s} {'bpb':>7s} {'m':>6s} {'ratio':>6s}", flush=True)
        self.row("hand-set, fixed, as published", {**HAND, "step_grid": 0, "small_mantissa_bits": 10}, fixed=True)
        done = lambda: time.perf_counter() - self.start > 60 * self.args.minutes
        wanted = [name.strip() for name in self.args.only.split(";") if name.strip()]
        if unknown := set(wanted) - {label for label, _ in ROWS}:
            raise t.UserError(f"--only {sorted(unknown)[0]!r}: expected labels of ROWS, such as {ROWS[0][0]!r}")
        chosen = [r for r in ROWS if not wanted or r[0] in wanted]
        for label, settings in chosen:
            if not done():
                self.row(label, settings)
        best = min((r for r in self.table["rows"] if r["ratio"]), key=lambda r: r["bpb"], default=None)
        for label, settings in ON_BEST if best and not self.args.only else []:
            if not done():
                self.row(label, {**best["settings"], **settings})
        print(f"total {time.perf_counter() - self.start:.0f} s; best: {best['label'] if best else 'none'}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--val", type=Path, required=True, help="validation shard")
    parser.add_argument("--train", type=Path, nargs="+", required=True, help="training shards for the statistics")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--targets", type=int, default=3_407_872)
    parser.add_argument("--hessian-batches", type=int, default=16)
    parser.add_argument("--train-batch-tokens", type=int, default=0, help="0: the default recipe's (8 micro-batches)")
    parser.add_argument("--code-bytes", type=int, default=24_000)
    parser.add_argument("--coders", type=lambda text: [name for name in text.split(",") if name], default=[],
                        help="also through these coders (comma list: brotli takes half a minute, pergroup two to three)")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--only", default="", help="rows with these labels (split by semicolons)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--save", type=Path, help="folder for hand.pglf, best.pglf and the sigmas of the best")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    Bench(parser.parse_args()).main()
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        sys.exit(main())
    except t.UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
