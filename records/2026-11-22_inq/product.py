"""INQ by the product's functions on one checkpoint: python product.py CHECKPOINT CURSOR "NAME:FOLDER:knob=value,...;..." """

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_gpt as t

checkpoint, cursor, variants = sys.argv[1:]
c, _ = t.load_config(dict(os.environ))
world, silent, lines = t.World(), t.Log(None, quiet=True), []
t.select_kernels(c)
torch._dynamo.config.cache_size_limit, torch._dynamo.config.automatic_dynamic_shapes = 64, False
run = t.Run(c, world, lambda line, **_: lines.append(line), t.Ledger(silent, world, 0), Path("/tmp"))
model = t.GPT(c, world.device, t.choose_attention(c, world.device), world.device.type == "cuda")
saved, data = {name: w.float() for name, w in load_file(checkpoint).items()}, t.load_validation(c, lambda *_: None)
t.import_weights(model, saved, checkpoint)
base = t.evaluate(run, model, data, "x").bpb
print(f"ema {base:.5f}", flush=True)
for variant in variants.split(";"):
    start = time.time()
    name, folder, knobs = variant.split(":")
    given = dict(pair.split("=") for pair in knobs.split(",") if pair)
    settings = replace(c, data_path=folder, **{key: type(getattr(c, key))(value) for key, value in given.items()})
    here = run._replace(config=settings)
    t.import_weights(model, saved, checkpoint)
    shards = [t.read_shard(path, c.vocab_size) for path in t.find_shards(settings, "train")]
    trainer = t.Trainer(here, model, shards)
    trainer.cursor = int(cursor)
    weights = {n: w.detach().clone() for n, w in t.export_weights(dict(model.named_parameters()), c.num_layers).items()}
    quantizer = t.calibrate(here, model, weights, shards, c.gptq_calibration_batches, c.fisher_batches)
    packed, calibrated = t.fit_bytes(here, quantizer, 50_000), time.time() - start
    if settings.inq_steps:
        t.quantize_in_turn(here, trainer, quantizer, packed.at, 0.0)
        packed = t.fit_bytes(here, quantizer, 50_000, packed.at)
    losses = " ".join(line.rsplit(" ", 1)[1] for line in lines if line.startswith("inq: "))
    lines.clear()
    t.import_weights(model, t.restore(packed.coded), "the quantised weights")
    bpb = t.evaluate(here, model, data, "x").bpb
    print(f"{name:24s} {knobs:40s} bpb {bpb:.5f} penalty {1000 * (bpb - base):+.2f} bytes {packed.size} losses {losses} | "
          f"{calibrated:.1f} s + {time.time() - start - calibrated:.1f} s", flush=True)
    del trainer, quantizer
