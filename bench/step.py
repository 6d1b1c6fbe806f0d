"""Time one training step on a GPU: micro-steps with and without loops, optimizer, averaging, loader, compilation.

    python bench/step.py [--tokens 98304] [--repeats 20] [--json FILE] [--profile]
    python bench/step.py --picture step.png before.txt after.txt        # where the time goes, from two outputs with --profile

Settings come from the environment as for train_gpt.py (recipes/*.env). The tokens are random, in documents of about 760
tokens as in the English shards: shapes and attention work are those of training, and no data is needed. Figures are
medians over repeats, with the variants interleaved; compare only within one run on one machine.
"""
from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as t  # noqa: E402

# Kernel-name pattern -> purpose, first match wins.
PURPOSES = (
    ("attention", r"flash|fmha|sdpa|attention|FlashAttn"),
    ("loss", r"softcap_ce|cross_entropy|log_softmax"),
    ("MLP", r"leaky_mlp"),
    ("elementwise", r"triton_|heads_kernel|^sum_(backward_)?kernel"),
    ("optimizer", r"multi_tensor|foreach|adam|lerp"),
    ("matmul", r"gemm|cutlass|nvjet|xmma|cublas|splitK|wgmma"),
    ("embedding", r"embedding|indexing|index_put|radix|sort"),
    ("copy", r"memcpy|memset|copy|cat"),
    ("other elementwise", r"elementwise|reduce|norm|vectorized"),
)


