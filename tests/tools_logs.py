"""Small synthetic logs in our format and in both references', for the tests of tools/ (figures are made up)."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "tools"

SOURCE = '''"""A script that stands in for the trainer."""
import os

log = lambda s: print(s)
if os.environ.get("NEVER"):
    log(f"quantized_ttt_phased val_loss:{0:.8f} val_bpb:{0:.8f} eval_time:{0}ms")
    log("""
Hyperparameters:
  seed: 999
500/20000 train_loss: 9.9999 train_time: 9.9m tok/s: 1
run_complete seconds:1.0
""")
    log("form\x0cfeed, line\u2028separator")
'''
WRAPPED = b"exec('print(1)')\n"


def ours(seed: int = 42, source: str = SOURCE, wrapped: bytes = WRAPPED, **change) -> str:
    """One finished run of ours. Keyword arguments replace the defaults below; `config` adds or replaces knobs."""
    v = {
        "bpb": 1.0500 + 0.0001 * (seed % 7), "ratio": 2.1885, "train_s": 598.12, "eval_s": 423.45, "steps": 4835,
        "model_bytes": 15_800_000, "scored": 3_560_456, "total": 3_560_456, "val_tokens": 3_560_457, "complete": True,
        "device": "count:8 name:NVIDIA H100 80GB HBM3", "code_bytes": len(wrapped), "extra": "", "config": {},
        "hessian_budget": "train", "total_bytes": None, "git": "0123456789abcdef0123456789abcdef01234567",
        "ttt_loss": None, "sigma": 8.74,
    } | change  # fmt: skip
    config = {
        "seed": seed, "run_id": f"run-{seed}", "logfile": f"logs/run-{seed}.txt", "artifact_dir": "",
        "iterations": 20000, "max_wallclock_seconds": 600.0, "gptq_reserve_seconds": 4.0, "train_batch_tokens": 786432,
        "warmdown_frac": 0.85, "min_lr": 0.1,
        "matrix_lr": 0.026, "num_loops": 2, "adaptive_hessian_clip": True, "ttt_enabled": True,
        "data_dir": f"/data/{seed}", "adam_eps": 1e-08, "polar_express": True, "lqer_enabled": False,
    } | v["config"]  # fmt: skip
    bpb = v["bpb"]
    loss = v["ttt_loss"] or bpb * v["ratio"]
    total = v["total_bytes"] or v["code_bytes"] + v["model_bytes"]
    lines = ["Hyperparameters:", *(f"  {k}: {x}" for k, x in sorted(config.items()))]
    lines += [
        "version python:3.12.3 torch:2.11.0 cuda:13.0 triton:3.6.0 attention:fa3",
        f"device {v['device']}",
        f"git revision:{v['git']}",
        f"script sha256:{hashlib.sha256(source.encode()).hexdigest()} bytes:{len(source.encode())}",
        "input file:/data/fineweb_train_000000.bin sha256:aa11 tokens:100000000",
        f"input file:/data/fineweb_val_000000.bin sha256:bb22 tokens:{v['val_tokens']}",
        f"source_begin lines:{len(source.split(chr(10))) - 1}",
        *(f"| {line}" for line in source.split("\n")[:-1]),
        "source_end",
        "model_params:35945671",
        "0/20000 val_loss: 9.0076 val_bpb: 4.1159",
        "1/20000 train_loss: 9.0087 train_time: 0.0m tok/s: 13452586 lr_mul: 1.000 grad_norm: 2.1 seconds: 0.06",
        "500/20000 train_loss: 2.5628 train_time: 0.8m tok/s: 8099629 lr_mul: 1.000 grad_norm: 0.12 seconds: 48.21",
        "2000/20000 train_loss: 2.4497 train_time: 3.3m tok/s: 8011048 lr_mul: 0.790 grad_norm: 0.10 seconds: 196.30",
        "layer_loop:enabled step:2124 frac:0.350 encoder:[0, 1, 2, 3, 4, 5, 3, 4] decoder:[5, 3, 4, 5, 6, 7]",
        "4500/20000 train_loss: 2.2644 train_time: 9.1m tok/s: 6458087 lr_mul: 0.100 grad_norm: 0.09 seconds: 548.00",
        f"stopping_early: wallclock_cap train_time: 586033ms step: {v['steps']}/20000",
        "peak memory allocated: 41719 MiB reserved: 47128 MiB",
        f"diagnostic pre-quantization post-ema val_loss:{(bpb + 0.002) * v['ratio']:.8f} val_bpb:{bpb + 0.002:.8f} "
        "eval_time:9649ms",
        "gptq_summary quantizer:scalar entropy_bytes:15855000 weighted_error:0.001234",
        "GPTQ adaptive clip_sigmas (Hessian-sensitivity, 3 tensors):",
        f"    blocks.0.attn.c_q.weight: {v['sigma']:.2f}",
        "    blocks.0.mlp.proj.weight: 9.25",
        "    blocks.10.mlp.fc.weight: 12.09",
        f"Serialized model quantized+trellis: {v['model_bytes']} bytes",
        f"Code size (wrapped): {v['code_bytes']} bytes",
        f"Total submission size quantized+trellis: {total} bytes",
        f"val_tokens scored:{v['total']} total:{v['total']} stage:quantized",
        f"diagnostic quantized val_loss:{(bpb + 0.01) * v['ratio']:.8f} val_bpb:{bpb + 0.01:.8f} eval_time:7378ms",
        f"val_tokens scored:{v['scored']} total:{v['total']} stage:ttt",
        f"quantized_ttt_phased val_loss:{loss:.8f} val_bpb:{bpb:.8f} eval_time:400000ms",
        "ledger stage:warmup seconds:32.345 budget:none",
        "ledger stage:train seconds:586.033 budget:train",
        f"ledger stage:hessians seconds:3.600 budget:{v['hessian_budget']}",
        "ledger stage:gptq seconds:8.400 budget:train",
        *([f"ledger stage:inq seconds:2.000 budget:{v['inq_budget']}"] if v.get("inq_budget") else []),
        "ledger stage:unpack seconds:2.100 budget:eval",
        "ledger stage:eval_ttt seconds:400.000 budget:eval",
        f"budget train {v['train_s']:.2f}/600",
        f"budget eval {v['eval_s']:.2f}/600",
        *filter(None, [v["extra"]]),
        *(["run_complete seconds:1134.5"] if v["complete"] else []),
    ]
    return "\n".join(lines) + "\n"


def reference_a(seed: int = 7) -> str:
    """What PR #1962's script prints, shortened."""
    return f"""W0430 03:34:24.372000 949 torch/distributed/run.py:803] *****************************************
Hyperparameters:
  artifact_dir:\x20
  caseops_enabled: True
  gptq_reserve_seconds: 4.0
  iterations: 20000
  max_wallclock_seconds: 600.0
  min_lr: 0.1
  seed: {seed}
  sliding_window_enabled: False
  train_batch_tokens: 786432
  ttt_enabled: True
  warmdown_frac: 0.85
train_shards: 80
model_params:35945671
warmup_step: 1/20
0/20000 val_loss: 9.0000 val_bpb: 4.1000
1/20000 train_loss: 9.0087 train_time: 0.0m tok/s: 13452586
500/20000 train_loss: 2.6000 train_time: 0.8m tok/s: 8099629
layer_loop:enabled step:2100 frac:0.350 encoder:[0, 1, 2, 3] decoder:[3, 4, 5]
4000/20000 train_loss: 2.4000 train_time: 7.9m tok/s: 6599483
4000/20000 val_loss: 2.4100 val_bpb: 1.1000
stopping_early: wallclock_cap train_time: 596000ms step: 4800/20000
diagnostic pre-quantization post-ema val_loss:2.33000000 val_bpb:1.06500000 eval_time:9600ms
Serialized model: 135417533 bytes
Code size (uncompressed): 164676 bytes
Code size (compressed): 33000 bytes
GPTQ:collected 67 Hessians in 3.5s
GPTQ adaptive clip_sigmas (Hessian-sensitivity, 2 tensors):
    blocks.0.attn.c_q.weight: 8.70
    blocks.10.mlp.proj.weight: 19.60
Quantized weights:
  gptq (int6): blocks.attn.c_k.weight, blocks.attn.c_q.weight
Serialize: per-group compression done in 120.0s
Serialized model quantized+pergroup: 15800000 bytes
Total submission size quantized+pergroup: 15833000 bytes
Deserialize: decompression done in 20.0s
diagnostic quantized val_loss:2.35000000 val_bpb:1.07414000 eval_time:73000ms
Deserialize: decompression done in 20.5s
ttt_lora:compile warmup done (100.0s)
ttp: b777/782 bl:2.3154 bb:1.0851 rl:2.3154 rb:1.0851 dl:8452-9229 gd:0
tttg: c1/131 lr:0.001000 t:2.4s
quantized_ttt_phased val_loss:2.32400000 val_bpb:1.06226000 eval_time:590000ms
total_eval_time:590.0s
"""


