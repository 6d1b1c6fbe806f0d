"""Programs that Triton would compile for Fisher's gradients, then for a global step of test-time training, by the arguments
of the launches (under the interpreter, the default network narrower): with everything specialised, and as the kernels are."""
import os

os.environ["TRITON_INTERPRET"] = "1"
import pathlib

import numpy as np
import torch
import train_gpt as t

EXEMPT = {"sum_kernel": ("scale", "N"), "sum_backward_kernel": ("scale", "N"), "qkv_heads_kernel": ("N", "T"), "gated_heads_kernel": ("N",),
          "leaky_mlp_kernel": ("M",), "past_attention_kernel": ("T",), "past_attention_live_kernel": ("T",)}
SEEN = set(), set()


def kind(v, known=True):
    if torch.is_tensor(v):
        return str(v.dtype), known and v.data_ptr() % 16 == 0
    if isinstance(v, (tuple, list)):
        return tuple(map(kind, v))
    return ("int", known and (v == 1, v % 16 == 0)) if type(v) is int else type(v).__name__


class Spy:
    def __init__(self, name, kernel):
        self.name, self.kernel = name, kernel

    def __getattr__(self, name):
        return getattr(self.kernel, name)

    def __getitem__(self, grid):
        def launch(*args, **constants):
            for seen, exempt in zip(SEEN, ((), EXEMPT.get(self.name, ()))):
                seen.add((self.name, *(kind(v, n not in exempt) for n, v in zip(self.kernel.arg_names, args)), *constants.items()))
            return self.kernel[grid](*args, **constants)
        return launch


for name, kernel in [(n, k) for n, k in vars(t).items() if n.endswith("_kernel") and hasattr(k, "arg_names")]:
    setattr(t, name, Spy(name, kernel))
t.Kernel.__call__ = lambda self, x, *rest: (self.fast if self.enabled else self.reference)(x, *rest)
c, _ = t.load_config({k: str(v) for k, v in dict(
    VOCAB_SIZE=256, MODEL_DIM=64, NUM_HEADS=4, NUM_KV_HEADS=2, TRAIN_SEQ_LEN=64, EVAL_SEQ_LEN=64, TTT_EVAL_SEQ_LEN=64,
    TRAIN_BATCH_TOKENS=512, GLOBAL_TTT_CHUNK_TOKENS=512).items()})
t.select_kernels(c)
model, world, log = t.GPT(c, torch.device("cpu"), "sdpa", False), t.World(), t.Log(None, quiet=True)
run = t.Run(c, world, log, t.Ledger(log, world, 0), pathlib.Path("."))
text = np.random.default_rng(0).integers(2, 256, 20000).astype(np.uint16)
text[::150] = 1
trainer = t.GlobalTrainer(run, model, None)
weights = [n for n in t.export_weights(dict(model.named_parameters()), c.num_layers) if "mlp" in n][:3]
for what, action in (("Fisher's gradients", lambda: t.collect_sensitivity(run, model, [text], weights, {}, 1)),
                     ("a global step after that", lambda: trainer.gradient(text, 0, 512, 512)),
                     ("the same with an odd number of tokens", lambda: trainer.gradient(text, 512, 1023, 512))):
    before = [len(s) for s in SEEN]
    action()
    print(f"{what:40}{len(SEEN[0]) - before[0]:4} programs, exempt: {len(SEEN[1]) - before[1]:3}")