def documents(count: int, seed: int, vocab: int, limit: int) -> t.Batch:
    """A packed row of random tokens in documents of exponential length, mean 760."""
    rng = np.random.default_rng(seed)
    row = rng.integers(2, vocab, count + 1).astype(np.uint16)
    row[0] = t.BOS
    ends = np.cumsum(rng.exponential(760, count // 100).astype(int) + 2)
    row[ends[ends < count]] = t.BOS
    return t.to_batch(row, limit)


def median_ms(call, repeats: int) -> float:
    """Median milliseconds of call() on the device, by events."""
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return float(np.median(times))


def ceilings(device) -> dict[str, float]:
    """Measured rates of this GPU: bfloat16 matmul in TFLOP/s, copy in TB/s (bytes read + written)."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    x = torch.randn(1 << 29, device=device)
    y = torch.empty_like(x)
    for _ in range(3):
        a @ b
        y.copy_(x)
    return {"matmul_tflops": 2 * 8192**3 / median_ms(lambda: a @ b, 10) / 1e9,
            "copy_tb_s": 2 * x.numel() * 4 / median_ms(lambda: y.copy_(x), 10) / 1e9}


def flops_per_token(c: t.Config, loops: int, longest: float = 760.0) -> float:
    """Forward and backward FLOPs of a token: 6 per matrix parameter and pass, and attention over half a document."""
    passes = len(c.pass_order(loops)[0])
    d, kv = c.model_dim, c.num_kv_heads * c.head_dim
    layer = 2 * d * d + 2 * kv * d + 2 * d * c.mlp_dim
    attention = 2 * 2 * c.model_dim * longest / 2
    return 6 * (passes * layer + c.vocab_size * d) + 3 * passes * attention


def kernel_table(call, top: int = 80) -> list[tuple[str, float, int]]:
    """Device milliseconds and launches of one call() by purpose, largest first, then the `top` largest kernels."""
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        call()
        torch.cuda.synchronize()
    groups: dict[str, list[float]] = {}
    rows = []
    for event in prof.key_averages():
        ms = event.self_device_time_total / 1000
        if ms <= 0:
            continue
        purpose = next((name for name, pattern in PURPOSES if re.search(pattern, event.key, re.I)), "other")
        total = groups.setdefault(purpose, [0.0, 0])
        total[0] += ms
        total[1] += event.count
        rows.append((event.key[:100], ms, event.count))
    return [(name, *values) for name, values in sorted(groups.items(), key=lambda kv: -kv[1][0])] + sorted(rows, key=lambda r: -r[1])[:top]


def purposes(path: Path) -> dict[str, float]:
    """Milliseconds by purpose of the micro-step with loops, from an output with --profile."""
    part = path.read_text().split("device time by purpose, one micro-step, loops")[-1].split("device time by purpose")[0]
    rows = re.findall(r"^ +([\d.]+) ms +\d+x  ([A-Za-z ]+)$", part, re.M)
    known = {name for name, _ in PURPOSES} | {"other"}
    return {name: float(ms) for ms, name in rows if name in known}


def picture(path: Path, logs: list[Path]):
    """A bar for each output."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    found = [purposes(log) for log in logs]
    names = sorted(set().union(*found), key=lambda n: -sum(f.get(n, 0) for f in found))
    figure, axes = plt.subplots(figsize=(8, 1.1 + 0.6 * len(logs)), layout="constrained")
    left = [0.0] * len(logs)
    for i, name in enumerate(names):
        widths = [f.get(name, 0.0) for f in found]
        bars = axes.barh([log.stem.replace("_", " ") for log in logs], widths, left=left, label=name, color=plt.cm.tab10(i))
        axes.bar_label(bars, [f"{w:.0f}" if w > 3 else "" for w in widths], label_type="center", color="white")
        left = [a + b for a, b in zip(left, widths)]
    axes.invert_yaxis()
    axes.set_xlabel("ms of GPU time, micro-step of 98,304 tokens with loops")
    axes.legend(ncols=len(names), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize=8, columnspacing=1, handlelength=1)
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=98304, help="tokens of a micro-step")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--together", type=int, default=4, help="micro-steps back to back in one measurement, as in training")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--profile", action="store_true", help="print device time by kernel")
    parser.add_argument("--picture", type=Path, help="draw what the outputs say, and measure nothing")
    parser.add_argument("logs", type=Path, nargs="*")
    args = parser.parse_args()
    if args.picture:
        if not args.logs or not all(log.is_file() and purposes(log) for log in args.logs):
            parser.error("--picture: expected outputs of bench/step.py --profile")
        picture(args.picture, args.logs)
        return 0
    if not torch.cuda.is_available():
        print("error: bench/step.py needs a CUDA GPU", file=sys.stderr)
        return 2
    try:
        config, _ = t.load_config(dict(os.environ))
        t.select_kernels(config)
    except t.UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.code
    device = torch.device("cuda")
    t.drop_broken_kernels(config, device, print)
    torch._dynamo.config.cache_size_limit = 64
    torch._dynamo.config.automatic_dynamic_shapes = False
    world = t.World()
    attention = t.choose_attention(config, device)
    model = t.GPT(config, device, attention, config.compile_enabled)
    optimizers = t.Optimizers(model, config, world)
    ema = [p.detach().clone() for p in model.parameters()]
    batches = [t.to_device(documents(args.tokens, s, config.vocab_size, config.train_seq_len), device) for s in range(4)]
    turn, micro_step = iter(range(1 << 30)), t.MicroStep(model, 1, print)

    def micro(loops: int, count: int = 1):
        for _ in range(count):
            for p in model.parameters():
                p.grad = None
            micro_step(batches[next(turn) % len(batches)], loops)

    def update():
        optimizers.start_reduce()
        optimizers.step(1.0, 100)

    def average():
        with torch.no_grad():
            torch._foreach_lerp_(ema, list(model.parameters()), 0.0035)

    start = time.perf_counter()
    states = (0, config.num_loops)
    for loops in states:
        micro(loops)
        torch.cuda.synchronize()
    update()
    torch.cuda.synchronize()
    compile_seconds = time.perf_counter() - start
    torch.cuda.reset_peak_memory_stats()    # what a CUDA graph holds is counted when it is captured
    for loops in states * 2:
        micro(loops, 2 * len(batches))      # every length of cu_seqlens is captured
    micro(states[0])
    update()
    rows = {loops: [] for loops in states}
    optimizer, averaging = [], []
    for _ in range(args.repeats):
        for loops in states:
            rows[loops].append(median_ms(lambda n=loops: micro(n, args.together), 1) / args.together)
        optimizer.append(median_ms(update, 1))
        averaging.append(median_ms(average, 1))
    peak = torch.cuda.max_memory_allocated() / 2**30
    rates = ceilings(device)
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    plain, looped = (float(np.median(rows[n])) for n in states)
    result = {"micro_step_ms": plain, "micro_step_loops_ms": looped, "optimizer_ms": float(np.median(optimizer)),
              "ema_ms": float(np.median(averaging)), "peak_memory_gb": peak, "compile_seconds": compile_seconds,
              "tokens_per_second": args.tokens / looped * 1000, "tokens": args.tokens, "attention": attention,
              "device": torch.cuda.get_device_name(), "torch": torch.__version__, "git": os.environ.get("GIT_REVISION") or git, **rates}
    print(f"{'what':34} {'median':>9} {'min':>9} {'max':>9}")
    for name, values in (("micro-step, no loops (ms)", rows[states[0]]), ("micro-step, loops (ms)", rows[states[1]]),
                         ("clip + optimizer (ms)", optimizer), ("averaging (ms)", averaging)):
        print(f"{name:34} {np.median(values):9.2f} {min(values):9.2f} {max(values):9.2f}")
    for loops, ms in ((states[0], plain), (states[1], looped)):
        rate = flops_per_token(config, loops) * args.tokens / ms / 1e9
        print(f"loops {loops}: {args.tokens / ms * 1000:,.0f} tok/s, {rate:.0f} TFLOP/s, "
              f"{100 * rate / rates['matmul_tflops']:.0f}% of the matmul ceiling")
    print(f"ceilings: matmul {rates['matmul_tflops']:.0f} TFLOP/s, copy {rates['copy_tb_s']:.2f} TB/s; "
          f"peak memory {peak:.1f} GiB; first call of every shape {compile_seconds:.1f} s")
    if args.profile:
        for loops in states:
            print(f"device time by purpose, one micro-step, loops {loops}:")
            for name, ms, count in kernel_table(lambda n=loops: micro(n)):
                print(f"  {ms:8.2f} ms {count:5}x  {name}")
        print("device time by purpose, clip + optimizer:")
        for name, ms, count in kernel_table(update):
            print(f"  {ms:8.2f} ms {count:5}x  {name}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