def reference_b(seed: int = 7) -> str:
    """What PR #1412's script prints, shortened: no `diagnostic`, plain code size, two loop phases."""
    return f"""Hyperparameters:
  iterations: 20000
  max_wallclock_seconds: 600.0
  gptq_reserve_seconds: 12.0
  seed: {seed}
  sliding_window_enabled: True
  train_batch_tokens: 786432
  ttt_enabled: False
0/20000 val_loss: 9.0000 val_bpb: 3.4000
500/20000 train_loss: 3.3000 train_time: 0.8m tok/s: 7721491 looping:False
layer_loop:phase1 step:2800 frac:0.500
layer_loop:phase2 step:3600 frac:0.650
5000/20000 train_loss: 2.8500 train_time: 9.4m tok/s: 6967776 looping:True
5170/20000 val_loss: 2.8100 val_bpb: 1.0890
stopping_early: wallclock_cap train_time: 588000ms step: 5170/20000
pre-quantization post-ema val_loss:2.81000000 val_bpb:1.08800000 eval_time:6600ms
Serialized model: 135426937 bytes
Code size: 80000 bytes
GPTQ:collected 67 Hessians in 11.4s
Serialized model quantized+brotli: 15970000 bytes
Total submission size quantized+brotli: 16050000 bytes
quantized val_loss:2.84000000 val_bpb:1.09960000 eval_time:8100ms
quantized_sliding_window val_loss:2.79900000 val_bpb:1.08370000 eval_time:83000ms
"""


def tool(name: str, *args, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """Run a tool as a user would."""
    line = [sys.executable, str(TOOLS / name), *map(str, args)]
    return subprocess.run(line, capture_output=True, text=True, cwd=cwd, timeout=60)
