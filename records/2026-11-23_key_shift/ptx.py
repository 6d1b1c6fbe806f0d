"""PTX for sm_90 of the kernel of heads before it got shift and shared values, and since: python ptx.py OLD_TRAIN_GPT NEW_TRAIN_GPT"""
import collections
import importlib.util
import re
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

B, F = "*bf16", "*fp32"
TYPES = dict(qkv=B, factor=F, gain=F, cos=F, sin=F, begins="*u8", first=B, share=F, q=B, k=B, v=B, own=B, dqkv=B, dgain=F, dfirst=B, dshare=F,
             N="i32", T="i32", eps="fp32")


def module(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def compiled(t, backward, off):
    """off: arguments that are None."""
    kernel, (block, warps) = t.qkv_heads_kernel, t.QKV_BLOCKS[backward]
    names = kernel.arg_names
    constants = {n: v for n, v in dict(H=8, K=4, D=64, WIDE=64, HALF=8, HALF_WIDE=8, FROM=40, BLOCK=block, COPIES=2, BACKWARD=backward,
                                       **dict.fromkeys(off)).items() if n in names}
    signature = {n: "constexpr" if n in constants else TYPES[n] for n in names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")}
    source = ASTSource(fn=kernel, signature=signature, constexprs={(names.index(n),): v for n, v in constants.items()}, attrs=attributes)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=warps))
    body = re.sub(r"//.*", "", made.asm["ptx"])
    words = collections.Counter(re.findall(r"(?<![.\w%])(?:ld|st)\.global[.\w]*", body))
    return sum(line.strip().endswith(";") for line in body.splitlines()), words, made.metadata.shared


old, new = module(sys.argv[1], "old"), module(sys.argv[2], "new")
for backward in (False, True):
    print("backward" if backward else "forward")
    for label, t, off in (("before", old, ()), ("since, both off", new, ("begins", "first", "share")), ("since, key shift", new, ("first", "share")),
                          ("since, both on", new, ())):
        lines, words, shared = compiled(t, backward, off)
        print(f"  {label:18}{lines:6} instructions, {shared:5} bytes shared, global loads {sum(n for w, n in words.items() if w[0] == 'l'):3}, "
              f"stores {sum(n for w, n in words.items() if w[0] == 's'):3}", dict(words) if off != ("first", "share") and label != "since, both on" else "")
