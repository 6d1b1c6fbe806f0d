"""Seconds that Triton takes for kernels of sm_90, before and after this process has packed the script: python compile.py TRAIN_GPT

Needs Triton, python-minifier and brotli, no GPU. TRAIN_GPT: a checkout's train_gpt.py.
"""
import ast
import importlib.util
import os
import sys
import tempfile
import time

os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

spec = importlib.util.spec_from_file_location("train_gpt", sys.argv[1])
sys.modules["train_gpt"] = t = importlib.util.module_from_spec(spec)
spec.loader.exec_module(t)

TYPES = dict(weights="*fp32", scale="*fp32", gate="*fp32", factor="*fp32", grad="*bf16", product="*bf16", dz="*bf16", sums="*fp32", N="i32",
             eps="fp32", out="*bf16", normed="*bf16", z="*bf16")
SIZES = dict(D=512, WIDE=512, HEADS=4, WINDOW=12)


def seconds(kernel, count, warps, constants, absent=()):
    """One compilation; constants that differ a little each time keep it out of every cache."""
    names, signature, values, attributes = kernel.arg_names, {}, {}, {}
    for i, name in enumerate(names):
        if name in constants or name in absent:
            signature[name], values[i,] = "constexpr", constants.get(name)
        elif name in ("parts", "dparts"):
            signature[name] = ("*bf16",) * count
            attributes.update({(i, k): [["tt.divisibility", 16]] for k in range(count)})
        else:
            signature[name] = TYPES[name]
            if TYPES[name].startswith("*") and name != "scale":
                attributes[i,] = [["tt.divisibility", 16]]
    start = time.perf_counter()
    triton.compile(ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes), target=GPUTarget("cuda", 90, 32),
                   options=dict(num_warps=warps))
    return time.perf_counter() - start


def table(label, eps):
    forward = dict(SIZES, COUNT=3, HEADS_WIDE=4, WINDOW_WIDE=16, ROWS=t.SUM_BLOCKS[0][0], eps=eps)
    backward = dict(SIZES, COUNT=3, APPLIED=False, NORMED=False, ROWS=t.SUM_BLOCKS[1][0])
    print(f"{label:28} sum {seconds(t.sum_kernel, 3, t.SUM_BLOCKS[0][1], forward):6.2f} s, "
          f"sum_backward {seconds(t.sum_backward_kernel, 3, t.SUM_BLOCKS[1][1], {**backward, 'WINDOW': 12 + int(eps * 1e9)}):6.2f} s")


print(f"Python {sys.version.split()[0]}, Triton {triton.__version__}")
seconds(t.sum_kernel, 1, 4, dict(SIZES, COUNT=1, HEADS_WIDE=4, WINDOW_WIDE=16, ROWS=8, eps=3e-9))       # the first one starts LLVM
table("before packing", 1e-9)
t.pack_script(t.script_source())
table("after", 2e-9)
print("left on the contexts that all syntax trees share:", sorted(ast.parse("x").body[0].value.ctx.__dict__))
