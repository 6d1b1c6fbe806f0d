"""Time every way to launch the fused kernels on a GPU, against the plain version compiled, and check each one's numbers.

    python bench/kernels.py [--tokens 98304] [--repeats 12] [--only leaky_mlp,qkv_heads] [--json FILE]

Each variant first runs in a process of its own on fewer tokens: its largest error against float64 is printed, and one
that does not compile, crashes or hangs costs its own row only. Then all that passed are timed in turns in this process;
milliseconds of a call are medians over repeats of ten calls back to back. Rates count the products, or the bytes that
must move. Settings come from the environment as for train_gpt.py.
"""
from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as t  # noqa: E402
from bench.step import ceilings, documents, median_ms  # noqa: E402

CALLS = 10      # back to back in one measurement: launches of the next hide behind the last

Tiling = t.Tiling
TILINGS = (Tiling(128, 256, 3, 8), Tiling(128, 256, 4, 8), Tiling(256, 128, 3, 8), Tiling(256, 128, 4, 8), Tiling(128, 128, 4, 8),
           Tiling(128, 128, 3, 4, 2), Tiling(128, 128, 2, 4, 2), Tiling(64, 256, 2, 4, 2))
BLOCKS = ((64, 4), (32, 4), (32, 2), (16, 4), (16, 2), (8, 2), (8, 1))
SUM_FORWARD = ((4, 4), (8, 4), (8, 8), (4, 2), (2, 1), (16, 8))
SUM_BACKWARD = ((4, 4, 2), (4, 4, 3), (2, 2, 4), (2, 2, 5), (2, 4, 4), (1, 1, 8), (1, 2, 6), (8, 8, 1), (4, 8, 2))


class Job(NamedTuple):
    """One thing to compute: inputs, the exact result, ways to compute it, and what they must do and move."""
    inputs: Callable[[t.Config, int, torch.device], tuple]
    exact: Callable[..., tuple]
    ways: dict[str, Callable[..., object]]
    flops: Callable[[t.Config, int], float]
    bytes: Callable[[t.Config, int], float]


def random(*shape, device, scale=1.0):
    g = torch.Generator(device).manual_seed(sum(shape))
    return (torch.randn(shape, generator=g, device=device) * scale).bfloat16()


def mlp_inputs(c, tokens, device):
    """n, Up, Down, the gradient of the output, pre-activations and hidden values."""
    D, M = c.model_dim, c.mlp_dim
    n, up, down = random(tokens, D, device=device), random(M, D, device=device, scale=D**-0.5), random(D, M, device=device, scale=M**-0.5)
    pre = n @ up.T
    hidden = torch.empty_like(pre)
    for a in range(0, tokens, 8192):        # what the kernel leaves: the sign of `pre` in the lowest bit
        x = pre[a: a + 8192].float()
        sign = (x < 0).int() << 16
        bits = F.leaky_relu(x, 0.5).square().view(torch.int32) - sign + (1 << 16)
        hidden[a: a + 8192] = (bits & -(2 << 16) | sign).view(torch.float32)
    return n, up, down, random(tokens, D, device=device) * 0.1, pre, hidden


def fused_forward(tiling):
    def call(n, up, down, grad, pre, hidden):
        out = n.new_empty(len(n), len(up))
        t.launch_leaky_mlp(n, up, out, out, False, tiling)
        return out
    return call


def fused_backward(tiling):
    def call(n, up, down, grad, pre, hidden):
        out = torch.empty_like(hidden)
        t.launch_leaky_mlp(grad, down, hidden, out, True, tiling)
        return out
    return call


slope = lambda x: torch.where(x > 0, 2 * x, 0.5 * x)
label = lambda x: f"{x.rows}x{x.columns} stages {x.stages} warps {x.warps} x{x.programs}"


def whole(pair_call):
    """Forward and backward of the whole MLP with all its matrix products."""
    def call(n, up, down, grad, pre, hidden):
        leaves = [x.detach().requires_grad_() for x in (n[None], up, down)]
        out = pair_call((leaves[0],), None, *leaves[1:], False)[0]
        return (out, *torch.autograd.grad(out, leaves, grad[None]))
    return call


def exact_whole(n, up, down, grad, *_):
    leaves = [x.double().requires_grad_() for x in (n[None], up, down)]
    out = F.leaky_relu(leaves[0] @ leaves[1].T, 0.5).square() @ leaves[2].T
    return (out.detach(), *torch.autograd.grad(out, leaves, grad[None].double()))


