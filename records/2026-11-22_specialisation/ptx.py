"""PTX for sm_90 of kernels whose number of rows is, or is not, known to be a multiple of 16: what the knowledge is worth."""
import difflib
import re

import train_gpt as t
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

B, F = "*bf16", "*fp32"
KNOWN = [["tt.divisibility", 16]]


def ptx(kernel, types, constants, rows, known, **options):
    names, signature, attributes = kernel.arg_names, {}, {}
    for i, n in enumerate(names):
        signature[n] = "constexpr" if n in constants else types[n]
        if isinstance(signature[n], tuple):
            attributes |= {(i, j): KNOWN for j in range(len(signature[n]))}
        elif signature[n].startswith("*") and n != "scale" or n in rows and known:
            attributes[i,] = KNOWN
    source = ASTSource(fn=kernel, signature=signature, constexprs={(names.index(n),): v for n, v in constants.items()}, attrs=attributes)
    text = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    text = re.sub(r"//.*", "", text)
    text = text[text.index(".entry"):].split(".section")[0]
    return re.sub(r"\.loc.*|\$L__\S*|\.file.*", "", text).splitlines()


def compare(name, *args, **options):
    a, b = (ptx(*args, known, **options) for known in (True, False))
    changed = [line for line in difflib.unified_diff(a, b, lineterm="", n=0) if line[0] in "+-" and line[:3] not in ("+++", "---")]
    words = [sorted(re.findall(r"(?<![.\w])(?:ld|st|mma|wgmma|cp|red|atom)[.\w]*", "\n".join(text))) for text in (a, b)]
    print(f"{name:24}{len(a):6} lines{len(b):6} lines, memory and matrix instructions "
          f"{'the same' if words[0] == words[1] else 'DIFFER'}{'' if changed else '; identical'}")


sums = dict(parts=(B,) * 3, weights=F, scale=F, gate=F, out=B, factor=F, z=B, N="i32", eps="fp32", grad=B, product=B, dz=B, dparts=(B,) * 3, sums=F)
rows, warps = t.SUM_BLOCKS[0]
compare("sum", t.sum_kernel, sums, dict(D=512, WIDE=512, normed=None, COUNT=3, HEADS=8, HEADS_WIDE=8, WINDOW=12, WINDOW_WIDE=16, ROWS=rows),
        ("N",), num_warps=warps)
rows, warps, _ = t.SUM_BLOCKS[1]
compare("sum, backward", t.sum_backward_kernel, sums,
        dict(D=512, WIDE=512, COUNT=3, HEADS=8, WINDOW=12, ROWS=rows, APPLIED=False, NORMED=False), ("N",), num_warps=warps)
heads = dict(qkv=B, factor=F, gain=F, cos=F, sin=F, q=B, k=B, v=B, own=B, dqkv=B, dgain=F, N="i32", T="i32", eps="fp32")
gated = dict(y=B, v=B, z=B, out=B, dy=B, dv=B, dz=B, N="i32", scale="fp32", factor="fp32")
past = dict(q=B, k=B, v=B, keys=B, values=B, y=B, lse=F, dy=B, delta=F, dq=B, dk=B, dv=B, position="*i64", T="i32", P="i32", window="i32",
            scale="fp32")
for backward in (False, True):
    suffix = ", backward" if backward else ""
    block, warps = t.QKV_BLOCKS[backward]
    compare("qkv heads" + suffix, t.qkv_heads_kernel, heads, dict(H=8, K=4, D=64, WIDE=64, HALF=8, HALF_WIDE=8, BLOCK=block, COPIES=1,
                                                                 BACKWARD=backward), ("N", "T"), num_warps=warps)
    block, warps = t.GATED_BLOCKS[backward]
    compare("gated heads" + suffix, t.gated_heads_kernel, gated, dict(G=2, K=4, D=64, WIDE=64, XSA=True, BLOCK=block, BACKWARD=backward),
            ("N",), num_warps=warps)
    compare("past attention" + suffix, t.past_attention_kernel, past, dict(K=4, G=2, D=64, WIDE=64, M=64, N=64, BACKWARD=backward), ("T",),
            num_warps=4, num_stages=2)
compare("past attention, live", t.past_attention_live_kernel, past, dict(K=4, G=2, D=64, WIDE=64, M=64, N=64), ("T",), num_warps=4,
        num_stages=2)