def heads_inputs(c, tokens, device):
    H, K, d = c.num_heads, c.num_kv_heads, c.head_dim
    shapes = ((1, tokens, (H + 2 * K) * d), *((1, tokens, heads, d) for heads in (H, H, H, K)))
    return (torch.rand(1, tokens, device=device) + 0.5, torch.rand(H, device=device) + 1, *t.rotary_table(tokens, c, tokens, device),
            c.num_kv_heads, H // K, *(random(*shape, device=device) for shape in shapes))


def heads_way(blocks, backward):
    def call(factor, gain, cos, sin, kv, copies, x, *grads):
        t.QKV_BLOCKS = (blocks, blocks)
        rest = factor, gain, cos, sin, kv, copies
        return t.qkv_heads_backward(x, *rest, *grads)[:1] if backward else t.qkv_heads_forward(x, *rest)
    return call


def heads_plain(backward, compiled=True):
    run = torch.compile(t.qkv_heads.reference, fullgraph=True) if compiled else t.qkv_heads.reference

    def call(factor, gain, cos, sin, kv, copies, x, *grads):
        rest = factor, gain, cos, sin, kv, copies
        if not backward:
            return run(x, *rest)
        x = x.detach().requires_grad_()
        return torch.autograd.grad(run(x, *rest), x, grads)
    return call


def exactly(function):
    return lambda *inputs: tuple(y.detach() for y in function(*(x.double() if torch.is_tensor(x) else x for x in inputs)))


def sum_inputs(c, tokens, device):
    """Three parts, their weights, scale and gate; the sum, its norm's factors; gradients of the sum, of its product and of the gate's."""
    D, H, W = c.model_dim, c.num_heads, c.gate_window
    parts, weights = tuple(random(tokens, D, device=device) for _ in range(3)), torch.rand(3, D, device=device) + 0.5
    gate, scale = random(H, W, device=device).float(), torch.tensor(0.5, device=device)
    u = sum(w * x for w, x in zip(weights, parts))
    factor = (u.square().mean(-1) + t.NORM_EPS).rsqrt() * scale
    return parts, weights, scale, gate, u.bfloat16(), factor, *(random(tokens, n, device=device) for n in (D, D, H))


def sum_forward(blocks):
    def call(parts, weights, scale, gate, u, factor, *_):
        t.SUM_BLOCKS = blocks, blocks
        out = torch.empty_like(u), torch.empty_like(factor), u.new_empty(len(u), len(gate))
        t.launch_sum(parts, weights, scale, gate, out[0], factor=out[1], z=out[2])
        return out
    return call


def sum_backward(blocks):
    def call(parts, weights, scale, gate, u, factor, grad, product, dz):
        t.SUM_BLOCKS = blocks, blocks
        dparts, dweights = [torch.empty_like(x) for x in parts], torch.empty_like(weights)
        t.launch_sum_backward(parts, weights, scale, gate, factor, grad, product, dz, dparts, dweights)
        return (*dparts, dweights)
    return call


def exact_sum(parts, weights, scale, gate, *_):
    """Sum, factors, the gate's product and the leaves of all that."""
    leaves = [x.double().requires_grad_() for x in (*parts, weights)]
    u = sum(w * x for w, x in zip(leaves[-1], leaves))
    r = (u.square().mean(-1) + t.NORM_EPS).rsqrt() * scale.double()
    z = (u * r[:, None])[:, : gate.shape[1]] @ gate.double().T
    return u, r, z, leaves


def exact_sum_forward(*inputs):
    return tuple(x.detach() for x in exact_sum(*inputs)[:3])


def exact_sum_backward(*inputs):
    u, r, z, leaves = exact_sum(*inputs)
    grad, product, dz = (x.double() for x in inputs[-3:])
    return torch.autograd.grad((grad * u).sum() + (product / r.detach()[:, None] * u * r[:, None]).sum() + (dz * z).sum(), leaves)


def gated_inputs(c, tokens, device):
    H, K, d = c.num_heads, c.num_kv_heads, c.head_dim
    return tuple(random(1, tokens, *shape, device=device) for shape in ((H, d), (K, d), (H,), (H, d)))


def gated_way(blocks, backward):
    def call(y, v, z, grad):
        t.GATED_BLOCKS = (blocks, blocks)
        return t.gated_heads_backward(y, v, z, True, 0.5, 1.0, grad) if backward else (t.gated_heads_forward(y, v, z, True, 0.5, 1.0),)
    return call


def gated_plain(backward, compiled=True):
    run = torch.compile(t.gated_heads.reference, fullgraph=True) if compiled else t.gated_heads.reference

    def call(y, v, z, grad):
        if not backward:
            return (run(y, v, z, True, 0.5, 1.0),)
        leaves = [x.detach().requires_grad_() for x in (y, v, z)]
        return torch.autograd.grad(run(*leaves, True, 0.5, 1.0), leaves, grad)
    return call


def attention_inputs(c, tokens, device):
    """q, k, v and the gradient, documents as in training."""
    segments = t.to_device(documents(tokens, 0, c.vocab_size, c.train_seq_len), device).segments
    q, k, v, grad = (random(1, tokens, heads, c.head_dim, device=device) for heads in (c.num_heads, *[c.num_kv_heads] * 2, c.num_heads))
    return q, k, v, grad, segments, c


def attention_way(expand: bool):
    """Forward and backward; expand: keys and values repeated for every query head beforehand, outside the clock."""
    widen = functools.cache(lambda x, copies: x.repeat_interleave(copies, 2))

    def call(q, k, v, grad, segments, c):
        attend = t.ATTENTION[t.choose_attention(c, q.device)]
        if expand:
            k, v = (widen(x, q.shape[2] // x.shape[2]) for x in (k, v))
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = attend(*leaves, segments)
        return (out.detach(), *torch.autograd.grad(out, leaves, grad)[:1])
    return call


def exact_attention(q, k, v, grad, segments, c):
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    out = t.attend_sdpa(*leaves, segments)
    return (out.detach(), *torch.autograd.grad(out, leaves, grad.double())[:1])


def jobs() -> dict[str, Job]:
    """Names start with the kernel's."""
    square = torch.compile(lambda x: F.leaky_relu(x, 0.5).square())
    times_slope = torch.compile(lambda d, x: d * slope(x))
    compiled = torch.compile(t.leaky_mlp.reference, fullgraph=True)
    product = lambda c, tokens: 2.0 * tokens * c.model_dim * c.mlp_dim
    width = lambda c: (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    return {
        "leaky_mlp forward": Job(
            mlp_inputs, lambda n, up, *_: (F.leaky_relu(n.double() @ up.double().T, 0.5).square(),),
            {"cuBLAS + compiled": lambda n, up, *_: square(n @ up.T), "cuBLAS alone (another result)": lambda n, up, *_: n @ up.T,
             **{label(x): fused_forward(x) for x in TILINGS}}, product, lambda c, n: 2.0 * n * (c.model_dim + c.mlp_dim)),
        "leaky_mlp backward": Job(
            mlp_inputs, lambda n, up, down, grad, *_: (grad.double() @ down.double() * slope(n.double() @ up.double().T),),
            {"cuBLAS + compiled": lambda n, up, down, grad, pre, *_: times_slope(grad @ down, pre),
             "cuBLAS alone (another result)": lambda n, up, down, grad, *_: grad @ down,
             **{label(x): fused_backward(x) for x in TILINGS}}, product, lambda c, n: 2.0 * n * (c.model_dim + 2 * c.mlp_dim)),
        "leaky_mlp whole": Job(mlp_inputs, exact_whole, {"compiled": whole(compiled), "fused": whole(t.leaky_mlp.fast)},
                               lambda c, n: 6 * product(c, n), lambda c, n: 0.0),
        "qkv_heads forward": Job(heads_inputs, exactly(heads_plain(False, False)),
                                 {"compiled": heads_plain(False), **{str(x): heads_way(x, False) for x in BLOCKS}},
                                 lambda c, n: 0.0, lambda c, n: 4.0 * n * width(c) + 3.0 * n * c.model_dim),
        "qkv_heads backward": Job(heads_inputs, exactly(heads_plain(True, False)),
                                  {"compiled": heads_plain(True), **{str(x): heads_way(x, True) for x in BLOCKS}},
                                  lambda c, n: 0.0, lambda c, n: 6.0 * n * width(c) + 2.0 * n * c.model_dim),
        "gated_heads forward": Job(gated_inputs, exactly(gated_plain(False, False)),
                                   {"compiled": gated_plain(False), **{str(x): gated_way(x, False) for x in BLOCKS}},
                                   lambda c, n: 0.0, lambda c, n: 2.0 * n * (2 * c.num_heads + c.num_kv_heads) * c.head_dim),
        "gated_heads backward": Job(gated_inputs, exactly(gated_plain(True, False)),
                                    {"compiled": gated_plain(True), **{str(x): gated_way(x, True) for x in BLOCKS}},
                                    lambda c, n: 0.0, lambda c, n: 2.0 * n * (3 * c.num_heads + 2 * c.num_kv_heads) * c.head_dim),
        "weighted_sum forward": Job(sum_inputs, exact_sum_forward, {str(x): sum_forward(x) for x in SUM_FORWARD},
                                    lambda c, n: 0.0, lambda c, n: 8.0 * n * c.model_dim),
        "weighted_sum backward": Job(sum_inputs, exact_sum_backward, {str(x): sum_backward(x) for x in SUM_BACKWARD},
                                     lambda c, n: 0.0, lambda c, n: 16.0 * n * c.model_dim),
        "attention forward+backward": Job(attention_inputs, exact_attention, {
            "grouped": attention_way(False), "keys and values for every head": attention_way(True)}, lambda c, n: 0.0, lambda c, n: 0.0),
    }


def errors(job: Job, way: str, c: t.Config, device) -> str:
    """Largest and RMS deviation of every output from float64, relative to its largest and RMS value."""
    inputs = job.inputs(c, 4173, device)
    found, out = job.ways[way](*inputs), []
    for a, b in zip(found if isinstance(found, tuple) else (found,), job.exact(*inputs)):
        d = a.detach().double() - b
        out.append(f"{(d.abs().max() / b.abs().max()).item():.1e}/{(d.square().mean() / b.square().mean()).sqrt().item():.1e}")
    return " ".join(out)


def probe(name: str, way: str) -> tuple[bool, str]:
    """errors() in a process of its own: (it ran, its line or the last line of its error)."""
    try:
        done = subprocess.run([sys.executable, __file__, "--probe", name, way], capture_output=True, text=True, timeout=150)
    except subprocess.TimeoutExpired:
        return False, "did not end within 150 s"
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or [f"exit status {done.returncode}"]
    return done.returncode == 0, lines[-1][:150]


def repeatedly(call: Callable, inputs: tuple):
    for _ in range(CALLS):
        call(*inputs)


def report(name: str, job: Job, c: t.Config, tokens: int, repeats: int, device, probes: dict) -> list[dict]:
    """Time the ways that passed, in turns; print and return a row for each."""
    inputs = job.inputs(c, tokens, device)
    times: dict[str, list[float]] = {way: [] for way in job.ways if probes[name, way][0]}
    for repeat in range(repeats + 1):
        for way in list(times):
            try:
                ms = median_ms(functools.partial(repeatedly, job.ways[way], inputs), 1) / CALLS
            except Exception as e:          # out of memory or resources at the real size
                times.pop(way)
                probes[name, way] = False, f"{type(e).__name__}: {str(e).splitlines()[0][:120]}"
                continue
            if repeat:
                times[way].append(ms)
    rows = []
    print(f"\n{name}, {tokens} tokens\n{'way':36} {'median':>8} {'min':>8} {'TFLOP/s':>8} {'TB/s':>6}  largest/RMS error of each output")
    for way in job.ways:
        ok, line = probes[name, way]
        if not ok:
            print(f"{way:36} failed: {line}")
            continue
        ms = float(np.median(times[way]))
        rates = f"{job.flops(c, tokens) / ms / 1e9:8.0f} {job.bytes(c, tokens) / ms / 1e9:6.2f}"
        print(f"{way:36} {ms:8.4f} {min(times[way]):8.4f} {rates}  {line}", flush=True)
        rows.append({"job": name, "way": way, "ms": ms, "min_ms": min(times[way]), "errors": line})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=98304)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--only", default="", help="comma list of kernels")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--processes", type=int, default=8, help="that check variants side by side")
    parser.add_argument("--probe", nargs=2, metavar=("JOB", "WAY"), help="check one variant and print its errors")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: bench/kernels.py needs a CUDA GPU", file=sys.stderr)
        return 2
    config, device = t.load_config(dict(os.environ))[0], torch.device("cuda")
    todo = {name: job for name, job in jobs().items() if not args.only or name.split()[0] in args.only.split(",")}
    if args.probe:
        print(errors(todo[args.probe[0]], args.probe[1], config, device))
        return 0
    names = [(name, way) for name, job in todo.items() for way in job.ways]
    with ThreadPoolExecutor(args.processes) as pool:
        probes = dict(zip(names, pool.map(lambda pair: probe(*pair), names)))
    rows = [row for name, job in todo.items() for row in report(name, job, config, args.tokens, args.repeats, device, probes)]
    rates = ceilings(device)
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}; ceilings: matmul {rates['matmul_tflops']:.0f} TFLOP/s, "
          f"copy {rates['copy_tb_s']:.2f} TB/s")
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, **rates}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
