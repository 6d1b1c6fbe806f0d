"""Parameter golf in one file: train, quantise, pack, read back and score a small language model.

The model must fit, code included, in 16,000,000 bytes, train in 600 s on 8 GPUs, and is scored in bits per byte.

    ./demo.sh                                                      # everything at toy size, CPU or GPU, minutes
    torchrun --standalone --nproc_per_node=8 train_gpt.py          # the default recipe (any number of GPUs, or none)
    CONFIG_CHECK=1 python train_gpt.py                             # print every setting and stop

Everything is set by environment variables (CONFIG, below, is their only table; `recipes/*.env` are ready sets).
Shapes are written as suffixes: B batch, T positions, D model width, H query heads, K key/value heads, V vocabulary.

Sections, in the order in which a run uses them:
CONFIG · RUNTIME · DATA · KERNELS · MODEL · OPTIMIZERS · TRAIN · CALIBRATE · QUANTIZE · REPAIR · CODER · ARTIFACT · EVALUATE · ADAPT · MAIN
"""
from __future__ import annotations

import ast
import contextlib
import decimal
import difflib
import functools
import gc
import hashlib
import inspect
import json
import lzma
import math
import mmap
import os
import platform
import queue
import re
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import uuid
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from decimal import Decimal
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# ======================================================================================================================
# CONFIG: one row per knob; read from the environment, checked and printed from this table alone
# ======================================================================================================================

CAP_BYTES = 16_000_000          # code + compressed model, decimal bytes
EVAL_BUDGET_SECONDS = 600.0     # the challenge's limit for everything from artifact to score


class UserError(Exception):
    """Something that the user can mend: printed as one line; `code` is the process's exit code (3: over the cap).

    everywhere: every rank meets it alike, so that rank 0 says it for all.
    """

    def __init__(self, message: str, code: int = 2, everywhere: bool = True):
        super().__init__(message)
        self.code, self.everywhere = code, everywhere


def knob(default, meaning: str = "", **limits):
    """A row of the table. Limits: at_least, above, at_most, below (numbers), choices (a tuple)."""
    return field(default=default, metadata={"meaning": meaning, **limits})


@dataclass(frozen=True)
class Config:
    """All settings; `CONFIG_CHECK=1` prints them."""
    # where things are
    data_dir: str = knob("./data", "folder of datasets/ and tokenizers/")
    data_path: str = knob("", "folder of the shards; empty: DATA_DIR/datasets/fineweb10B_sp<VOCAB_SIZE>[_caseops]")
    tokenizer_path: str = knob("", "SentencePiece model; empty: DATA_DIR/tokenizers/fineweb_<VOCAB_SIZE>_bpe[...].model")
    vocab_size: int = knob(8192, "pieces of the tokenizer", at_least=2, at_most=65536)
    caseops_enabled: bool = knob(False, "count validation bytes from the CaseOps sidecar, not from the tokenizer")
    seed: int = knob(1337, "initial weights", at_least=0, at_most=2 ** 63 - 1)
    run_id: str = knob("", "name of the run and its log; empty: a fresh UUID")
    artifact_dir: str = knob("", "folder for log, checkpoints and artifact; empty: ./logs and .")
    config_check: bool = knob(False, "print the resolved table and stop")
    # budget and batch
    iterations: int = knob(20000, "most steps", at_least=1)
    max_wallclock_seconds: float = knob(600.0, "training budget, Hessians and GPTQ included; 0: by ITERATIONS only", at_least=0)
    gptq_reserve_seconds: float = knob(-1.0, "seconds kept back for Hessians and GPTQ; -1: measured in warm-up", at_least=-1)
    train_batch_tokens: int = knob(786432, "tokens a step over all ranks", at_least=1, at_most=2 ** 31 - 1)
    train_seq_len: int = knob(2048, "longest document segment in training", at_least=2, at_most=2 ** 31 - 1)
    train_seq_schedule: str = knob("", "shorter ones up to shares of the budget: longest@share,... (PR 2014: 1024@0.1,2048@0.7)")
    grad_accum_steps: int = knob(0, "micro-steps a step; 0: 8 / world size, or the next that divides the batch", at_least=0)
    warmup_steps: int = knob(20, "uncounted steps per number of loops and longest segment, undone afterwards", at_least=0)
    warmdown_frac: float = knob(0.85, "last part of the budget in which the learning rate falls", at_least=0, at_most=1)
    min_lr: float = knob(0.1, "floor of the learning-rate multiplier", at_least=0, at_most=1)
    val_loss_every: int = knob(0, "steps between validations in training; 0: none", at_least=0)
    train_log_every: int = knob(500, "steps between log lines; 0: none", at_least=0)
    checkpoint_every: int = knob(0, "steps between resumable checkpoints; 0: only on a signal", at_least=0)
    resume: bool = knob(False, "continue from the checkpoint in ARTIFACT_DIR")
    # network
    num_layers: int = knob(11, "layers", at_least=1, at_most=1024)
    model_dim: int = knob(512, "width", at_least=8, at_most=65536)
    num_heads: int = knob(4, "query heads", at_least=1)
    num_kv_heads: int = knob(2, "key/value heads", at_least=1)
    mlp_mult: float = knob(4.0, "MLP width / model width", above=0, at_most=1024)
    xsa_last_n: int = knob(11, "last layers whose attention output drops its own value direction", at_least=0)
    rope_base: float = knob(1e4, "rotary base", above=1)
    rope_dims: int = knob(32, "rotated dimensions of each head", at_least=0)
    rope_yarn: bool = knob(False, "scale the rotary base when the context exceeds ROPE_TRAIN_SEQ_LEN")
    rope_train_seq_len: int = knob(2048, "context up to which the rotary base is unscaled", at_least=1)
    ln_scale: bool = knob(True, "multiply block inputs by 1/sqrt(layer + 1)")
    qk_gain_init: float = knob(5.0, "initial gain of each query head", above=0)
    logit_softcap: float = knob(30.0, "cap c of c*tanh(logit/c)", above=0)
    skip_gates_enabled: bool = knob(True, "U-Net skips are gated")
    tie_embeddings: bool = knob(True, "the head is the embedding")
    tied_embed_init_std: float = knob(0.005, "initial deviation of the embedding", above=0)
    num_loops: int = knob(2, "extra passes over the looped layers", at_least=0, at_most=1024)
    loop_start: int = knob(3, "first looped layer", at_least=0)
    loop_end: int = knob(5, "last looped layer", at_least=0)
    enable_looping_at: float = knob(0.35, "part of the budget after which layers loop", at_least=0, at_most=1)
    loop_phase2_at: float = knob(0.0, "progressive recurrence: one extra pass until this part of the budget; 0: off", at_least=0, at_most=1)
    parallel_start_layer: int = knob(7, "two-lane decoder from this layer; 0 or negative: off")
    parallel_final_lane: str = knob("mean", "what leaves the two lanes", choices=("mean", "attn", "mlp"))
    parallel_residual_start: int = knob(-1, "GPT-J parallel residual from this layer; negative: off")
    smear_gate_enabled: bool = knob(True, "mix the previous token's embedding in, never over BOS")
    gate_window: int = knob(12, "input dimensions that the small gates read", at_least=1)
    sparse_attn_gate_enabled: bool = knob(True, "head gates from the first GATE_WINDOW inputs")
    sparse_attn_gate_scale: float = knob(0.5, "scale inside that gate's sigmoid")
    gated_attn_enabled: bool = knob(False, "head gates from the whole input")
    attn_out_gate_enabled: bool = knob(False, "head gates 2*sigmoid from the first GATE_WINDOW of ATTN_OUT_GATE_SRC")
    attn_out_gate_src: str = knob("proj", "source of that gate: the query projection, or the block's input", choices=("proj", "input"))
    # optimizers
    matrix_lr: float = knob(0.026, "Muon, for the matrices", above=0)
    scalar_lr: float = knob(0.02, "AdamW, for scales and gates", above=0)
    tied_embed_lr: float = knob(0.03, "AdamW, for a tied embedding", above=0)
    embed_lr: float = knob(0.6, "AdamW, for an untied embedding", above=0)
    head_lr: float = knob(0.008, "AdamW, for an untied head", above=0)
    muon_momentum: float = knob(0.97, "Nesterov momentum", at_least=0, at_most=1)
    muon_momentum_warmup_start: float = knob(0.92, "momentum at step 0", at_least=0, at_most=1)
    muon_momentum_warmup_steps: int = knob(1500, "steps to full momentum", at_least=0)
    muon_backend_steps: int = knob(5, "Newton-Schulz iterations", at_least=1, at_most=5)
    muon_row_normalize: bool = knob(True, "unit rows before orthogonalising")
    muon_wd: float = knob(0.095, "weight decay of the matrices", at_least=0)
    polar_express: bool = knob(True, "per-iteration Newton-Schulz coefficients (arXiv 2505.16932)")
    beta1: float = knob(0.9, "AdamW", at_least=0, below=1)
    beta2: float = knob(0.99, "AdamW", at_least=0, below=1)
    adam_eps: float = knob(1e-8, "AdamW", above=0)
    adam_wd: float = knob(0.02, "weight decay of scales and gates", at_least=0)
    embed_wd: float = knob(0.085, "weight decay of the embedding", at_least=0)
    grad_clip_norm: float = knob(0.3, "largest norm of the averaged gradient; 0: off", at_least=0)
    ema_decay: float = knob(0.9965, "decay of the averaged weights", at_least=0, at_most=1)
    # quantisation and packing
    matrix_bits: int = knob(6, "bits of the matrices", at_least=2, at_most=8)
    embed_bits: int = knob(7, "bits of the embedding", at_least=2, at_most=8)
    matrix_clip_sigmas: float = knob(12.85, "clip of other matrices, in row deviations", above=0)
    attn_clip_sigmas: float = knob(13.0, "clip of attention matrices", above=0)
    mlp_clip_sigmas: float = knob(11.5, "clip of MLP matrices", above=0)
    embed_clip_sigmas: float = knob(14.0, "clip of the embedding", above=0)
    clip_rule: str = knob("fisher", "how steps are shared out over rows and tensors (ADAPTIVE_HESSIAN_CLIP=1: adaptive)",
                          choices=("hand", "adaptive", "fisher"))
    adaptive_hessian_clip: bool = knob(False, "clip per tensor from Hessian and variance (PR 1689)")
    hessian_clip_lambda: float = knob(0.0, "weight of row importance in the clip (PR 1412)", at_least=0)
    quantizer: str = knob("trellis32", "rounding inside GPTQ: each weight by itself, or along a trellis of so many states",
                          choices=("scalar", "trellis4", "trellis8", "trellis16", "trellis32", "trellis64"))
    trellis_lambda: float = knob(0.1, "squared steps that a bit is worth to the trellis", at_least=0)
    fisher_batches: int = knob(64, "small training batches for the squared gradients", at_least=2)
    fisher_row_power: float = knob(0.5, "step ~ sensitivity ^ -this between the rows of a tensor", at_least=0, at_most=1)
    fisher_tensor_power: float = knob(0.5, "the same between tensors", at_least=0, at_most=1)
    fisher_coarsest: float = knob(2.0, "largest step, in hand-set steps: gradients speak of small errors", above=0)
    target_bytes: int = knob(CAP_BYTES, "code + model end just under this; 0: fixed clips", at_least=0, at_most=CAP_BYTES)
    step_grid: int = knob(8, "steps on a grid of so many parts of an octave; 0: any float16", at_least=0, at_most=16)
    inq_steps: int = knob(4, "training steps between groups of matrices that are quantised in turn; 0: all at once", at_least=0)
    inq_groups: int = knob(8, "such groups", at_least=2)
    inq_lr: float = knob(0.01, "learning-rate multiplier of these steps, falling to 0 in each group", above=0)
    inq_reread: bool = knob(False, "such steps also on text that training has read: they then serve what was memorised")
    small_mantissa_bits: int = knob(7, "mantissa bits kept of the tensors stored as float16 (10: all)", at_least=2, at_most=10)
    mixed_precision_hessian: bool = knob(False, "bits by Hessian sensitivity (PR 1962: a negative result)")
    mixed_precision_bits_low: int = knob(5, "bits of the least sensitive", at_least=2, at_most=8)
    mixed_precision_bits_high: int = knob(7, "bits of the most sensitive", at_least=2, at_most=8)
    mixed_precision_low_frac: float = knob(0.25, "share of the least sensitive", at_least=0, at_most=1)
    mixed_precision_high_frac: float = knob(0.25, "share of the most sensitive", at_least=0, at_most=1)
    clip_mult_early: float = knob(1.0, "clip multiplier, layers 0-2", above=0)
    clip_mult_loop: float = knob(1.0, "clip multiplier, looped layers", above=0)
    clip_mult_mid: float = knob(1.0, "clip multiplier, the rest", above=0)
    clip_mult_late: float = knob(1.0, "clip multiplier, layers 8 and up", above=0)
    gptq_calibration_batches: int = knob(16, "training batches for the Hessians", at_least=1)
    lqer_enabled: bool = knob(False, "low-rank repair of the worst tensors")
    lqer_asym_enabled: bool = knob(True, "its asymmetric int2/int4 coding")
    lqer_rank: int = knob(4, "its rank", at_least=1)
    lqer_top_k: int = knob(3, "tensors repaired", at_least=0)
    lqer_factor_bits: int = knob(4, "bits of symmetric factors", at_least=2, at_most=8)
    lqer_asym_group: int = knob(64, "values sharing a scale", at_least=1)
    gated_attn_quant_gate: bool = knob(True, "head-gate weights as int8 rows")
    compressor: str = knob("entropy", "coder of the artifact", choices=("entropy", "brotli", "lzma", "pergroup"))
    # evaluation
    sliding_window_enabled: bool = knob(False, "also score with a sliding window")
    eval_stride: int = knob(64, "tokens scored by each window", at_least=1)
    eval_seq_len: int = knob(2048, "longest context in evaluation", at_least=2, at_most=2 ** 31 - 1)
    val_batch_tokens: int = knob(524288, "validation tokens in flight over 8 micro-batches", at_least=8)
    windowed_eval_enabled: bool = knob(False, "also score in one pass with windowed attention")
    eval_time_limit: float = knob(EVAL_BUDGET_SECONDS, "seconds from artifact to score: adapting stops in time for it; 0: none", at_least=0)
    ttt_enabled: bool = knob(False, "test-time training")
    ttt_protocol: str = knob("cached", "read the whole window again for each chunk, or cache it", choices=("published", "cached"))
    ttt_live_tokens: int = knob(48, "cached: tokens before the chunk that are read again with it", at_least=0)
    phased_ttt_enabled: bool = knob(True, "global phases between batches of documents")
    phased_ttt_prefix_docs: int = knob(0, "documents before the last global phase (published: 2500); 0: phases are dealt batches",
                                       at_least=0)
    phased_ttt_num_phases: int = knob(12, "global phases (published: 3); 0: none", at_least=0)
    ttt_lora_rank: int = knob(56, "adapter rank", at_least=1)
    ttt_lora_alpha: float = knob(144.0, "adapter output scale * rank", above=0)
    ttt_lora_lr: float = knob(2e-4, "adapter learning rate (published protocol: 1e-4)", at_least=0)
    ttt_chunk_size: int = knob(24, "tokens scored between updates (published protocol: 48)", at_least=1)
    ttt_chunk_by_length: str = knob("", "chunks of shorter documents, as longest:chunk,... (PR 2014: 256:8,2000:24)")
    ttt_eval_seq_len: int = knob(3072, "longest context (published: 2048)", at_least=2)
    ttt_batch_size: int = knob(96, "documents in a batch (published protocol: 64)", at_least=1)
    ttt_micro_tokens: int = knob(32768, "published: most positions in one forward and backward", at_least=1)
    ttt_grad_steps: int = knob(1, "updates a chunk", at_least=1)
    ttt_weight_decay: float = knob(0.5, "adapter weight decay", at_least=0)
    ttt_beta1: float = knob(0.0, "adapter AdamW", at_least=0, below=1)
    ttt_beta2: float = knob(0.99, "adapter AdamW", at_least=0, below=1)
    ttt_optimizer: str = knob("adam", "adapter optimizer", choices=("adam", "sgd"))
    ttt_warm_start_a: bool = knob(True, "keep A from batch to batch")
    ttt_q_lora: bool = knob(True, "adapter on queries")
    ttt_k_lora: bool = knob(True, "adapter on keys")
    ttt_v_lora: bool = knob(True, "adapter on values")
    ttt_o_lora: bool = knob(True, "adapter on output projections")
    ttt_mlp_lora: bool = knob(True, "adapter on MLPs")
    ttt_head_lora: bool = knob(True, "adapter on the head")
    ttt_compile: bool = knob(False, "published: torch.compile while adapting (on CUDA)")
    ttt_graphs: bool = knob(True, "CUDA graphs of the cached protocol's and the global phases' forward and backward")
    ngram_tilt_enabled: bool = knob(True, "test-time training: tilt towards what followed the last tokens in text scored before")
    asym_logit_rescale: bool = knob(False, "softcaps of positive and negative logits, trained in the global phases (PR 1923)")
    global_ttt_optimizer: str = knob("muon", "training's optimizers at a low rate, or SGD (published)", choices=("muon", "sgd"))
    global_ttt_lr_mul: float = knob(0.04, "global Muon (momentum: MUON_MOMENTUM_WARMUP_START) and AdamW: share of rates", at_least=0)
    global_ttt_lr: float = knob(0.001, "global SGD", at_least=0)
    global_ttt_momentum: float = knob(0.9, "global SGD", at_least=0, at_most=1)
    global_ttt_grad_clip: float = knob(1.0, "global SGD", at_least=0)
    global_ttt_again: bool = knob(False, "every phase trains on all that has been scored (published), not on what is new")
    global_ttt_epochs: int = knob(1, "passes over each chunk", at_least=1)
    global_ttt_chunk_tokens: int = knob(65536, "tokens of a chunk (published: 32768); the rate falls from chunk to chunk", at_least=1)
    global_ttt_batch_seqs: int = knob(32, "most sequences of a global step", at_least=1)
    global_ttt_respect_doc_boundaries: bool = knob(True, "global phases train in document segments")
    # a stage alone, on what an earlier run saved
    prequant_only: bool = knob(False, "stop before quantisation")
    quantize_only: bool = knob(False, "start from the saved EMA weights")
    ttt_eval_only: bool = knob(False, "start from the saved artifact (also EVAL_ONLY)")
    # machine
    attention_backend: str = knob("auto", "attention implementation", choices=("auto", "fa3", "varlen", "sdpa"))
    fused_ce_enabled: bool = knob(True, "fused softcap + cross-entropy kernel")
    kernels_off: str = knob("", "fast kernels to replace by their references (comma list, or all)")
    compile_enabled: bool = knob(True, "torch.compile on CUDA")
    train_graphs: bool = knob(True, "a CUDA graph of a micro-step's forward and backward")
    deterministic: bool = knob(False, "on CUDA too, one seed always gives the same numbers (as many steps: MAX_WALLCLOCK_SECONDS=0)")

    @property
    def trellis_states(self) -> int:
        return int(self.quantizer.removeprefix("trellis")) if self.quantizer != "scalar" else 0

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def mlp_dim(self) -> int:
        return int(self.mlp_mult * self.model_dim)

    @property
    def gate_kind(self) -> str:
        return ("sparse" if self.sparse_attn_gate_enabled else "full" if self.gated_attn_enabled
                else f"out_{self.attn_out_gate_src}" if self.attn_out_gate_enabled else "")

    def pass_order(self, loops: int) -> tuple[list[int], int]:
        """Layers in the order of one forward with `loops` extra passes, and how many of them are the encoder."""
        looped = list(range(self.loop_start, self.loop_end + 1)) if self.num_loops else []
        order = ([*range(self.loop_start), *looped * (loops + 1), *range(self.loop_end + 1, self.num_layers)]
                 if looped else list(range(self.num_layers)))
        return order, len(order) // 2

    def loops_at(self, frac: float) -> int:
        """Extra passes over the looped layers after `frac` of the budget."""
        if frac < self.enable_looping_at:
            return 0
        return min(1, self.num_loops) if frac < self.loop_phase2_at else self.num_loops

    def seq_len_at(self, frac: float) -> int:
        """Longest document segment in training after `frac` of the budget."""
        return min([longest for longest, until in seq_schedule(self) if frac < until][:1] + [self.train_seq_len])

    def lr_mul(self, frac: float) -> float:
        """Learning-rate multiplier after `frac` of the budget."""
        if frac < 1 - self.warmdown_frac:
            return 1.0
        return max((1 - frac) / max(self.warmdown_frac, 1e-9), self.min_lr)


CONTRADICTIONS: list[tuple[Callable[[Config], bool], str]] = [
    (lambda c: c.model_dim % c.num_heads, "MODEL_DIM={model_dim} must be a multiple of NUM_HEADS={num_heads}"),
    (lambda c: c.num_heads % c.num_kv_heads, "NUM_HEADS={num_heads} must be a multiple of NUM_KV_HEADS={num_kv_heads}"),
    (lambda c: c.rope_dims % 2 or c.rope_dims > c.head_dim, "ROPE_DIMS={rope_dims} must be even and at most MODEL_DIM/NUM_HEADS"),
    (lambda c: c.mlp_dim < 1, "MLP_MULT={mlp_mult} leaves no MLP units"),
    (lambda c: c.gate_window > c.model_dim, "GATE_WINDOW={gate_window} exceeds MODEL_DIM={model_dim}"),
    (lambda c: c.xsa_last_n > c.num_layers, "XSA_LAST_N={xsa_last_n} exceeds NUM_LAYERS={num_layers}"),
    (lambda c: c.num_loops and not c.loop_start <= c.loop_end < c.num_layers,
     "LOOP_START={loop_start} and LOOP_END={loop_end} must satisfy LOOP_START <= LOOP_END < NUM_LAYERS={num_layers}"),
    (lambda c: 0 < c.loop_phase2_at < c.enable_looping_at,
     "LOOP_PHASE2_AT={loop_phase2_at} must not come before ENABLE_LOOPING_AT={enable_looping_at}"),
    (lambda c: c.sparse_attn_gate_enabled + c.gated_attn_enabled + c.attn_out_gate_enabled > 1,
     "at most one of SPARSE_ATTN_GATE_ENABLED, GATED_ATTN_ENABLED, ATTN_OUT_GATE_ENABLED can be 1"),
    (lambda c: c.parallel_start_layer > 0 and c.parallel_residual_start >= 0,
     "PARALLEL_START_LAYER={parallel_start_layer} and PARALLEL_RESIDUAL_START={parallel_residual_start} exclude each other: "
     "set the first to 0 or the second to -1"),
    (lambda c: c.parallel_start_layer >= c.num_layers or c.parallel_residual_start >= c.num_layers,
     "PARALLEL_START_LAYER={parallel_start_layer} and PARALLEL_RESIDUAL_START={parallel_residual_start} must be below "
     "NUM_LAYERS={num_layers}"),
    (lambda c: c.parallel_start_layer > 0 and c.parallel_start_layer in c.pass_order(0)[0][:c.pass_order(0)[1]],
     "PARALLEL_START_LAYER={parallel_start_layer} must be a decoder layer (the upper half of NUM_LAYERS={num_layers})"),
    (lambda c: c.parallel_start_layer > 0 and c.num_loops and c.parallel_start_layer <= c.loop_end,
     "PARALLEL_START_LAYER={parallel_start_layer} must come after LOOP_END={loop_end}: lanes cannot loop"),
    (lambda c: c.mixed_precision_low_frac + c.mixed_precision_high_frac > 1,
     "MIXED_PRECISION_LOW_FRAC and MIXED_PRECISION_HIGH_FRAC add up to more than 1"),
    (lambda c: c.mixed_precision_bits_low > c.mixed_precision_bits_high,
     "MIXED_PRECISION_BITS_LOW={mixed_precision_bits_low} exceeds MIXED_PRECISION_BITS_HIGH={mixed_precision_bits_high}"),
    (lambda c: c.adaptive_hessian_clip and c.clip_rule != "adaptive",
     "ADAPTIVE_HESSIAN_CLIP=1 contradicts CLIP_RULE={clip_rule}: set one of them"),
    (lambda c: c.mixed_precision_hessian and c.clip_rule == "fisher",
     "MIXED_PRECISION_HESSIAN=1 needs CLIP_RULE=hand or adaptive: under fisher the steps alone set the bits"),
    (lambda c: c.prequant_only + c.quantize_only + c.ttt_eval_only > 1,
     "at most one of PREQUANT_ONLY, QUANTIZE_ONLY, TTT_EVAL_ONLY can be 1"),
    (lambda c: c.resume and (c.quantize_only or c.ttt_eval_only), "RESUME=1 needs training: not with QUANTIZE_ONLY or TTT_EVAL_ONLY"),
    (lambda c: c.val_batch_tokens // 8 < c.eval_seq_len,
     "VAL_BATCH_TOKENS={val_batch_tokens} must be at least 8 x EVAL_SEQ_LEN={eval_seq_len}"),
    (lambda c: c.sliding_window_enabled and c.eval_stride > c.eval_seq_len,
     "EVAL_STRIDE={eval_stride} must be at most EVAL_SEQ_LEN={eval_seq_len}: windows would miss tokens"),
    (lambda c: c.ttt_chunk_size > c.ttt_eval_seq_len,
     "TTT_CHUNK_SIZE={ttt_chunk_size} exceeds TTT_EVAL_SEQ_LEN={ttt_eval_seq_len}"),
    (lambda c: 0 < c.max_wallclock_seconds <= c.gptq_reserve_seconds,
     "GPTQ_RESERVE_SECONDS={gptq_reserve_seconds} leaves no training in MAX_WALLCLOCK_SECONDS={max_wallclock_seconds}"),
]
ALIASES = {"EVAL_ONLY": "TTT_EVAL_ONLY"}
# What a saved model depends on: an artifact or checkpoint made under other values is refused.
MODEL_KNOBS = tuple(f.name for f in fields(Config) if f.name in """vocab_size num_layers model_dim num_heads num_kv_heads
    mlp_mult xsa_last_n rope_base rope_dims rope_yarn rope_train_seq_len ln_scale logit_softcap skip_gates_enabled
    tie_embeddings num_loops loop_start loop_end parallel_start_layer parallel_final_lane parallel_residual_start
    smear_gate_enabled gate_window sparse_attn_gate_enabled sparse_attn_gate_scale gated_attn_enabled
    attn_out_gate_enabled attn_out_gate_src""".split())


def allowed_values(f) -> str:
    """What a knob accepts, in words."""
    m = f.metadata
    if f.type == "bool":
        return "0 or 1"
    if "choices" in m:
        return "one of " + ", ".join(m["choices"])
    noun = {"int": "a whole number", "float": "a number", "str": "UTF-8 text"}[f.type]
    limits = [f"{word} {m[key]}" for key, word in (("at_least", ">="), ("above", ">"), ("at_most", "<="), ("below", "<")) if key in m]
    return " ".join([noun, " and ".join(limits)]).strip()


def parse_knob(f, text: str):
    """One environment value -> the knob's type, within its limits; raises UserError naming variable and limits."""
    m = f.metadata
    try:
        text.encode()                   # the log is UTF-8: a ValueError here for bytes that are not
        if f.type == "bool":
            value = {"0": False, "1": True, "false": False, "true": True}[text.strip().lower()]
        else:
            value = {"int": int, "float": float, "str": str}[f.type](text)
        ok = (("choices" not in m or value in m["choices"]) and ("at_least" not in m or value >= m["at_least"])
              and ("above" not in m or value > m["above"]) and ("at_most" not in m or value <= m["at_most"])
              and ("below" not in m or value < m["below"]) and (f.type != "float" or math.isfinite(value)))
    except (ValueError, KeyError):
        ok = False
    if not ok:
        raise UserError(f"{f.name.upper()}={text!r}: expected {allowed_values(f)}")
    return value


def load_config(env: dict[str, str]) -> tuple[Config, list[str]]:
    """Environment -> checked Config and warnings about names that look like ours. Raises UserError."""
    table = {f.name.upper(): f for f in fields(Config)}
    given = {}
    for name, text in env.items():
        target = ALIASES.get(name, name)
        if target in table:
            if name != target and env.get(target, text) != text:
                raise UserError(f"{name}={text!r} contradicts {target}={env[target]!r}: set one of them")
            given[target] = parse_knob(table[target], text)
    warnings = []
    for name in sorted(set(env) - set(table) - set(ALIASES)):
        near = [whole] if (whole := f"{name}_ENABLED") in table else []
        near = near or (difflib.get_close_matches(name, [*table, *ALIASES], n=1, cutoff=0.85) if len(name) > 4 else [])
        if near:
            warnings.append(f"warning: {name} is not a setting; did you mean {near[0]}?")
    config = Config(**{name.lower(): value for name, value in given.items()})
    suffix = "_lossless_caps_caseops_v1_reserved" if config.caseops_enabled else ""
    paths = {"data_path": config.data_path or f"{config.data_dir}/datasets/fineweb10B_sp{config.vocab_size}{suffix}",
             "tokenizer_path": config.tokenizer_path or f"{config.data_dir}/tokenizers/fineweb_{config.vocab_size}_bpe{suffix}.model",
             "run_id": config.run_id or str(uuid.uuid4())}
    if config.adaptive_hessian_clip and "CLIP_RULE" not in given:
        paths["clip_rule"] = "adaptive"
    config = Config(**{**asdict(config), **paths})
    for broken, message in CONTRADICTIONS:
        if broken(config):
            raise UserError(message.format(**asdict(config)))
    return config, warnings


def pairs(name: str, text: str, mark: str, number: type, fits: Callable[..., bool], expected: str) -> list[tuple]:
    """Setting `name`: "1:2,3:4" with mark ":" -> [(1, 2), (3, 4)], the second of each pair a `number`; raises UserError."""
    try:
        out = [(int(a), number(b)) for a, b in (part.split(mark) for part in text.split(",") if part.strip())]
        if not all(fits(*pair) for pair in out):
            raise ValueError
    except ValueError:
        raise UserError(f"{name}={text!r}: expected {expected}") from None
    return out


def seq_schedule(config: Config) -> list[tuple[int, float]]:
    """TRAIN_SEQ_SCHEDULE -> (longest segment, share of the budget at which it ends) in order; raises UserError."""
    rules = pairs("TRAIN_SEQ_SCHEDULE", config.train_seq_schedule, "@", float, lambda longest, share: longest > 1 and 0 < share <= 1,
                  "longest@share pairs such as 1024@0.1,2048@0.7, shares of 0 to 1")
    return sorted(rules, key=lambda rule: rule[1])


def chunk_rules(config: Config) -> list[tuple[int, int]]:
    """TTT_CHUNK_BY_LENGTH -> (longest document, chunk) pairs in order; raises UserError."""
    return sorted(pairs("TTT_CHUNK_BY_LENGTH", config.ttt_chunk_by_length, ":", int, lambda _, chunk: 0 < chunk <= config.ttt_chunk_size,
                        f"longest:chunk pairs such as 256:8,2000:24, chunks of 1 to TTT_CHUNK_SIZE={config.ttt_chunk_size}"))


def config_table(config: Config) -> str:
    """Every setting, one `  name: value` line each, in name order (the form that the challenge's log parsers read)."""
    return "\n".join(f"  {name}: {value}" for name, value in sorted(asdict(config).items()))


# ======================================================================================================================
# RUNTIME: the ranks, the log, the ledger of seconds, files that are whole or not there
# ======================================================================================================================


# PyTorch 2.13 renamed these two
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class LifeSigns:
    """Ends this process when another rank is lost: gloo reports that as any of many errors, NCCL waits for ever.

    A thread signs in the store every two seconds and reads the others' signs. A rank is lost when its process has ended
    without closing (seen at once on the same machine) or has not signed for SILENCE seconds. The lowest rank that is left
    says so in one line, and all leave with code 1. The connection to the store is its own: the other may be waiting.
    """
    SILENCE = 45.0

    def __init__(self, rank: int, size: int):
        self.rank, self.others = rank, [r for r in range(size) if r != rank]
        self.log: Log | None = None
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False)
        attempt = [os.environ.get(f"TORCHELASTIC_{name}", "") for name in ("RUN_ID", "RESTART_COUNT")]      # one store may serve several
        self.store = dist.PrefixStore("/".join(("signs", *attempt)), store)
        try:        # process ids mean something only here: same machine, same namespace
            self.place = f"{platform.node()} {os.readlink('/proc/self/ns/pid')}"
        except OSError:
            self.place = ""
        self.turn = self.failures = 0
        self.sign()
        self.seen = {r: (self.store.get(str(r)).decode(), time.monotonic()) for r in self.others}       # waits for their first
        self.finished, self.lock = threading.Event(), threading.Lock()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    def sign(self):
        self.turn += 1
        self.store.set(str(self.rank), f"{self.turn} {os.getpid()} {self.place}")

    def watch(self):
        while not self.finished.wait(2.0):
            self.look()

    def look(self):
        """Sign, read the others' signs, and end this process if one of them is lost."""
        with self.lock:
            lost = self.lost()
            if not lost:
                return
            if self.rank < min(set(self.others) - set(lost), default=self.rank + 1):
                line = "error: " + ", ".join(lost.values()) + ": no rank can go on without it"
                print(line, file=sys.stderr, flush=True)
                if self.log:
                    self.log(line, console=False)
            time.sleep(3)                   # until all have looked: the first to leave must not pass for lost
            os._exit(1)

    def lost(self) -> dict[int, str]:
        """Lost ranks and what is known of each."""
        dead = {rank for rank in self.others if not self.lives(self.seen[rank][0])}         # before reading: it may close now
        now = time.monotonic()
        try:
            self.sign()
            for rank in self.others:
                sign = self.store.get(str(rank)).decode()
                if sign != self.seen[rank][0]:
                    self.seen[rank] = sign, now
            self.failures = 0
        except RuntimeError as e:           # the store went with the process that kept it, at the end perhaps
            self.failures += 1
            if self.failures == 1:
                return {}
            if not dead:
                return {0: f"the store of the ranks is gone ({str(e).splitlines()[0][:80]})"}
        out = {rank: f"rank {rank} is gone" for rank in sorted(dead) if self.seen[rank][0] != "finished"}
        silent = {rank: now - at for rank, (sign, at) in self.seen.items() if sign != "finished" and now - at > self.SILENCE}
        return out | {rank: f"rank {rank} has not answered for {seconds:.0f} s" for rank, seconds in silent.items() if rank not in out}

    def lives(self, sign: str) -> bool:
        """False if the sign is that of a process of this machine that has ended."""
        _, pid, place = [*sign.split(" ", 2), "", "", ""][:3]
        if not self.place or place != self.place:
            return True
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
        except OSError:
            return False

    def explain(self, error: RuntimeError):
        """A collective failed: if a rank is lost, this does not return. Else raises the error."""
        words = ("connection", "peer", "socket", "broken pipe", "reset", "nccl", "timed out", "timeout")
        if any(word in str(error).lower() for word in words):
            ignore_signals()
            time.sleep(self.SILENCE + 5)
        raise error

    def close(self, finished: bool):
        """finished: the others need not wait for this rank."""
        self.finished.set()
        self.thread.join()
        with contextlib.suppress(RuntimeError):
            if finished:
                self.store.set(str(self.rank), "finished")


class World:
    """The ranks of this run. On one process every collective costs nothing; CPU tensors go through gloo."""
    life: LifeSigns | None = None

    def __init__(self):
        env = os.environ
        try:
            self.rank, self.size, self.local_rank = (int(env.get(k, d)) for k, d in
                                                     (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        except ValueError:
            raise UserError("RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers: start with torchrun, or unset them") from None
        if not 0 <= self.rank < self.size or ("RANK" in env or self.size > 1) and not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= set(env):
            raise UserError("RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT do not belong together: start with torchrun, or unset them")
        if torch.cuda.is_available():
            if self.local_rank >= torch.cuda.device_count():
                raise UserError(f"local rank {self.local_rank} has no GPU: {torch.cuda.device_count()} are visible; lower --nproc_per_node")
            self.device = torch.device("cuda", self.local_rank)
            torch.cuda.set_device(self.device)
        else:
            self.device = torch.device("cpu")
        if "RANK" in env:
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo", timeout=timedelta(minutes=10))
        if self.size > 1:
            self.life = LifeSigns(self.rank, self.size)
            self.sum(torch.zeros(1, device=self.device))        # connects, outside every budget; a rank that cannot fails here

    def sum(self, t: Tensor, op=dist.ReduceOp.SUM) -> Tensor:
        """In-place all-reduce; returns t."""
        if self.size > 1:
            dist.all_reduce(t, op)
        return t

    def mean(self, t: Tensor) -> Tensor:
        return self.sum(t).div_(self.size) if self.size > 1 else t

    def max(self, value: float) -> float:
        """The largest of all ranks' values."""
        return self.sum(torch.tensor(value, dtype=torch.float64), dist.ReduceOp.MAX).item()

    def broadcast(self, t: Tensor, source: int = 0) -> Tensor:
        if self.size > 1:
            dist.broadcast(t, source)
        return t

    def reduce_scatter(self, out: Tensor, t: Tensor):
        """Start averaging t over ranks into each rank's slice `out`; returns a handle to wait on."""
        return REDUCE_SCATTER(out, t, async_op=True)

    def all_gather(self, out: Tensor, t: Tensor):
        return ALL_GATHER(out, t, async_op=True)

    def together(self, action: Callable):
        """Run action on every rank; if any rank meets a UserError, all raise the first of them."""
        result, error = None, None
        try:
            result = action()
        except UserError as e:
            error = (str(e), e.code)
        if self.size > 1:
            errors = [None] * self.size
            dist.all_gather_object(errors, error)
            error = next((e for e in errors if e), None)
        if error:
            raise UserError(*error)
        return result

    def sync(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def timed(self, action: Callable) -> float:
        """Seconds that an action takes, until the device has done it."""
        self.sync()
        start = time.perf_counter()
        action()
        self.sync()
        return time.perf_counter() - start

    def close(self, finished: bool = True):
        if self.life:
            self.life.close(finished)
        if dist.is_initialized():
            dist.destroy_process_group()


class Log:
    """One line per event, on rank 0: console and file."""

    def __init__(self, path: Path | None, quiet: bool):
        self.quiet, self.file = quiet, None
        if path and not quiet:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self.file = open(path, "a", buffering=1, encoding="utf-8")
            except OSError as e:
                raise UserError(f"cannot write the log {path}: {e.strerror}") from None

    def __call__(self, text: str, console: bool = True):
        if self.quiet:
            return
        if console:
            print(text, flush=True)
        try:
            if self.file:
                print(text, file=self.file)
        except OSError as e:                # a full disk must not end the run
            print(f"warning: the log file ends here: {e.strerror}", flush=True)
            with contextlib.suppress(OSError):
                self.file.close()
            self.file = None


class Ledger:
    """Seconds of every stage, and what the two budgets (train, eval) have used."""

    def __init__(self, log: Log, world: World, train_limit: float):
        self.log, self.world = log, world
        self.limits = {"train": train_limit, "eval": EVAL_BUDGET_SECONDS}
        self.used = {"train": 0.0, "eval": 0.0, "none": 0.0}
        self.known = 0

    def open(self):
        """A budget begins: kernels compiled from here on are its own."""
        self.known = len(COMPILED)

    @contextlib.contextmanager
    def stage(self, name: str, budget: str = "none"):
        """Charge the wall-clock seconds of a with-block, device work included."""
        start, known = time.perf_counter(), len(COMPILED)
        yield
        self.world.sync()
        if budget == "none":
            del COMPILED[known:]        # no budget has paid for them
        self.charge(name, time.perf_counter() - start, budget)

    def charge(self, name: str, seconds: float, budget: str = "none"):
        self.used[budget] += seconds
        self.log(f"ledger stage:{name} seconds:{seconds:.3f} budget:{budget}")

    def close(self, budget: str):
        """Log the kernels compiled in it, used/limit, and the violation line that a record is refused for."""
        log_compiled(self.log, self.known, budget)
        used, limit = self.used[budget], self.limits[budget]
        self.log(f"budget {budget} {used:.2f}/{limit:.0f}" if limit else f"budget {budget} {used:.2f}/none")
        if limit and used > limit:
            self.log(f"budget_violation: {budget} used {used:.2f} s of {limit:.0f} s")


class Progress:
    """`name done/total (left: N s)` lines for stages of more than 5 s, no more than one every 5 s."""

    def __init__(self, log: Log, name: str, total: int):
        self.log, self.name, self.total = log, name, total
        self.start = self.last = time.perf_counter()

    def __call__(self, done: int):
        now = time.perf_counter()
        if now - self.last > 5 and done < self.total:
            self.last = now
            self.log(f"progress {self.name} {done}/{self.total} left: {(now - self.start) / done * (self.total - done):.0f} s")


class Run(NamedTuple):
    """What every stage needs to know."""
    config: Config
    world: World
    log: Log
    ledger: Ledger
    folder: Path            # where checkpoints and the artifact go


def write_atomically(path: Path, data: bytes):
    """All of data at path, or the old file untouched: temporary file, fsync, rename. Raises UserError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        raise UserError(f"cannot write {path} ({len(data):,} bytes): {e.strerror}", everywhere=False) from None
    finally:                                # also when a signal's UserError comes in between
        with contextlib.suppress(OSError):
            temporary.unlink()
    with contextlib.suppress(OSError):      # the rename too must outlast a power cut; not every file system can promise it
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_leftovers(folder: Path):
    """Delete what killed runs left over: files and folders named `.*.PID.tmp` of processes that are gone."""
    for path in folder.glob(".*.[0-9]*.tmp"):
        with contextlib.suppress(OSError, ValueError):      # another user's process, another run that tidies up, a foreign name
            if not is_alive(int(path.name.split(".")[-2])):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def checksum(tensors: dict[str, Tensor], state: dict) -> int:
    """CRC-32 over the state, and names, shapes, types and bytes of the tensors in name order."""
    crc = zlib.crc32(json.dumps(state, sort_keys=True).encode())
    for name, t in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {t.dtype} {list(t.shape)}".encode(), crc)
        crc = zlib.crc32(t.reshape(-1).view(torch.uint8).numpy(), crc)      # reshape first: a 0-dim tensor has no byte view
    return crc


def check_replicas(run: Run, stage: str, tensors: list[Tensor], step: int = 0):
    """Log one checksum over the bytes of these tensors, which all ranks must hold alike, at the same step. UserError if not.

    Tensor by tensor through the CPU: for 36 M parameters and their average 0.3 s, in no budget.
    """
    with run.ledger.stage("checksum"):
        crc = 0
        for t in tensors:
            crc = zlib.crc32(t.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy(), crc)
        table = torch.zeros(run.world.size, 2, dtype=torch.int64)
        table[run.world.rank] = torch.tensor([crc, step])
        rows = [tuple(row) for row in run.world.sum(table).tolist()]
    usual = max(rows, key=rows.count)
    others = {rank: row for rank, row in enumerate(rows) if row != usual}
    at = f" step:{usual[1]}" if step else ""
    run.log(f"parameters_checksum stage:{stage} ranks:{len(rows)}{at} crc32:{usual[0]:08x} equal:{int(not others)}")
    if others:
        known = ", ".join(f"rank {rank} has {crc:08x} at step {there}" for rank, (crc, there) in others.items())
        raise UserError(f"the ranks have different parameters ({stage}): {known}, expected {usual[0]:08x} at step {usual[1]}", code=1)


def save_tensors(path: Path, tensors: dict[str, Tensor], state: dict):
    """safetensors whose metadata is `state` as JSON, plus a checksum of the tensors."""
    from safetensors.torch import save
    tensors = {name: t.detach().contiguous().cpu() for name, t in tensors.items()}
    write_atomically(path, save(tensors, {"state": json.dumps({**state, "crc32": checksum(tensors, state)})}))


def load_tensors(path: Path, config: Config) -> tuple[dict[str, Tensor], dict]:
    """Read what save_tensors wrote; raises UserError if missing, damaged, or made under other MODEL_KNOBS."""
    from safetensors import SafetensorError, safe_open
    if not path.is_file():
        raise UserError(f"{path} is missing: run training first (it is written at its end)")
    try:
        with safe_open(path, "pt") as f:
            state = json.loads((f.metadata() or {}).get("state", "{}"))
            tensors = {name: f.get_tensor(name) for name in f.keys()}
    except (SafetensorError, OSError, ValueError) as e:
        raise UserError(f"{path} is damaged: {str(e).splitlines()[0]}") from None
    if not isinstance(state, dict) or state.pop("crc32", None) != checksum(tensors, state):
        raise UserError(f"{path} is damaged: its tensors do not match their checksum")
    check_same_model(path, state.get("model", {}), config)
    return tensors, state


def model_knobs(config: Config) -> dict:
    return {name: getattr(config, name) for name in MODEL_KNOBS}


def check_same_model(path: Path, saved: dict, config: Config):
    """UserError when a file was made under other MODEL_KNOBS than the run's."""
    for name, value in model_knobs(config).items():
        if name in saved and saved[name] != value:
            raise UserError(f"{path} was made with {name.upper()}={saved[name]}, this run has {value}: use the same settings")


def choose_algorithms(deterministic: bool):
    """DETERMINISTIC: only algorithms that repeat to the bit on one machine; call before CUDA starts.

    Covers PyTorch's operators, the backward of its variable-length attention among them, cuBLAS, and what torch.compile
    chooses by timing; attend_fa3 asks for itself. Our Triton kernels have no atomics and no autotuning.
    """
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # cuBLAS reads it when it starts
        from torch._inductor import config as inductor
        if hasattr(inductor, "deterministic"):                          # PyTorch 2.10
            inductor.deterministic = True


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def stop_now(number, _frame):
    """Signal handler outside the training loop: there is nothing to save."""
    raise UserError(f"stopped by signal {number}", code=130)


def ignore_signals():
    """When a rank leaves, the launcher stops the others: that must not come between what they still have to say."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Signals:
    """SIGTERM and SIGINT ask for a stop at the end of the step; a second one kills as usual. `release` ends that."""

    def __init__(self):
        self.received = 0
        self.before = {number: signal.signal(number, self.catch) for number in STOP_SIGNALS}

    def release(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def any_rank(self, world: World) -> int:
        """What any rank has received; the same on every rank."""
        return int(world.max(self.received))

    def catch(self, number, _frame):
        self.received = number
        signal.signal(number, signal.SIG_DFL)


def packed_source() -> str:
    """The text that a packed script unpacked and runs, or "" (see ARTIFACT)."""
    return getattr(sys.modules[__name__], "PACKED_SOURCE", "")


def script_source() -> str:
    """This program's own text: of the file, or of what a packed script unpacked (see ARTIFACT)."""
    return packed_source() or Path(__file__).read_text()


def log_provenance(run: Run, attention: str, shards: list[Path]):
    """Settings, versions, devices, revision, checksums and source: what a reader needs to repeat the run."""
    c, log, source = run.config, run.log, script_source()
    log("Hyperparameters:\n" + config_table(c), console=False)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
                "triton": getattr(triton, "__version__", None), "attention": attention}
    log("version " + " ".join(f"{k}:{v}" for k, v in versions.items()))
    name = torch.cuda.get_device_name() if run.world.device.type == "cuda" else platform.processor() or platform.machine()
    log(f"device count:{run.world.size} name:{name}")
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        git = lambda *a: subprocess.run(["git", *a], cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.strip()
        here = lambda: git("rev-parse", "HEAD") + "+dirty" * bool(git("status", "--porcelain", "-uno"))
        log(f"git revision:{os.environ.get('GIT_REVISION') or here()}")         # the variable: where the tree is a copy without history
    log(f"script sha256:{hashlib.sha256(source.encode()).hexdigest()} bytes:{len(source.encode())}")
    for path in shards:         # a whole shard would take a second: its first and last 64 KiB tell shards apart, its header would not
        with open(path, "rb") as file:
            head = file.read(1 << 16)
            file.seek(max(path.stat().st_size - (1 << 16), 0))
            both = hashlib.sha256(head + file.read()).hexdigest()
        log(f"input file:{path} sha256:{both} tokens:{np.frombuffer(head[:HEADER_BYTES], '<i4')[2]}", console=False)
    lines = source.split("\n")
    log(f"source_begin lines:{len(lines)}\n" + "\n".join("| " + line for line in lines) + "\nsource_end", console=False)


# ======================================================================================================================
# DATA: shards, the shared cursor over them, document segments, bytes of every token
# ======================================================================================================================

BOS = 1                                     # begins every document
HEADER_BYTES, MAGIC, VERSION = 1024, 20240520, 1
PAD_SEGMENTS = 64                           # cu_seqlens is padded to a multiple of this: few lengths


def find_shards(config: Config, split: str) -> list[Path]:
    """Shards of a split ("train", "val") in name order; raises UserError naming the command that makes them."""
    folder = Path(config.data_path)
    variant = "caseops" if config.caseops_enabled else f"sp{config.vocab_size}"
    hint = f"run `python data/sample.py` for the sample or `python data/download.py --variant {variant}`, or set DATA_PATH"
    if not folder.is_dir():
        raise UserError(f"data folder {folder} is missing: {hint}")
    paths = sorted(folder.glob(f"fineweb_{split}_[0-9]*.bin"))
    if not paths:
        raise UserError(f"no fineweb_{split}_*.bin in {folder}: {hint}")
    return paths


def read_shard(path: Path, vocab_size: int, sample: bool = True) -> np.memmap:
    """Tokens of one shard, uint16 memory map. Raises UserError unless magic, version, size and ids are right."""
    try:
        size = path.stat().st_size
        if size < HEADER_BYTES and path.is_file():
            raise UserError(f"{path} has {size} bytes: expected a header of {HEADER_BYTES}")
        header = np.fromfile(path, "<i4", 256)
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}") from None
    if header[0] != MAGIC or header[1] != VERSION:
        raise UserError(f"{path} begins with ({header[0]}, {header[1]}): expected magic {MAGIC} and version {VERSION}")
    expected = HEADER_BYTES + 2 * int(header[2])
    if size != expected:
        raise UserError(f"{path} has {size} bytes: expected {expected} for {header[2]} tokens (truncated?)")
    if header[2] == 0:
        raise UserError(f"{path} holds no tokens")
    tokens = np.memmap(path, "<u2", "r", HEADER_BYTES)
    seen = tokens[:: max(1, len(tokens) // 65536)] if sample else tokens
    if int(seen.max()) >= vocab_size:
        raise UserError(f"{path} has token id {int(seen.max())}: expected ids below VOCAB_SIZE={vocab_size}")
    return tokens


def check_length(shard: np.ndarray):
    """UserError if a mapped shard was cut short since read_shard: reading past its end would kill the process (SIGBUS)."""
    if isinstance(shard.base, mmap.mmap) and shard.base.size() < HEADER_BYTES + shard.nbytes:
        raise UserError(f"{shard.filename} was cut short during the run: it has {shard.base.size()} bytes, expected "
                        f"{HEADER_BYTES + shard.nbytes}", everywhere=False)


def segment_bounds(ids: np.ndarray, limit: int) -> np.ndarray:
    """Starts of the segments of a packed row: at 0, at every BOS, and every `limit` tokens inside a document."""
    starts = np.flatnonzero(ids == BOS)
    if not len(starts) or starts[0] != 0:
        starts = np.concatenate(([0], starts))
    pieces = -(-np.diff(starts, append=len(ids)) // limit)
    first = np.cumsum(pieces) - pieces
    return np.repeat(starts, pieces) + limit * (np.arange(pieces.sum()) - np.repeat(first, pieces))


def pad_cu_seqlens(starts: np.ndarray, total: int) -> np.ndarray:
    """Segment starts -> int32 cu_seqlens, padded with `total` to a multiple of PAD_SEGMENTS entries."""
    out = np.full(-(-(len(starts) + 1) // PAD_SEGMENTS) * PAD_SEGMENTS, total, np.int32)
    out[: len(starts)] = starts
    return out


class Segments(NamedTuple):
    """Documents of a packed row: attention never crosses them. cu_seqlens int32 [n], entries past the last = T."""
    cu_seqlens: Tensor
    longest: int
    fresh: Tensor | None = None     # bool [1, T]: the token before is no neighbour in the text, nothing is smeared in
    window: int = 0         # positions that one position sees, itself included; 0: all before it


class Batch(NamedTuple):
    """One packed row: ids and targets int64 [1, T]; cursor: the stream's position after it."""
    ids: Tensor
    targets: Tensor
    segments: Segments
    cursor: int = 0


class TokenStream:
    """Spans of tokens+1 for every rank from one shared cursor over the shards in name order, carried over their ends.

    The cursor counts tokens since the start of the first epoch; documents in a span are to be cut at `limit`.
    Raises UserError when all shards hold less than one span for every rank.
    """

    def __init__(self, shards: list[np.ndarray], rank: int, size: int, tokens: int, limit: int, vocab_size: int = 65536):
        self.shards, self.rank, self.size, self.tokens, self.limit, self.cursor = shards, rank, size, tokens, limit, 0
        self.vocab_size = vocab_size
        self.ends = np.cumsum([len(s) for s in shards])
        if self.ends[-1] < size * (tokens + 1):
            raise UserError(f"the training shards hold {self.ends[-1]} tokens: one step needs {size * (tokens + 1)} "
                            "(world size x (micro-batch + 1)); lower TRAIN_BATCH_TOKENS or add data")

    def read(self, start: int, count: int) -> np.ndarray:
        out, total = np.empty(count, np.uint16), int(self.ends[-1])
        done = 0
        while done < count:
            at = (start + done) % total
            i = int(np.searchsorted(self.ends, at, side="right"))
            check_length(self.shards[i])
            part = self.shards[i][at - (self.ends[i] - len(self.shards[i])):][: count - done]
            out[done: done + len(part)] = part
            done += len(part)
        return out

    def next(self) -> tuple[np.ndarray, int]:
        """This rank's next span (uint16 [tokens + 1]) and the cursor after it."""
        span = self.tokens + 1
        row = self.read(self.cursor + self.rank * span, span)
        if int(row.max()) >= self.vocab_size:       # read_shard has looked at a sample only
            raise UserError(f"the training shards have token id {row.max()} after token {self.cursor}: expected ids below "
                            f"VOCAB_SIZE={self.vocab_size}", everywhere=False)
        self.cursor += self.size * span
        return row, self.cursor

    @property
    def epoch(self) -> int:
        return self.cursor // int(self.ends[-1]) + 1


def to_batch(row: np.ndarray, limit: int, cursor: int = 0) -> Batch:
    """uint16 [T+1] -> a packed CPU batch of T positions."""
    ids = torch.from_numpy(row.astype(np.int64))
    cu = torch.from_numpy(pad_cu_seqlens(segment_bounds(row[:-1], limit), len(row) - 1))
    return Batch(ids[None, :-1], ids[None, 1:], Segments(cu, limit), cursor)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy to the device without waiting. cu_seqlens changes length: its compiled users treat it as dynamic."""
    move = lambda t: t.to(device, non_blocking=True)
    cu = move(batch.segments.cu_seqlens)
    if device.type == "cuda":
        torch._dynamo.mark_dynamic(cu, 0)
    fresh = None if batch.segments.fresh is None else move(batch.segments.fresh)
    return Batch(move(batch.ids), move(batch.targets), batch.segments._replace(cu_seqlens=cu, fresh=fresh), batch.cursor)


class Prefetcher:
    """Reads a stream ahead in a thread; `next()` gives device batches. Close it to end the thread."""

    def __init__(self, stream: TokenStream, device: torch.device, depth: int = 4):
        self.stream, self.device, self.cursor = stream, device, stream.cursor
        self.queue, self.stopped = queue.Queue(depth), threading.Event()
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    def work(self):
        try:
            while not self.stopped.is_set():
                row, cursor = self.stream.next()
                item = to_batch(row, self.stream.limit, cursor)
                if self.device.type == "cuda":
                    item = Batch(item.ids.pin_memory(), item.targets.pin_memory(),
                                 Segments(item.segments.cu_seqlens.pin_memory(), item.segments.longest), item.cursor)
                self.put(item)
        except BaseException as e:          # handed to next(): a thread's exception would go unseen
            self.put(e)

    def put(self, item):
        while not self.stopped.is_set():
            with contextlib.suppress(queue.Full):
                return self.queue.put(item, timeout=0.2)

    def next(self) -> Batch:
        item = self.queue.get()
        if isinstance(item, OSError):
            raise UserError(f"a training shard vanished or cannot be read: {item}", everywhere=False)
        if isinstance(item, BaseException):
            raise item
        self.cursor = item.cursor
        return to_device(item, self.device)

    def cut_at(self, limit: int) -> Prefetcher:
        """What follows the last batch, cut at `limit`; what was read ahead is read again."""
        self.close()
        self.stream.cursor, self.stream.limit = self.cursor, limit
        return Prefetcher(self.stream, self.device, self.queue.maxsize)

    def close(self):
        self.stopped.set()
        with contextlib.suppress(queue.Empty):
            self.queue.get_nowait()         # the thread may wait for room
        self.thread.join()


class Validation(NamedTuple):
    """tokens uint16 [N]; byte_counts int64 [N]: UTF-8 bytes that tokens[i] stands for after tokens[i-1]."""
    tokens: np.ndarray
    byte_counts: np.ndarray


def token_byte_table(tokenizer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """SentencePiece model -> per piece: bytes without a leading space, has a leading space, is a boundary (control...).

    A boundary swallows the space after it. With a tokenizer that neither adds a space before a text nor removes the
    text's own, that space is text: nothing is a boundary.
    """
    n = tokenizer.vocab_size()
    lengths, spaced, boundary = np.zeros(n, np.int64), np.zeros(n, bool), np.zeros(n, bool)
    for i in range(n):
        if tokenizer.is_control(i) or tokenizer.is_unknown(i) or tokenizer.is_unused(i):
            boundary[i] = True
        elif tokenizer.is_byte(i):
            lengths[i] = 1
        else:
            piece = tokenizer.id_to_piece(i)
            spaced[i] = piece.startswith("\u2581")
            lengths[i] = len(piece.removeprefix("\u2581").replace("\u2581", " ").encode())
    for i in np.flatnonzero(spaced & (lengths > 0))[:1]:
        if tokenizer.decode([int(i)]).startswith(" "):
            boundary[:] = False
    return lengths, spaced, boundary


def count_bytes(tokens: np.ndarray, table: tuple[np.ndarray, np.ndarray, np.ndarray]) -> np.ndarray:
    """UTF-8 bytes of each token: its piece, plus its leading space unless a boundary token (BOS) comes before."""
    lengths, spaced, boundary = table
    counts = lengths[tokens]
    counts[1:] += spaced[tokens[1:]] & ~boundary[tokens[:-1]]
    return counts


def load_tokenizer(config: Config):
    """SentencePieceProcessor of VOCAB_SIZE pieces; raises UserError."""
    import sentencepiece
    if not Path(config.tokenizer_path).is_file():
        raise UserError(f"tokenizer {config.tokenizer_path} is missing: set TOKENIZER_PATH, or see data/download.py and data/sample.py")
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(model_file=config.tokenizer_path)
    except (RuntimeError, OSError) as e:
        raise UserError(f"tokenizer {config.tokenizer_path} is not a SentencePiece model: {str(e).splitlines()[0]}") from None
    if tokenizer.vocab_size() != config.vocab_size:
        raise UserError(f"tokenizer {config.tokenizer_path} has {tokenizer.vocab_size()} pieces: expected VOCAB_SIZE={config.vocab_size}")
    return tokenizer


def check_byte_counts(tokens: np.ndarray, counts: np.ndarray, tokenizer, documents: int = 32) -> int:
    """Compare the byte counts of the first documents with their decoded text; raises UserError where they differ."""
    starts = [*np.flatnonzero(tokens == BOS)[: documents + 1], len(tokens)]
    for a, b in zip(starts[:documents], starts[1:]):
        ids = tokens[a + 1: b].tolist()
        text = tokenizer.decode(ids)
        if "\ufffd" not in text and tokenizer.unk_id() not in ids and len(text.encode()) != counts[a: b].sum():
            raise UserError(f"bytes of the validation document at token {a} add up to {counts[a: b].sum()}: "
                            f"its text has {len(text.encode())}")
    return min(documents, len(starts) - 1)


def load_validation(config: Config, log: Log) -> Validation:
    """All validation tokens with their bytes; raises UserError on anything that would give a wrong score."""
    shards = {p: read_shard(p, config.vocab_size, sample=False) for p in find_shards(config, "val")}
    tokens = np.concatenate(list(shards.values()))
    if len(tokens) < 2:
        raise UserError(f"the validation shards in {config.data_path} hold {len(tokens)} token: expected at least 2")
    if not (tokens == BOS).any():
        raise UserError(f"the validation shards in {config.data_path} have no BOS (token {BOS}): expected one before every document")
    tokenizer = load_tokenizer(config)
    if config.caseops_enabled:
        parts = []
        for path, shard in shards.items():
            sidecar = path.with_name(path.name.replace("val_", "val_bytes_"))
            if not sidecar.is_file():
                raise UserError(f"byte sidecar {sidecar} is missing: CASEOPS_ENABLED=1 expects one beside every validation shard "
                                "(data/download.py --variant caseops, data/tokenize_docs.py --caseops)")
            parts.append(read_shard(sidecar, 65536))
            if len(parts[-1]) != len(shard):
                raise UserError(f"byte sidecar {sidecar} has {len(parts[-1])} entries: expected one for each of {len(shard)} tokens")
        counts = np.concatenate(parts).astype(np.int64)
    else:
        counts = count_bytes(tokens, token_byte_table(tokenizer))
        log(f"byte_check documents:{check_byte_counts(tokens, counts, tokenizer)} equal to their text")
    return Validation(tokens, counts)


# ======================================================================================================================
# KERNELS: every fast kernel beside the plain version that defines it
# ======================================================================================================================

KERNELS: dict[str, Kernel] = {}     # name -> pair; tests compare each pair, bench/step.py times it


@dataclass
class Kernel:
    """A pair of functions with one meaning. Call it: the fast one runs on CUDA unless it is switched off."""
    reference: Callable
    fast: Callable
    # arguments as the run's network will give them: Triton compiles by their types and constants
    example: Callable[[Config, torch.device], tuple] | None = None
    enabled: bool = True
    eager: bool = False     # inside torch.compile the reference serves: the compiler fuses it with its neighbours

    def __call__(self, x: Tensor | tuple[Tensor, ...], *rest):
        cuda = (x[0] if isinstance(x, tuple) else x).is_cuda
        fast = self.enabled and cuda and not (self.eager and torch.compiler.is_compiling())
        return (self.fast if fast else self.reference)(x, *rest)


def kernel(reference: Callable, example: Callable[[Config, torch.device], tuple], eager: bool = False):
    """Decorator: register a fast version beside its reference, under the reference's name less `_reference`."""
    def register(fast: Callable) -> Kernel:
        name = reference.__name__.removesuffix("_reference")
        KERNELS[name] = Kernel(reference, fast, example, eager=eager)
        return KERNELS[name]
    return register


def try_kernel(pair: Kernel, config: Config, device: torch.device):
    """Run the fast version forward and backward on its example; raises whatever it raises."""
    inputs = pair.example(config, device)
    for t in (t for x in inputs for t in (x if isinstance(x, tuple) else (x,))):
        if torch.is_tensor(t) and t.is_floating_point():
            t.requires_grad_()
    outputs = pair.fast(*inputs)
    wanted = [t.float().sum() for t in (outputs if isinstance(outputs, tuple) else (outputs,)) if torch.is_tensor(t) and t.requires_grad]
    if wanted:
        torch.autograd.backward(wanted)
    if device.type == "cuda":
        torch.cuda.synchronize()


def drop_broken_kernels(config: Config, device: torch.device, log: Callable[[str], None]):
    """Kernels that do not compile or run on this GPU give way to their references, with one line each."""
    for name, pair in KERNELS.items():
        if pair.enabled and device.type == "cuda":
            try:
                try_kernel(pair, config, device)
            except Exception as e:          # Triton raises anything from its own errors to RuntimeError
                pair.enabled = False
                log(f"kernel {name} does not run on this GPU ({type(e).__name__}: {(str(e).splitlines() or [''])[0][:100]}): "
                    "its plain version serves")


def select_kernels(config: Config):
    """Apply KERNELS_OFF and FUSED_CE_ENABLED; raises UserError for an unknown name."""
    off = {name.strip() for name in config.kernels_off.split(",") if name.strip()}
    unknown = off - set(KERNELS) - {"all"}
    if unknown:
        raise UserError(f"KERNELS_OFF={config.kernels_off!r}: expected names of {', '.join(KERNELS)}, or all")
    for name, pair in KERNELS.items():
        pair.enabled = triton is not None and not {name, "all"} & off and (name != "softcap_ce" or config.fused_ce_enabled)


try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:                 # a CPU install has none: the references serve
    triton = tl = None

# Triton compiles a kernel anew for numbers that are no multiple of 16 and for pointers off 16 bytes. What varies in a run is
# exempt (do_not_specialize): numbers of rows, and scales, which stand anywhere in their layer's row. It costs a comparison or two.
COMPILED: list[tuple[str, float]] = []      # kernels that Triton has compiled in a budget (not read from its cache), seconds


def note_compiled(*, metadata: dict, times, cache_hit: bool, **_):
    """What Triton calls after every kernel that it compiles or reads from its cache; times are microseconds."""
    if not cache_hit:
        COMPILED.append((metadata["name"], times.total / 1e6))


if hasattr(triton, "knobs"):        # Triton 3.4 and later
    triton.knobs.compilation.listener = note_compiled


def log_compiled(log: Callable[[str], None], known: int, stage: str):
    """One line about the kernels compiled after the first `known` ones."""
    new = COMPILED[known:]
    names = ", ".join(f"{name} {count}" for name, count in Counter(name for name, _ in new).items())
    log(f"ledger kernels_compiled:{len(new)} seconds:{sum(seconds for _, seconds in new):.1f} stage:{stage}" + f" ({names})" * bool(new))


def softcap_ce_reference(logits_NV: Tensor, targets_N: Tensor, cap: float) -> Tensor:
    """Cross-entropy in nats of each row under cap*tanh(logit/cap), float32 [N]."""
    return F.cross_entropy(cap * torch.tanh(logits_NV.float() / cap), targets_N, reduction="none")


def fused_op(schema: str, allocate: Callable, launch: Callable):
    """A custom operator that torch.compile can see through: allocate(*args) makes the outputs (also on fake tensors),
    launch(*args, *outputs) fills them."""
    name = schema.split("(")[0]

    def run(*args):
        outputs = allocate(*args)
        launch(*args, *(outputs if isinstance(outputs, tuple) else (outputs,)))
        return outputs

    op = torch.library.custom_op(f"pgolf::{name}", run, mutates_args=(), schema=schema[len(name):])
    op.register_fake(allocate)
    return op


if triton is not None:
    @triton.jit
    def softcap_ce_kernel(logits, targets, losses, lse, grad_losses, grad_logits, V, cap,
                          BLOCK: tl.constexpr, BACKWARD: tl.constexpr):
        """A row per program. Forward: one online pass keeps max and sum. Backward: recomputes the softmax from lse."""
        row = tl.program_id(0).to(tl.int64)
        target = tl.load(targets + row)
        columns = tl.arange(0, BLOCK)
        if BACKWARD:
            total, scale = tl.load(lse + row), tl.load(grad_losses + row)
            for start in range(0, V, BLOCK):
                j = start + columns
                t = 2 * tl.sigmoid(2 / cap * tl.load(logits + row * V + j, mask=j < V, other=0.0).to(tl.float32)) - 1
                p = tl.exp(cap * t - total) - tl.where(j == target, 1.0, 0.0)
                tl.store(grad_logits + row * V + j, (scale * p * (1 - t * t)).to(grad_logits.dtype.element_ty), mask=j < V)
        else:
            top, mass = cap * -2.0, 0.0         # below every capped logit
            for start in range(0, V, BLOCK):
                j = start + columns
                x = tl.load(logits + row * V + j, mask=j < V, other=0.0).to(tl.float32)
                z = tl.where(j < V, cap * (2 * tl.sigmoid(2 / cap * x) - 1), float("-inf"))
                higher = tl.maximum(top, tl.max(z, 0))
                mass = mass * tl.exp(top - higher) + tl.sum(tl.exp(z - higher), 0)
                top = higher
            x = tl.load(logits + row * V + target).to(tl.float32)
            total = top + tl.log(mass)
            tl.store(lse + row, total)
            tl.store(losses + row, total - cap * (2 * tl.sigmoid(2 / cap * x) - 1))

    def launch_softcap_ce(logits, targets, losses, lse, grad_losses, grad_logits, cap, backward):
        n, v = logits.shape
        softcap_ce_kernel[(n,)](logits, targets, losses, lse, grad_losses, grad_logits, v, cap,
                                BLOCK=min(8192, triton.next_power_of_2(v)), BACKWARD=backward, num_warps=8)

    softcap_ce_forward = fused_op(
        "softcap_ce(Tensor logits, Tensor targets, float cap) -> (Tensor, Tensor)",
        lambda x, y, cap: tuple(x.new_empty(x.shape[0], dtype=torch.float32) for _ in range(2)),
        lambda x, y, cap, losses, lse: launch_softcap_ce(x, y, losses, lse, losses, x, cap, False))
    softcap_ce_backward = fused_op(
        "softcap_ce_backward(Tensor logits, Tensor targets, Tensor lse, Tensor grad, float cap) -> Tensor",
        lambda x, y, lse, g, cap: torch.empty_like(x),
        lambda x, y, lse, g, cap, out: launch_softcap_ce(x, y, lse, lse, g.contiguous(), out, cap, True))

    def save_softcap_ce(ctx, inputs, output):
        logits, targets, ctx.cap = inputs
        ctx.save_for_backward(logits, targets, output[1])

    softcap_ce_forward.register_autograd(
        lambda ctx, grad, _: (softcap_ce_backward(*ctx.saved_tensors, grad, ctx.cap), None, None), setup_context=save_softcap_ce)


@kernel(softcap_ce_reference, lambda c, device: (
    torch.zeros(64, c.vocab_size, dtype=torch.bfloat16, device=device), torch.zeros(64, dtype=torch.int64, device=device), c.logit_softcap))
def softcap_ce(logits_NV: Tensor, targets_N: Tensor, cap: float) -> Tensor:
    """Softcap and cross-entropy in one pass: float32 losses [N]; the softcapped logits are never stored (Triton)."""
    return softcap_ce_forward(logits_NV.contiguous(), targets_N, cap)[0]


def weighted_sum_reference(parts: tuple[Tensor, ...], weights_CD: Tensor | None, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """u = the sum of parts [B, T, D], each times its weights (then three at most), rounded once; n = u normed, times scale []
    (no scale: None)."""
    first, *more = parts if weights_CD is None else [w * x for w, x in zip(weights_CD.unbind(0), parts)]
    u = functools.reduce(torch.add, more, first if first.dtype == torch.float64 else first.float()).to(parts[0].dtype)
    return u, None if scale is None else norm(u) * scale


SUM_BLOCKS = (8, 4), (4, 4, 4)      # rows and warps of a program; backward: and programs on a processor

if triton is not None:
    @triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["scale"])
    def sum_kernel(parts, weights, scale, gate, out, normed, factor, z, N, eps, D: tl.constexpr, WIDE: tl.constexpr,
                   COUNT: tl.constexpr, HEADS: tl.constexpr, HEADS_WIDE: tl.constexpr, WINDOW: tl.constexpr, WINDOW_WIDE: tl.constexpr,
                   ROWS: tl.constexpr):
        """ROWS rows per program: the sum of parts into `out`; what norms it, scale included, into `factor`; the normed sum into
        `normed`, and its product with the HEADS rows of `gate` into z. What is None is left out."""
        row, j = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDE)
        ok = (row < N)[:, None] & (j < D)[None, :]
        at = row.to(tl.int64)[:, None] * D + j[None, :]
        u = tl.zeros((ROWS, WIDE), tl.float32)
        for i in tl.static_range(COUNT):
            part = tl.load(parts[i] + at, mask=ok, other=0.0).to(tl.float32)
            if weights is not None:
                part *= tl.load(weights + i * D + j, mask=j < D, other=0.0)[None, :]
            u += part
        if out is not None:
            tl.store(out + at, u.to(out.dtype.element_ty), mask=ok)
        if scale is not None:
            r = tl.rsqrt(tl.sum(u * u, 1) / D + eps) * tl.load(scale)
            if factor is not None:
                tl.store(factor + row, r, mask=row < N)
            if normed is not None:
                tl.store(normed + at, (u * r[:, None]).to(normed.dtype.element_ty), mask=ok)
            if gate is not None:
                h, k = tl.arange(0, HEADS_WIDE), tl.arange(0, WINDOW_WIDE)
                short = tl.zeros((ROWS, WINDOW_WIDE), tl.float32)           # the columns that the gate reads, once more
                for i in tl.static_range(COUNT):
                    few = (row < N)[:, None] & (k < WINDOW)[None, :]
                    part = tl.load(parts[i] + row.to(tl.int64)[:, None] * D + k[None, :], mask=few, other=0.0).to(tl.float32)
                    if weights is not None:
                        part *= tl.load(weights + i * D + k, mask=k < WINDOW, other=0.0)[None, :]
                    short += part
                g = tl.load(gate + h[:, None] * WINDOW + k[None, :], mask=(h < HEADS)[:, None] & (k < WINDOW)[None, :], other=0.0)
                along = tl.sum(short[:, None, :] * g.to(tl.float32)[None, :, :], 2) * r[:, None]
                kept = (row < N)[:, None] & (h < HEADS)[None, :]
                tl.store(z + row[:, None] * HEADS + h[None, :], along.to(z.dtype.element_ty), mask=kept)

    @triton.jit
    def give_part(at, ok, weight, du, x):
        """Store a part's gradient; what its weights are to gain."""
        tl.store(at, (weight * du).to(at.dtype.element_ty), mask=ok)
        return du * x

    @triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["scale"])
    def sum_backward_kernel(parts, weights, scale, gate, factor, grad, product, dz, dparts, sums, N, D: tl.constexpr, WIDE: tl.constexpr,
                            COUNT: tl.constexpr, HEADS: tl.constexpr, WINDOW: tl.constexpr, APPLIED: tl.constexpr, NORMED: tl.constexpr,
                            ROWS: tl.constexpr):
        """The gradient of the sum u is `grad` plus what `product` and dz bring through the norm: product is the gradient of
        n = u * factor with respect to u at a fixed factor (APPLIED: with respect to n). Weighed, every part's gradient goes to dparts
        and its weights' share to this program's row of `sums`; else they are one and the same. NORMED: the only part is n, not u."""
        j = tl.arange(0, WIDE)
        wide = j < D
        w0, w1, w2 = tl.zeros((1, WIDE), tl.float32), tl.zeros((1, WIDE), tl.float32), tl.zeros((1, WIDE), tl.float32)
        if weights is not None:
            w0 = tl.load(weights + j, mask=wide, other=0.0)[None, :]
            if COUNT > 1:
                w1 = tl.load(weights + D + j, mask=wide, other=0.0)[None, :]
            if COUNT > 2:
                w2 = tl.load(weights + 2 * D + j, mask=wide, other=0.0)[None, :]
        sum0, sum1, sum2 = tl.zeros((ROWS, WIDE), tl.float32), tl.zeros((ROWS, WIDE), tl.float32), tl.zeros((ROWS, WIDE), tl.float32)
        for tile in range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0)):
            row = tile * ROWS + tl.arange(0, ROWS)
            ok = (row < N)[:, None] & wide[None, :]
            at = row.to(tl.int64)[:, None] * D + j[None, :]
            du = tl.zeros((ROWS, WIDE), tl.float32)
            if grad is not None:
                du += tl.load(grad + at, mask=ok, other=0.0).to(tl.float32)
            x0 = tl.load(parts[0] + at, mask=ok, other=0.0).to(tl.float32)
            x1, x2, u = x0, x0, x0
            if weights is not None:
                u = w0 * x0
            if COUNT > 1:
                x1 = tl.load(parts[1] + at, mask=ok, other=0.0).to(tl.float32)
                u += x1 if weights is None else w1 * x1
            if COUNT > 2:
                x2 = tl.load(parts[2] + at, mask=ok, other=0.0).to(tl.float32)
                u += x2 if weights is None else w2 * x2
            if product is not None:
                r = tl.load(factor + row, mask=row < N, other=1.0)
                if NORMED:
                    u /= r[:, None]
                p = tl.load(product + at, mask=ok, other=0.0).to(tl.float32)
                if APPLIED:
                    p *= r[:, None]
                for h in tl.static_range(HEADS if dz is not None else 0):
                    share = tl.load(dz + row * HEADS + h, mask=row < N, other=0.0).to(tl.float32) * r
                    p += share[:, None] * tl.load(gate + h * WINDOW + j, mask=j < WINDOW, other=0.0).to(tl.float32)[None, :]
                root = r / tl.load(scale)
                du += p - u * (tl.sum(p * u, 1) * root * root / D)[:, None]
            if weights is None:
                tl.store(dparts[0] + at, du.to(dparts[0].dtype.element_ty), mask=ok)
            else:
                sum0 += give_part(dparts[0] + at, ok, w0, du, x0)
                if COUNT > 1:
                    sum1 += give_part(dparts[1] + at, ok, w1, du, x1)
                if COUNT > 2:
                    sum2 += give_part(dparts[2] + at, ok, w2, du, x2)
        if sums is not None:
            mine = sums + tl.program_id(0) * (COUNT * D) + j
            tl.store(mine, tl.sum(sum0, 0), mask=wide)
            if COUNT > 1:
                tl.store(mine + D, tl.sum(sum1, 0), mask=wide)
            if COUNT > 2:
                tl.store(mine + 2 * D, tl.sum(sum2, 0), mask=wide)

    def gate_shape(gate):
        return (1, 1) if gate is None else gate.shape

    def launch_sum(parts, weights, scale, gate=None, out=None, normed=None, factor=None, z=None):
        d, (heads, window), (rows, warps) = parts[0].shape[-1], gate_shape(gate), SUM_BLOCKS[0]
        n = parts[0].numel() // d
        sum_kernel[(triton.cdiv(n, rows),)](
            tuple(parts), weights, scale, gate, out, normed, factor, z, n, NORM_EPS, D=d, WIDE=triton.next_power_of_2(d),
            COUNT=len(parts), HEADS=heads, HEADS_WIDE=triton.next_power_of_2(heads), WINDOW=window,
            WINDOW_WIDE=triton.next_power_of_2(window), ROWS=rows, num_warps=warps)

    def launch_sum_backward(parts, weights, scale, gate, factor, grad, product, dz, dparts, dweights=None, applied=False, normed=False):
        d, (heads, window), (rows, warps, programs) = parts[0].shape[-1], gate_shape(gate), SUM_BLOCKS[1]
        n = parts[0].numel() // d
        if parts[0].is_cuda:
            programs *= torch.cuda.get_device_properties(parts[0].device).multi_processor_count
        programs = min(programs, triton.cdiv(n, rows))
        sums = None if dweights is None else dweights.new_empty(programs, *dweights.shape)
        sum_backward_kernel[(programs,)](
            tuple(parts), weights, scale, gate, factor, grad, product, dz, tuple(dparts), sums, n, D=d, WIDE=triton.next_power_of_2(d),
            COUNT=len(parts), HEADS=heads, WINDOW=window, APPLIED=applied, NORMED=normed, ROWS=rows,
            num_warps=warps)
        if sums is not None:
            torch.sum(sums, 0, out=dweights)

    class WeightedSum(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weights, scale, *parts):
            ctx.set_materialize_grads(False)
            u, normed = torch.empty_like(parts[0]), None if scale is None else torch.empty_like(parts[0])
            factor = None if scale is None else u.new_empty(u.shape[:-1], dtype=torch.float32)
            launch_sum(parts, weights, scale, out=u, normed=normed, factor=factor)
            ctx.save_for_backward(weights, scale, factor, *((u,) if weights is None else parts))
            return u, normed

        @staticmethod
        def backward(ctx, grad, product):
            weights, scale, factor, *parts = ctx.saved_tensors
            grad, product = (g if g is None else g.contiguous() for g in (grad, product))
            dweights = torch.empty_like(weights) if ctx.needs_input_grad[0] else None
            dparts = [torch.empty_like(x) for x in parts]
            launch_sum_backward(parts, weights, scale, None, factor, grad, product, None, dparts, dweights, applied=True)
            return dweights, None, *(dparts if weights is not None else dparts * (len(ctx.needs_input_grad) - 2))


@kernel(weighted_sum_reference, lambda c, device: (
    tuple(torch.ones(1, 64, c.model_dim, dtype=torch.bfloat16, device=device) for _ in range(3)), torch.ones(3, c.model_dim, device=device),
    torch.ones((), device=device)), eager=True)
def weighted_sum(parts: tuple[Tensor, ...], weights_CD: Tensor | None, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Sum and norm in one kernel, and one for all their gradients (Triton)."""
    return WeightedSum.apply(weights_CD, scale, *(x.contiguous() for x in parts))


def normed_linear_reference(parts: tuple[Tensor, ...], weights_CD: Tensor | None, scale: Tensor, matrix_OD: Tensor,
                            gate_HW: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """u and n of weighted_sum; -> u, n Matrix^T, None, and the gate's n[..., :W] Gate^T. A fast version may leave n's row factors
    [B, T] to the reader of the product: they come third then."""
    u, n = weighted_sum_reference(parts, weights_CD, scale)
    z = None if gate_HW is None else F.linear(n[..., : gate_HW.shape[1]], gate_HW.to(n.dtype))
    return u, F.linear(n, matrix_OD), None, z


if triton is not None:
    flat = lambda t: t.flatten(0, -2)

    def allocate_normed_linear(parts, weights, scale, matrix, gate):
        x = parts[0]
        return (torch.empty_like(x), x.new_empty(*x.shape[:-1], matrix.shape[0]), x.new_empty(x.shape[:-1], dtype=torch.float32),
                x.new_empty(*x.shape[:-1], 0 if gate is None else gate.shape[0]))

    def run_normed_linear(parts, weights, scale, matrix, gate, u, y, factor, z):
        launch_sum(parts, weights, scale, gate, u, factor=factor, z=None if gate is None else z)
        torch.mm(flat(u), matrix.T, out=flat(y))

    normed_linear_forward = fused_op(
        "normed_linear(Tensor[] parts, Tensor? weights, Tensor scale, Tensor matrix, Tensor? gate) -> (Tensor, Tensor, Tensor, Tensor)",
        allocate_normed_linear, run_normed_linear)
    sum_backward = fused_op(
        "sum_backward(Tensor[] parts, Tensor? weights, Tensor scale, Tensor? gate, Tensor factor, Tensor? grad, Tensor product, Tensor? dz,"
        " bool normed) -> (Tensor[], Tensor)",
        lambda parts, weights, *_: ([torch.empty_like(x) for x in (parts[:1] if weights is None else parts)],
                                    parts[0].new_empty(0) if weights is None else torch.empty_like(weights)),
        lambda parts, weights, scale, gate, factor, grad, product, dz, normed, dparts, dweights: launch_sum_backward(
            parts, weights, scale, gate, factor, grad, product, dz, dparts, None if weights is None else dweights, normed, normed))

    def save_normed_linear(ctx, inputs, output):
        parts, weights, scale, matrix, gate = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(weights, scale, matrix, gate, output[0], output[2], *parts)

    def grad_normed_linear(ctx, grad, dy, _, dz):
        weights, scale, matrix, gate, u, factor, *parts = ctx.saved_tensors
        grad, dy, dz = (g if g is None else g.contiguous() for g in (grad, dy, dz if gate is not None else None))
        dgate = None if dz is None else (flat((dz * factor[..., None]).to(u.dtype)).T @ flat(u)[:, : gate.shape[1]]).to(gate.dtype)
        product = (flat(dy) @ matrix).view(u.shape)
        dparts, dweights = sum_backward(parts, weights, scale, None if dz is None else gate, factor, grad, product, dz, False)
        if weights is None:
            dparts, dweights = dparts * len(parts), None
        return dparts, dweights, None, flat(dy).T @ flat(u), dgate

    normed_linear_forward.register_autograd(grad_normed_linear, setup_context=save_normed_linear)


@kernel(normed_linear_reference, lambda c, device: (
    tuple(torch.ones(1, 64, c.model_dim, dtype=torch.bfloat16, device=device) for _ in range(3)), torch.ones(3, c.model_dim, device=device),
    torch.ones((), device=device),
    torch.ones((c.num_heads + 2 * c.num_kv_heads) * c.head_dim, c.model_dim, dtype=torch.bfloat16, device=device),
    torch.ones(c.num_heads, c.gate_window, device=device)))
def normed_linear(parts: tuple[Tensor, ...], weights_CD: Tensor | None, scale: Tensor, matrix_OD: Tensor,
                  gate_HW: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The product of the sum itself: n is never stored. The norm's factors come third (Triton around a product of cuBLAS)."""
    u, y, factor, z = normed_linear_forward([x.contiguous() for x in parts], weights_CD, scale, matrix_OD.contiguous(), gate_HW)
    return u, y, factor, None if gate_HW is None else z


def qkv_heads_reference(qkv: Tensor, factor_BT: Tensor | None, gain_H: Tensor, cos: Tensor, sin: Tensor, kv_heads: int,
                        copies: int) -> tuple[Tensor, ...]:
    """Joint projection [B, T, (H + 2K) d] -> q [B, T, H, d] normed, rotated, times its head's gain; k [B, T, K copies, d]
    normed and rotated; v [B, T, K copies, d]; v again [B, T, K, d], for XSA: no sum of its two gradients in between.
    factor: of the values (norms undo any other), a constant to gradients; see normed_linear. cos, sin: [T, rotated dimensions / 2]
    of these positions. copies: of every key and value, side by side."""
    B, T, _ = qkv.shape
    q, k, v = qkv.view(B, T, len(gain_H) + 2 * kv_heads, -1).split((len(gain_H), kv_heads, kv_heads), 2)
    if factor_BT is not None:
        v = (v * factor_BT.detach()[..., None, None]).to(v.dtype)
    q = (rotate(norm(q), cos, sin).float() * gain_H[:, None]).to(qkv.dtype)
    return q, rotate(norm(k), cos, sin).repeat_interleave(copies, 2), v.repeat_interleave(copies, 2), v.contiguous()


QKV_BLOCKS, GATED_BLOCKS = ((8, 1), (32, 4)), ((16, 4), (16, 4))       # tokens and warps of a program, forward and backward

if triton is not None:
    @triton.jit
    def copy_values(source, amount, part, own, dsource, ok, D: tl.constexpr, COPIES: tl.constexpr, BACKWARD: tl.constexpr):
        """Forward: a value head times `amount` to its copies and to `own`. Backward: the sum of all their gradients."""
        if BACKWARD:
            total = tl.load(own, mask=ok, other=0.0).to(tl.float32)
            for copy in tl.static_range(COPIES):
                total += tl.load(part + copy * D, mask=ok, other=0.0).to(tl.float32)
            tl.store(dsource, (total * amount).to(dsource.dtype.element_ty), mask=ok)
        else:
            value = (tl.load(source, mask=ok, other=0.0).to(tl.float32) * amount).to(own.dtype.element_ty)
            tl.store(own, value, mask=ok)
            for copy in tl.static_range(COPIES):
                tl.store(part + copy * D, value, mask=ok)

    @triton.jit(do_not_specialize=["N", "T"])
    def qkv_heads_kernel(qkv, factor, gain, cos, sin, q, k, v, own, dqkv, dgain, N, T, eps, H: tl.constexpr, K: tl.constexpr,
                         D: tl.constexpr, WIDE: tl.constexpr, HALF: tl.constexpr, HALF_WIDE: tl.constexpr, BLOCK: tl.constexpr,
                         COPIES: tl.constexpr, BACKWARD: tl.constexpr):
        """BLOCK tokens of one head per program. Forward fills q, k, v, own; backward reads their gradients there and fills
        dqkv and each token's share of dgain. The rotated halves a and b have tiles of their own: all accesses are vectors."""
        slot, row = tl.program_id(0) % (H + 2 * K), tl.program_id(0) // (H + 2 * K) * BLOCK + tl.arange(0, BLOCK)
        i, j = tl.arange(0, HALF_WIDE)[None, :], tl.arange(0, WIDE)[None, :]
        token = row.to(tl.int64)[:, None]
        ok, turned = (row < N)[:, None] & (j < D), (row < N)[:, None] & (i < HALF)
        source = qkv + token * ((H + 2 * K) * D) + slot * D
        dsource = dqkv + token * ((H + 2 * K) * D) + slot * D
        if slot < H:
            part = q + token * (H * D) + slot * D
        elif slot < H + K:
            part = k + (token * K + slot - H) * (COPIES * D)
        else:
            part = v + (token * K + slot - H - K) * (COPIES * D)
        if slot >= H + K:
            value_amount = tl.full((BLOCK, 1), 1.0, tl.float32)
            if factor is not None:
                value_amount = tl.load(factor + row, mask=row < N, other=0.0)[:, None]
            copy_values(source + j, value_amount, part + j, own + (token * K + slot - H - K) * D + j, dsource + j, ok, D, COPIES, BACKWARD)
        else:
            rest = ok & (j >= 2 * HALF)
            c = tl.load(cos + (row % T)[:, None] * HALF + i, mask=turned, other=0.0)
            s = tl.load(sin + (row % T)[:, None] * HALF + i, mask=turned, other=0.0)
            x = tl.load(source + j, mask=ok, other=0.0).to(tl.float32)
            a = tl.load(source + i, mask=turned, other=0.0).to(tl.float32)
            b = tl.load(source + HALF + i, mask=turned, other=0.0).to(tl.float32)
            scale = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
            amount = scale
            if slot < H:
                amount *= tl.load(gain + slot)
            if BACKWARD:
                g, ga, gb = tl.zeros_like(x), tl.zeros_like(a), tl.zeros_like(b)
                for copy in tl.static_range(COPIES):
                    if slot >= (H if copy > 0 else 0):
                        g += tl.load(part + copy * D + j, mask=rest, other=0.0).to(tl.float32)
                        ga += tl.load(part + copy * D + i, mask=turned, other=0.0).to(tl.float32)
                        gb += tl.load(part + copy * D + HALF + i, mask=turned, other=0.0).to(tl.float32)
                da, db = ga * c - gb * s, ga * s + gb * c
                along = (tl.sum(g * x, 1) + tl.sum(a * da + b * db, 1))[:, None] * scale
                if slot < H:
                    tl.store(dgain + token * H + slot, along, mask=(row < N)[:, None])
                along *= scale / D
                tl.store(dsource + j, (amount * (g - x * along)).to(dqkv.dtype.element_ty), mask=rest)
                tl.store(dsource + i, (amount * (da - a * along)).to(dqkv.dtype.element_ty), mask=turned)
                tl.store(dsource + HALF + i, (amount * (db - b * along)).to(dqkv.dtype.element_ty), mask=turned)
            else:
                for copy in tl.static_range(COPIES):
                    if slot >= (H if copy > 0 else 0):
                        tl.store(part + copy * D + j, (amount * x).to(q.dtype.element_ty), mask=rest)
                        tl.store(part + copy * D + i, (amount * (a * c + b * s)).to(q.dtype.element_ty), mask=turned)
                        tl.store(part + copy * D + HALF + i, (amount * (b * c - a * s)).to(q.dtype.element_ty), mask=turned)

    def launch_qkv_heads(qkv, factor, gain, cos, sin, kv_heads, copies, q, k, v, own, dqkv, dgain, backward):
        n, heads, d, half = qkv.shape[0] * qkv.shape[1], len(gain), q.shape[-1], cos.shape[1]
        block, warps = QKV_BLOCKS[backward]
        qkv_heads_kernel[(triton.cdiv(n, block) * (heads + 2 * kv_heads),)](
            qkv, factor, gain, cos, sin, q, k, v, own, dqkv, dgain, n, qkv.shape[1], NORM_EPS, H=heads, K=kv_heads, D=d,
            WIDE=triton.next_power_of_2(d), HALF=half, HALF_WIDE=triton.next_power_of_2(max(half, 1)), BLOCK=block,
            COPIES=copies, BACKWARD=backward, num_warps=warps)

    def allocate_qkv_heads(qkv, factor, gain, cos, sin, kv_heads, copies):
        B, T, width = qkv.shape
        d = width // (len(gain) + 2 * kv_heads)
        return tuple(qkv.new_empty(B, T, count, d) for count in (len(gain), kv_heads * copies, kv_heads * copies, kv_heads))

    qkv_heads_forward = fused_op(
        "qkv_heads(Tensor qkv, Tensor? factor, Tensor gain, Tensor cos, Tensor sin, int kv_heads, int copies)"
        " -> (Tensor, Tensor, Tensor, Tensor)",
        allocate_qkv_heads, lambda x, *rest: launch_qkv_heads(x, *rest, x, rest[1], False))
    qkv_heads_backward = fused_op(
        "qkv_heads_backward(Tensor qkv, Tensor? factor, Tensor gain, Tensor cos, Tensor sin, int kv_heads, int copies,"
        " Tensor dq, Tensor dk, Tensor dv, Tensor dv2) -> (Tensor, Tensor)",
        lambda x, factor, gain, *_: (torch.empty_like(x), gain.new_empty(x.shape[0] * x.shape[1], len(gain))),
        lambda *args: launch_qkv_heads(*args[:7], *(g.contiguous() for g in args[7:11]), *args[11:], True))

    def save_qkv_heads(ctx, inputs, output):
        *tensors, ctx.kv_heads, ctx.copies = inputs
        ctx.save_for_backward(*tensors)

    def grad_qkv_heads(ctx, *grads):
        dx, dgain = qkv_heads_backward(*ctx.saved_tensors, ctx.kv_heads, ctx.copies, *grads)
        return dx, None, dgain.sum(0), *[None] * 4

    qkv_heads_forward.register_autograd(grad_qkv_heads, setup_context=save_qkv_heads)


@kernel(qkv_heads_reference, lambda c, device: (
    torch.ones(1, 64, (c.num_heads + 2 * c.num_kv_heads) * c.head_dim, dtype=torch.bfloat16, device=device),
    torch.ones(1, 64, device=device), torch.ones(c.num_heads, device=device), *rotary_table(64, c, 64, device), c.num_kv_heads,
    c.num_heads // c.num_kv_heads))
def qkv_heads(qkv: Tensor, factor_BT: Tensor | None, gain_H: Tensor, cos: Tensor, sin: Tensor, kv_heads: int,
              copies: int) -> tuple[Tensor, ...]:
    """One kernel for norms, rotary embedding and gain of all heads, and one for their gradients (Triton)."""
    return qkv_heads_forward(qkv.contiguous(), factor_BT, gain_H, cos, sin, kv_heads, copies)


def gated_heads_reference(y_BTHd: Tensor, v_BTKd: Tensor, z_BTH: Tensor, xsa: bool, scale: float, factor: float) -> Tensor:
    """Attention output without its own value's direction (if xsa), times factor * sigmoid(scale * z) per head."""
    y = remove_own_value(y_BTHd, v_BTKd) if xsa else y_BTHd
    return (y.float() * (factor * torch.sigmoid(z_BTH.float() * scale))[..., None]).to(y_BTHd.dtype)


if triton is not None:
    @triton.jit(do_not_specialize=["N"])
    def gated_heads_kernel(y, v, z, out, dy, dv, dz, N, scale, factor, G: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
                           WIDE: tl.constexpr, XSA: tl.constexpr, BLOCK: tl.constexpr, BACKWARD: tl.constexpr):
        """BLOCK tokens of one key/value group per program. Backward reads the gradient of the output in `out`."""
        token, group = (tl.program_id(0) // K * BLOCK + tl.arange(0, BLOCK)).to(tl.int64), tl.program_id(0) % K
        j = tl.arange(0, WIDE)[None, :]
        ok = (token < N)[:, None] & (j < D)
        at_v = token[:, None] * (K * D) + group * D + j
        length = tl.zeros((BLOCK, 1), tl.float32)
        unit = tl.zeros((BLOCK, WIDE), tl.float32)
        if XSA:
            unit = tl.load(v + at_v, mask=ok, other=0.0).to(tl.float32)
            length = tl.maximum(tl.sqrt(tl.sum(unit * unit, 1)), 1e-12)[:, None]
            unit = unit / length
        dunit = tl.zeros((BLOCK, WIDE), tl.float32)
        for g in tl.static_range(G):
            head = group * G + g
            at = (token[:, None] * (K * G) + head) * D + j
            at_z = token * (K * G) + head
            x = tl.load(y + at, mask=ok, other=0.0).to(tl.float32)
            along = tl.sum(x * unit, 1)[:, None]
            kept = x - along * unit
            s = tl.sigmoid(scale * tl.load(z + at_z, mask=token < N, other=0.0).to(tl.float32))[:, None]
            if BACKWARD:
                d = tl.load(out + at, mask=ok, other=0.0).to(tl.float32)
                ds = tl.sum(d * kept, 1)[:, None] * factor * scale * s * (1 - s)
                tl.store(dz + at_z[:, None], ds.to(dz.dtype.element_ty), mask=(token < N)[:, None])
                d = d * (factor * s)
                d_along = tl.sum(d * unit, 1)[:, None]
                tl.store(dy + at, (d - d_along * unit).to(dy.dtype.element_ty), mask=ok)
                dunit -= d_along * x + along * d
            else:
                tl.store(out + at, (kept * (factor * s)).to(out.dtype.element_ty), mask=ok)
        if BACKWARD and XSA:
            dunit = (dunit - tl.sum(dunit * unit, 1)[:, None] * unit) / length
            tl.store(dv + at_v, dunit.to(dv.dtype.element_ty), mask=ok)

    def launch_gated_heads(y, v, z, xsa, scale, factor, out, dy, dv, dz, backward):
        B, T, H, d = y.shape
        (block, warps), kv = GATED_BLOCKS[backward], v.shape[2]
        gated_heads_kernel[(triton.cdiv(B * T, block) * kv,)](
            y, v, z, out, dy, dv, dz, B * T, scale, factor, G=H // kv, K=kv, D=d, WIDE=triton.next_power_of_2(d), XSA=xsa,
            BLOCK=block, BACKWARD=backward, num_warps=warps)

    gated_heads_forward = fused_op(
        "gated_heads(Tensor y, Tensor v, Tensor z, bool xsa, float scale, float factor) -> Tensor",
        lambda y, v, z, xsa, scale, factor: torch.empty_like(y),
        lambda y, v, z, xsa, scale, factor, out: launch_gated_heads(y, v, z, xsa, scale, factor, out, y, v, z, False))
    gated_heads_backward = fused_op(
        "gated_heads_backward(Tensor y, Tensor v, Tensor z, bool xsa, float scale, float factor, Tensor grad) -> (Tensor, Tensor, Tensor)",
        lambda y, v, z, xsa, scale, factor, grad: (torch.empty_like(y), torch.empty_like(v) if xsa else torch.zeros_like(v),
                                                   torch.empty_like(z)),
        lambda y, v, z, xsa, scale, factor, grad, dy, dv, dz: launch_gated_heads(
            y, v, z, xsa, scale, factor, grad.contiguous(), dy, dv, dz, True))

    def save_gated_heads(ctx, inputs, output):
        y, v, z, *ctx.options = inputs
        ctx.save_for_backward(y, v, z)

    gated_heads_forward.register_autograd(
        lambda ctx, grad: (*gated_heads_backward(*ctx.saved_tensors, *ctx.options, grad), None, None, None), setup_context=save_gated_heads)


@kernel(gated_heads_reference, lambda c, device: (
    *(torch.ones(1, 64, *shape, dtype=torch.bfloat16, device=device)
      for shape in ((c.num_heads, c.head_dim), (c.num_kv_heads, c.head_dim), (c.num_heads,))), True, 0.5, 1.0))
def gated_heads(y_BTHd: Tensor, v_BTKd: Tensor, z_BTH: Tensor, xsa: bool, scale: float, factor: float) -> Tensor:
    """XSA and head gate in one kernel, all their gradients in another (Triton)."""
    return gated_heads_forward(y_BTHd.contiguous(), v_BTKd.contiguous(), z_BTH.contiguous(), xsa, scale, factor)


def leaky_mlp_reference(parts: tuple[Tensor, ...], scale: Tensor | None, up_MD: Tensor, down_DM: Tensor,
                        onto: bool) -> tuple[Tensor, Tensor]:
    """h = the sum of parts [B, T, D], n = h normed, times scale (no scale: n is the only part), hidden = leaky_relu(n Up^T, 0.5)^2
    [B, T, M] -> (h +, if onto and scaled) hidden Down^T [B, T, D], and hidden (no gradient enters there)."""
    h, n = weighted_sum_reference(parts, None, scale)
    hidden = F.leaky_relu(F.linear(h if n is None else n, up_MD), 0.5).square()
    out = F.linear(hidden, down_DM)
    return h + out if onto and n is not None else out, hidden.detach()


class Tiling(NamedTuple):
    """How a matrix product is cut: rows and 16-bit columns of a tile, pipeline stages, warps, programs per processor."""
    rows: int
    columns: int
    stages: int
    warps: int
    programs: int = 1


MLP_FORWARD, MLP_BACKWARD = Tiling(128, 128, 3, 4, 2), Tiling(128, 256, 3, 8)

if triton is not None:
    @triton.jit
    def square_leaky(x, SHIFT: tl.constexpr):
        """leaky_relu(x, 0.5)^2, rounded to a 16- or 32-bit float whose lowest bit is the sign of x."""
        sign = (x < 0).to(tl.int32) << SHIFT
        bits = (x * x * tl.where(x < 0, 0.25, 1.0)).to(tl.int32, bitcast=True) - sign + (1 << SHIFT)
        return (bits & -(2 << SHIFT) | sign).to(tl.float32, bitcast=True)

    @triton.jit
    def square_leaky_slope(hidden, SHIFT: tl.constexpr):
        """Derivative at x, read off square_leaky(x): 2 x = 2 sqrt(hidden), or x / 2 = -sqrt(hidden) where the sign is set."""
        h = hidden.to(tl.float32)
        return tl.sqrt(h) * (2 - 3 * (h.to(tl.int32, bitcast=True) >> SHIFT & 1)).to(tl.float32)

    @triton.jit(do_not_specialize=["M"])
    def leaky_mlp_kernel(a, b, hidden, out, M, N, K, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HALF: tl.constexpr,
                         DEPTH: tl.constexpr, SHIFT: tl.constexpr, BACKWARD: tl.constexpr):
        """Persistent product of a [M, K] with b^T (b [N, K]; backward: b [K, N]), its epilogue in half tiles while the next tile's
        loads run. Forward stores square_leaky of it; backward stores it times the slope that `hidden` tells."""
        across = tl.cdiv(N, COLUMNS)
        for tile in tl.range(tl.program_id(0), tl.cdiv(M, ROWS) * across, tl.num_programs(0), flatten=True):
            row, column = tile // across * ROWS, tile % across * COLUMNS
            total = tl.zeros((ROWS, COLUMNS), tl.float32)
            for k in range(0, K, DEPTH):
                if BACKWARD:
                    y = b.load([k, column])
                else:
                    y = b.load([column, k]).T
                total = tl.dot(a.load([row, k]), y, total, input_precision="ieee")
            left, right = tl.split(tl.permute(tl.reshape(total, (ROWS, 2, HALF)), (0, 2, 1)))
            if BACKWARD:
                h_left, h_right = hidden.load([row, column]), hidden.load([row, column + HALF])
                out.store([row, column], (left * square_leaky_slope(h_left, SHIFT)).to(out.dtype))
                out.store([row, column + HALF], (right * square_leaky_slope(h_right, SHIFT)).to(out.dtype))
            else:
                out.store([row, column], square_leaky(left, SHIFT).to(out.dtype))
                out.store([row, column + HALF], square_leaky(right, SHIFT).to(out.dtype))

    def launch_leaky_mlp(a_MK, b, hidden_MN, out_MN, backward, tiling):
        """Tensors reach the kernel as descriptors for TMA (Hopper and later): rows of multiples of 16 bytes."""
        (m, n), k, size = out_MN.shape, a_MK.shape[1], a_MK.element_size()
        rows, columns, depth = tiling.rows, tiling.columns * 2 // size, 128 // size
        cut = lambda t, *shape: TensorDescriptor.from_tensor(t, list(shape))
        chip = torch.cuda.get_device_properties(a_MK.device) if a_MK.is_cuda else None
        if chip and chip.major < 9:
            raise RuntimeError("no TMA: tiles through pointers would be slower than cuBLAS")
        processors = chip.multi_processor_count if chip else 1
        leaky_mlp_kernel[(min(processors * tiling.programs, triton.cdiv(m, rows) * triton.cdiv(n, columns)),)](
            cut(a_MK, rows, depth), cut(b, depth, columns) if backward else cut(b, columns, depth), cut(hidden_MN, rows, columns // 2),
            cut(out_MN, rows, columns // 2), m, n, k, ROWS=rows, COLUMNS=columns, HALF=columns // 2, DEPTH=depth,
            SHIFT=32 - 8 * size, BACKWARD=backward, num_warps=tiling.warps, num_stages=tiling.stages,
            maxnreg=min(255, 2048 // (tiling.warps * tiling.programs)))

    def allocate_leaky_mlp(parts, scale, up, down, onto):
        x = parts[0]
        return (torch.empty_like(x), x.new_empty(*x.shape[:-1], up.shape[0]), x.new_empty(0) if scale is None else torch.empty_like(x),
                x.new_empty(0 if scale is None else x.shape[:-1], dtype=torch.float32))

    def run_leaky_mlp(parts, scale, up, down, onto, out, hidden, n, factor):
        """The product is added onto the sum in place: a sum elsewhere would be copied first."""
        if scale is None:
            n = parts[0]
        else:
            launch_sum(parts, None, scale, out=out if onto else None, normed=n, factor=factor)
        launch_leaky_mlp(flat(n), up, flat(hidden), flat(hidden), False, MLP_FORWARD)
        flat(out).addmm_(flat(hidden), down.T, beta=int(onto))

    leaky_mlp_forward = fused_op(
        "leaky_mlp(Tensor[] parts, Tensor? scale, Tensor up, Tensor down, bool onto) -> (Tensor, Tensor, Tensor, Tensor)",
        allocate_leaky_mlp, run_leaky_mlp)
    leaky_mlp_backward = fused_op(
        "leaky_mlp_backward(Tensor grad, Tensor down, Tensor hidden) -> Tensor", lambda g, down, hidden: torch.empty_like(hidden),
        lambda g, down, hidden, out: launch_leaky_mlp(flat(g), down, flat(hidden), flat(out), True, MLP_BACKWARD))

    def save_leaky_mlp(ctx, inputs, output):
        parts, scale, up, down, ctx.onto = inputs
        ctx.count = len(parts)
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(scale, up, down, output[1], parts[0] if scale is None else output[2], output[3])

    def grad_leaky_mlp(ctx, grad, *_):
        scale, up, down, hidden, n, factor = ctx.saved_tensors
        grad, (_, _, wants_up, wants_down, _) = grad.contiguous(), ctx.needs_input_grad
        before = leaky_mlp_backward(grad, down, hidden)
        dh = (flat(before) @ up).view(n.shape)
        if scale is not None:
            dh = sum_backward([n], None, scale, None, factor, grad if ctx.onto else None, dh, None, True)[0][0]
        return ([dh] * ctx.count, None, flat(before).T @ flat(n) if wants_up else None,
                flat(grad).T @ flat(hidden) if wants_down else None, None)

    leaky_mlp_forward.register_autograd(grad_leaky_mlp, setup_context=save_leaky_mlp)


@kernel(leaky_mlp_reference, lambda c, device: (
    tuple(torch.ones(1, 64, c.model_dim, dtype=torch.bfloat16, device=device) for _ in range(2)), torch.ones((), device=device),
    *(torch.ones(shape, dtype=torch.bfloat16, device=device) for shape in ((c.mlp_dim, c.model_dim), (c.model_dim, c.mlp_dim))), True))
def leaky_mlp(parts: tuple[Tensor, ...], scale: Tensor | None, up_MD: Tensor, down_DM: Tensor, onto: bool) -> tuple[Tensor, Tensor]:
    """Activation and its gradient inside the matrix products (Triton); only n and hidden are kept for the backward pass."""
    return leaky_mlp_forward([x.contiguous() for x in parts], scale, up_MD.contiguous(), down_DM.contiguous(),
                             onto and scale is not None)[:2]


class Shared(torch.autograd.Function):
    """A tensor for `count` readers, whose gradients are added at once and not one by one."""

    @staticmethod
    def forward(ctx, x: Tensor, count: int) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for _ in range(count))

    @staticmethod
    def backward(ctx, *grads):
        return weighted_sum(tuple(g for g in grads if g is not None), None, None)[0], None


def past_attention_reference(q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor, keys_BPKd: Tensor, values_BPKd: Tensor,
                             position: Tensor, window: int) -> Tensor:
    """Causal attention of the T positions from `position` [1] on, each to the window of positions that ends with it.

    keys and values are rings of P >= window - 1 + T: position p lies at p % P. They already hold these positions' k and v,
    and get no gradient themselves.
    """
    T, start, device = q_BTHd.shape[1], int(position), q_BTHd.device
    past, i = torch.arange(max(start - window + 1, 0), start, device=device), torch.arange(start, start + T, device=device)
    k, v = (torch.cat((ring[:, past % ring.shape[1]], live), 1).transpose(1, 2)
            for ring, live in ((keys_BPKd, k_BTKd), (values_BPKd, v_BTKd)))
    i, j = i[:, None], torch.cat((past, i))
    return F.scaled_dot_product_attention(q_BTHd.transpose(1, 2), k, v, attn_mask=(j <= i) & (j > i - window),
                                          enable_gqa=q_BTHd.shape[2] != k.shape[1]).transpose(1, 2)


if triton is not None:
    @triton.jit(do_not_specialize=["T"])
    def past_attention_kernel(q, keys, values, y, lse, dy, delta, dq, position, T, P, window, scale, K: tl.constexpr,
                              G: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
                              BACKWARD: tl.constexpr):
        """M queries of one key/value group per program; the query of head g at position t is its row t G + g. Forward fills
        y and lse; backward fills dq, and delta = sum(y dy). lse is in base 2: scale contains log2 e."""
        pair, low = tl.program_id(1).to(tl.int64), tl.program_id(0) * M
        start = tl.load(position).to(tl.int32)
        m, j = low + tl.arange(0, M), tl.arange(0, WIDE)
        row = (pair // K * T + m // G) * (K * G) + pair % K * G + m % G
        at, ok = row[:, None] * D + j[None, :], (m < T * G)[:, None] & (j < D)[None, :]
        t = (start + m // G)[:, None]
        x = tl.load(q + at, mask=ok, other=0.0)
        total = tl.zeros((M, WIDE), tl.float32)
        if BACKWARD:
            grad, top = tl.load(dy + at, mask=ok, other=0.0), tl.load(lse + row, mask=m < T * G, other=0.0)
            change = tl.sum(grad.to(tl.float32) * tl.load(y + at, mask=ok, other=0.0).to(tl.float32), 1)
            tl.store(delta + row, change, mask=m < T * G)
        else:
            top, mass = tl.full((M,), -1e30, tl.float32), tl.zeros((M,), tl.float32)
        last = start + tl.minimum(T, (low + M - 1) // G + 1)
        for first in range(tl.maximum(start + low // G - window + 1, 0), last, N):
            n = first + tl.arange(0, N)
            there = ((pair // K * P + n % P) * K + pair % K)[:, None] * D + j[None, :]
            known = (n < last)[:, None] & (j < D)[None, :]
            k = tl.load(keys + there, mask=known, other=0.0)
            v = tl.load(values + there, mask=known, other=0.0)
            s = tl.dot(x, tl.trans(k), input_precision="ieee") * scale
            s = tl.where((n[None, :] <= t) & (n[None, :] > t - window), s, float("-inf"))
            if BACKWARD:
                ds = tl.exp2(s - top[:, None]) * (tl.dot(grad, tl.trans(v), input_precision="ieee") - change[:, None])
                total += tl.dot(ds.to(k.dtype), k, input_precision="ieee")
            else:
                higher = tl.maximum(top, tl.max(s, 1))
                p, fade = tl.exp2(s - higher[:, None]), tl.exp2(top - higher)
                mass = mass * fade + tl.sum(p, 1)
                total = total * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
                top = higher
        if BACKWARD:
            tl.store(dq + at, (total * (scale * 0.6931471805599453)).to(dq.dtype.element_ty), mask=ok)
        else:
            tl.store(y + at, (total / mass[:, None]).to(y.dtype.element_ty), mask=ok)
            tl.store(lse + row, top + tl.log2(mass), mask=m < T * G)

    @triton.jit(do_not_specialize=["T"])
    def past_attention_live_kernel(q, k, v, dy, lse, delta, dk, dv, T, window, scale, K: tl.constexpr, G: tl.constexpr,
                                   D: tl.constexpr, WIDE: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
        """Gradients of N live keys and values of one group per program, over the queries of its heads that see them."""
        pair, low = tl.program_id(1).to(tl.int64), tl.program_id(0) * N
        n, j = low + tl.arange(0, N), tl.arange(0, WIDE)
        here, known = ((pair // K * T + n) * K + pair % K)[:, None] * D + j[None, :], (n < T)[:, None] & (j < D)[None, :]
        key, value = tl.load(k + here, mask=known, other=0.0), tl.load(v + here, mask=known, other=0.0)
        dkey, dvalue = tl.zeros((N, WIDE), tl.float32), tl.zeros((N, WIDE), tl.float32)
        for first in range(low * G, tl.minimum(T, low + N - 1 + window) * G, M):
            m = first + tl.arange(0, M)
            row, inside, t = (pair // K * T + m // G) * (K * G) + pair % K * G + m % G, m < T * G, (m // G)[:, None]
            at, ok = row[:, None] * D + j[None, :], inside[:, None] & (j < D)[None, :]
            x, grad = tl.load(q + at, mask=ok, other=0.0), tl.load(dy + at, mask=ok, other=0.0)
            s = tl.dot(x, tl.trans(key), input_precision="ieee") * scale
            s = tl.where(inside[:, None] & (n[None, :] <= t) & (n[None, :] > t - window), s, float("-inf"))
            p = tl.exp2(s - tl.load(lse + row, mask=inside, other=0.0)[:, None])
            dvalue += tl.dot(tl.trans(p.to(grad.dtype)), grad, input_precision="ieee")
            change = tl.load(delta + row, mask=inside, other=0.0)[:, None]
            ds = p * (tl.dot(grad, tl.trans(value), input_precision="ieee") - change)
            dkey += tl.dot(tl.trans(ds.to(x.dtype)), x, input_precision="ieee")
        tl.store(dk + here, (dkey * (scale * 0.6931471805599453)).to(dk.dtype.element_ty), mask=known)
        tl.store(dv + here, dvalue.to(dv.dtype.element_ty), mask=known)

    def past_attention_sizes(q, k, window):
        """What both kernels are launched with."""
        d, kv = q.shape[3], k.shape[2]
        return (window, d ** -0.5 / math.log(2)), dict(K=kv, G=q.shape[2] // kv, D=d, WIDE=max(triton.next_power_of_2(d), 16),
                                                       M=64, N=64, num_warps=4, num_stages=2)

    def launch_past_attention(q, keys, values, y, lse, dy, delta, dq, position, window, backward):
        numbers, sizes = past_attention_sizes(q, keys, window)
        T, P = q.shape[1], keys.shape[1]
        past_attention_kernel[(triton.cdiv(T * sizes["G"], 64), len(q) * sizes["K"])](
            q, keys, values, y, lse, dy, delta, dq, position, T, P, *numbers, **sizes, BACKWARD=backward)

    def launch_past_attention_backward(q, k, v, keys, values, position, window, y, lse, dy, dq, dk, dv):
        delta, (numbers, sizes) = torch.empty_like(lse), past_attention_sizes(q, k, window)
        launch_past_attention(q, keys, values, y, lse, dy, delta, dq, position, window, True)
        past_attention_live_kernel[(triton.cdiv(q.shape[1], 64), len(q) * sizes["K"])](
            q, k, v, dy, lse, delta, dk, dv, q.shape[1], *numbers, **sizes)

    past_attention_forward = fused_op(
        "past_attention(Tensor q, Tensor k, Tensor v, Tensor keys, Tensor values, Tensor position, int window) -> (Tensor, Tensor)",
        lambda q, *_: (torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)),
        lambda q, k, v, keys, values, position, window, y, lse: launch_past_attention(
            q, keys, values, y, lse, y, lse, y, position, window, False))
    past_attention_backward = fused_op(
        "past_attention_backward(Tensor q, Tensor k, Tensor v, Tensor keys, Tensor values, Tensor position, int window, Tensor y, "
        "Tensor lse, Tensor dy) -> (Tensor, Tensor, Tensor)",
        lambda q, k, v, *_: tuple(map(torch.empty_like, (q, k, v))),
        lambda q, k, v, keys, values, position, window, y, lse, dy, dq, dk, dv: launch_past_attention_backward(
            q, k, v, keys, values, position, window, y, lse, dy.contiguous(), dq, dk, dv))

    def save_past_attention(ctx, inputs, output):
        *tensors, ctx.window = inputs
        ctx.save_for_backward(*tensors, *output)

    def grad_past_attention(ctx, grad, _):
        *tensors, y, lse = ctx.saved_tensors
        return *past_attention_backward(*tensors, ctx.window, y, lse, grad), None, None, None, None

    past_attention_forward.register_autograd(grad_past_attention, setup_context=save_past_attention)


@kernel(past_attention_reference, lambda c, device: (
    *(torch.ones(1, length, heads, c.head_dim, dtype=torch.bfloat16, device=device)
      for length, heads in ((64, c.num_heads), (64, c.num_kv_heads), (64, c.num_kv_heads), (127, c.num_kv_heads), (127, c.num_kv_heads))),
    torch.full((1,), 100, device=device), 64))
def past_attention(q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor, keys_BPKd: Tensor, values_BPKd: Tensor, position: Tensor,
                   window: int) -> Tensor:
    """The same on any CUDA GPU, wherever `position` on the device says: one CUDA graph serves all positions (Triton)."""
    return past_attention_forward(*(t.contiguous() for t in (q_BTHd, k_BTKd, v_BTKd)), keys_BPKd, values_BPKd, position, window)[0]


@torch.no_grad()
def adamw_reference(weights: Tensor, low: Tensor, gradient: Tensor, first: Tensor | None, second: Tensor, step: int, lr: float,
                    beta1: float, beta2: float, decay: float) -> Tensor:
    """AdamW's step number `step` (from 1), eps 1e-10, in place; low: a copy of the weights in the gradient's precision, or they
    themselves. first: None where beta1 is 0."""
    g = gradient.float()
    m = g if first is None else first.lerp_(g, 1 - beta1)
    second.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    weights.mul_(1 - lr * decay).addcdiv_(m, (second / (1 - beta2 ** step)).sqrt_().add_(1e-10), value=-lr / (1 - beta1 ** step))
    return low.copy_(weights)


if triton is not None:
    @triton.jit
    def adamw_kernel(weights, low, gradient, first, second, N, keep, rate, beta1, beta2, root, MOMENTUM: tl.constexpr,
                     BLOCK: tl.constexpr):
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        ok = i < N
        g = tl.load(gradient + i, mask=ok, other=0.0).to(tl.float32)
        m = g
        if MOMENTUM:
            m = beta1 * tl.load(first + i, mask=ok, other=0.0) + (1 - beta1) * g
            tl.store(first + i, m, mask=ok)
        v = beta2 * tl.load(second + i, mask=ok, other=0.0) + (1 - beta2) * g * g
        w = keep * tl.load(weights + i, mask=ok, other=0.0) - rate * m / (root * tl.sqrt(v) + 1e-10)
        tl.store(second + i, v, mask=ok)
        tl.store(weights + i, w, mask=ok)
        tl.store(low + i, w.to(low.dtype.element_ty), mask=ok)


@kernel(adamw_reference, lambda c, device: (
    torch.ones(2, 64, device=device), *(torch.ones(2, 64, dtype=torch.bfloat16, device=device) for _ in range(2)),
    None if c.ttt_beta1 == 0 else torch.ones(2, 64, device=device), torch.ones(2, 64, device=device), 1, 1e-4, c.ttt_beta1, 0.99, 0.5))
def adamw(weights: Tensor, low: Tensor, gradient: Tensor, first: Tensor | None, second: Tensor, step: int, lr: float, beta1: float,
          beta2: float, decay: float) -> Tensor:
    """Everything read once and written once; contiguous tensors (Triton)."""
    adamw_kernel[(triton.cdiv(weights.numel(), 1024),)](
        weights, low, gradient, second if first is None else first, second, weights.numel(), 1 - lr * decay, lr / (1 - beta1 ** step),
        beta1, beta2, (1 - beta2 ** step) ** -0.5, MOMENTUM=first is not None, BLOCK=1024)
    return low


TRELLIS_CODES = {       # states -> parity-check polynomials h0, h1 (Ungerboeck 1982, one-dimensional modulation)
    1: (0o1, 0o0), 4: (0o5, 0o2), 8: (0o13, 0o4), 16: (0o23, 0o4), 32: (0o45, 0o10), 64: (0o103, 0o24)}
TRELLIS_BLOCK = 128         # columns between two decisions


def trellis_next(states: int) -> np.ndarray:
    """The state after each state and branch, int64 [states, 2]. An integer n may follow state s if n and s are both even
    or both odd; its branch is the second lowest bit of n, so the four classes n mod 4 are told apart by state and branch."""
    h0, h1 = (h >> 1 for h in TRELLIS_CODES[states])
    s = np.arange(states)
    return np.stack([s >> 1 ^ (s & 1) * h0 ^ branch * h1 for branch in (0, 1)], 1)


def trellis_block_reference(w_NRB: Tensor, u_NBB: Tensor, step_NR: Tensor, shrink_NR: Tensor, state_NR: Tensor,
                            states: int) -> tuple[Tensor, Tensor]:
    """GPTQ over a few columns with integers from a trellis (trellis-coded quantisation: Marcellin, Fischer 1990).

    Viterbi: of all allowed sequences, nearly the one of least sum((x - n)^2 + shrink n^2) / U_jj^2, x the weight in steps
    after the errors of the columns before it. Every survivor carries its own errors. w float32 [N, R, B], u the upper
    factor's rows and columns, state int64 [N, R]: before the first column. Returns the errors (x - n) step / U_jj of the
    best sequence, float32 [N, R, B], and its last state.
    """
    nexts = torch.from_numpy(trellis_next(states)).to(w_NRB.device)
    sources = torch.stack([nexts[:, b].argsort() for b in (0, 1)], 1)       # [state after, branch] -> state before
    sources = sources[:, :, None, None]
    odd = (torch.arange(states, device=w_NRB.device) & 1)[:, None, None]
    part, step, shrink = w_NRB.repeat(states, 1, 1, 1), step_NR.float(), shrink_NR
    cost = torch.full(part.shape[:3], 1e30, device=w_NRB.device).scatter_(0, state_NR[None], 0.0)
    for j in range(w_NRB.shape[2]):
        x, scale = part[..., j] / step, u_NBB[:, j, j, None]
        n = [4 * ((x / (1 + shrink) - kind) / 4 + 0.5).floor_().clamp_(-31, 31) + kind for kind in (odd, odd + 2)]
        costs = [cost + ((x - m).square() + shrink * m.square()) / scale.square() for m in n]
        cost, branch = torch.stack([costs[b].index_select(0, sources[:, b].flatten()) for b in (0, 1)]).min(0)
        cost = cost - cost.amin(0)
        before = torch.where(branch.bool(), sources[:, 1], sources[:, 0])
        error = torch.where(branch.bool(), (x - n[1]).gather(0, before), (x - n[0]).gather(0, before)) * step / scale
        part = part.gather(0, before[..., None].expand_as(part))
        part[..., j] = error
        part[..., j + 1:] -= error[..., None] * u_NBB[:, None, j, j + 1:]
    last = cost.argmin(0)
    return part.gather(0, last[None, ..., None].expand_as(part[:1]))[0], last


if triton is not None:
    @triton.jit
    def trellis_kernel(w, u, step, shrink, state, errors, last, R, width, S: tl.constexpr, B: tl.constexpr, H0: tl.constexpr,
                       H1: tl.constexpr):
        """One row of one matrix per program; all survivors' weights stay in registers."""
        row = tl.program_id(0).to(tl.int64)
        u += row // R * width * width
        j, s = tl.arange(0, B), tl.arange(0, S)
        top = s // ((S + 1) // 2)
        source0 = 2 * (s ^ top * H0) + top
        source1 = 2 * (s ^ top * H0 ^ H1) + top
        odd = (s % 2).to(tl.float32)
        part = tl.load(w + row * width + j, mask=j < width, other=0.0)[None, :] + tl.zeros((S, B), tl.float32)
        cost = tl.where(s == tl.load(state + row), 0.0, 1e30)
        size, small = tl.load(step + row), tl.load(shrink + row)
        for i in range(width):
            scale = tl.load(u + i * width + i)
            ahead = tl.load(u + i * width + j, mask=j < width, other=0.0)
            x = tl.sum(tl.where(j[None, :] == i, part, 0.0), 1) / size
            y = x / (1 + small)
            n0 = 4 * tl.minimum(tl.maximum(tl.floor((y - odd) / 4 + 0.5), -31.0), 31.0) + odd
            n1 = 4 * tl.minimum(tl.maximum(tl.floor((y - odd - 2) / 4 + 0.5), -31.0), 31.0) + odd + 2
            cost0 = tl.gather(cost + ((x - n0) * (x - n0) + small * n0 * n0) / (scale * scale), source0, 0)
            cost1 = tl.gather(cost + ((x - n1) * (x - n1) + small * n1 * n1) / (scale * scale), source1, 0)
            second = cost1 < cost0
            cost = tl.where(second, cost1, cost0)
            cost -= tl.min(cost, 0)
            before = tl.where(second, source1, source0)
            error = tl.where(second, tl.gather(x - n1, source1, 0), tl.gather(x - n0, source0, 0)) * size / scale
            part = tl.gather(part, tl.broadcast_to(before[:, None], (S, B)), 0)
            part = tl.where((j == i)[None, :], error[:, None],
                            tl.where((j > i)[None, :], part - error[:, None] * ahead[None, :], part))
        best = tl.argmin(cost, 0)
        tl.store(errors + row * width + j, tl.sum(tl.where((s == best)[:, None], part, 0.0), 0), mask=j < width)
        tl.store(last + row, best)


@kernel(trellis_block_reference, lambda c, device: (
    torch.ones(1, 16, TRELLIS_BLOCK, device=device), torch.eye(TRELLIS_BLOCK, device=device)[None], torch.ones(1, 16, device=device),
    torch.zeros(1, 16, device=device), torch.zeros(1, 16, dtype=torch.int64, device=device), c.trellis_states or 4))
def trellis_block(w_NRB: Tensor, u_NBB: Tensor, step_NR: Tensor, shrink_NR: Tensor, state_NR: Tensor,
                  states: int) -> tuple[Tensor, Tensor]:
    """A program for every row, its survivors in registers (Triton)."""
    w, u, step, shrink, state = (t.contiguous() for t in (w_NRB, u_NBB, step_NR.float(), shrink_NR, state_NR))
    N, R, width = w.shape
    errors, last = torch.empty_like(w), torch.empty_like(state)
    block = triton.next_power_of_2(width)
    h0, h1 = (h >> 1 for h in TRELLIS_CODES[states])
    trellis_kernel[(N * R,)](w, u, step, shrink, state, errors, last, R, width, S=states, B=block, H0=h0, H1=h1,
                             num_warps=max(1, min(8, states * block // 1024)))
    return errors, last


# ======================================================================================================================
# MODEL: one forward, one attention, for training, evaluation, calibration and test-time training
# ======================================================================================================================

NORM_EPS = torch.finfo(torch.float32).eps       # the same in every precision

# Parameters are stacked over layers, so that Muon sees equal shapes in one batch and few tensors move between ranks;
# in files every layer's part has its own name. One row: parameter -> names of its consecutive groups of L entries.
PER_LAYER_NAMES = {
    "qo_bank": ("blocks.{}.attn.c_q.weight", "blocks.{}.attn.proj.weight"),
    "kv_bank": ("blocks.{}.attn.c_k.weight", "blocks.{}.attn.c_v.weight"),
    "mlp_up_bank": ("blocks.{}.mlp.fc.weight",),
    "mlp_down_bank": ("blocks.{}.mlp.proj.weight",),
    "q_gain": ("blocks.{}.attn.q_gain",),
    "attn_gate_w": ("blocks.{}.attn.attn_gate_w",),
    "attn_scale": ("blocks.{}.attn_scale",),
    "mlp_scale": ("blocks.{}.mlp_scale",),
    "resid_mix": ("blocks.{}.resid_mix",),
}
FILE_NAMES = {"tok_emb": "tok_emb.weight", "lm_head": "lm_head.weight", "smear_gate": "smear_gate.weight"}


class LoRA(NamedTuple):
    """Low-rank adapter per batch row: x [B, T, I] -> (y +) scale * x A^T B^T, with a [B, R, I], b [B, O, R]."""
    a: Tensor
    b: Tensor
    scale: float

    def rows_times(self, scale_O: Tensor) -> LoRA:
        return self._replace(b=self.b * scale_O.to(self.b.dtype)[:, None])

    def __call__(self, x_BTI: Tensor, y_BTO: Tensor | None = None) -> Tensor:
        low, up = torch.bmm(x_BTI, self.a.to(x_BTI.dtype).mT), self.b.to(x_BTI.dtype).mT
        return torch.bmm(low, up) * self.scale if y_BTO is None else torch.baddbmm(y_BTO, low, up, alpha=self.scale)


class PassAdapters(NamedTuple):
    """Adapters of one pass over a layer; None: none. The o and mlp adapters read the normed inputs n and run beside."""
    q: LoRA | None = None
    k: LoRA | None = None
    v: LoRA | None = None
    o: LoRA | None = None
    mlp: LoRA | None = None


class Adapters(NamedTuple):
    """Everything that test-time training adds to a forward: one PassAdapters per pass slot, one LoRA on the head."""
    passes: tuple[PassAdapters, ...]
    head: LoRA | None = None
    caps: Tensor | None = None      # [2]: softcaps of positive and of negative logits, instead of LOGIT_SOFTCAP


class Past(NamedTuple):
    """Rings of cached keys and values [B, P, K, d] at one pass slot: position p lies at p % P."""
    k: Tensor
    v: Tensor
    position: Tensor        # [1]: of the first live token
    at: Tensor              # [T]: places of the live tokens
    window: int             # positions that one position sees, itself included


class Layer(NamedTuple):
    """One layer's tensors, matrices in the compute precision, and the skip that enters this pass (or None)."""
    qkv: Tensor             # [(H + 2K) d, D]: one product for queries, keys and values
    o: Tensor               # [D, D], its rows times attn_scale: the scale's gradient then needs no pass over activations
    up: Tensor              # [M, D]
    down: Tensor            # [D, M], its rows times mlp_scale
    q_gain: Tensor          # [H]
    gate: Tensor | None     # [H, window or D]
    attn_scale: Tensor      # [D]: for adapters beside o
    mlp_scale: Tensor       # [D]: for adapters beside down
    mix: Tensor             # [2, D]: of the stream and of x0
    depth_scale: Tensor     # []
    lane_keep: Tensor | None    # [2]: what each lane keeps of itself
    lane_add: Tensor | None     # [source, lane]


class Skip(NamedTuple):
    x: Tensor
    weight: Tensor          # [D]
    gate: Tensor | None     # [D]


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), eps=NORM_EPS)


def linear(x: Tensor, weight: Tensor, adapter: LoRA | None = None) -> Tensor:
    """x W^T plus an adapter's part: the only place where an adapter meets a matrix."""
    y = F.linear(x, weight)
    return y if adapter is None else adapter(x, y)


def rotary_table(length: int, config: Config, context: int, device) -> tuple[Tensor, Tensor]:
    """cos and sin [length, ROPE_DIMS/2], float32; with ROPE_YARN the base grows once context exceeds training's."""
    dims, base = config.rope_dims, config.rope_base
    if config.rope_yarn and context > config.rope_train_seq_len and dims > 2:
        base *= (context / config.rope_train_seq_len) ** (dims / (dims - 2))
    frequencies = base ** -(torch.arange(0, dims, 2, device=device, dtype=torch.float64) / max(dims, 1))
    angles = torch.arange(length, device=device, dtype=torch.float64)[:, None] * frequencies
    return angles.cos().float(), angles.sin().float()


def rotate(x_BTHd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the first 2*cos.shape[1] dimensions of each head, as two halves."""
    half = cos.shape[1]
    if half == 0:
        return x_BTHd
    cos, sin = cos[:, None], sin[:, None]
    a, b, rest = x_BTHd[..., :half].float(), x_BTHd[..., half: 2 * half].float(), x_BTHd[..., 2 * half:]
    return torch.cat(((a * cos + b * sin).to(rest.dtype), (b * cos - a * sin).to(rest.dtype), rest), -1)


def remove_own_value(y_BTHd: Tensor, v_BTKd: Tensor) -> Tensor:
    """XSA: each query head's output loses its component along its own position's value vector."""
    B, T, H, d = y_BTHd.shape
    v = F.normalize(v_BTKd.float(), dim=-1)[:, :, :, None]
    y = y_BTHd.float().view(B, T, v.shape[2], -1, d)
    return (y - (y * v).sum(-1, keepdim=True) * v).view(B, T, H, d).to(y_BTHd.dtype)


def packed(*tensors_1Tnd: Tensor) -> list[Tensor]:
    """The one packed row of each. As a view: the gradient of [0] is a copy into zeros."""
    return [t.squeeze(0) for t in tensors_1Tnd]


def attend_fa3(q, k, v, segments: Segments | None, window: int = 0) -> Tensor:
    """FlashAttention 3 (Hopper). q [B, T, H, d], k and v [B, T, K, d] -> [B, T, H, d]."""
    from flash_attn_interface import flash_attn_func, flash_attn_varlen_func
    limits = {"causal": True, "window_size": (window - 1, 0) if window else (-1, -1),
              "deterministic": torch.are_deterministic_algorithms_enabled()}        # of its backward
    if segments is None:
        y = flash_attn_func(q, k, v, **limits)
    else:
        cu, longest = segments[:2]
        y = flash_attn_varlen_func(*packed(q, k, v), cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest,
                                   max_seqlen_k=longest, **limits)[None]
    return y


def attend_varlen(q, k, v, segments: Segments | None, window: int = 0) -> Tensor:
    """PyTorch's own variable-length attention (2.10 and later, any CUDA GPU with FlashAttention 2)."""
    from torch.nn.attention.varlen import varlen_attn
    known = inspect.signature(varlen_attn).parameters
    if segments is None or window and "window_size" not in known:
        return attend_sdpa(q, k, v, segments, window)
    groups = q.shape[2] // k.shape[2]
    options = {"window_size": (window - 1, 0)} if "window_size" in known else {"is_causal": True}
    if "enable_gqa" in known:
        options["enable_gqa"] = groups > 1
    elif groups > 1:
        k, v = (t.repeat_interleave(groups, 2) for t in (k, v))
    cu, longest = segments[:2]
    return varlen_attn(*packed(q, k, v), cu, cu, longest, longest, **options)[None]


def attend_sdpa(q, k, v, segments: Segments | None, window: int = 0) -> Tensor:
    """scaled_dot_product_attention, document by document: the block-causal mask without ever storing it."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if segments is None:
        return attend_rows(q, k, v, window).transpose(1, 2)
    cuts = torch.unique(segments.cu_seqlens).tolist()
    parts = [attend_rows(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], window) for a, b in zip(cuts, cuts[1:])]
    return torch.cat(parts, 2).transpose(1, 2)


def attend_rows(q_BHTd: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Causal attention; with a window, strip by strip of that many queries."""
    call = functools.partial(F.scaled_dot_product_attention, enable_gqa=q_BHTd.shape[1] != k.shape[1])
    T, parts = q_BHTd.shape[2], []
    if not 0 < window < T:
        return call(q_BHTd, k, v, is_causal=True)
    for a in range(0, T, window):
        first, b = max(a - window + 1, 0), min(a + window, T)
        i, j = torch.arange(a, b, device=k.device)[:, None], torch.arange(first, b, device=k.device)
        parts.append(call(q_BHTd[:, :, a:b], k[:, :, first:b], v[:, :, first:b], attn_mask=(j <= i) & (j > i - window)))
    return torch.cat(parts, 2)


ATTENTION = {"fa3": attend_fa3, "varlen": attend_varlen, "sdpa": attend_sdpa}


def choose_attention(config: Config, device: torch.device) -> str:
    """The fastest backend that this machine has, or the one asked for; raises UserError when that one is missing."""
    def have(module: str) -> bool:
        try:
            __import__(module)
        except Exception:           # a broken wheel raises anything from OSError up
            return False
        return True
    def repeats() -> bool:          # not every build of FlashAttention 3 has the switch for its backward
        from flash_attn_interface import flash_attn_varlen_func
        return not config.deterministic or "deterministic" in inspect.signature(flash_attn_varlen_func).parameters
    cuda = device.type == "cuda"
    usable = {"fa3": cuda and torch.cuda.get_device_capability(device)[0] == 9 and have("flash_attn_interface") and repeats(),
              "varlen": cuda and have("torch.nn.attention.varlen"), "sdpa": True}
    if config.attention_backend == "auto":
        return next(name for name, ok in usable.items() if ok)
    if not usable[config.attention_backend]:
        raise UserError(f"ATTENTION_BACKEND={config.attention_backend} is not usable here: expected auto, or one of "
                        + ", ".join(name for name, ok in usable.items() if ok))
    return config.attention_backend


class PassShape(NamedTuple):
    """What decides the code of a pass, and nothing else: equal shapes share one compiled graph."""
    kind: str               # "sequential", "parallel" (GPT-J) or "lanes"
    xsa: bool
    heads: int
    kv_heads: int
    kv_copies: int          # of every key and value head: FA3 adds gradients of grouped heads atomically, in float32, slowly
    gate_kind: str          # "", "sparse", "full", "out_proj", "out_input"
    gate_window: int
    gate_scale: float
    attention: str


def attention(parts: tuple[Tensor, ...], weights_CD: Tensor | None, w: Layer, segments, rope, shape: PassShape, adapter: PassAdapters,
              tap, past: Past | None = None) -> tuple[Tensor, Tensor]:
    """u, the weighted sum of parts [B, T, D], and the gated, document-masked attention of u normed, output projection and scale included.

    With a past: the positions before these are read from it; these positions' keys and values are written there.
    """
    B, T, D = parts[0].shape
    if tap or any(adapter) or shape.gate_kind in ("full", "out_proj"):
        u, n = weighted_sum(parts, weights_CD, w.depth_scale)
        qkv, factor, z = linear(n, w.qkv), None, None
        if adapter.q or adapter.k or adapter.v:
            split = qkv.split((D, *[(qkv.shape[-1] - D) // 2] * 2), -1)
            qkv = torch.cat([a(n, part) if a else part for a, part in zip(adapter[:3], split)], -1)
        if w.gate is not None:
            z = F.linear((qkv if shape.gate_kind == "out_proj" else n)[..., : w.gate.shape[1]], w.gate.to(n.dtype))
    else:
        u, qkv, factor, z = normed_linear(parts, weights_CD, w.depth_scale, w.qkv, w.gate)
    q, k, v, own = qkv_heads(qkv, factor, w.q_gain, *rope, shape.kv_heads, shape.kv_copies if past is None else 1)
    if past is not None:
        past.k.index_copy_(1, past.at, k.detach())
        past.v.index_copy_(1, past.at, v.detach())
        y = past_attention(q, k, v, past.k, past.v, past.position, past.window)
    else:
        y = ATTENTION[shape.attention](q, k, v, segments, segments.window if segments else 0)
    if z is not None:
        y = gated_heads(y, own, z, shape.xsa, shape.gate_scale, 2.0 if shape.gate_kind.startswith("out") else 1.0)
    elif shape.xsa:
        y = remove_own_value(y, own)
    y = y.reshape(B, T, D)
    if tap:
        tap("attn", n)
        tap("attn.proj", y)
    out = linear(y, w.o)
    return u, out if adapter.o is None else adapter.o.rows_times(w.attn_scale)(n, out)


def mlp(parts: tuple[Tensor, ...], w: Layer, adapter: PassAdapters, tap, onto: bool = False) -> Tensor:
    """With h, the sum of parts, and n, h normed: (h +) leaky_relu(n Up^T, 0.5)^2 Down^T times mlp_scale."""
    if adapter.mlp is None and not tap:
        return leaky_mlp(parts, w.depth_scale, w.up, w.down, onto)[0]
    h, n = weighted_sum(parts, None, w.depth_scale)
    out, hidden = leaky_mlp((n,), None, w.up, w.down, False)
    if tap:
        tap("mlp.fc", n)
        tap("mlp.proj", hidden)
    out = h + out if onto else out
    return out if adapter.mlp is None else adapter.mlp.rows_times(w.mlp_scale)(n, out)


NO_ADAPTERS = PassAdapters()


def block(x: Tensor, lane: Tensor | None, x0: Tensor, skip: Skip | None, w: Layer, segments, rope, shape: PassShape,
          adapter: PassAdapters = NO_ADAPTERS, tap=None, past: Past | None = None):
    """One pass over a layer -> (x, lane). x: the stream (with two lanes: the attention lane).

    lane: the MLP lane or None. A U-Net skip is merged into x first. tap(role, input) sees the input of every matrix
    (calibration).
    """
    dtype, stream, weights = x.dtype, (x,), w.mix
    if skip is not None:
        keep = torch.ones_like(skip.weight) if skip.gate is None else torch.sigmoid(skip.gate)
        stream, merge = (x, skip.x), torch.stack((keep, skip.weight if skip.gate is None else skip.weight * (1 - keep)))
        if shape.kind == "lanes":
            x = weighted_sum(stream, merge, None)[0]
            stream = (x,)
        else:
            weights = torch.cat((merge * w.mix[:1], w.mix[1:]))
    u, att = attention((*stream, x0), weights, w, segments, rope, shape, adapter, tap, past)
    if shape.kind == "sequential":
        return mlp((u, att), w, adapter, tap, onto=True), None
    out = mlp((u if shape.kind == "parallel" else lane,), w, adapter, tap)
    if shape.kind == "parallel":
        return u + att + out, None
    keep, add = w.lane_keep, w.lane_add
    return ((keep[0] * x + add[0, 0] * att + add[1, 0] * out).to(dtype),
            (keep[1] * lane + add[0, 1] * att + add[1, 1] * out).to(dtype))


def embed(ids_BT: Tensor, table: Tensor, gate: Tensor | None, strength: Tensor | None, dtype: torch.dtype,
          fresh_BT: Tensor | None = None) -> Tensor:
    """Token embedding, SmearGate and norm. A BOS (and where `fresh`) takes nothing from the token before it."""
    x = F.embedding(ids_BT, table).to(dtype)
    if gate is not None:
        z = F.linear(x[..., : gate.shape[1]], gate.to(dtype)).float()
        follows = ids_BT != BOS if fresh_BT is None else (ids_BT != BOS) & ~fresh_BT
        amount = strength * torch.sigmoid(z) * follows[..., None]
        x = (x + amount * F.pad(x, (0, 0, 1, 0))[:, :-1]).to(dtype)
    return norm(x)


def head_losses(x_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor, cap: float, adapter: LoRA | None = None, tap=None,
                caps: Tensor | None = None, hints_BT: Tensor | None = None) -> Tensor:
    """Cross-entropy in nats of every position, float32 [B, T]. caps: of positive and negative logits (PR 1923).

    hints_BT: other tokens; then [2, B, T], the second of these, without gradient.
    """
    n = norm(x_BTD)
    if tap:
        tap("head", n)
    logits = linear(n, weight_VD, adapter)
    above, below = (cap, cap) if caps is None else caps
    capped = lambda z: torch.where(z > 0, above * torch.tanh(z / above), below * torch.tanh(z / below))
    if caps is None:
        losses = softcap_ce(logits.flatten(0, 1), targets_BT.flatten(), cap).view(targets_BT.shape)
    else:
        losses = F.cross_entropy(capped(logits.float()).flatten(0, 1), targets_BT.flatten(), reduction="none").view(targets_BT.shape)
    if hints_BT is None:
        return losses
    target, hint = capped(logits.detach().gather(2, torch.stack((targets_BT, hints_BT), 2)).float()).unbind(2)
    return torch.stack((losses, (losses + target - hint).detach()))


def adapters_of(adapters: Adapters | None) -> list[LoRA]:
    if adapters is None:
        return []
    return [lora for part in (*adapters.passes, (adapters.head,)) for lora in part if lora is not None]


def mark_flexible(*tensors: Tensor | None):
    """Tell the compiler that rows and positions (the first two dimensions) vary: one graph for all batches of adapters."""
    for t in tensors:
        if t is not None:
            for i in range(min(t.ndim, 2)):
                torch._dynamo.maybe_mark_dynamic(t, i)


class GPT(nn.Module):
    """The network of spec model.md: depth recurrence with U-Net skips, XSA, head gates, parallel residuals.

    Parameters are float32 masters; `dtype` is the compute precision.
    """

    def __init__(self, config: Config, device: torch.device, attention_name: str = "sdpa", compiled: bool = False):
        super().__init__()
        c = self.config = config
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.attention_name = attention_name
        L, D, H, kv, M = c.num_layers, c.model_dim, c.num_heads, c.num_kv_heads * c.head_dim, c.mlp_dim
        passes = c.pass_order(c.num_loops)[1]
        g = torch.Generator().manual_seed(c.seed)
        ones = lambda *shape: nn.Parameter(torch.ones(shape))
        zeros = lambda *shape: nn.Parameter(torch.zeros(shape))
        normal = lambda std, *shape: nn.Parameter(torch.randn(shape, generator=g) * std)
        orthogonal = lambda rows, cols: nn.init.orthogonal_(torch.empty(rows, cols), generator=g)
        self.tok_emb = normal(c.tied_embed_init_std, c.vocab_size, D)
        self.lm_head = None if c.tie_embeddings else normal(c.tied_embed_init_std, c.vocab_size, D)
        self.qo_bank = nn.Parameter(torch.stack([*(orthogonal(D, D) for _ in range(L)), *(torch.zeros(D, D) for _ in range(L))]))
        self.kv_bank = nn.Parameter(torch.stack([orthogonal(kv, D) for _ in range(2 * L)]))
        self.mlp_up_bank = nn.Parameter(torch.stack([orthogonal(M, D) for _ in range(L)]))
        self.mlp_down_bank = zeros(L, D, M)
        self.q_gain = nn.Parameter(torch.full((L, H), c.qk_gain_init))
        self.attn_scale, self.mlp_scale = ones(L, D), ones(L, D)
        self.resid_mix = nn.Parameter(torch.tensor([1.0, 0.0])[None, :, None].repeat(L, 1, D))
        kind = c.gate_kind
        self.attn_gate_w = None if not kind else normal(0.01, L, H, D) if kind == "full" else zeros(L, H, c.gate_window)
        self.skip_weights = ones(passes, D) if passes else None
        self.skip_gates = zeros(passes, D) if passes and c.skip_gates_enabled else None
        self.smear_gate = zeros(1, c.gate_window) if c.smear_gate_enabled else None
        self.smear_lambda = zeros(1) if c.smear_gate_enabled else None
        lanes = c.parallel_start_layer > 0
        self.parallel_resid_lambdas = nn.Parameter(torch.full((L, 2), 1.1)) if lanes else None
        self.parallel_post_lambdas = ones(L, 2, 2) if lanes else None
        depth = [1 / math.sqrt(i + 1) if c.ln_scale else 1.0 for i in range(L)]
        self.register_buffer("depth_scale", torch.tensor(depth), persistent=False)
        self.shapes = [PassShape("lanes" if 0 < c.parallel_start_layer <= i else
                                 "parallel" if 0 <= c.parallel_residual_start <= i else "sequential",
                                 i >= L - c.xsa_last_n, H, c.num_kv_heads, H // c.num_kv_heads if attention_name == "fa3" else 1,
                                 kind, c.gate_window,
                                 c.sparse_attn_gate_scale if kind == "sparse" else 1.0, attention_name)
                       for i in range(L)]
        self.to(device)
        self.rope_tables: dict[tuple, tuple[Tensor, Tensor]] = {}
        self.compiled = compiled
        compile_ = (lambda f: torch.compile(f, fullgraph=True)) if compiled else (lambda f: f)
        self.block, self.embed, self.head_losses = compile_(block), compile_(embed), compile_(head_losses)

    def rope(self, length: int, context: int) -> tuple[Tensor, Tensor]:
        key = (length, context if self.config.rope_yarn else 0)
        if key not in self.rope_tables:
            self.rope_tables[key] = rotary_table(length, self.config, context, self.tok_emb.device)
        return self.rope_tables[key]

    def layers(self) -> list[Layer]:
        """Per-layer views. Casting a whole bank and unbinding it once keeps its gradient one tensor."""
        L = self.config.num_layers
        split = lambda p: (None,) * L if p is None else p.unbind(0)
        cast = lambda bank: bank.to(self.dtype)
        (q, o), (k, v) = self.qo_bank.chunk(2), cast(self.kv_bank).chunk(2)
        rows = zip(torch.cat((cast(q), k, v), 1).unbind(0), cast(o * self.attn_scale[:, :, None]).unbind(0),
                   cast(self.mlp_up_bank).unbind(0), cast(self.mlp_down_bank * self.mlp_scale[:, :, None]).unbind(0),
                   *map(split, (self.q_gain, self.attn_gate_w, self.attn_scale, self.mlp_scale, self.resid_mix,
                                self.depth_scale, self.parallel_resid_lambdas, self.parallel_post_lambdas)))
        return [Layer(*row) for row in rows]

    def forward(self, ids_BT: Tensor, segments: Segments | None = None, loops: int | None = None,
                adapters: Adapters | None = None, tap: Callable | None = None, cache: KeyValueCache | None = None) -> Tensor:
        """Tokens -> final stream [B, T, D], before the last norm.

        segments: documents of one packed row (B = 1); None: every row is one causal document. loops: extra passes
        (None: NUM_LOOPS). tap(name, input): called with the input of every matrix, by its name in files.
        cache: keys and values of earlier positions; ids then begin with the token before (any token at position 0),
        which serves the SmearGate and gives no output.
        """
        c, compiled = self.config, self.runs_compiled(ids_BT, adapters, tap)
        run = self.block if compiled else block
        flexible = mark_flexible if self.compiled and adapters else lambda *tensors: None
        flexible(ids_BT, *(t for lora in adapters_of(adapters) for t in lora[:2]))
        fresh = cache.positions(ids_BT.shape[1]) == 1 if cache else segments.fresh if segments else None
        x = (self.embed if compiled else embed)(ids_BT, self.tok_emb, self.smear_gate, self.smear_lambda, self.dtype, fresh)
        x = x[:, 1:].contiguous() if cache else x
        layers, lane, skips = self.layers(), None, []
        length = x.shape[1]
        if cache:
            at = cache.positions(length)
            rope, at = tuple(t[at] for t in cache.rope), at % cache.capacity
        else:
            rope = self.rope(length, (segments.window or segments.longest) if segments else length)
        order, encoder = c.pass_order(c.num_loops if loops is None else loops)
        x, *x0 = Shared.apply(x, len(order) + 1) if x.requires_grad else [x] * (len(order) + 1)
        weights = self.skip_weights.unbind(0) if skips is not None and self.skip_weights is not None else ()
        gates = self.skip_gates.unbind(0) if self.skip_gates is not None else (None,) * len(weights)
        for slot, i in enumerate(order):
            flexible(x, x0[slot], lane, *rope)
            k = slot - encoder
            skip = Skip(skips.pop(), weights[k], gates[k]) if k >= 0 and skips else None
            if lane is None and self.shapes[i].kind == "lanes":
                lane = x
            x, lane = run(x, lane, x0[slot], skip, layers[i], segments, rope, self.shapes[i],
                          adapters.passes[slot] if adapters else NO_ADAPTERS,
                          (lambda role, value, i=i: tap(f"blocks.{i}.{role}", value)) if tap else None,
                          cache.past(slot, len(x), at) if cache else None)
            if k < 0:
                skips.append(x)
        if lane is not None:
            x = {"mean": (x + lane) / 2, "attn": x, "mlp": lane}[c.parallel_final_lane]
        return x

    def runs_compiled(self, ids_BT: Tensor, adapters: Adapters | None, tap) -> bool:
        """Taps never; a single row with adapters neither: to the compiler a size of one is another program."""
        return self.compiled and not tap and not (adapters and len(ids_BT) == 1)

    def losses(self, ids_BT: Tensor, targets_BC: Tensor, segments=None, loops=None, adapters=None, tap=None, cache=None,
               at_BC: Tensor | None = None, hints_BC: Tensor | None = None) -> Tensor:
        """Cross-entropy in nats of every target, float32 [B, C]: of the last C positions, or of those that at_BC names.

        hints_BC: see head_losses. Other arguments as forward's.
        """
        x = self(ids_BT, segments, loops, adapters, tap, cache)
        x = x[:, -targets_BC.shape[1]:] if at_BC is None else x.gather(1, at_BC[..., None].expand(-1, -1, x.shape[2]))
        weight = (self.tok_emb if self.lm_head is None else self.lm_head).to(self.dtype)
        run = self.head_losses if self.runs_compiled(ids_BT, adapters, tap) else head_losses
        head, caps = (adapters.head, adapters.caps) if adapters else (None, None)
        if self.compiled and adapters:
            mark_flexible(x, targets_BC, hints_BC)
        return run(x, weight, targets_BC, self.config.logit_softcap, head, tap, caps, hints_BC)


class KeyValueCache:
    """Keys and values of earlier positions, at every pass slot: rings that hold the last window - 1 and `live` more.

    A forward begins at `position`, which the device knows (so that its CUDA graph serves all positions), and leaves its own
    keys and values in the rings; `advance` makes the first of these part of the past. longest: documents' most tokens.
    """

    def __init__(self, model: GPT, rows: int, window: int, live: int, longest: int):
        c, device = model.config, model.tok_emb.device
        self.window, self.capacity = window, window - 1 + live
        shape = (rows, self.capacity, c.num_kv_heads, c.head_dim)
        self.rings = [[torch.empty(shape, dtype=model.dtype, device=device) for _ in "kv"] for _ in c.pass_order(c.num_loops)[0]]
        self.rope = model.rope(-(-(longest + live) // 4096) * 4096, window)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)

    def clear(self):
        self.position.zero_()

    def positions(self, length: int) -> Tensor:
        return self.position + torch.arange(length, device=self.position.device)

    def past(self, slot: int, rows: int, at_T: Tensor) -> Past:
        """For the first rows."""
        return Past(*(ring[:rows] for ring in self.rings[slot]), self.position, at_T, self.window)

    def advance(self, count: int):
        """The first `count` live positions join the past."""
        self.position += count


@torch.no_grad()
def export_weights(parameters: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Stacked parameters -> views of them under their names in files, one per layer, outside autograd: a node that they kept
    alive would break the capture of a CUDA graph."""
    out = {}
    for name, p in parameters.items():
        if name in PER_LAYER_NAMES:
            for g, pattern in enumerate(PER_LAYER_NAMES[name]):
                out.update({pattern.format(i): p[g * layers + i] for i in range(layers)})
        else:
            out[FILE_NAMES.get(name, name)] = p
    return out


@torch.no_grad()
def import_weights(model: GPT, tensors: dict[str, Tensor], source: str = "the file"):
    """Copy tensors under their file names into the model; raises UserError naming what is missing, extra or misshapen."""
    views = export_weights(dict(model.named_parameters()), model.config.num_layers)
    for what, names in (("lacks", set(views) - set(tensors)), ("has unknown", set(tensors) - set(views))):
        if names:
            raise UserError(f"{source} {what} {sorted(names)[0]}: expected the tensors of this configuration")
    for name, view in views.items():
        if view.shape != tensors[name].shape:
            raise UserError(f"{source}: {name} has shape {list(tensors[name].shape)}: expected {list(view.shape)}")
        view.copy_(tensors[name])


class Role(NamedTuple):
    """What happens to the tensors whose file name matches: optimizer, bits and clip knobs (quantised if large), group."""
    pattern: str
    optimizer: str          # "muon", "embed", "head" or "scalar"
    bits: str = ""          # Config field; "": float16 (or int8 rows: see QUANTIZE)
    clip: str = ""


ROLES = (
    Role("tok_emb.weight", "embed", "embed_bits", "embed_clip_sigmas"),
    Role("lm_head.weight", "head", "embed_bits", "embed_clip_sigmas"),
    Role("blocks.*.attn.c_q.weight", "muon", "matrix_bits", "attn_clip_sigmas"),
    Role("blocks.*.attn.c_k.weight", "muon", "matrix_bits", "attn_clip_sigmas"),
    Role("blocks.*.attn.c_v.weight", "muon", "matrix_bits", "attn_clip_sigmas"),
    Role("blocks.*.attn.proj.weight", "muon", "matrix_bits", "attn_clip_sigmas"),
    Role("blocks.*.mlp.fc.weight", "muon", "matrix_bits", "mlp_clip_sigmas"),
    Role("blocks.*.mlp.proj.weight", "muon", "matrix_bits", "mlp_clip_sigmas"),
    Role("*", "scalar"),
)


def role_of(name: str) -> Role:
    return next(role for role in ROLES if fnmatch(name, role.pattern))


# ======================================================================================================================
# OPTIMIZERS: Muon for the banks (sharded over ranks by slice), AdamW for the rest
# ======================================================================================================================

POLAR_EXPRESS = (       # arXiv 2505.16932: the best odd quintic for each iteration
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
PLAIN_MUON = ((3.4445, -4.775, 2.0315),)


def newton_schulz(g_NRC: Tensor, steps: int, coefficients=POLAR_EXPRESS, dtype=torch.bfloat16) -> Tensor:
    """Approximate U V^T of every matrix's singular value decomposition (Muon: Jordan et al. 2024), in dtype."""
    tall = g_NRC.shape[1] > g_NRC.shape[2]
    x = (g_NRC.mT if tall else g_NRC).to(dtype)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for i in range(steps):
        a, b, c = coefficients[min(i, len(coefficients) - 1)]
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon:
    """Momentum, row normalisation and Newton-Schulz on the slices of the banks that this rank owns.

    Gradients are reduce-scattered (bfloat16 on CUDA), updates all-gathered; a bank of n slices is padded to a multiple
    of the ranks, so any world size works and a rank without slices still takes part.
    """

    def __init__(self, banks: list[nn.Parameter], config: Config, world: World):
        self.banks, self.c, self.world = banks, config, world
        self.wire = torch.bfloat16 if world.device.type == "cuda" else torch.float32
        self.share = [-(-len(p) // world.size) for p in banks]
        self.momentum = [torch.zeros(n, *p.shape[1:], device=p.device) for n, p in zip(self.share, banks)]

    def start_reduce(self):
        """Begin averaging the banks' gradients; each rank will hold its slices of the mean."""
        self.grads, self.handles = [], []
        for p, n in zip(self.banks, self.share):
            if self.world.size == 1:
                self.grads.append(p.grad)
                continue
            padded = F.pad(p.grad.to(self.wire), (0, 0, 0, 0, 0, n * self.world.size - len(p)))
            mine = torch.empty_like(padded[:n])
            self.handles.append(self.world.reduce_scatter(mine, padded))
            self.grads.append(mine)

    def finish_reduce(self) -> list[Tensor]:
        for handle in self.handles:
            handle.wait()
        if self.world.size > 1:
            self.grads = [g.float().div_(self.world.size) for g in self.grads]
        return self.grads

    @torch.no_grad()
    def step(self, lr: float, momentum: float):
        c, gathering = self.c, []
        coefficients = POLAR_EXPRESS if c.polar_express else PLAIN_MUON
        torch._foreach_mul_(self.momentum, momentum)
        torch._foreach_add_(self.momentum, self.grads)
        for p, n, update in zip(self.banks, self.share, torch._foreach_add(self.grads, self.momentum, alpha=momentum)):
            if c.muon_row_normalize:
                update = update / (update.norm(dim=2, keepdim=True) + 1e-7)
            update = newton_schulz(update, c.muon_backend_steps, coefficients, self.wire)
            if self.world.size == 1:
                gathering.append((p, update, None))
            else:
                whole = update.new_empty(n * self.world.size, *update.shape[1:])
                gathering.append((p, whole, self.world.all_gather(whole, update.contiguous())))
        for p, update, handle in gathering:
            if handle:
                handle.wait()
            p.mul_(1 - lr * c.muon_wd).add_(update[: len(p)], alpha=-lr * max(1, p.shape[1] / p.shape[2]) ** 0.5)
        self.grads.clear()


class Optimizers:
    """Muon and AdamW over all parameters exactly once, with clipping of the averaged gradient."""

    def __init__(self, model: GPT, config: Config, world: World):
        c = self.c = config
        self.world = world
        by_kind: dict[str, list] = {"muon": [], "embed": [], "head": [], "scalar": []}
        for name, p in model.named_parameters():
            by_kind[role_of(PER_LAYER_NAMES.get(name, (FILE_NAMES.get(name, name),))[0]).optimizer].append(p)
        self.muon = Muon(by_kind["muon"], c, world)
        rates = {"embed": (c.tied_embed_lr if c.tie_embeddings else c.embed_lr, c.embed_wd), "head": (c.head_lr, c.embed_wd),
                 "scalar": (c.scalar_lr, c.adam_wd)}
        groups = [{"params": by_kind[kind], "lr": lr, "base_lr": lr, "weight_decay": wd}
                  for kind, (lr, wd) in rates.items() if by_kind[kind]]
        self.adam = torch.optim.AdamW(groups, betas=(c.beta1, c.beta2), eps=c.adam_eps, fused=True)
        self.large, self.small = by_kind["embed"] + by_kind["head"], by_kind["scalar"]
        covered = sorted(id(p) for params in by_kind.values() for p in params)
        if covered != sorted(id(p) for p in model.parameters()):
            raise RuntimeError("the optimizers must cover every parameter exactly once")

    def reset(self):
        """Forget everything but the parameters."""
        self.adam.state.clear()
        for m in self.muon.momentum:
            m.zero_()

    def start_reduce(self):
        """Begin averaging gradients over ranks (parameters without a gradient count as zero)."""
        for p in self.small + self.large:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        self.muon.start_reduce()

    @torch.no_grad()
    def step(self, lr_mul: float, step: int) -> Tensor:
        """Average, clip, update; returns the norm of the averaged gradient (a tensor: nothing waits for it)."""
        c, adam_grads = self.c, [p.grad for p in self.large + self.small]
        if self.world.size > 1:
            packed = torch.cat([p.grad.flatten() for p in self.small])
            for t in (*(p.grad for p in self.large), packed):
                self.world.mean(t)
            for p, part in zip(self.small, packed.split([p.numel() for p in self.small])):
                p.grad.copy_(part.view_as(p))
        bank_grads = self.muon.finish_reduce()
        square = lambda grads: torch.stack(torch._foreach_norm(grads)).square().sum()
        total = (self.world.sum(square(bank_grads)) + square(adam_grads)).sqrt()
        if c.grad_clip_norm > 0:
            torch._foreach_mul_([*bank_grads, *adam_grads], (c.grad_clip_norm / (total + 1e-6)).clamp(max=1.0))
        warm = min(step / c.muon_momentum_warmup_steps, 1.0) if c.muon_momentum_warmup_steps else 1.0
        self.muon.step(c.matrix_lr * lr_mul, (1 - warm) * c.muon_momentum_warmup_start + warm * c.muon_momentum)
        for group in self.adam.param_groups:
            group["lr"] = group["base_lr"] * lr_mul
        self.adam.step()
        for p in (*self.muon.banks, *self.large, *self.small):
            p.grad = None
        return total

    def save(self) -> dict[str, Tensor]:
        """State as tensors, whole on every rank, so that another number of ranks can go on from it."""
        out = {}
        for i, (p, m) in enumerate(zip(self.muon.banks, self.muon.momentum)):
            if self.world.size > 1:
                whole = m.new_empty(len(m) * self.world.size, *m.shape[1:])
                self.world.all_gather(whole, m).wait()
                m = whole
            out[f"muon.{i}"] = m[: len(p)]
        for i, state in self.adam.state_dict()["state"].items():
            out.update({f"adam.{i}.{key}": value for key, value in state.items()})
        return out

    def load(self, tensors: dict[str, Tensor]):
        for i, (p, m) in enumerate(zip(self.muon.banks, self.muon.momentum)):
            whole = F.pad(tensors[f"muon.{i}"], (0, 0, 0, 0, 0, len(m) * self.world.size - len(p)))
            m.copy_(whole[self.world.rank * len(m):][: len(m)])
        state: dict[int, dict] = {}
        for name, t in tensors.items():
            if name.startswith("adam."):
                _, i, key = name.split(".")
                state.setdefault(int(i), {})[key] = t
        self.adam.load_state_dict({"state": state, "param_groups": self.adam.state_dict()["param_groups"]})


# ======================================================================================================================
# TRAIN: the budget's clock, the loop, averaged weights, checkpoints
# ======================================================================================================================

AGREE_EVERY, AGREE_SECONDS = 16, 1.0        # steps and seconds at most between agreements of the ranks on the time


class Clock:
    """Rank 0's training seconds, known to every rank: agreed on every few steps, extrapolated alike in between."""

    def __init__(self, world: World, limit: float, elapsed: float = 0.0):
        self.world, self.limit, self.before = world, limit, elapsed
        self.base, self.base_step, self.per_step, self.next_agreement, self.paces = elapsed, None, 0.0, 0, []
        self.started = time.perf_counter()

    def read(self) -> float:
        return self.before + time.perf_counter() - self.started

    @contextlib.contextmanager
    def paused(self):
        """A with-block that does not count (validation)."""
        self.world.sync()
        self.before = self.read()
        yield
        self.world.sync()
        self.started = time.perf_counter()

    def tick(self, step: int, signal_number: int) -> tuple[float, int]:
        """Seconds at the start of this step and the signal that any rank received; the same on every rank."""
        received = signal_number if self.world.size == 1 else 0
        if self.world.size == 1 or step >= self.next_agreement:
            now = self.read()
            if self.base_step not in (None, step):
                self.paces = [*self.paces[-2:], (now - self.base) / (step - self.base_step)]
            pace = statistics.median_high(self.paces or [0.0])          # a stall passes, and so does a step that was only launched
            agreed = torch.tensor([now, pace] if self.world.rank == 0 else [0.0, 0.0], dtype=torch.float64)
            agreed = self.world.sum(torch.cat((agreed, torch.tensor([signal_number], dtype=torch.float64))), dist.ReduceOp.MAX)
            self.base, self.per_step, received = agreed[0].item(), agreed[1].item(), int(agreed[2].item())
            self.base_step = step
            alone = min(AGREE_SECONDS, (self.limit - self.base) / 2 if self.limit else math.inf)
            self.next_agreement = step + int(min(max(alone / self.per_step, 1), AGREE_EVERY) if self.per_step else 1)
        return self.base + (step - self.base_step) * self.per_step, received

    def out_of_time(self, elapsed: float) -> bool:
        """True when this step and the one still on the device would end past the limit."""
        return self.limit > 0 and elapsed + 2 * self.per_step > self.limit


def later(t: Tensor) -> Callable[[], float]:
    """The value of a one-number tensor once the device has it; whoever asks waits for that and for nothing after it."""
    if not t.is_cuda:
        return t.item
    copy, ready = t.to("cpu", non_blocking=True), torch.cuda.Event()
    ready.record()
    return lambda: (ready.synchronize(), copy.item())[1]


class Pending(NamedTuple):
    """A step whose results are still on their way from the device (see later)."""
    step: int
    loss: Callable[[], float]
    grad_norm: Callable[[], float]
    lr_mul: float


class Graphs:
    """CUDA graphs of functions whose inputs stay where they are: a key's first call is eager, its second captures, later ones
    replay. All share one pool of memory: a result holds until the next call. Eager always where there is no CUDA."""

    def __init__(self, wanted: bool, log: Callable[[str], None]):
        self.wanted, self.log, self.seen, self.graphs = wanted, log, set(), {}
        self.pool = torch.cuda.graph_pool_handle() if wanted else None
        self.batches: dict[tuple, Batch] = {}

    def hold(self, key: tuple, new: Batch) -> Batch:
        """The batch where this key's graph will read it: in the first one of to_device, whose cu_seqlens is marked as dynamic."""
        if not self.wanted:
            return new
        held = self.batches.setdefault(key, new)
        for kept, value in zip((held.ids, held.targets, held.segments.cu_seqlens), (new.ids, new.targets, new.segments.cu_seqlens)):
            kept.copy_(value)
        return held

    def give_up(self, why: RuntimeError):
        self.wanted = False
        self.graphs.clear()
        self.log(f"cuda_graphs: none ({(str(why).splitlines() or [''])[0][:100]}): eager from here on")

    def __call__(self, key: tuple, function: Callable[[], Tensor | tuple[Tensor, ...]]) -> Tensor | tuple[Tensor, ...]:
        if not self.wanted or key not in self.seen:
            self.seen.add(key)
            try:
                return function()
            except torch.OutOfMemoryError as e:
                if not self.graphs:
                    raise
                self.give_up(e)             # what they hold is what is lacking
            return function()
        if key not in self.graphs:
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                    result = function()
            except RuntimeError as e:
                torch.cuda.set_stream(torch.cuda.default_stream())          # a capture that fails may stay on its own
                self.give_up(e)
                return function()
            self.graphs[key] = graph, result
        graph, result = self.graphs[key]
        graph.replay()
        return result


def is_capturable(model: GPT) -> bool:
    """Can packed rows go through the model in a CUDA graph? sdpa asks the processor where documents end."""
    return model.tok_emb.is_cuda and ATTENTION[model.attention_name] is not attend_sdpa


class MicroStep:
    """Forward and backward of one micro-batch of `accumulate`; gradients join those that wait in the parameters.

    On CUDA one graph for every number of loops, longest segment and length of cu_seqlens: a step then does not depend on how fast
    Python is, and its thousand kernels follow each other without gaps.
    """

    def __init__(self, model: GPT, accumulate: int, log: Callable[[str], None]):
        self.model, self.accumulate, self.parameters = model, accumulate, list(model.parameters())
        self.graphs = Graphs(model.config.train_graphs and is_capturable(model), log)

    def __call__(self, batch: Batch, loops: int) -> Tensor:
        """The mean loss / accumulate, detached; it holds until the next call."""
        key = loops, batch.segments.longest, len(batch.segments.cu_seqlens)
        held = self.graphs.hold(key, batch)

        def differentiate():
            loss = self.model.losses(held.ids, held.targets, held.segments, loops).mean() / self.accumulate
            return loss.detach(), *torch.autograd.grad(loss, self.parameters, allow_unused=True)

        loss, *gradient = self.graphs(key, differentiate)
        for p, g in zip(self.parameters, gradient):
            if g is not None:
                p.grad = (g if self.accumulate == 1 else g.clone()) if p.grad is None else p.grad.add_(g)
        return loss


class Trainer:
    """Owns the weights, their average, the optimizers and the place in the data."""

    def __init__(self, run: Run, model: GPT, shards: list[np.ndarray]):
        self.run, self.model, self.shards = run, model, shards
        c, world = run.config, run.world
        self.accumulate, self.micro_tokens = micro_batch(c, world.size)
        for p in model.parameters():
            world.broadcast(p.data)
        self.micro_step, self.optimizers = MicroStep(model, self.accumulate, run.log), Optimizers(model, c, world)
        self.ema = [p.detach().clone() for p in model.parameters()]
        self.step, self.pending, self.last_loss, self.cursor = 0, None, float("nan"), 0

    def stream(self, longest: int = 0) -> TokenStream:
        """The training data from where the loop left it; longest: documents are cut there, not at TRAIN_SEQ_LEN."""
        c, world = self.run.config, self.run.world
        stream = TokenStream(self.shards, world.rank, world.size, self.micro_tokens, longest or c.train_seq_len, c.vocab_size)
        stream.cursor = self.cursor
        return stream

    def tokens_in_turn(self, quantizer: Quantizer) -> int:
        """How many tokens the steps of quantize_in_turn read."""
        c = self.run.config
        turns = max(len(in_turn(quantizer, c.inq_groups)) - 1, 0)
        return c.inq_steps * turns * self.accumulate * self.run.world.size * (self.micro_tokens + 1)

    def forget(self):
        """The optimizers and the count of steps begin anew, without lines in the log until the loop."""
        self.settle()
        self.optimizers.reset()
        self.step, self.last_loss, self.clock = 0, float("nan"), None

    def take_step(self, batches: Prefetcher, loops: int, lr_mul: float):
        """Forward, backward and update; the results of the step before are checked while this one runs."""
        loss = 0.0
        for _ in range(self.accumulate):
            loss = loss + self.micro_step(batches.next(), loops)
        self.optimizers.start_reduce()
        self.settle()
        grad_norm = self.optimizers.step(lr_mul, self.step)
        self.step += 1
        self.pending = Pending(self.step, later(loss), later(grad_norm), lr_mul)

    def settle(self):
        """Check and log the last step, then let its weights into the average: a bad step can not reach it."""
        if self.pending is None:
            return
        step, loss, grad_norm, lr_mul = self.pending
        self.pending, loss, grad_norm = None, loss(), grad_norm()
        if not math.isfinite(grad_norm):
            self.abandon(step, loss)
        self.last_loss = loss
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, list(self.model.parameters()), 1 - self.run.config.ema_decay)
        every = self.run.config.train_log_every
        if every and (step <= 5 or step % every == 0) and self.clock:
            c, seconds = self.run.config, self.clock.read()
            mean_loss = self.run.world.mean(torch.tensor(loss, dtype=torch.float64)).item()
            self.run.log(f"{step}/{c.iterations} train_loss: {mean_loss:.4f} train_time: {seconds / 60:.1f}m "
                         f"tok/s: {step * c.train_batch_tokens / seconds:.0f} lr_mul: {lr_mul:.4f} "
                         f"grad_norm: {grad_norm:.4f} seconds: {seconds:.3f}")

    def abandon(self, step: int, loss: float):
        """A gradient is not finite: save the average, which never saw it, and stop every rank."""
        bad = torch.tensor([0.0 if math.isfinite(loss) else 1.0] * self.run.world.size, dtype=torch.float64)
        bad[torch.arange(self.run.world.size) != self.run.world.rank] = 0
        ranks = self.run.world.sum(bad).nonzero().flatten().tolist()
        path = self.run.folder / "last_good_ema.safetensors"
        if self.run.world.rank == 0:
            save_tensors(path, self.average(), {"model": model_knobs(self.run.config), "step": step - 1})
        raise UserError(f"non-finite gradient at step {step} (non-finite loss on ranks {ranks}), last finite loss {self.last_loss:.4f}; "
                        f"the averaged weights before it are in {path}", code=1)

    clock: Clock | None = None
    step_seconds = 0.0          # of a step with all loops, where it was measured

    def average(self) -> dict[str, Tensor]:
        """EMA weights under their names in files."""
        names = [name for name, _ in self.model.named_parameters()]
        return export_weights(dict(zip(names, self.ema)), self.run.config.num_layers)

    def warm_up(self, dry_run: Callable[[], None]) -> float:
        """Real steps with every number of loops and length of segments, then everything as before; returns a second dry_run's
        seconds.

        dry_run: a rehearsal of what the training budget must keep time for (Hessians and GPTQ on one batch).
        """
        c = self.run.config
        weights = [p.detach().clone() for p in self.model.parameters()]
        changes = (0.0, c.enable_looping_at, c.loop_phase2_at, *(share for _, share in seq_schedule(c)), 1.0)
        for loops, longest in sorted({(c.loops_at(f), c.seq_len_at(f)) for f in changes}) * bool(c.warmup_steps):
            with contextlib.closing(Prefetcher(self.stream(longest), self.run.world.device)) as batches:
                for _ in range(c.warmup_steps):
                    self.take_step(batches, loops, 1.0)
                self.settle()
        dry_run()
        seconds = self.run.world.timed(dry_run)
        with torch.no_grad():
            for p, average, w in zip(self.model.parameters(), self.ema, weights):
                p.copy_(w)
                average.copy_(w)
        self.pending = None
        self.forget()
        return seconds

    def loop(self, reserve: float, validate: Callable[[str], None]):
        """Train until the budget less `reserve` seconds, ITERATIONS, or a signal (checkpoint, exit code 130)."""
        run, c = self.run, self.run.config
        stream, elapsed = self.stream(), 0.0
        if c.resume:
            stream.cursor, elapsed = self.load()
        limit = max(c.max_wallclock_seconds - reserve, 0.001) if c.max_wallclock_seconds else 0.0
        loops, epoch = -1, stream.epoch         # before the prefetcher moves the stream
        signals, batches = Signals(), Prefetcher(stream, run.world.device)
        self.clock = Clock(run.world, limit, elapsed)
        try:
            while True:
                elapsed, signal_number = self.clock.tick(self.step, signals.received)
                over = self.clock.out_of_time(elapsed)
                if signal_number or over or self.step >= c.iterations:
                    break
                frac = elapsed / limit if limit else self.step / c.iterations
                if c.loops_at(frac) != loops:
                    loops = self.announce_loops(c.loops_at(frac), frac, first=loops < 0)
                if c.seq_len_at(frac) != stream.limit:
                    batches = batches.cut_at(c.seq_len_at(frac))
                    run.log(f"train_seq_len:{stream.limit} step:{self.step} frac:{frac:.3f}")
                self.take_step(batches, loops, c.lr_mul(frac))
                if batches.cursor // int(stream.ends[-1]) + 1 != epoch:
                    epoch = batches.cursor // int(stream.ends[-1]) + 1
                    run.log(f"data epoch:{epoch} step:{self.step}")
                if c.val_loss_every and self.step % c.val_loss_every == 0:
                    with self.clock.paused():
                        validate(f"{self.step}/{c.iterations}")
                if c.checkpoint_every and self.step % c.checkpoint_every == 0:
                    self.settle()
                    try:
                        self.save(batches.cursor)
                    except UserError as e:          # a full disk may have room again later
                        run.log(f"warning: {e}; training goes on")
            self.settle()
            run.world.sync()
            elapsed, self.cursor = self.clock.read(), batches.cursor
            if over:
                run.log(f"stopping_early: wallclock_cap train_time: {1000 * elapsed:.0f}ms step: {self.step}/{c.iterations}")
            run.ledger.charge("train", elapsed, "train")
            signal_number = signal_number or signals.any_rank(run.world)
            if signal_number:           # still caught: a launcher's signal must not come between rank 0 and the file
                path = self.save(batches.cursor)
                raise UserError(f"stopped by signal {signal_number} after step {self.step}; RESUME=1 continues from {path}", code=130)
        finally:
            batches.close()
            signals.release()
        if signals.received:            # after the ranks agreed that there was none
            signal.raise_signal(signals.received)

    def refine(self, batches: Prefetcher, steps: int, lr_mul: float, held: dict[str, Tensor]):
        """Further steps of training at a rate that falls to 0, in which the tensors of `held` (file names) keep their values."""
        views = export_weights(dict(self.model.named_parameters()), self.run.config.num_layers)
        places = [views[name] for name in held]
        for i in range(steps):
            self.take_step(batches, self.run.config.loops_at(1.0), lr_mul * (1 - i / steps))
            if held:
                with torch.no_grad():
                    torch._foreach_copy_(places, list(held.values()))
        self.settle()

    def announce_loops(self, loops: int, frac: float, first: bool) -> int:
        order, encoder = self.run.config.pass_order(loops)
        if loops or not first:
            self.run.log(f"layer_loop:enabled step:{self.step} frac:{frac:.3f} encoder:{order[:encoder]} decoder:{order[encoder:]}")
        return loops

    def save(self, cursor: int) -> Path:
        """Write the resumable checkpoint; every rank must call it after `settle`, and leaves when the file is there."""
        names = [name for name, _ in self.model.named_parameters()]
        tensors = {**{f"weights.{n}": p for n, p in zip(names, self.model.parameters())},
                   **{f"ema.{n}": e for n, e in zip(names, self.ema)}, **self.optimizers.save()}
        path = self.run.folder / "checkpoint.safetensors"
        state = {"model": model_knobs(self.run.config), "step": self.step, "cursor": cursor, "elapsed": self.clock.read(),
                 "seed": self.run.config.seed}
        self.run.world.together(lambda: save_tensors(path, tensors, state) if self.run.world.rank == 0 else None)
        return path

    @torch.no_grad()
    def load(self) -> tuple[int, float]:
        """Continue where the checkpoint stopped; returns its cursor and its training seconds."""
        path = self.run.folder / "checkpoint.safetensors"
        tensors, state = load_tensors(path, self.run.config)
        if state.get("seed") != self.run.config.seed:
            raise UserError(f"{path} was made with SEED={state.get('seed')}, this run has {self.run.config.seed}")
        try:
            for (name, p), average in zip(self.model.named_parameters(), self.ema):
                p.copy_(tensors[f"weights.{name}"])
                average.copy_(tensors[f"ema.{name}"])
            self.optimizers.load(tensors)
            self.step = state["step"]
        except KeyError as e:
            raise UserError(f"{path} lacks {e.args[0]}: expected a checkpoint of this configuration") from None
        self.run.log(f"resumed step:{self.step} elapsed:{state['elapsed']:.2f}s from {path}")
        return state["cursor"], state["elapsed"]


def micro_batch(config: Config, size: int) -> tuple[int, int]:
    """Micro-steps a step and tokens of each rank's micro-batch; raises UserError when the batch does not divide."""
    total = config.train_batch_tokens
    counts = [config.grad_accum_steps] if config.grad_accum_steps else range(-(-8 // size), 65)
    for count in counts:
        if total % (count * size) == 0:
            return count, total // (count * size)
    raise UserError(f"TRAIN_BATCH_TOKENS={total} does not divide by {size} ranks x GRAD_ACCUM_STEPS "
                    f"{config.grad_accum_steps or '(8 / ranks and up)'}: choose a multiple")


# ======================================================================================================================
# CALIBRATE: what flows into every matrix
# ======================================================================================================================

HESSIAN_OF = {"attn.c_q": "attn", "attn.c_k": "attn", "attn.c_v": "attn"}     # matrices that share an input


def hessian_key(name: str) -> str:
    """File name of a matrix -> name of the input it reads (the `tap` of the forward)."""
    if not name.startswith("blocks."):
        return "head"
    _, i, part = name.removesuffix(".weight").split(".", 2)
    return f"blocks.{i}.{HESSIAN_OF.get(part, part)}"


def input_key(name: str, table: dict) -> str:
    """Key of a matrix in a table of Hessians or factors: its own, or that of the input that it shares."""
    return name if name in table else hessian_key(name)


@torch.no_grad()
def collect_hessians(run: Run, model: GPT, shards: list[np.ndarray], batches: int) -> dict[str, Tensor]:
    """H = sum x x^T / batches of every matrix's input over training batches, averaged over ranks. float32 [in, in].

    Forward only, all loops on, in document segments; a layer that runs several times adds up over its passes (GPTQ:
    arXiv 2210.17323).
    """
    c, world = run.config, run.world
    stream = TokenStream(shards, world.rank, world.size, micro_batch(c, world.size)[1], c.train_seq_len)
    hessians: dict[str, Tensor] = {}

    def tap(name: str, x: Tensor):
        x = x.flatten(0, -2).float()
        if name not in hessians:
            hessians[name] = x.new_zeros(x.shape[1], x.shape[1])
        hessians[name].addmm_(x.T, x)

    progress = Progress(run.log, "hessians", batches)
    with matmul_precision("high"):                  # bfloat16 inputs are exact in TF32, sums are float32
        for i in range(batches):
            batch = to_device(to_batch(stream.next()[0], c.train_seq_len), world.device)
            model.losses(batch.ids, batch.targets, batch.segments, tap=tap)
            progress(i + 1)
    flat = world.mean(torch.cat([h.flatten() for h in hessians.values()])) / batches
    parts = flat.split([h.numel() for h in hessians.values()])
    return {name: part.view_as(h) for (name, h), part in zip(hessians.items(), parts)}


FISHER_TOKENS = 4096        # of a batch: small batches give many independent gradients
NO_TAP = lambda name, value: None       # a forward with a tap is not compiled: no graph for one more length


def collect_sensitivity(run: Run, model: GPT, shards: list[np.ndarray], names: list[str], factors: dict[str, Factor],
                        batches: int) -> dict[str, Tensor]:
    """Fisher sensitivity of each matrix (file names) over `batches` small training batches, averaged over ranks: mean squared
    gradients of its rows in the unit of the loss of one batch, float64 [2, R], from even and from odd batches (their
    agreement shows the noise).

    GPTQ makes errors of the shape step * noise * V, V = U / diag(U) (QUANTIZE), so the loss grows by
    step^2 / 24 * E |g V^T|^2 for a row with gradient g. That is what is averaged, not |g|^2: the two differ where GPTQ
    can hide an error in directions that the inputs do not use. Sums over a batch's tokens are squared, so what a layer
    does in several passes and at several positions counts with its correlation.
    """
    if not names:
        return {}
    c, world = run.config, run.world
    tokens = min(FISHER_TOKENS, micro_batch(c, world.size)[1])
    stream = TokenStream(shards, world.rank, world.size, tokens, c.train_seq_len)
    parameters = dict(model.named_parameters())
    rows: dict[str, Tensor] = {}
    mine = max(-(-batches // world.size), 2)
    progress = Progress(run.log, "fisher", mine)
    for i in range(mine):
        batch = to_device(to_batch(stream.next()[0], c.train_seq_len), world.device)
        loss = model.losses(batch.ids, batch.targets, batch.segments, tap=NO_TAP).sum()
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters.values(), gradients)]
        gradients = export_weights(dict(zip(parameters, gradients)), c.num_layers)
        with matmul_precision("high"), torch.no_grad():
            for name in names:
                g = gradients[name].float()
                if name not in rows:
                    rows[name] = torch.zeros(2, len(g), dtype=torch.float64, device=g.device)
                if (key := input_key(name, factors)) in factors:
                    factor = factors[key]
                    g = (g * factor.live)[:, factor.order] @ (factor.u / factor.u.diagonal()[:, None]).T
                rows[name][i % 2] += g.square().sum(1)
        progress(i + 1)
    whole = world.mean(torch.cat([rows[name] for name in names], 1)) / mine
    return dict(zip(names, whole.split([rows[name].shape[1] for name in names], 1)))


def token_counts(shards: list[np.ndarray], vocab_size: int) -> Tensor:
    """How often each token occurs at the start of the training data (float64)."""
    return torch.from_numpy(np.bincount(shards[0][:4_000_000], minlength=vocab_size)).double()


@contextlib.contextmanager
def matmul_precision(name: str):
    """Float32 matmul precision inside a with-block: "high" allows TF32, "highest" does not."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# ======================================================================================================================
# QUANTIZE: which tensor gets which code, and GPTQ
# ======================================================================================================================

SMALLEST_QUANTISED = 65_536         # matrices of more elements go through GPTQ
SMALLEST_STEP = 2.0 ** -14          # smallest normal float16
LARGEST_STEP = 2.0 ** 15


class IntTensor(NamedTuple):
    """Integers times a step per row: q int8 [rows, columns], step float16 [rows], |q| <= 2^(bits-1) - 1.

    With n steps for another number of rows (LQER factors), each step serves 1/n of the values in reading order.
    states > 0: every row is a path through a trellis of so many states, its columns taken in path_order.
    """
    q: Tensor
    step: Tensor
    bits: int
    states: int = 0

    def decode(self) -> Tensor:
        return (self.q.float().view(len(self.step), -1) * self.step.float()[:, None]).view(self.q.shape)


class HalfTensor(NamedTuple):
    """A tensor kept as float16."""
    values: Tensor

    def decode(self) -> Tensor:
        return self.values.float()


def largest(bits: int) -> int:
    return 2 ** (bits - 1) - 1


def is_quantised(name: str, t: Tensor) -> bool:
    return bool(role_of(name).bits) and t.ndim == 2 and t.numel() > SMALLEST_QUANTISED


def layer_group(name: str, config: Config) -> str:
    """early (layers 0-2), loop, late (8 and up), mid (the rest), or "" outside the blocks (PR 1412's groups)."""
    if not name.startswith("blocks."):
        return ""
    i = int(name.split(".")[1])
    looped = config.num_loops and config.loop_start <= i <= config.loop_end
    return "early" if i <= 2 else "loop" if looped else "late" if i >= 8 else "mid"


def clip_sigma(name: str, config: Config) -> float:
    """Clip of a matrix in standard deviations of its rows (SDClip: PR 1394)."""
    group = layer_group(name, config)
    return getattr(config, role_of(name).clip) * (getattr(config, f"clip_mult_{group}") if group else 1.0)


def raw_steps(w_NRC: Tensor, sigma_N: Tensor, bits: int) -> Tensor:
    """SDClip (PR 1394): sigma * std(row) / q_max, float32 [N, R]."""
    return sigma_N[:, None] * w_NRC.std(dim=2) / largest(bits)


def snap_steps(steps: Tensor, w_NRC: Tensor, bits: int, grid: int = 0) -> Tensor:
    """Steps as they are stored: float16, on a grid of `grid` parts of an octave. A row that hardly varies gets the step
    that still reaches its mean."""
    steps = torch.maximum(steps, w_NRC.mean(dim=2).abs() / largest(bits)).clamp(SMALLEST_STEP, LARGEST_STEP).half()
    if grid:
        steps = torch.from_numpy(on_grid(grid_index(steps.cpu().numpy(), grid), grid)).to(steps.device)
    return steps


def grid_index(steps: np.ndarray, parts: int) -> np.ndarray:
    """Nearest place of each step on a logarithmic grid of `parts` to the octave (int32)."""
    return np.rint(parts * np.log2(np.maximum(steps.astype(np.float64), SMALLEST_STEP))).astype(np.int32)


def on_grid(index: np.ndarray, parts: int) -> np.ndarray:
    """The grid's steps as float16: rounding so coarse hides what powers differ by between machines."""
    return np.exp2(np.clip(index, -14 * parts, 15 * parts) / parts).astype(np.float16)


def inverse_factor(h_NCC: Tensor, warn: Callable[[str], None]) -> Tensor:
    """Upper U with H^-1 = U^T U of damped Hessians [N, C, C]: flip, Cholesky, flip, triangular inverse.

    A factorisation that fails is tried again with ten times the damping, three times, then replaced by the identity:
    GPTQ with U = I is round-to-nearest.
    """
    eye = torch.eye(h_NCC.shape[1], device=h_NCC.device, dtype=torch.float64)
    h = h_NCC.double()
    damping = 0.01 * h.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * eye
    out = eye.expand_as(h).clone()
    todo = torch.arange(len(h), device=h.device)
    for attempt in range(4):
        flipped = (h[todo] + damping[todo] * 10 ** attempt).flip(1, 2)
        lower, info = torch.linalg.cholesky_ex(flipped)
        ok = (info == 0) & lower.isfinite().all(2).all(1)
        out[todo[ok]] = torch.linalg.solve_triangular(lower[ok].flip(1, 2), eye.expand_as(lower[ok]), upper=True)
        todo = todo[~ok]
        if not len(todo):
            return out.float()
        warn(f"gptq cholesky failed for {len(todo)} matrices with damping x{10 ** attempt}: "
             + ("trying ten times more" if attempt < 3 else "warning: they are rounded to nearest"))
    return out.float()


class Factor(NamedTuple):
    """What GPTQ needs of a Hessian, made once however often its matrices are quantised. Batched as [N, ...] or single."""
    order: Tensor           # int64 [C]: columns by falling diag H
    u: Tensor               # float32 [C, C]: inverse_factor of H in that order
    live: Tensor            # bool [C]: inputs that are ever active, in the matrix's own order


ORDER_CLASSES = 8           # of columns, where the decoder must know the order: three bits a column
ORDER_SUFFIX = ":order"     # of the float16 tensor that holds them


def path_order(classes: np.ndarray) -> np.ndarray:
    """Columns in the order of a trellis path: class by class."""
    return classes.argsort(kind="stable")


@torch.no_grad()
def prepare(h_NCC: Tensor, warn: Callable[[str], None], coarse: bool = False) -> Factor:
    """Hessians -> factors. A Hessian with NaN or infinity becomes the identity: its matrices are rounded to nearest.

    coarse: columns in ORDER_CLASSES classes of falling diag H, as they stand inside a class.
    """
    h = h_NCC.float().clone()
    broken = ~h.isfinite().all(2).all(1)
    if broken.any():
        warn(f"warning: {int(broken.sum())} Hessians are not finite: their matrices are rounded to nearest")
        h[broken] = torch.eye(h.shape[1], device=h.device)
    dead = ~(h.diagonal(dim1=1, dim2=2) > 0)
    h.masked_fill_(dead[:, None, :] | dead[:, :, None], 0.0)
    h.diagonal(dim1=1, dim2=2).masked_fill_(dead, 1.0)
    order = h.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    if coarse:
        ranks = torch.arange(order.shape[1], device=order.device).expand_as(order)
        order = torch.empty_like(order).scatter_(1, order, ranks * ORDER_CLASSES // order.shape[1]).argsort(dim=1, stable=True)
    each = torch.arange(len(h), device=h.device)[:, None, None]
    return Factor(order, inverse_factor(h[each, order[:, :, None], order[:, None, :]], warn), ~dead)


@torch.no_grad()
def round_scalar(w_NRC: Tensor, factor: Factor, step_NR: Tensor, bits: int, block_size: int = 128) -> Tensor:
    """GPTQ (arXiv 2210.17323) of N matrices at once: integers int8 [N, R, C] that minimise the error seen through H.

    Columns in the factor's order, that of falling diag H, in blocks; each column's rounding error is spread over those that follow.
    Inputs that are never active (H_jj = 0) get weight 0. step: float16 or float32 [N, R].
    """
    q_max, columns, u, order = largest(bits), w_NRC.shape[2], factor.u, factor.order
    w = (w_NRC.float() * factor.live[:, None]).gather(2, order[:, None].expand_as(w_NRC)).contiguous()
    step = step_NR.float()
    q = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    with matmul_precision("highest"):
        for a in range(0, columns, block_size):
            b = min(a + block_size, columns)
            part, errors = w[:, :, a:b].clone(), torch.empty_like(w[:, :, a:b])
            for j in range(b - a):
                column = part[:, :, j]
                rounded = (column / step).round_().clamp_(-q_max, q_max)
                q[:, :, a + j] = rounded
                errors[:, :, j] = (column - rounded * step) / u[:, a + j, a + j, None]
                part[:, :, j + 1:] -= errors[:, :, j, None] * u[:, None, a + j, a + j + 1: b]
            w[:, :, b:] -= torch.bmm(errors, u[:, a:b, b:])
    return torch.empty_like(q).scatter_(2, order[:, None].expand_as(q), q)


@torch.no_grad()
def round_trellis(w_NRC: Tensor, factor: Factor, step_NR: Tensor, states: int, rate: float) -> Tensor:
    """The same loop with integers from a trellis (see trellis_block), each row a path from state 0. int8 [N, R, C].

    rate: squared steps that a bit is worth. Rows are coded as Gaussians, so a bit more is spent on larger integers as
    their squares grow.
    """
    columns, u, order = w_NRC.shape[2], factor.u, factor.order
    w = (w_NRC.float() * factor.live[:, None]).gather(2, order[:, None].expand_as(w_NRC)).contiguous()
    step = step_NR.float()
    shrink = rate * math.log2(math.e) / 2 * step.square() / w.square().mean(2).clamp_min(1e-30)
    state = torch.zeros(step.shape, dtype=torch.int64, device=w.device)
    q = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    with matmul_precision("highest"):
        for a in range(0, columns, TRELLIS_BLOCK):
            b = min(a + TRELLIS_BLOCK, columns)
            here = u[:, a:b, a:b]
            errors, state = trellis_block(w[:, :, a:b], here, step, shrink.clamp(max=1.0), state, states)
            # what was rounded: the weight after the errors before it, less its own
            q[:, :, a:b] = ((w[:, :, a:b] - torch.bmm(errors, here)) / step[:, :, None]).round_()
            w[:, :, b:] -= torch.bmm(errors, u[:, a:b, b:])
    return torch.empty_like(q).scatter_(2, order[:, None].expand_as(q), q)


def weighted_square(e_RC: Tensor, h_CC: Tensor) -> float:
    """trace(E H E^T): the squared error of the layer's output over the calibration inputs."""
    return ((e_RC @ h_CC) * e_RC).sum(dtype=torch.float64).item()


class Clip(NamedTuple):
    """A rule's answer for one matrix: step = sigma * rows * std(row) / q_max(bits of its role)."""
    sigma: float
    rows: Tensor | None = None      # float32 [R], mean about 1


class Calibration(NamedTuple):
    """Everything that the rules know of a model, by file name (hessians: by hessian_key)."""
    weights: dict[str, Tensor]
    hessians: dict[str, Tensor]
    sensitivity: dict[str, Tensor] = {}         # see collect_sensitivity
    counts: Tensor | None = None    # of the tokens


def hand_rule(names: list[str], known: Calibration, c: Config) -> dict[str, Clip]:
    return {name: Clip(clip_sigma(name, c)) for name in names}


def input_sensitivity(name: str, known: Calibration) -> float:
    """mean(diag H) * mean(var(row)): PR 1689's measure of a matrix."""
    h = known.hessians[hessian_key(name)]
    return max(h.diagonal().double().mean().item() * known.weights[name].double().var(dim=1).mean().item(), 1e-30)


def adaptive_rule(names: list[str], known: Calibration, c: Config) -> dict[str, Clip]:
    """PR 1689: sigma ~ sensitivity^-0.15 within 6 .. 24, the element-weighted mean of ln sigma as hand-set.

    Embeddings keep the hand-set sigma.
    """
    clips = hand_rule(names, known, c)
    matrices = [name for name in names if name.startswith("blocks.")]
    if not matrices:
        return clips
    slope = torch.tensor([-0.15 * math.log(input_sensitivity(n, known)) for n in matrices], dtype=torch.float64)
    size = torch.tensor([known.weights[n].numel() for n in matrices], dtype=torch.float64)
    size /= size.sum()
    aim = (size * torch.tensor([math.log(clips[n].sigma) for n in matrices], dtype=torch.float64)).sum()
    low, high = -20.0, 20.0
    sigmas = lambda offset: (slope + offset).exp().clamp(6, 24)
    for _ in range(64):
        middle = (low + high) / 2
        low, high = (middle, high) if (size * sigmas(middle).log()).sum() < aim else (low, middle)
    return clips | {n: Clip(sigma) for n, sigma in zip(matrices, sigmas((low + high) / 2).tolist())}


def steady(rows_2R: Tensor, prior_R: Tensor) -> Tensor:
    """Mean of two noisy halves, drawn towards the prior as far as the halves disagree. float64 [R].

    The mix is of values, not of logarithms: a row that no batch happened to need keeps a share of its prior.
    """
    logs = (rows_2R / prior_R + 0.1).log()
    logs = logs - logs.mean(1, keepdim=True)
    agreement = ((logs[0] * logs[1]).mean() / (logs[0].var() * logs[1].var()).sqrt().clamp_min(1e-12)).clamp(0, 1)
    return torch.lerp(prior_R, rows_2R.mean(0), 2 * agreement / (1 + agreement))    # Spearman-Brown: of the mean of both


def neighbours_mean(values: Tensor, rank_by: Tensor, width: int = 65) -> Tensor:
    """Mean of each value with those that stand next to it when sorted by rank_by."""
    order = rank_by.argsort(stable=True)
    padded = F.pad(values[order][None, None], (width // 2, width // 2), mode="replicate")
    return torch.empty_like(values).index_copy_(0, order, F.avg_pool1d(padded, width, 1)[0, 0])


EXTREME = 1e5           # more than this far from the usual is a row or tensor that training has not reached


def fisher_rule(names: list[str], known: Calibration, c: Config) -> dict[str, Clip]:
    """Steps by theory: at high rate the least loss for given bytes has step ~ (loss per step^2 and weight)^-1/2.

    Rows of the embedding are compared with tokens about as frequent, other rows with their matrix. The element-weighted
    mean of ln step is that of the hand-set sigmas.
    """
    logs, excess, size, clips = {}, 0.0, 0, hand_rule(names, known, c)
    names = [name for name in names if name in known.sensitivity]       # of what was not measured nothing better is known
    usual = float(np.median([known.sensitivity[name].mean().item() / known.weights[name].shape[1] for name in names] or [1.0]))
    for name in names:
        w = known.weights[name].double()
        seen = known.sensitivity[name].to(w.device)
        mean = seen.mean().clamp(usual * w.shape[1] / EXTREME + 1e-30, usual * w.shape[1] * EXTREME + 1e-30)
        prior = mean.expand(len(w))
        if known.counts is not None and len(known.counts) == len(w):
            prior = neighbours_mean(seen.mean(0), known.counts.to(w.device))
        rows = (steady(seen, prior.clamp_min(mean / EXTREME)) / mean).clamp_min(1 / EXTREME).log()
        spread = w.std(dim=1)
        spread = spread.clamp_min(0.01 * spread.mean().item() + 1e-12)
        logs[name] = -c.fisher_tensor_power * (mean / w.shape[1]).log() - c.fisher_row_power * rows - spread.log()
        group = layer_group(name, c)
        hand = math.log(getattr(c, role_of(name).clip) / largest(getattr(c, role_of(name).bits)))
        excess += (logs[name].mean().item() - hand) * w.numel()
        logs[name] += math.log(largest(getattr(c, role_of(name).bits)) * (getattr(c, f"clip_mult_{group}") if group else 1))
        size += w.numel()
    # a rare token's logit that loses its few bits is a large error, which no gradient foretells: hence the cap
    logs = {name: (x - excess / size).clamp(max=math.log(c.fisher_coarsest * clips[name].sigma)) for name, x in logs.items()}
    return clips | {name: Clip(x.mean().exp().item(), (x - x.mean()).exp().float()) for name, x in logs.items()}


CLIP_RULES: dict[str, Callable[[list[str], Calibration, Config], dict[str, Clip]]] = {
    "hand": hand_rule, "adaptive": adaptive_rule, "fisher": fisher_rule}


def row_importance(w_RC: Tensor, h_CC: Tensor) -> Tensor:
    """PR 1412: r_r = mean_j |W_rj| h_j / its mean over rows, h_j = H_jj / mean(diag H). float32 [R]."""
    h = h_CC.diagonal()
    r = (w_RC.float().abs() * (h / h.mean().clamp_min(1e-30))).mean(1)
    return r / r.mean().clamp_min(1e-30)


def matrix_bits(names: list[str], known: Calibration, c: Config) -> dict[str, int]:
    """Bits of each matrix: its role's, or with MIXED_PRECISION_HESSIAN by sensitivity (PR 1962)."""
    bits = {name: getattr(c, role_of(name).bits) for name in names}
    if c.mixed_precision_hessian:
        ranked = sorted((n for n in names if n.startswith("blocks.")), key=lambda n: input_sensitivity(n, known))
        low, high = (int(len(ranked) * f) for f in (c.mixed_precision_low_frac, c.mixed_precision_high_frac))
        bits.update(dict.fromkeys(ranked[:low], c.mixed_precision_bits_low))
        bits.update(dict.fromkeys(ranked[len(ranked) - high:], c.mixed_precision_bits_high))
    return bits


def shorten_mantissa(t: Tensor, bits: int) -> Tensor:
    """float16 with only the first `bits` bits of its mantissa in use, to nearest."""
    half, drop = t.half(), 10 - bits
    if not drop:
        return half
    rounded = ((half.view(torch.int16).int() + (1 << drop >> 1)) >> drop << drop).to(torch.int16).view(torch.float16)
    return torch.where(rounded.isfinite(), rounded, half)


class Batched(NamedTuple):
    """Matrices of one shape and bits, which go through the quantiser together."""
    names: list[str]
    w: Tensor               # float32 [N, R, C]
    steps: Tensor           # float32 [N, R], as the rule wants them
    finest: Tensor          # float32 [N, R], that cut no weight off
    energy: Tensor          # float32 [N, R]: mean squares
    bits: int               # of the integers
    mine: list[int]         # those that this rank quantises
    factor: Factor | None   # of those


class Quantizer:
    """Calibrated weights, ready to be quantised with any multiplier of all steps.

    Matrices of one shape go through GPTQ in one batch, shared out over ranks; every rank returns everything.
    """

    def __init__(self, run: Run, known: Calibration, factors: dict[str, Factor] | None = None):
        c, world = self.c, self.world = run.config, run.world
        self.run, self.known = run, known
        self.states, self.errors = c.trellis_states, {}
        self.union = 2 if self.states else 1        # a trellis takes every second of its integers: half the step, the same bits
        names = [name for name, t in known.weights.items() if is_quantised(name, t)]
        if factors is None:
            factors = prepare_all(run, known.hessians)
        # an untied embedding is a table of rows, not a product: it has no Hessian and is rounded
        self.hessian = {n: known.hessians.get(hessian_key(n)) for n in names}
        if not c.tie_embeddings and "tok_emb.weight" in self.hessian:
            self.hessian["tok_emb.weight"] = None
        self.clips = CLIP_RULES[c.clip_rule](names, known, c)
        if c.hessian_clip_lambda:
            for name in names:
                if self.hessian[name] is not None:
                    rows = 1 + c.hessian_clip_lambda * (row_importance(known.weights[name], self.hessian[name]) - 1)
                    clip = self.clips[name]
                    self.clips[name] = clip._replace(rows=rows if clip.rows is None else rows * clip.rows)
        self.factors, self.bits = factors, matrix_bits(names, known, c)
        self.done: dict[str, IntTensor] = {}        # codes that stay as they are (INQ)
        self.spent = 0.0                            # bytes of these, as estimated
        groups: dict[tuple, list[str]] = {}
        for name in names:
            groups.setdefault((known.weights[name].shape, self.bits[name]), []).append(name)
        self.batches = []
        for (_, bits), group in groups.items():
            mine = list(range(world.rank, len(group), world.size))
            chosen = [self.factor(group[i]) for i in mine]
            w = torch.stack([known.weights[name].float() for name in group]).to(world.device)
            steps = raw_steps(w, torch.tensor([self.clips[name].sigma for name in group], device=w.device), bits)
            for i, name in enumerate(group):
                if self.clips[name].rows is not None:
                    steps[i] *= self.clips[name].rows.to(w.device)
            if c.clip_rule == "fisher" or self.states:          # with an entropy coder behind, a longer reach costs nothing
                bits = 8
            self.batches.append(Batched(group, w, steps, w.abs().amax(2) / largest(bits), w.square().mean(2), bits, mine,
                                        Factor(*map(torch.stack, zip(*chosen))) if mine else None))

    def factor(self, name: str) -> Factor:
        """Without a Hessian: rounding to nearest, in the order that the decoder knows for matrices of this input."""
        known = self.factors.get(input_key(name, self.factors))
        if self.hessian[name] is not None:
            return known
        columns, device = self.known.weights[name].shape[1], self.world.device
        order = torch.arange(columns, device=device) if known is None else known.order
        return Factor(order, torch.eye(columns, device=device), torch.ones(columns, dtype=torch.bool, device=device))

    def steps(self, batch: Batched, multiplier: float) -> Tensor:
        """Steps of a multiplier: not so fine that weights are cut off, unless hand-set sigmas ask for it."""
        steps = batch.steps / self.union
        floor = batch.finest if self.c.clip_rule == "fisher" else torch.minimum(steps, batch.finest)
        steps = torch.maximum(steps * multiplier, floor)
        return snap_steps(steps, batch.w, batch.bits, self.c.step_grid)

    def estimate(self, multiplier: float) -> float:
        """Bytes of the integers that are not done, before any are made: rows as Gaussians of their own deviation."""
        bits = 0.0
        for batch in self.batches:
            open_N = torch.tensor([name not in self.done for name in batch.names], device=batch.w.device)
            squares = (batch.energy / (self.union * self.steps(batch, multiplier).float()).square())[open_N].double()
            bits += (0.5 * (1 + 2 * math.pi * math.e * squares).log2()).sum().item() * batch.w.shape[2]
        return bits / 8

    def round(self, w_NRC: Tensor, factor: Factor, step_NR: Tensor, bits: int) -> Tensor:
        if self.states:
            return round_trellis(w_NRC, factor, step_NR, self.states, self.c.trellis_lambda)
        return round_scalar(w_NRC, factor, step_NR, bits)

    def orders(self) -> dict[str, HalfTensor]:
        """What the decoder must know of the columns of trellis paths: their classes, by input."""
        out = {}
        for name in self.bits if self.states else ():
            if self.hessian[name] is not None:
                key = input_key(name, self.factors)
                order = self.factors[key].order.cpu()
                classes = torch.arange(len(order)) * ORDER_CLASSES // len(order)
                out[key + ORDER_SUFFIX] = HalfTensor(torch.empty(len(order)).scatter_(0, order, classes.float()).half())
        return out

    @torch.no_grad()
    def __call__(self, multiplier: float = 1.0) -> dict[str, IntTensor | HalfTensor]:
        c, weights = self.c, self.known.weights
        coded: dict[str, IntTensor | HalfTensor] = {}
        for name, t in weights.items():
            if name.endswith("attn_gate_w") and c.gated_attn_quant_gate:
                step = (t.float().abs().amax(1) / 127).clamp_min(SMALLEST_STEP).half()
                q = (t.float() / step.float()[:, None]).round().clamp(-127, 127)
                coded[name] = IntTensor(q.to(torch.int8).cpu(), step.cpu(), 8)
            elif name not in self.bits:
                coded[name] = HalfTensor(shorten_mantissa(t, c.small_mantissa_bits).cpu())
        coded |= self.done | self.round_all([name for name in self.bits if name not in self.done], multiplier)
        coded = {name: coded[name] for name in weights} | self.orders()
        return repair(self, coded) if c.lqer_enabled else coded

    def round_all(self, names: list[str], multiplier: float) -> dict[str, IntTensor]:
        """Codes of these matrices; every rank returns all of them, and notes their errors."""
        world, coded = self.world, {}
        errors = torch.zeros(len(names), 2, dtype=torch.float64)
        place = {name: i for i, name in enumerate(names)}
        for batch in self.batches:
            if place.keys().isdisjoint(batch.names):
                continue
            mine = [(at, i) for at, i in enumerate(batch.mine) if batch.names[i] in place]
            steps = self.steps(batch, multiplier)
            q = torch.zeros(batch.w.shape, dtype=torch.int8, device=world.device)
            if mine:
                at, here = (list(places) for places in zip(*mine))
                q[here] = self.round(batch.w[here], Factor(*(t[at] for t in batch.factor)), steps[here], batch.bits)
            for _, i in mine:
                h = self.hessian[batch.names[i]]
                error = batch.w[i] - q[i].float() * steps[i].float()[:, None]
                for j, x in enumerate((error, batch.w[i])):
                    errors[place[batch.names[i]], j] = x.double().square().sum().item() if h is None else weighted_square(x, h)
            world.sum(q)
            coded.update({name: IntTensor(q[i].cpu(), steps[i].cpu(), batch.bits, self.states)
                          for i, name in enumerate(batch.names) if name in place})
        self.errors |= dict(zip(names, world.sum(errors).tolist()))
        return coded

    def finish(self, names: list[str], multiplier: float):
        """Quantise these matrices for good."""
        before = self.estimate(multiplier)
        self.done |= self.round_all(names, multiplier)
        self.spent += before - self.estimate(multiplier)

    def steer(self, at: float, whole: float) -> float:
        """log2 of the multiplier with which all comes to `whole` estimated bytes again, near `at`: an octave is a bit a weight."""
        weights = sum(t.numel() for name, t in self.known.weights.items() if name in self.bits and name not in self.done)
        return at + 8 * (self.spent + self.estimate(2.0 ** at) - whole) / max(weights, 1)

    @torch.no_grad()
    def update(self, weights: dict[str, Tensor]):
        """Go on with these weights for all that is not done; steps and Hessians stay those of the first ones."""
        weights = {name: t if name in self.done else weights[name].detach().clone() for name, t in self.known.weights.items()}
        self.known = self.known._replace(weights=weights)
        for batch in self.batches:
            for i, name in enumerate(batch.names):
                batch.w[i].copy_(weights[name])
            batch.energy.copy_(batch.w.square().mean(2))

    def rate(self, coded: dict[str, IntTensor | HalfTensor], name: str) -> float:
        """Bits a weight of one matrix: the entropy of its integers, given the trellis's state."""
        return 8 * entropy_bytes({name: coded[name]}) / coded[name].q.numel()

    def log_table(self, coded: dict[str, IntTensor | HalfTensor]):
        """The sigma, the entropy and the weighted error of every matrix as they came out, and one line on the whole."""
        c, sigmas = self.c, {}
        for name, bits in self.bits.items():
            if c.clip_rule != "adaptive" or name.startswith("blocks."):
                spread = self.known.weights[name].double().std(dim=1).clamp_min(1e-12).cpu()
                sigmas[name] = (coded[name].step.double() * self.union * largest(bits) / spread).log().mean().exp().item()
        table = "\n".join(f"    {name}: {sigma:.2f}" for name, sigma in sigmas.items())
        self.run.log(f"GPTQ clip_sigmas (rule:{c.clip_rule}, {len(sigmas)} tensors):\n{table}", console=False)
        rates = "\n".join(f"    {name}: {self.rate(coded, name):.4f} {error / max(energy, 1e-30):.6f}"
                          for name, (error, energy) in self.errors.items())
        self.run.log(f"GPTQ bits and weighted error (quantizer:{c.quantizer}, {len(self.errors)} tensors):\n{rates}", console=False)
        error, energy = (sum(e[i] for e in self.errors.values() if math.isfinite(e[0] + e[1])) for i in range(2))
        self.run.log(f"gptq_summary quantizer:{c.quantizer} entropy_bytes:{entropy_bytes(coded):.0f} "
                     f"weighted_error:{error / max(energy, 1e-30):.6g}")


def prepare_all(run: Run, hessians: dict[str, Tensor]) -> dict[str, Factor]:
    """Factors of all Hessians, those of one size together."""
    sizes: dict[int, list[str]] = {}
    for name, h in hessians.items():
        sizes.setdefault(len(h), []).append(name)
    out = {}
    for names in sizes.values():
        stacked = prepare(torch.stack([hessians[n] for n in names]), run.log, run.config.trellis_states > 0)
        out.update(zip(names, map(Factor._make, zip(*stacked))))
    return out


def in_turn(quantizer: Quantizer, count: int) -> list[list[str]]:
    """The matrices in `count` groups of about as many weights, from the last layer down to the embedding: that order left the
    least error (records/2026-11-22_inq)."""
    sizes = {name: quantizer.known.weights[name].numel() for name in quantizer.bits}
    layer = lambda name: int(name.split(".")[1]) if name.startswith("blocks.") else -1
    groups, total, before = [[] for _ in range(count)], sum(sizes.values()), 0
    for name in sorted(sizes, key=layer, reverse=True):
        groups[min(int((before + sizes[name] / 2) * count / total), count - 1)].append(name)
        before += sizes[name]
    return [group for group in groups if group]


def quantize_in_turn(run: Run, trainer: Trainer, quantizer: Quantizer, at: float, closing: float = 0.0):
    """Quantise all groups of matrices but the last, with INQ_STEPS of training after each: what is not quantised yet learns to
    make up for what is (incremental network quantization: arXiv 1702.03044). Leaves codes and weights in the quantizer.

    at: log2 of the multiplier of all steps; each group then takes its part of what training has changed in bytes. closing:
    seconds that must be left of the training budget; there are fewer steps where time is short.
    """
    c, world = run.config, run.world
    groups = in_turn(quantizer, c.inq_groups)[:-1]
    views = export_weights(dict(trainer.model.named_parameters()), c.num_layers)
    whole = quantizer.estimate(2.0 ** at)
    trainer.forget()
    with contextlib.closing(Prefetcher(trainer.stream(), world.device)) as batches:
        for i, names in enumerate(groups):
            with run.ledger.stage("inq", "train"):
                if c.target_bytes:
                    at = quantizer.steer(at, whole)
                wanted = [at, affordable_steps(run, trainer, closing, len(groups) - i)]
                at, steps = world.broadcast(torch.tensor(wanted, dtype=torch.float64)).tolist()
                quantizer.finish(names, 2.0 ** at)
                trainer.refine(batches, int(steps), c.inq_lr, {n: code.decode().to(world.device) for n, code in quantizer.done.items()})
                quantizer.update(views)
            run.log(f"inq: group:{i + 1}/{len(groups) + 1} matrices:{len(names)} multiplier:{2.0 ** at:.6f} steps:{steps:.0f}"
                    + f" last loss: {trainer.last_loss:.4f}" * bool(steps))


def affordable_steps(run: Run, trainer: Trainer, closing: float, turns: int) -> int:
    """INQ_STEPS, or what the training budget less `closing` seconds has for each of the turns that are left."""
    c = run.config
    if not (c.max_wallclock_seconds and trainer.step_seconds):
        return c.inq_steps
    left = (c.max_wallclock_seconds - closing - run.ledger.used["train"]) / turns
    return max(min(c.inq_steps, int(left / trainer.step_seconds)), 0)


# ======================================================================================================================
# REPAIR: low-rank correction of the worst matrices (LQER: arXiv 2402.02446)
# ======================================================================================================================

LQER_SUFFIXES = (".lqer_a", ".lqer_b")


def code_factor(x: Tensor, bits: int, group: int = 0) -> IntTensor:
    """A factor as integers. group > 0: asymmetric, `group` values in reading order share a scale of max / (2^(bits-1) - 0.5),
    values -2^(bits-1) .. 2^(bits-1) - 1. group = 0: symmetric, a scale for each row."""
    parts = x.float().reshape(-1, group or x.shape[1])
    top = 2 ** (bits - 1)
    step = (parts.abs().amax(1) / (top - (0.5 if group else 1))).clamp(SMALLEST_STEP, LARGEST_STEP).half()
    q = (parts / step.float()[:, None]).round().clamp(-top if group else 1 - top, top - 1)
    return IntTensor(q.to(torch.int8).view(x.shape).cpu(), step.cpu(), bits)


def low_rank(error_RC: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [R, rank] and B [rank, C] with the least |E - A B|: truncated SVD. (Through the Hessian: records/2026-11-22_quantisation_h100,
    "hand-set + LQER by Hessian", gained nothing.)"""
    e = error_RC.double()
    vectors = torch.linalg.eigh(e.T @ e)[1][:, -rank:].flip(1)
    return (e @ vectors).float(), vectors.T.float()


@torch.no_grad()
def repair(quantizer: Quantizer, coded: dict[str, IntTensor | HalfTensor]) -> dict[str, IntTensor | HalfTensor]:
    """Add the two factors of the LQER_TOP_K worst matrices, under their names and LQER_SUFFIXES."""
    c, device = quantizer.c, quantizer.world.device
    error = {n: quantizer.known.weights[n].float().to(device) - coded[n].decode().to(device)
             for n in quantizer.bits if n not in quantizer.done}         # for what is done training has made up
    out = dict(coded)
    for name in sorted(error, key=lambda n: error[n].square().sum().item(), reverse=True)[: c.lqer_top_k]:
        a, b = low_rank(error[name], min(c.lqer_rank, *error[name].shape))
        if c.lqer_asym_enabled and b.numel() % c.lqer_asym_group == 0:
            factors = code_factor(a, 2, a.numel()), code_factor(b, 4, c.lqer_asym_group)
        else:
            factors = code_factor(a, c.lqer_factor_bits), code_factor(b, c.lqer_factor_bits)
        out.update({name + suffix: factor for suffix, factor in zip(LQER_SUFFIXES, factors)})
    return out


def restore(coded: dict[str, IntTensor | HalfTensor]) -> dict[str, Tensor]:
    """Codes -> float32 weights under their file names, repairs added."""
    out = {name: t.decode() for name, t in coded.items() if not name.endswith(ORDER_SUFFIX)}
    for name in [n for n in out if n + LQER_SUFFIXES[0] in out]:
        a, b = (out.pop(name + suffix) for suffix in LQER_SUFFIXES)
        out[name] = out[name] + a @ b
    return out


# ======================================================================================================================
# CODER: integers and halves <-> bytes
# ======================================================================================================================


class Spec(NamedTuple):
    """What a decoder must know of a tensor: name, shape, bits (0: float16), number of steps (0: one for each row), states."""
    name: str
    shape: tuple[int, ...]
    bits: int
    steps: int = 0
    states: int = 0

    @property
    def halves(self) -> int:
        """float16 values of the tensor: its steps, or all."""
        return (self.steps or self.shape[0]) if self.bits else math.prod(self.shape)


def coding_group(name: str) -> str:
    """Tensors of one role are coded together: the name without its layer."""
    return ".".join(part for part in name.split(".") if not part.isdigit())


def entropy_bits(counts: np.ndarray) -> float:
    """Bits of n symbols with these counts under their own frequencies."""
    n = counts[counts > 0]
    return float(-(n * np.log2(n / n.sum())).sum())


def entropy_bytes(coded: dict[str, IntTensor | HalfTensor]) -> float:
    """Order-0 entropy of the integers in bytes: sum over roles of n H(q) / 8."""
    counts: dict[str, np.ndarray] = {}
    for name, t in coded.items():
        if isinstance(t, IntTensor):
            seen = np.bincount(t.q.numpy().reshape(-1).astype(np.int64) + 128, minlength=256)
            for part in (0, 1) if t.states else (slice(None),):         # the state tells even from odd
                key = coding_group(name), part if t.states else -1
                counts[key] = counts.get(key, 0) + (seen[part::2] if t.states else seen)
    return sum(map(entropy_bits, counts.values())) / 8


def find_path(name: str, columns: int, known: dict[str, IntTensor | HalfTensor]) -> np.ndarray:
    """The order in which a trellis path takes the columns of a matrix; raises ValueError if its classes do not fit."""
    inputs = {n.removesuffix(ORDER_SUFFIX): t for n, t in known.items() if n.endswith(ORDER_SUFFIX)}
    key = input_key(name, inputs)
    if key not in inputs:
        return np.arange(columns)
    if inputs[key].values.shape != (columns,):
        raise ValueError(f"the classes of {key} are {list(inputs[key].values.shape)}: {name} has {columns} columns")
    return path_order(inputs[key].values.numpy())


def odd_along_path(branches: np.ndarray, path: np.ndarray, states: int) -> np.ndarray:
    """Which integers of a trellis are odd, by the branches (second lowest bits) of them all: uint8 [rows, columns]."""
    nexts = trellis_next(states).astype(np.uint8).ravel()
    taken = np.ascontiguousarray(branches.T, np.uint8)
    state, odd = np.zeros(len(branches), np.uint8), np.empty_like(taken)
    for j in path:
        odd[j] = state & 1
        state = nexts[2 * state + taken[j]]
    return odd.T


def halved(coded: dict[str, IntTensor | HalfTensor]) -> dict[str, IntTensor | HalfTensor]:
    """For coders that know no trellis: its integers without their lowest bit, which the others tell."""
    return {n: t._replace(q=t.q >> 1) if isinstance(t, IntTensor) and t.states else t for n, t in coded.items()}


def doubled(coded: dict[str, IntTensor | HalfTensor]) -> dict[str, IntTensor | HalfTensor]:
    """Inverse of halved; raises ValueError."""
    out = dict(coded)
    for n, t in coded.items():
        if isinstance(t, IntTensor) and t.states:
            odd = odd_along_path(t.q.numpy() & 1, find_path(n, t.q.shape[1], coded), t.states)
            out[n] = t._replace(q=2 * t.q + torch.from_numpy(odd.astype(np.int8)))
    return out


def flatten_codes(coded: dict[str, IntTensor | HalfTensor]) -> bytes:
    """Integers role by role (one byte each), then all float16 values with their high bytes before their low bytes."""
    in_order = sorted(coded, key=lambda name: (coding_group(name), list(coded).index(name)))
    ints = [coded[n].q.numpy().tobytes() for n in in_order if isinstance(coded[n], IntTensor)]
    halves = [(coded[n].step if isinstance(coded[n], IntTensor) else coded[n].values).numpy().tobytes() for n in in_order]
    planes = np.frombuffer(b"".join(halves), np.uint8).reshape(-1, 2)
    return b"".join(ints) + planes[:, 1].tobytes() + planes[:, 0].tobytes()


def flat_sizes(specs: list[Spec]) -> tuple[int, int]:
    """Bytes of integers and number of float16 values that flatten_codes makes of these tensors."""
    return sum(math.prod(s.shape) for s in specs if s.bits), sum(s.halves for s in specs)


def unflatten_codes(data: bytes, specs: list[Spec]) -> dict[str, IntTensor | HalfTensor]:
    """Inverse of flatten_codes; raises ValueError when the length does not fit the specs."""
    ints, halves = flat_sizes(specs)
    if len(data) != ints + 2 * halves:
        raise ValueError(f"a stream holds {len(data)} bytes: expected {ints + 2 * halves}")
    q = np.frombuffer(data, np.int8, ints)
    planes = np.frombuffer(data, np.uint8, 2 * halves, ints).reshape(2, halves)
    values = torch.from_numpy(np.stack((planes[1], planes[0]), 1).reshape(-1).copy().view(np.float16))
    out, at, at_half = {}, 0, 0
    for spec in sorted(specs, key=lambda s: (coding_group(s.name), specs.index(s))):
        count = math.prod(spec.shape)
        part = values[at_half: at_half + spec.halves]
        at_half += spec.halves
        if spec.bits:
            out[spec.name] = IntTensor(torch.from_numpy(q[at: at + count].copy()).view(spec.shape), part, spec.bits, spec.states)
            at += count
        else:
            out[spec.name] = HalfTensor(part.view(spec.shape))
    return {s.name: out[s.name] for s in specs}


def compress_brotli(data: bytes) -> bytes:
    import brotli
    return brotli.compress(data, quality=11, lgwin=24)


def decompress_brotli(data: bytes, size: int) -> bytes:
    """Inverse of compress_brotli; raises ValueError rather than give more than `size` bytes."""
    import brotli
    unpacker, out, given = brotli.Decompressor(), [], 0
    while given <= size and not unpacker.is_finished():
        out.append(unpacker.process(b"" if out else data, output_buffer_limit=size - given + 1))
        given += len(out[-1])
        if not out[-1] and unpacker.can_accept_more_data():
            break
    if given != size or not unpacker.is_finished():
        raise ValueError(f"a brotli stream holds {'more than ' * (given > size)}{min(given, size)} bytes: expected {size}")
    return b"".join(out)


XZ = {"format": lzma.FORMAT_RAW, "filters": [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 1 << 26}]}


class Coder(NamedTuple):
    """One value of COMPRESSOR. encode: codes -> streams; decode: its inverse; probe: is everything that it needs there?

    encode and decode get a folder for temporary files. decode raises ValueError on anything that does not fit.
    knows_trellis: False gets the integers of a trellis without their lowest bits.
    """
    encode: Callable[[dict, Path], dict[str, bytes]]
    decode: Callable[[dict[str, bytes], list[Spec], Path], dict]
    probe: Callable[[], None]
    knows_trellis: bool = False


def one_stream(pack: Callable[[bytes], bytes], unpack: Callable[[bytes, int], bytes]) -> Coder:
    """A general compressor over everything at once."""
    def decode_stream(streams, specs, _folder):
        ints, halves = flat_sizes(specs)
        return unflatten_codes(unpack(streams["all"], ints + 2 * halves), specs)
    return Coder(lambda coded, _folder: {"all": pack(flatten_codes(coded))}, decode_stream, lambda: pack(b"probe"))


class SymbolCoder:
    """A range coder (constriction) that runs either way, so that one description of the format serves both.

    through(...) codes `values` when writing and returns what was coded when reading. Probabilities are made of exact
    integers: every machine decodes alike. Reading stops at `limit` symbols, so a foreign file can not fill the memory.
    """

    def __init__(self, data: bytes | None = None):
        from constriction import stream
        self.writing, queue = data is None, stream.queue
        self.categorical = stream.model.Categorical
        if self.writing:
            self.coder = queue.RangeEncoder()
        elif len(data) % 4:
            raise ValueError(f"the coded integers have {len(data)} bytes: expected a multiple of 4")
        else:
            self.coder = queue.RangeDecoder(np.frombuffer(data, "<u4").astype(np.uint32))

    def through(self, weights: np.ndarray, values: np.ndarray | None, count: int) -> np.ndarray:
        """`count` symbols 0 .. len(weights) - 1 with probabilities proportional to weights (exact in float64)."""
        if count == 0 or len(weights) < 2:
            return np.zeros(count, np.int32)
        model = self.categorical(weights.astype(np.float64), perfect=False)
        if self.writing:
            self.coder.encode(np.ascontiguousarray(values, np.int32), model)
            return values
        return self.coder.decode(model, count)

    def number(self, value: int | None) -> int:
        """One unsigned number of 32 bits."""
        parts = self.through(np.ones(256), None if value is None else np.frombuffer(struct.pack("<I", value), np.uint8), 4)
        return int.from_bytes(bytes(parts.tolist()), "little")

    def counts(self, counts: np.ndarray | None, size: int) -> np.ndarray:
        """A histogram in floating point with three bits of mantissa, about 4 to 7 bits an entry."""
        exponent = mantissa = None
        if counts is not None:
            exponent = np.frexp(counts.astype(np.float64))[1]          # 0 for an empty entry
            mantissa = (counts.astype(np.int64) * 16 >> exponent) & 7
        exponent = self.through(np.ones(33), exponent, size)
        some = exponent > 0
        mantissa = self.through(np.ones(8), None if mantissa is None else mantissa[some], int(some.sum()))
        out = np.zeros(size)
        out[some] = np.ldexp(8.0 + mantissa, exponent[some] - 4)
        return out

    def integers(self, values: np.ndarray | None, count: int) -> np.ndarray:
        """Whole numbers of a small range (int32): their smallest, then symbols under their own histogram or a flat one."""
        if count == 0:
            return np.zeros(0, np.int32)
        low = size = seen = flat = None
        if values is not None:
            low, size = int(values.min()), int(np.ptp(values)) + 1
            seen = np.bincount(values - low)
            flat = count * math.log2(size) <= entropy_bits(seen) + 6 * size
        low = self.number(None if low is None else low + 2 ** 31) - 2 ** 31
        size, flat = self.number(size), self.number(flat)
        if not 1 <= size <= 65536:
            raise ValueError(f"a table has {size} entries: expected 1 to 65536")
        weights = np.ones(size) if flat else self.counts(seen, size)
        return self.through(weights, None if values is None else values - low, count) + low

    def finish(self) -> bytes:
        return self.coder.get_compressed().astype("<u4").tobytes()


@functools.cache
def gaussian_weights(scale: int) -> np.ndarray:
    """Weights of the integers -127 .. 127 (symbols 0 .. 254) under exp(-k^2 / 2 s^2), s = 2^(scale / FINE), as whole
    numbers of 24 bits: decimal arithmetic, the same on every machine."""
    with decimal.localcontext(decimal.Context(prec=30)):
        ratio = (-1 / (2 * Decimal(2) ** (Decimal(2 * scale) / FINE))).exp()
        weight, factor, half = Decimal(2 ** 24), ratio, []
        while len(half) < 128 and weight > Decimal("0.5"):
            half.append(int(weight))
            weight, factor = weight * factor, factor * ratio * ratio
    half = np.array(half + [0] * (128 - len(half)), np.float64)
    return np.concatenate((half[:0:-1], half))


FINE = 32                           # scales of the integers, in parts of an octave: of a tensor,
COARSE = 8                          # and of its rows and columns
SCALES = (-3 * FINE, 8 * FINE)      # smallest and largest scale
FEWEST_ROWS = 64                    # tensors of fewer rows have no scales of their columns


class Scales(NamedTuple):
    """What the coder's model knows of an integer tensor: log2 of its size, of its rows' and its columns' (int32)."""
    whole: int              # in 1/FINE octaves
    rows: np.ndarray        # in 1/COARSE octaves, relative to the whole
    columns: np.ndarray

    def contexts(self) -> np.ndarray:
        """Index of the distribution of every integer, uint16 [rows, columns] from 0."""
        rows = self.whole - SCALES[0] + FINE // COARSE * self.rows[:, None]
        return np.clip(rows + FINE // COARSE * self.columns, 0, SCALES[1] - SCALES[0]).astype(np.uint16)


def measure_scales(q: np.ndarray) -> Scales:
    """Root mean squares of rows and columns as whole numbers on a logarithmic grid: q ~ Gaussian(whole + row + column)."""
    squares = q.astype(np.float32) ** 2
    size = lambda x, parts: np.rint(parts / 2 * np.log2(np.maximum(x, 2.0 ** -6))).astype(np.int32)
    mean = squares.mean(1)
    whole = size(np.median(mean), FINE)
    rows = size(mean / 2.0 ** (2 * whole / FINE), COARSE)
    squares /= 2.0 ** (2 * rows[:, None] / COARSE)
    columns = np.zeros(q.shape[1], np.int32)
    if len(q) >= FEWEST_ROWS:
        columns = size(squares.mean(0) / 2.0 ** (2 * whole / FINE), COARSE)
        squares /= 2.0 ** (2 * columns / COARSE)
    return Scales(int(size(squares.mean(), FINE)), rows, columns)


def code_bits(coder: SymbolCoder, bits: np.ndarray | None, count: int) -> np.ndarray:
    """Bits that are as often 0 as 1, eight at a time: uint8 [count]."""
    packed = coder.through(np.ones(256), None if bits is None else np.packbits(bits), -(-count // 8))
    return np.unpackbits(packed.astype(np.uint8), count=count)


def code_matrices(coder: SymbolCoder, matrices: list[np.ndarray] | None, scales: list[Scales], paths: list[np.ndarray],
                  states: int) -> list[np.ndarray]:
    """All integers of the matrices of one role, one distribution after the other: int8 [rows, columns] each.

    Of a trellis the branches go first: then every integer is known modulo 4.
    """
    shapes = [(len(s.rows), len(s.columns)) for s in scales]
    ends = np.cumsum([rows * columns for rows, columns in shapes])
    split = lambda values: [part.reshape(shape) for part, shape in zip(np.split(values, ends[:-1]), shapes)]
    contexts = np.concatenate([s.contexts().ravel() for s in scales])
    n = None if matrices is None else np.concatenate([q.ravel() for q in matrices])
    apart = 4 if states else 1
    if states:
        branches = code_bits(coder, None if n is None else n >> 1 & 1, len(contexts))
        odd = np.concatenate([odd_along_path(part, path, states).ravel() for part, path in zip(split(branches), paths)])
        if n is not None and not np.array_equal(odd, n & 1):
            raise RuntimeError("integers that are no path through their trellis cannot be coded")
        contexts *= 4
        contexts += 2 * branches + odd
    order = contexts.argsort(kind="stable")
    ordered = np.empty(len(contexts), np.int8) if n is None else n[order]
    start = 0
    for context, end in enumerate(np.bincount(contexts).cumsum().tolist()):
        if end > start:
            first = (context - 1) % apart           # of -127 .. 127, the least that is equal to context modulo `apart`
            weights = gaussian_weights(context // apart + SCALES[0])[first::apart]
            part = None if n is None else (ordered[start:end].astype(np.int32) + 127 - first) // apart
            part = coder.through(weights if weights.any() else np.ones(len(weights)), part, end - start)
            if n is None:
                ordered[start:end] = apart * part + first - 127
        start = end
    if n is not None:
        return matrices
    out = np.empty_like(ordered)
    out[order] = ordered
    return split(out)


def code_halves(coder: SymbolCoder, values: np.ndarray | None, count: int) -> np.ndarray:
    """float16 values [count]: the upper bytes, then as many of the lower bits as are in use."""
    bits = None if values is None else values.view(np.uint16).astype(np.int32)
    unused = None if bits is None else next((n for n in range(8, 0, -1) if not (bits & (1 << n) - 1).any()), 0)
    unused = coder.number(unused)
    upper = coder.integers(None if bits is None else bits >> 8, count)
    lower = coder.integers(None if bits is None else (bits & 255) >> unused, count)
    return (upper << 8 | lower << unused).astype(np.uint16).view(np.float16)


def code_steps(coder: SymbolCoder, steps: np.ndarray | None, count: int) -> np.ndarray:
    """float16 steps of one role: places on the grid of STEP_GRID parts of an octave where all lie on it, else halves."""
    grid = None if steps is None else next((g for g in range(1, 17) if (on_grid(grid_index(steps, g), g) == steps).all()), 0)
    grid = coder.number(grid)
    if not grid:
        return code_halves(coder, steps, count)
    return on_grid(coder.integers(None if steps is None else grid_index(steps, grid), count), grid)


def code_rows(coder: SymbolCoder, rows: list[np.ndarray] | None, steps: list[np.ndarray]) -> np.ndarray:
    """Scales of the rows of one role, as they are or times their steps (rows of weights differ less than rows of integers
    where steps follow the loss): whichever takes fewer bits. The second needs steps on a grid of COARSE."""
    places = [grid_index(step, COARSE) for step in steps]
    exact = all((on_grid(p, COARSE) == step).all() for p, step in zip(places, steps))
    shift = np.concatenate([p - np.sort(p)[len(p) // 2] for p in places])
    plain = None if rows is None else np.concatenate(rows)
    bits = lambda values: entropy_bits(np.bincount(values - values.min()))
    times = exact and coder.number(None if plain is None else int(bits(plain + shift) < bits(plain)))
    if not times:
        return coder.integers(plain, len(shift))
    return coder.integers(None if plain is None else plain + shift, len(shift)) - shift


def code_all(open_coder: Callable[[str], SymbolCoder], specs: list[Spec],
             coded: dict[str, IntTensor | HalfTensor] | None) -> dict[str, IntTensor | HalfTensor]:
    """Everything, role by role. Writing: `coded` goes out; reading: coded is None and comes back.

    The integers of each role have a stream of their own, coded by a thread of its own.
    """
    out, groups, waiting, coder = {}, {}, [], open_coder("all")
    together = lambda parts: None if parts is None else np.concatenate([np.ravel(p) for p in parts])
    split = lambda whole, sizes: np.split(whole, np.cumsum(sizes)[:-1])
    for spec in specs:
        groups.setdefault((bool(spec.bits), coding_group(spec.name), spec.states), []).append(spec)
    with ThreadPoolExecutor() as pool:
        for (is_int, role, states), group in sorted(groups.items(), key=lambda item: item[0][0]):   # float16 first: it has the paths
            given = [coded[s.name] for s in group] if coded else None
            sizes = [s.halves for s in group]
            if not is_int:
                values = code_halves(coder, together([t.values.numpy() for t in given]) if given else None, sum(sizes))
                out.update({s.name: HalfTensor(torch.from_numpy(part.copy()).view(s.shape))
                            for s, part in zip(group, split(values, sizes))})
                continue
            steps = split(code_steps(coder, together([t.step.numpy() for t in given]) if given else None, sum(sizes)), sizes)
            matrices = [t.q.numpy().reshape(len(t.step), -1) for t in given] if given else None
            scales = [measure_scales(q) for q in matrices] if given else None
            whole = coder.integers(together([s.whole for s in scales]) if scales else None, len(group))
            rows = split(code_rows(coder, [s.rows for s in scales] if scales else None, steps), sizes)
            widths = [math.prod(s.shape) // s.halves for s in group]
            columns = split(coder.integers(together([s.columns for s in scales]) if scales else None, sum(widths)), widths)
            paths = [find_path(s.name, width, out) for s, width in zip(group, widths)] if states else []
            waiting.append((group, steps, pool.submit(code_matrices, open_coder(f"{role}/{states}"), matrices,
                                                      list(map(Scales, whole, rows, columns)), paths, states)))
        for group, steps, integers in waiting:
            for spec, step, q in zip(group, steps, integers.result()):
                out[spec.name] = IntTensor(torch.from_numpy(q).view(spec.shape), torch.from_numpy(step.copy()), spec.bits, spec.states)
    return {spec.name: out[spec.name] for spec in specs}


def encode_entropy(coded: dict[str, IntTensor | HalfTensor], _folder: Path) -> dict[str, bytes]:
    coders: dict[str, SymbolCoder] = {}
    code_all(lambda name: coders.setdefault(name, SymbolCoder()), specs_of(coded), coded)
    return {name: coder.finish() for name, coder in coders.items()}


def decode_entropy(streams: dict[str, bytes], specs: list[Spec], _folder: Path) -> dict[str, IntTensor | HalfTensor]:
    return code_all(lambda name: SymbolCoder(streams[name]), specs, None)


LRZIP_SECONDS = 900.0       # a stream takes 20 to 100 s
SORTED_GROUPS = ("tok_emb.weight", "blocks.attn.c_q.weight", "blocks.mlp.fc.weight")


def lrzip(data: bytes, folder: Path, *options: str) -> bytes:
    """data through the lrzip program (ZPAQ) by way of temporary files; raises UserError if it is missing, fails or hangs."""
    with tempfile.TemporaryDirectory(prefix=".lrzip.", suffix=f".{os.getpid()}.tmp", dir=folder) as place:
        source, target = Path(place, "in"), Path(place, "out")
        source.write_bytes(data)
        try:
            done = subprocess.run(["lrzip", "-q", "-f", *options, "-o", target, source], capture_output=True, text=True,
                                  timeout=LRZIP_SECONDS, stdin=subprocess.DEVNULL)
        except FileNotFoundError:
            raise UserError("COMPRESSOR=pergroup needs the lrzip program: apt-get install lrzip") from None
        except subprocess.TimeoutExpired:
            raise UserError(f"lrzip did not finish in {LRZIP_SECONDS:.0f} s and was stopped: use another COMPRESSOR") from None
        if done.returncode or not target.is_file():
            last = (done.stderr or done.stdout or "no message").strip().splitlines()[-1:]
            raise UserError(f"lrzip failed (exit code {done.returncode}): {' '.join(last)}")
        return target.read_bytes()


def similarity_order(q: Tensor) -> np.ndarray:
    """Greedy nearest neighbours of the rows in L1 distance, from row 0: uint16 [rows]."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = q.to(device, torch.float32)
    distances = torch.cat([torch.cdist(part, rows, p=1) for part in rows.split(1024)]).cpu().numpy()
    order, used = np.zeros(len(q), np.int64), np.zeros(len(q), np.float32)
    for i in range(len(q) - 1):
        used[order[i]] = np.inf
        order[i + 1] = (distances[order[i]] + used).argmin()
    return order.astype(np.uint16)


def pergroup_layout(specs: list[Spec]) -> tuple[dict[str, list[Spec]], list[Spec]]:
    """Matrices of each role that have a stream of their own; what stays for brotli (their steps as float16 tensors)."""
    is_large = lambda s: s.bits and not s.steps and len(s.shape) == 2 and SMALLEST_QUANTISED < math.prod(s.shape) and s.shape[0] <= 65536
    groups: dict[str, list[Spec]] = {}
    for spec in filter(is_large, specs):
        groups.setdefault(coding_group(spec.name), []).append(spec)
    return groups, [Spec(s.name, (s.shape[0],), 0) if is_large(s) else s for s in specs]


def encode_pergroup(coded: dict[str, IntTensor | HalfTensor], folder: Path) -> dict[str, bytes]:
    """Transposed matrices of a role in one lrzip stream, some with similar rows side by side; the rest through brotli."""
    groups, rest = pergroup_layout(specs_of(coded))
    orders, plain = [], {}
    for name, group in groups.items():
        parts = []
        for spec in group:
            q = coded[spec.name].q
            if name in SORTED_GROUPS:
                orders.append(similarity_order(q))
                q = q[torch.from_numpy(orders[-1].astype(np.int64))]
            parts.append(q.T.contiguous().numpy().tobytes())
        plain[name] = b"".join(parts)
    with ThreadPoolExecutor() as pool:
        streams = dict(zip(plain, pool.map(lambda data: lrzip(data, folder, "-z", "-L", "9"), plain.values())))
    streams["order"] = compress_brotli(b"".join(o.astype("<u2").tobytes() for o in orders))
    large = {spec.name for group in groups.values() for spec in group}
    rest = {s.name: HalfTensor(coded[s.name].step) if s.name in large else coded[s.name] for s in rest}
    streams["rest"] = compress_brotli(flatten_codes(rest))
    return streams


def decode_pergroup(streams: dict[str, bytes], specs: list[Spec], folder: Path) -> dict[str, IntTensor | HalfTensor]:
    """Inverse of encode_pergroup; raises ValueError on streams that do not fit the specs."""
    groups, rest = pergroup_layout(specs)
    ints, halves = flat_sizes(rest)
    out = unflatten_codes(decompress_brotli(streams["rest"], ints + 2 * halves), rest)
    rows = [s.shape[0] for name, group in groups.items() if name in SORTED_GROUPS for s in group]
    orders = np.frombuffer(decompress_brotli(streams["order"], 2 * sum(rows)), "<u2").astype(np.int64)
    orders = iter(np.split(orders, np.cumsum(rows)[:-1]))
    with ThreadPoolExecutor() as pool:
        plain = dict(zip(groups, pool.map(lambda name: lrzip(streams[name], folder, "-d"), groups)))
    for name, group in groups.items():
        if len(plain[name]) != sum(math.prod(s.shape) for s in group):
            raise ValueError(f"stream {name} holds {len(plain[name])} bytes: expected {sum(math.prod(s.shape) for s in group)}")
        at = 0
        for spec in group:
            count = math.prod(spec.shape)
            q = torch.from_numpy(np.frombuffer(plain[name], np.int8, count, at).copy()).view(spec.shape[::-1]).T
            if name in SORTED_GROUPS:
                order = next(orders)
                if not np.array_equal(np.sort(order), np.arange(len(order))):
                    raise ValueError(f"stream order: the rows of {spec.name} are not a permutation")
                q = torch.empty_like(q).index_copy_(0, torch.from_numpy(order), q)
            out[spec.name] = IntTensor(q.contiguous(), out[spec.name].values, spec.bits, spec.states)
            at += count
    return out


COMPRESSORS: dict[str, Coder] = {
    "entropy": Coder(encode_entropy, decode_entropy, SymbolCoder, True),
    "brotli": one_stream(compress_brotli, decompress_brotli),
    "lzma": one_stream(lambda data: lzma.compress(data, **XZ), lambda data, size: lzma.LZMADecompressor(**XZ).decompress(data, size + 1)),
    "pergroup": Coder(encode_pergroup, decode_pergroup, lambda: (compress_brotli(b"probe"), lrzip(b"probe" * 99, None, "-z", "-L", "9"))),
}


def specs_of(coded: dict[str, IntTensor | HalfTensor]) -> list[Spec]:
    return [Spec(n, tuple(t.q.shape), t.bits, len(t.step) if len(t.step) != t.q.shape[0] else 0, t.states) if isinstance(t, IntTensor)
            else Spec(n, tuple(t.values.shape), 0) for n, t in coded.items()]


def encode(coded: dict[str, IntTensor | HalfTensor], compressor: str, folder: Path | None = None) -> dict[str, bytes]:
    """Codes -> named streams."""
    coder = COMPRESSORS[compressor]
    return coder.encode(coded if coder.knows_trellis else halved(coded), folder)


def decode(streams: dict[str, bytes], specs: list[Spec], compressor: str, folder: Path | None = None) -> dict[str, IntTensor | HalfTensor]:
    """Inverse of encode; raises ValueError on anything that does not fit the specs."""
    coder = COMPRESSORS[compressor]
    coded = coder.decode(streams, specs, folder)
    return coded if coder.knows_trellis else doubled(coded)


# ======================================================================================================================
# ARTIFACT: the container, and the script that ships with it
# ======================================================================================================================

ARTIFACT_MAGIC, ARTIFACT_VERSION = b"PGLF", 2
ARTIFACT_HEAD = struct.Struct("<4sHII")         # magic, version, bytes of the header, CRC-32 of the header
LONGEST_HEADER = 1 << 20
LARGEST_MODEL = 1 << 28                         # values; reading takes a few bytes for each


def write_artifact(coded: dict[str, IntTensor | HalfTensor], config: Config) -> bytes:
    """Codes -> one file: head, header (deflated JSON: model knobs, tensors, streams with checksums), streams."""
    folder = Path(config.artifact_dir or ".")
    try:
        streams = encode(coded, config.compressor, folder)
    except OSError as e:                # lrzip's temporary files
        raise UserError(f"cannot pack with {config.compressor}: temporary files in {folder}: {e.strerror}") from None
    header = {"model": model_knobs(config), "compressor": config.compressor, "tensors": specs_of(coded),
              "streams": [(name, len(data), zlib.crc32(data)) for name, data in streams.items()]}
    packed = zlib.compress(json.dumps(header, separators=(",", ":")).encode(), 9)
    return b"".join((ARTIFACT_HEAD.pack(ARTIFACT_MAGIC, ARTIFACT_VERSION, len(packed), zlib.crc32(packed)), packed, *streams.values()))


def read_artifact_header(data: bytes, path: Path) -> tuple[dict, dict[str, bytes]]:
    """Check magic, version, lengths and every checksum; returns header and streams. Raises UserError naming the field."""
    def expect(ok: bool, what: str):
        if not ok:
            raise UserError(f"artifact {path} is damaged: {what}")
    expect(len(data) >= ARTIFACT_HEAD.size, f"it has {len(data)} bytes, expected at least {ARTIFACT_HEAD.size}")
    magic, version, length, crc = ARTIFACT_HEAD.unpack_from(data)
    expect(magic == ARTIFACT_MAGIC, f"magic is {magic!r}, expected {ARTIFACT_MAGIC!r}")
    expect(version == ARTIFACT_VERSION, f"version is {version}, expected {ARTIFACT_VERSION}")
    packed = data[ARTIFACT_HEAD.size: ARTIFACT_HEAD.size + length]
    expect(len(packed) == length, f"header is cut off at {len(packed)} of {length} bytes")
    expect(zlib.crc32(packed) == crc, "header checksum")
    try:
        unpacker = zlib.decompressobj()
        header = json.loads(unpacker.decompress(packed, LONGEST_HEADER))
        expect(isinstance(header["model"], dict) and isinstance(header["compressor"], str), "header (model, compressor)")
        header["tensors"] = specs = [Spec(name, tuple(shape), *rest) for name, shape, *rest in header["tensors"]]
        for spec in specs:
            numbers = (*spec.shape, spec.bits, spec.steps)
            expect(all(type(n) is int and n >= 0 for n in numbers) and spec.bits <= 8 and len(spec.shape) > (1 if spec.bits else -1)
                   and math.prod(spec.shape) > 0 and math.prod(spec.shape) % (spec.steps or 1) == 0, f"header ({spec})")
            expect(not spec.states or spec.states in TRELLIS_CODES and spec.bits > 0 and len(spec.shape) == 2 and not spec.steps,
                   f"header (states of {spec})")
        expect(sum(math.prod(spec.shape) for spec in specs) <= LARGEST_MODEL, "header (more values than a model can have)")
        streams, at = {}, ARTIFACT_HEAD.size + length
        for name, size, checksum_ in header["streams"]:
            streams[name] = data[at: at + size]
            expect(len(streams[name]) == size, f"stream {name} is cut off at {len(streams[name])} of {size} bytes")
            expect(zlib.crc32(streams[name]) == checksum_, f"checksum of stream {name}")
            at += size
    except (ValueError, KeyError, TypeError, RecursionError, zlib.error) as e:
        raise UserError(f"artifact {path} is damaged: header ({e})") from None
    expect(at == len(data), f"total length is {len(data)} bytes, expected {at}")
    return header, streams


def read_artifact(path: Path, config: Config) -> dict[str, IntTensor | HalfTensor]:
    """Codes read back from disk; nothing in the file can run code. Raises UserError."""
    try:
        data = path.read_bytes()
    except OSError as e:
        raise UserError(f"artifact {path} cannot be read: {e.strerror}; run training or QUANTIZE_ONLY=1 first") from None
    header, streams = read_artifact_header(data, path)
    check_same_model(path, header["model"], config)
    return decode_checked(header, streams, path)


def decode_checked(header: dict, streams: dict[str, bytes], path: Path) -> dict[str, IntTensor | HalfTensor]:
    """What read_artifact_header returned -> codes; whatever a decoder finds wrong is a UserError."""
    if header["compressor"] not in COMPRESSORS:
        raise UserError(f"artifact {path} is packed with {header['compressor']}: expected one of {', '.join(COMPRESSORS)}")
    try:
        return decode(streams, header["tensors"], header["compressor"], path.parent)
    except UserError:
        raise
    except OSError as e:                # lrzip's temporary files
        raise UserError(f"artifact {path} cannot be unpacked: temporary files in {path.parent}: {e.strerror}") from None
    except Exception as e:              # decoders raise what they like; with checked streams this is a foreign file
        raise UserError(f"artifact {path} is damaged: {e}") from None


WRAPPER = '''#coding:latin1
import brotli,linecache as l,sys
s=brotli.decompress("""BLOB""".encode("latin1")).decode()
n=__file__+":unpacked"
l.cache[n]=len(s),None,s.splitlines(True),n
sys.modules[__name__].PACKED_SOURCE=s
exec(compile(s,n,"exec"))
'''
KEPT_NAMES = "bool int float str range min max abs len".split()     # annotations are read as text; kernels need the real ones


def slim_source(source: str) -> str:
    """The same program without comments, docstrings, what knobs mean and annotations, under short names.

    What something looks at stays: annotations of classes and of Triton kernels, arguments that are given by name anywhere (by
    PyTorch: those of setup_context), constant arguments of kernels, names of references (they name the kernel pairs).
    """
    import python_minifier
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    kernels = [f for f in functions if any(ast.unparse(getattr(d, "func", d)).endswith("jit") for d in f.decorator_list)]
    arguments = lambda f: [node for node in ast.walk(f.args) if isinstance(node, ast.arg)]
    for f in functions:
        if f not in kernels:
            f.returns = None
            for argument in arguments(f):
                argument.annotation = None
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "knob":
            del node.args[1:]
    calls, tables = ([node for node in ast.walk(tree) if isinstance(node, kind)] for kind in (ast.Call, ast.Dict))
    named = {"ctx", "inputs", "output", *(k.arg for call in calls for k in call.keywords),
             *(k.value for table in tables for k in table.keys if isinstance(k, ast.Constant))}
    for f in (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.Lambda)) and node not in kernels):
        while f.args.args and f.args.args[0].arg not in named:      # positional only: free to be renamed
            f.args.posonlyargs.append(f.args.args.pop(0))
    slim = python_minifier.minify(
        ast.unparse(tree), remove_literal_statements=True, hoist_literals=False, remove_annotations=False, combine_imports=True,
        rename_globals=True, preserve_globals=KEPT_NAMES + [f.name for f in functions if f.name.endswith("_reference")],
        preserve_locals=[a.arg for f in kernels for a in arguments(f) if a.annotation])        # constants come by name
    for node in ast.walk(tree):         # all trees share contexts and operators: the minifier left links to its whole tree there,
        if not node._fields:            # and Triton deep-copies a context for every `x += y` of a kernel that it compiles
            node.__dict__.clear()
    return slim


def escape(data: bytes) -> str:
    """Bytes as what stands between triple quotes in a latin-1 source, escaped where they must be (1%): a fifth shorter than base85."""
    text = data.decode("latin1")
    for raw, escaped in ((r"\\", r"\\\\"), ("\r", r"\\r"), ("\0(?=[0-7])", r"\\000"), ("\0", r"\\0"), (r'"(?="")|"\Z', r'\\"')):
        text = re.sub(raw, escaped, text)
    return text


def pack_script(source: str) -> bytes:
    """The script that ships: slim_source, compressed, self-extracting."""
    import brotli
    slim = slim_source(source).encode()
    packed = min((brotli.compress(slim, quality=11, lgblock=bits) for bits in (16, 17, 18)), key=len)
    return WRAPPER.replace("BLOB", escape(packed)).encode("latin1")


def shipped_script() -> bytes:
    """Bytes of the script that the record folder ships: packed, or this very file when it is already packed."""
    return Path(__file__).read_bytes() if packed_source() else pack_script(script_source())


# ======================================================================================================================
# EVALUATE: every validation token scored once, in bits per byte
# ======================================================================================================================


class Score(NamedTuple):
    loss: float             # mean nats per token
    bpb: float              # bits per UTF-8 byte
    tokens: int
    seconds: float


def plain_windows(tokens: np.ndarray, row: int, longest: int) -> np.ndarray:
    """Windows [start, end, first scored] over input positions: segments cut at BOS, at rows, and every `longest`."""
    n = len(tokens) - 1
    starts = np.concatenate([a + segment_bounds(tokens[a: min(a + row, n)], longest) for a in range(0, n, row)])
    return np.stack((starts, np.append(starts[1:], n), starts), 1)


def sliding_windows(tokens: np.ndarray, longest: int, stride: int) -> np.ndarray:
    """Windows in which every token has up to `longest - stride` tokens of its own document before it.

    A document's first window scores all it sees; each further one ends `stride` later and scores only its last tokens.
    Context never crosses a document's start (the model is trained so), hence documents up to `longest` are read once.
    """
    n = len(tokens) - 1
    starts = segment_bounds(tokens[:n], n)
    out = []
    for a, b in zip(starts, np.append(starts[1:], n)):
        out.append((a, min(a + longest, b), a))
        for end in range(a + longest + stride, b + stride, stride):
            end = min(end, b)
            out.append((end - longest, end, out[-1][1]))
    return np.array(out)


def pack_windows(windows: np.ndarray, row: int) -> list[np.ndarray]:
    """Windows in order, as many to a row as fit."""
    rows, first, used = [], 0, 0
    for i, size in enumerate(windows[:, 1] - windows[:, 0]):
        if used + size > row:
            rows.append(windows[first:i])
            first, used = i, 0
        used += size
    return [*rows, windows[first:]]


class Sums(NamedTuple):
    """What has been scored."""
    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0
    saved: float = 0.0          # nats that the n-gram tilt has taken off

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(a + b for a, b in zip(self, other)))

    @property
    def loss(self) -> float:
        return self.nats / max(self.tokens, 1)

    @property
    def bpb(self) -> float:
        return self.nats / math.log(2) / max(self.bytes, 1)


@torch.no_grad()
def sum_windows(run: Run, model: GPT, data: Validation, rows: list[np.ndarray], row: int, segments: Segments, name: str,
                adapters: Adapters | None = None) -> Sums:
    """Sums over the scored part of all windows in packed rows of `row` positions; segments: its longest and window."""
    device, tokens = run.world.device, data.tokens
    progress = Progress(run.log, name, len(rows))
    nats, counts = torch.zeros((), dtype=torch.float64, device=device), np.zeros(2, np.int64)
    for done, part in enumerate(rows):
        at = np.concatenate([np.arange(a, b) for a, b, _ in part])
        scored = np.concatenate([np.arange(a, b) >= first for a, b, first in part])
        padded = np.pad(at, (0, row - len(at)))
        starts = np.append(0, np.cumsum(part[:, 1] - part[:, 0]))
        cu = torch.from_numpy(pad_cu_seqlens(starts, row))
        as_row = lambda values: torch.from_numpy(values.astype(np.int64))[None]
        fresh = np.zeros(row, bool)                                 # windows that do not go on where the last one ended
        fresh[starts[1:-1][part[1:, 0] != part[:-1, 1]]] = True
        here = segments._replace(cu_seqlens=cu, fresh=torch.from_numpy(fresh)[None])
        batch = to_device(Batch(as_row(tokens[padded]), as_row(tokens[padded + 1]), here), device)
        losses = model.losses(batch.ids, batch.targets, batch.segments, adapters=adapters)[0, : len(at)]
        nats += losses.double()[torch.from_numpy(scored).to(device)].sum()
        counts += scored.sum(), data.byte_counts[at[scored] + 1].sum()
        progress(done + 1)
    return Sums(nats.item(), *counts.tolist())


def sum_over_ranks(run: Run, data: Validation, mine: Sums, name: str) -> Sums:
    """The sums of all ranks; a token scored twice or not at all is an error."""
    total = run.world.sum(torch.tensor(mine, dtype=torch.float64)).tolist()
    n = len(data.tokens) - 1
    run.log(f"val_tokens scored:{total[1]:.0f} total:{n} stage:{name}")
    if total[1] != n:
        raise RuntimeError(f"{name}: {total[1]:.0f} of {n} validation tokens scored")
    return Sums(total[0], int(total[1]), int(total[2]), total[3])


def score_windows(run: Run, model: GPT, data: Validation, windows: np.ndarray, row: int, longest: int, name: str,
                  window: int = 0) -> Score:
    """Loss and bits per byte over the scored part of all windows; rows of windows are shared out over the ranks."""
    world, start = run.world, time.perf_counter()
    mine = pack_windows(windows, row)[world.rank:: world.size]
    total = sum_over_ranks(run, data, sum_windows(run, model, data, mine, row, Segments(None, longest, window=window), name), name)
    return Score(total.loss, total.bpb, total.tokens, time.perf_counter() - start)


def plain_row(c: Config, data: Validation) -> int:
    """Positions of a row in evaluation: the same for all, so that all share one compiled graph."""
    return min(c.val_batch_tokens // 8 // c.eval_seq_len, -(-len(data.tokens) // c.eval_seq_len)) * c.eval_seq_len


def evaluate(run: Run, model: GPT, data: Validation, name: str, sliding: bool = False, windowed: bool = False) -> Score:
    """Plain evaluation in rows of VAL_BATCH_TOKENS / 8, or a sliding window of EVAL_SEQ_LEN and EVAL_STRIDE.

    windowed: whole documents in one pass, every position attending to the EVAL_SEQ_LEN positions that end with it
    (deeper layers reach further back, through the keys and values of what they see).
    """
    c, longest = run.config, run.config.eval_seq_len
    row = plain_row(c, data)
    if windowed:
        windows = sliding_windows(data.tokens, len(data.tokens), 1)
        size = int((windows[:, 1] - windows[:, 0]).max())
        return score_windows(run, model, data, windows, max(row, -(-size // longest) * longest), size, name, longest)
    windows = sliding_windows(data.tokens, longest, c.eval_stride) if sliding else plain_windows(data.tokens, row, longest)
    return score_windows(run, model, data, windows, row, longest, name)


def log_score(run: Run, label: str, score: Score):
    run.log(f"{label} val_loss:{score.loss:.8f} val_bpb:{score.bpb:.8f} eval_time:{1000 * score.seconds:.0f}ms")


# ======================================================================================================================
# ADAPT: phased test-time training; every token is scored before anything has learnt from it
# ======================================================================================================================


HINT_ORDERS = (2, 3, 4, 5, 6, 8, 12, 16)
HINT_KINDS = 6 * len(HINT_ORDERS)


class Hints(NamedTuple):
    """For every token of a text what followed the longest match of the tokens before it, and of which kind that match is."""
    tokens: Tensor          # int64 [N]
    kinds: Tensor           # int64 [N], below HINT_KINDS; -1: no match


def last_matches(key: Tensor, usable: Tensor, document: Tensor, part: Tensor) -> Tensor:
    """Where each place's key stood last: earlier in its document, or else in an earlier part; -1: nowhere. All [n]; places are in the
    order of reading; those that are not usable find nothing and are not found."""
    by_key = usable.nonzero().flatten()
    by_key = by_key[key[by_key].sort(stable=True).indices]
    changes = lambda t: t[by_key] != F.pad(t[by_key], (1, 0), value=-1)[:-1]
    new_key, i = changes(key), torch.arange(len(by_key), device=key.device)
    first = torch.where(new_key | changes(part), i, 0).cummax(0).values           # of this key in this part
    before = torch.where(new_key | changes(document), torch.where(new_key[first], -1, first - 1), i - 1)
    source = torch.full_like(key, -1)
    source[by_key] = torch.where(before >= 0, by_key[before], -1)
    return source


def find_hints(tokens: np.ndarray, documents: np.ndarray, parts: np.ndarray, device: torch.device) -> Hints:
    """The hint at a token is what followed the last HINT_ORDERS tokens of its document where these stood last: earlier in the
    same document, or else in documents of earlier parts; of the longest order that has stood anywhere.

    documents [D, 2] as of find_documents, in the order of reading; parts [D] never falls. Kind: the order; was it the same
    document; did that place have a hint of this order itself, and did it come true.
    """
    at = torch.from_numpy(np.concatenate([np.arange(a, a + size) for a, size in documents])).to(device)
    text = torch.from_numpy(tokens.astype(np.int64)).to(device)
    sizes = torch.from_numpy(documents[:, 1]).to(device)
    ids, following, document = text[at], text[at + 1], torch.repeat_interleave(sizes)
    part, place = torch.from_numpy(parts).to(device)[document], torch.arange(len(at), device=device) - (sizes.cumsum(0) - sizes)[document]
    hint, kind = torch.zeros_like(ids), torch.full_like(ids, -1)
    key, power, reach = torch.zeros_like(ids), 1, 0
    for level, order in enumerate(HINT_ORDERS):
        while reach < order:                            # a polynomial of the last tokens, modulo 2^64
            key[reach:] += ids[: max(len(ids) - reach, 0)] * (power - (power >> 63 << 64))
            power, reach = power * 0x9E3779B97F4A7C15 % 2 ** 64, reach + 1
        source = last_matches(key, place >= order - 1, document, part)
        found = (source >= 0).nonzero().flatten()
        last, again = source[found], source[source[found]]
        came_true = torch.where(again < 0, 0, 1 + (following[again] == following[last]).long())
        hint[found], kind[found] = following[last], 6 * level + 3 * (document[last] == document[found]).long() + came_true
    out = Hints(torch.zeros_like(text), torch.full_like(text, -1))
    out.tokens[at + 1], out.kinds[at + 1] = hint, kind
    return out


class Tilt:
    """Mends the probabilities of hints by what came of such hints in earlier phases (a learnt n-gram tilt: PR 1514, 2135; match
    model and SSE of PAQ, Mahoney 2005).

    Where the network gives the hint probability p, with logit z, it gets p' = sigmoid(z + w_kind . (1, z/4, z^2/16)) and every
    other token its own times (1 - p') / (1 - p): a distribution, whatever w. w is 0 at first; then ridge logistic regression
    on all hints of earlier phases, which are kept as counts by kind and z.
    """
    REACH, BINS = 12.0, 192

    def __init__(self, world: World, device: torch.device):
        self.world = world
        self.fresh = torch.zeros(2, HINT_KINDS * self.BINS, dtype=torch.int64, device=device)       # hints, those that came true
        self.known = torch.zeros(2, HINT_KINDS, self.BINS, dtype=torch.float64)
        self.weights = torch.zeros(HINT_KINDS, 3, dtype=torch.float64)

    @staticmethod
    def features(z: Tensor) -> Tensor:
        return torch.stack((torch.ones_like(z), z / 4, z * z / 16), -1)

    def __call__(self, losses: Tensor, hint_losses: Tensor, kinds: Tensor, hits: Tensor) -> Tensor:
        """The network's losses of targets and of their hints in nats, float64; hits: is the hint the target; all [n]. Returns losses
        of targets; those without hint (kind -1) as they are. What came of the hints is kept for `learn`."""
        some = (kinds >= 0).nonzero().flatten()
        kinds, hits, out = kinds[some], hits[some], losses.clone()
        surprise = hint_losses[some].clamp(1e-7, 700.0)
        z = -surprise.expm1().log()
        near = z.clamp(-self.REACH, self.REACH)
        bins = kinds * self.BINS + ((near / self.REACH + 1) / 2 * self.BINS).long().clamp(max=self.BINS - 1)
        for row, chosen in zip(self.fresh, (bins, bins[hits])):
            row += torch.bincount(chosen, minlength=len(row))
        tilted = z + (self.features(near) * self.weights.to(z.device)[kinds]).sum(1)
        others = out[some] + (-(-surprise).expm1()).log() - F.logsigmoid(-tilted)
        out[some] = torch.where(hits, -F.logsigmoid(tilted), others)
        return out

    def learn(self):
        """After a phase, by all ranks together: Newton's method, each kind by itself."""
        self.known += self.world.sum(self.fresh).cpu().view(self.known.shape)
        self.fresh.zero_()
        z = (torch.arange(self.BINS, dtype=torch.float64) + 0.5) * (2 * self.REACH / self.BINS) - self.REACH
        x, (hints, true) = self.features(z), self.known

        def look(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """Regularised nats of each kind, Newton's step, and what that would save if nats fell on as they begin to."""
            logits = z + w @ x.T
            q = logits.sigmoid()
            curvature = torch.einsum("kb,bi,bj->kij", hints * q * (1 - q), x, x) + torch.eye(3, dtype=torch.float64)
            slope = (hints * q - true) @ x + w
            step = torch.linalg.solve(curvature, slope)
            return (hints * F.softplus(logits) - true * logits).sum(1) + w.square().sum(1) / 2, step, (slope * step).sum(1)

        w, (nats, step, promise) = self.weights, look(self.weights)
        for _ in range(40):
            now, *then = look(w - step)
            good = now <= nats - 0.1 * promise
            w, nats = torch.where(good[:, None], w - step, w), torch.where(good, now, nats)
            step, promise = torch.where(good[:, None], then[0], step / 4), torch.where(good, then[1], promise / 4)
        self.weights = w


def score_first(chunks, score: Callable, adapt: Callable):
    """The rule of test-time training: a chunk's losses are banked before the chunk can teach."""
    for chunk in chunks:
        yield score(chunk)
        adapt(chunk)


def find_documents(tokens: np.ndarray) -> np.ndarray:
    """[documents, 2]: first position and number of targets of every document that has one.

    The target of a document's last token is the next BOS; the last document has none for its last token.
    """
    n = len(tokens) - 1
    starts = segment_bounds(tokens[:n], n)
    return np.stack((starts, np.diff(starts, append=n)), 1)


class DocumentBatch(NamedTuple):
    """Documents [rows, 2] (see find_documents) that are read in step, longest first, and the length of their chunks."""
    documents: np.ndarray
    chunk: int

    @property
    def tokens(self) -> int:
        return int(self.documents[:, 1].sum())


def document_batches(documents: np.ndarray, config: Config) -> list[DocumentBatch]:
    """All documents, longest first, in batches of TTT_BATCH_SIZE that share a chunk length."""
    rules, out = chunk_rules(config), []
    ordered = documents[np.argsort(-documents[:, 1], kind="stable")]
    chunks = [next((chunk for longest, chunk in rules if size <= longest), config.ttt_chunk_size) for size in ordered[:, 1]]
    cuts = [0, *(np.flatnonzero(np.diff(chunks)) + 1), len(ordered)]
    for a, b in zip(cuts, cuts[1:]):
        out += [DocumentBatch(ordered[i: min(i + config.ttt_batch_size, b)], chunks[a]) for i in range(a, b, config.ttt_batch_size)]
    return out


class Phase(NamedTuple):
    """Batches [first, last) are read; then, if documents > 0, the base weights train on the first so many documents, or on what of
    them is new."""
    first: int
    last: int
    documents: int


def plan_phases(batches: list[DocumentBatch], config: Config) -> tuple[list[DocumentBatch], list[Phase]]:
    """Batches in the order of reading, and phases: the same for any number of ranks.

    Published protocol: the longest documents first; phases end with the batch that completes equal parts of the first
    PHASED_TTT_PREFIX_DOCS. Without that number batches are dealt out like cards to the phases and what follows the last one,
    so that all of them read documents of all lengths; who gets the longest is the last: most tokens come after most lessons.
    """
    count, prefix = config.phased_ttt_num_phases * config.phased_ttt_enabled, config.phased_ttt_prefix_docs
    hands = [batches] if prefix else [batches[i:: count + 1] for i in reversed(range(count + 1))]
    batches = [b for hand in hands for b in hand]
    done = np.cumsum([len(b.documents) for b in batches])
    boundaries = ([min(prefix, int(done[-1])) * (i + 1) // count for i in range(count)] if prefix
                  else done[np.cumsum([len(hand) for hand in hands]) - 1].tolist())
    ends = {}
    for boundary in boundaries:
        last = int(np.searchsorted(done, boundary)) + 1
        if boundary > 0 and last < len(batches):            # after the last batch there is nobody to profit
            ends[last] = boundary
    cuts = [0, *ends, len(batches)]
    return batches, [Phase(a, b, ends.get(b, 0)) for a, b in zip(cuts, cuts[1:])]


class DocumentAdapters:
    """A LoRA on the matrices of every pass slot, and on the head, for each document of a batch; and their optimizer.

    A starts uniform +-1/sqrt(in), B zero: a new document starts from the base model. Everything of one document is one row
    of `weights` (all A, then all B, in adapters_of's order; `low`: in the compute precision): the first documents of a batch
    are a prefix of each tensor, the optimizer is one kernel, and nothing ever moves.
    """

    def __init__(self, model: GPT, rows: int, seed: int):
        c = self.c = model.config
        D, R, kv, slots = c.model_dim, c.ttt_lora_rank, c.num_kv_heads * c.head_dim, len(c.pass_order(c.num_loops)[0])
        self.kinds = [kind for kind in PassAdapters._fields if getattr(c, f"ttt_{kind}_lora")]
        outputs = [kv if kind in ("k", "v") else D for kind in self.kinds] * slots + [c.vocab_size] * c.ttt_head_lora
        self.shapes = [(R, D)] * len(outputs) + [(out, R) for out in outputs]
        self.counts, self.slots, device = [a * b for a, b in self.shapes], slots, model.tok_emb.device
        zeros = lambda dtype=torch.float32: torch.zeros(rows, sum(self.counts), dtype=dtype, device=device)
        self.weights, self.gradient = zeros(), zeros(model.dtype)
        self.low = self.weights if model.dtype == torch.float32 else zeros(model.dtype)
        self.first, self.second = zeros() if c.ttt_beta1 else None, zeros() if c.ttt_optimizer == "adam" else None
        self.kept, self.generator = torch.empty(rows, R * D * len(outputs), device=device), torch.Generator(device)
        self.restart(seed)

    def restart(self, seed: int):
        """A of every row anew; the same for any rank."""
        self.generator.manual_seed(seed)
        self.draw()

    def draw(self):
        self.kept.uniform_(-1, 1, generator=self.generator).div_(math.sqrt(self.c.model_dim))

    def begin(self, rows: int):
        """B zero, optimizer state zero; A as the row's last document left it (TTT_WARM_START_A), or new."""
        self.rows, self.steps = rows, 0
        if not self.c.ttt_warm_start_a:
            self.draw()
        self.weights[:, : self.kept.shape[1]] = self.kept
        for t in (self.weights[:, self.kept.shape[1]:], self.first, self.second):
            if t is not None:
                t.zero_()
        self.low.copy_(self.weights)

    def keep(self, rows: int):
        """Remember A for the first rows' next documents; a row that went wrong keeps the A that it began with."""
        kept, a = self.kept[:rows], self.weights[:rows, : self.kept.shape[1]]
        torch.where(a.isfinite().all(1, keepdim=True), a, kept, out=kept)

    def split(self, t_RN: Tensor) -> list[Tensor]:
        """Rows of weights or of their gradient as matrices [rows, ...]: all A, then all B."""
        return [part.unflatten(1, shape) for part, shape in zip(t_RN.split(self.counts, 1), self.shapes)]

    def build(self, rows: slice, caps: Tensor | None) -> Adapters:
        """The forward's argument for some rows: leaves in the compute precision."""
        parts = [t.detach().requires_grad_() for t in self.split(self.low[rows])] if self.shapes else []
        half, scale = len(parts) // 2, self.c.ttt_lora_alpha / self.c.ttt_lora_rank
        loras = (LoRA(a, b, scale) for a, b in zip(parts[:half], parts[half:]))
        passes = tuple(PassAdapters(**{kind: next(loras) for kind in self.kinds}) for _ in range(self.slots))
        return Adapters(passes, next(loras, None), caps)

    def take_gradient(self, rows: slice, adapters: Adapters, losses: Tensor, weights: Tensor):
        """Of sum(weights * losses), for what build made of these rows."""
        loras = adapters_of(adapters)
        gradient = torch.autograd.grad(losses, [lora.a for lora in loras] + [lora.b for lora in loras], weights)
        torch.cat([g.flatten(1) for g in gradient], 1, out=self.gradient[rows])

    def step(self):
        """One update of the first rows from their gradient."""
        c, self.steps = self.c, self.steps + 1
        weights, low, gradient, first, second = (t if t is None else t[: self.rows]
                                                 for t in (self.weights, self.low, self.gradient, self.first, self.second))
        if c.ttt_optimizer == "adam":
            adamw(weights, low, gradient, first, second, self.steps, c.ttt_lora_lr, c.ttt_beta1, c.ttt_beta2, c.ttt_weight_decay)
        else:
            g = gradient.float().add(weights, alpha=c.ttt_weight_decay)
            low.copy_(weights.sub_(g if first is None else first.mul_(c.ttt_beta1).add_(g), alpha=c.ttt_lora_lr))


class Reader:
    """Reads batches of documents chunk by chunk, each document with its own adapter.

    Published protocol: every chunk is read with the whole window before it. Cached: with the last TTT_LIVE_TOKENS
    before it; of earlier positions the keys and values are kept as they were computed, under the adapter of that time.
    Documents that end leave their rows by halves; a batch with few documents has empty rows: few sizes, few CUDA graphs.
    """

    def __init__(self, model: GPT, rows: int, longest: int, caps: Tensor | None, log: Callable[[str], None], hinted: bool = False):
        c, device = model.config, model.tok_emb.device
        self.model, self.c, self.caps, self.adapters = model, c, caps, DocumentAdapters(model, rows, c.seed)
        self.ladder = [rows]
        while self.ladder[-1] > 1:
            self.ladder.append(-(-self.ladder[-1] // 2))
        self.ids = torch.zeros(rows, longest + c.ttt_chunk_size + 1, dtype=torch.int64, device=device)   # column 0: before the first
        self.hints = torch.zeros_like(self.ids) if hinted else None
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.cache = self.graphs = None
        if c.ttt_protocol == "cached":
            self.cache = KeyValueCache(model, rows, c.ttt_eval_seq_len, c.ttt_chunk_size + c.ttt_live_tokens, longest)
            self.graphs = Graphs(c.ttt_graphs and device.type == "cuda", log)

    def rung(self, documents: int) -> int:
        """The fewest rows of the ladder that hold so many documents."""
        return min(rows for rows in self.ladder if rows >= documents)

    def begin(self, batch: DocumentBatch, tokens: np.ndarray, hints: Tensor | None = None):
        """hints [N]: a token beside every one of tokens [N]."""
        self.chunk, self.sizes, self.documents = batch.chunk, batch.documents[:, 1], len(batch.documents)
        at = np.minimum(batch.documents[:, :1] + np.arange(len(self.chunks()) * self.chunk + 1),
                        batch.documents.sum(1, keepdims=True))
        self.ids[: self.documents, 1: at.shape[1] + 1] = torch.from_numpy(tokens[at].astype(np.int64))
        if hints is not None:
            self.hints[: self.documents, 1: at.shape[1] + 1] = hints[torch.from_numpy(at).to(hints.device)]
        self.lengths.zero_()[: self.documents] = torch.from_numpy(self.sizes.astype(np.int64))
        self.adapters.begin(self.rung(self.documents))
        if self.cache:
            self.cache.clear()

    def chunks(self) -> range:
        return range(-(-int(self.sizes[0]) // self.chunk))

    def score(self, chunk: int) -> Tensor:
        """Losses [1, documents, chunk length] in nats, 0 where a document has ended; those that ended for good may be gone.
        [2, …] if hinted: the second row are losses of the hints."""
        first = chunk * self.chunk
        rows = self.adapters.rows = self.rung(int((self.sizes > first).sum()))
        self.teaches = bool(self.adapters.shapes) and bool((self.sizes > first + self.chunk).any())
        losses = self.forward(chunk)
        ended = first + torch.arange(self.chunk, device=self.ids.device) >= self.lengths[:rows, None]
        return losses.masked_fill(ended, 0.0)[:, : self.documents]

    def adapt(self, chunk: int):
        """Update the adapters of the documents that go on with the mean loss of the chunk just banked."""
        for i in range(self.c.ttt_grad_steps if self.teaches else 0):
            if i:
                self.forward(chunk)
            self.adapters.step()
        if self.cache:
            self.cache.advance(self.live_from(chunk + 1) - self.live_from(chunk))

    def live_from(self, chunk: int) -> int:
        """First position that is read with a chunk of the cached protocol."""
        return max(chunk * self.chunk - self.c.ttt_live_tokens, 0)

    def forward(self, chunk: int) -> Tensor:
        """Losses of the chunk's targets; their gradient waits in the adapters, which nothing changes here."""
        if not self.cache:
            return self.read_windows(chunk * self.chunk, (chunk + 1) * self.chunk)
        live = (chunk + 1) * self.chunk - self.live_from(chunk)
        return self.graphs((self.adapters.rows, live, self.chunk, self.teaches), lambda: self.read_live(live))

    def read_live(self, live: int) -> Tensor:
        """So many positions from the cache's on. Which these are only the device knows: a CUDA graph serves all chunks."""
        rows = self.adapters.rows
        at = self.cache.positions(live + 2)                             # the token before, these, the last one's target
        ids, targets = self.ids[:rows, at[:-1]], at[-self.chunk:]
        goes_on = self.lengths[:rows] > self.cache.position + live
        return self.read(slice(rows), ids, targets, goes_on, cache=self.cache)

    def read_windows(self, first: int, last: int) -> Tensor:
        """Positions [first, last) with the whole window before them. Rows do not touch each other: some of them at a time."""
        rows, longest, device = self.adapters.rows, self.c.ttt_eval_seq_len, self.ids.device
        lengths, tokens = self.lengths[:rows], self.ids[:rows, 1:]
        ends = np.minimum(last, self.sizes[:rows])
        width = -(-int((ends - np.maximum(ends - longest, 0)).max()) // 16) * 16        # odd widths would be compiled anew
        starts = (lengths[:, None].clamp(max=last) - longest).clamp(min=0)
        ids = tokens.gather(1, (starts + torch.arange(width, device=device)).clamp(max=tokens.shape[1] - 1))
        at = (torch.arange(first, last, device=device) - starts).clamp(0, width - 1)
        parts = -(-rows // max(self.c.ttt_micro_tokens // width, 1))
        some = [slice(rows * i // parts, rows * (i + 1) // parts) for i in range(parts)]
        targets = torch.arange(first + 2, last + 2, device=device)
        return torch.cat([self.read(s, ids[s], targets, lengths[s] > last, at_BC=at[s]) for s in some], 1)

    def read(self, rows: slice, ids: Tensor, columns: Tensor, goes_on: Tensor, **where) -> Tensor:
        """Losses of the targets in some columns and rows of self.ids [1 or 2, rows, columns], detached; takes the gradient of the mean
        loss of each document that goes on."""
        hints = None if self.hints is None else self.hints[rows, columns]
        with torch.set_grad_enabled(self.teaches or self.model.compiled):       # compiled: the same graphs for last chunks
            adapters = self.adapters.build(rows, self.caps)
            losses = self.model.losses(ids, self.ids[rows, columns], adapters=adapters, hints_BC=hints, **where)
            losses = losses[None] if hints is None else losses
        if self.teaches:
            self.adapters.take_gradient(rows, adapters, losses[0], (goes_on / losses.shape[2])[:, None].expand_as(losses[0]))
        return losses.detach()


@contextlib.contextmanager
def compiling(model: GPT, wanted: bool):
    """Whether the model runs compiled inside a with-block (never where it was not built so)."""
    before, model.compiled = model.compiled, model.compiled and wanted
    try:
        yield
    finally:
        model.compiled = before


def caps_alone(c: Config, caps: Tensor | None) -> Adapters | None:
    """Adapters that are nothing but softcaps (ASYM_LOGIT_RESCALE), if there are any."""
    return None if caps is None else Adapters((NO_ADAPTERS,) * len(c.pass_order(c.num_loops)[0]), caps=caps)


class GlobalTrainer:
    """Trains the base weights (and the softcaps) on documents already scored; every rank ends with the same weights.

    By training's own optimizers, whose momentum lasts from pass to pass, at a low rate; or by SGD, anew in every pass, as
    document A has it (the softcaps always).
    On CUDA forward and backward of a step are one graph, whatever the number of ranks: launched one by one, their kernels
    take longer to launch than to run. Python prepares a step while the device is busy with the one before.
    """

    def __init__(self, run: Run, model: GPT, caps: Tensor | None):
        c, alone = run.config, [] if caps is None else [caps]
        self.run, self.model, self.caps, self.parameters = run, model, caps, [*model.parameters(), *alone]
        self.graphs = Graphs(c.ttt_graphs and is_capturable(model) and not (c.ttt_compile and model.compiled), run.log)
        self.by_sgd = alone if c.global_ttt_optimizer == "muon" else self.parameters
        self.optimizers, self.trained = None, 0         # made when they are needed; chunks

    def __call__(self, tokens: np.ndarray, documents: np.ndarray, out_of_time: Callable[[], bool]):
        """One pass at a falling rate. Chunks of GLOBAL_TTT_CHUNK_TOKENS in the order of reading, all but the last trained on;
        without GLOBAL_TTT_AGAIN only those that no pass before has had (documents: those of that pass and more)."""
        run, c, start = self.run, self.run.config, time.perf_counter()
        stream = np.concatenate([tokens[a: a + size] for a, size in documents])
        total, longest = len(stream) - 1, c.eval_seq_len
        chunks, begin = -(-total // c.global_ttt_chunk_tokens), 0 if c.global_ttt_again else self.trained
        sgd = torch.optim.SGD(self.by_sgd, lr=c.global_ttt_lr, momentum=c.global_ttt_momentum) if self.by_sgd else None
        if self.by_sgd is not self.parameters:
            self.optimizers = self.optimizers or Optimizers(self.model, c, run.world)
        left_out = lambda: False            # of the step before
        for i in range(begin, chunks - 1):
            first, last = (min((i + j) * c.global_ttt_chunk_tokens, total) for j in (0, 1))
            fall = 0.5 * (1 + math.cos(math.pi * (i - begin) / (chunks - 1 - begin)))
            if run.world.max(bool(out_of_time())):
                run.log(f"ttt_time_limit: global pass stopped at chunk {i + 1}/{chunks}")
                break
            for _ in range(c.global_ttt_epochs):
                for a in range(first, last, c.global_ttt_batch_seqs * longest):
                    before, left_out = left_out, later(self.step(stream, a, min(a + c.global_ttt_batch_seqs * longest, last), sgd, fall))
                    self.report(before())
            self.trained = i + 1
            lr = fall * (c.global_ttt_lr_mul * c.matrix_lr if self.optimizers else c.global_ttt_lr)
            run.log(f"tttg: c{i + 1}/{chunks} lr:{lr:.6f} t:{time.perf_counter() - start:.1f}s")
        self.report(left_out())

    def report(self, left_out: float):
        if left_out:
            self.run.log("ttt_non_finite: the gradient of a global step was left out")

    def step(self, stream: np.ndarray, a: int, b: int, sgd: torch.optim.Optimizer | None, fall: float) -> Tensor:
        """An update by the mean loss of the targets of positions [a, b), sequences of them shared out over the ranks: their number
        changes roundings only (Muon's gradients travel in bfloat16). Returns whether the gradient was not finite, and hence zero."""
        c, world = self.run.config, self.run.world
        sequences = -(-(b - a) // c.eval_seq_len)
        mine = [min(a + c.eval_seq_len * (sequences * (world.rank + i) // world.size), b) for i in (0, 1)]
        gradient = self.gradient(stream, *mine, (b - a) / world.size) if mine[1] > mine[0] else [None] * len(self.parameters)
        for p, g in zip(self.parameters, gradient):
            p.grad = torch.zeros_like(p) if g is None else g
        wrong = ~world.sum(torch.stack(torch._foreach_norm([p.grad for p in self.parameters])).sum()).isfinite()
        for p in self.parameters:
            p.grad.masked_fill_(wrong, 0.0)
        if sgd:
            for p in self.by_sgd:
                world.mean(p.grad)
            torch.nn.utils.clip_grad_norm_(self.by_sgd, c.global_ttt_grad_clip or math.inf)
            for group in sgd.param_groups:
                group["lr"] = c.global_ttt_lr * fall
            sgd.step()
        if self.optimizers:
            self.optimizers.start_reduce()
            self.optimizers.step(c.global_ttt_lr_mul * fall, 0)
        return wrong

    def gradient(self, stream: np.ndarray, a: int, b: int, count: float) -> tuple[Tensor | None, ...]:
        """Of the sum over the targets of positions [a, b) / count; it holds until the next call.

        A segment ends with its sequence and, if documents are respected, its document. The token before is read too (for the
        SmearGate), so that shares do not matter; in fact 16 tokens, so that the number of rows stays a multiple of 16.
        """
        c, lead = self.run.config, min(a, 16)
        row = stream[a - lead: b + 1]
        starts = np.append(np.zeros(min(lead, 1), np.int64), np.arange(lead, len(row) - 1, c.eval_seq_len))
        if c.global_ttt_respect_doc_boundaries:
            starts = np.union1d(starts, np.flatnonzero(row[:-1] == BOS))
        ids, cu = torch.from_numpy(row.astype(np.int64))[None], torch.from_numpy(pad_cu_seqlens(starts, len(row) - 1))
        new = to_device(Batch(ids[:, :-1], ids[:, 1:], Segments(cu, c.eval_seq_len)), self.run.world.device)
        key = len(row), len(cu), lead, count
        held = self.graphs.hold(key, new)

        def differentiate():
            losses = self.model.losses(held.ids, held.targets, held.segments, adapters=caps_alone(c, self.caps))[:, lead:]
            return torch.autograd.grad(losses.sum() / count, self.parameters, allow_unused=True)

        return self.graphs(key, differentiate)


class Crew:
    """What ranks share while each reads at its own pace, in torch.distributed's store: a queue, barriers, sums, a stop."""
    count = 0           # crews so far in this process: each has its own names in the store

    def __init__(self, world: World):
        self.world = world
        Crew.count += 1
        self.store = (dist.PrefixStore(f"ttt/{Crew.count}", dist.distributed_c10d._get_default_store()) if world.size > 1
                      else dist.HashStore())

    def take(self, phase: int) -> int:
        """The next number 0, 1, 2, ... of a phase's queue: each goes to one rank."""
        return self.store.add(f"queue/{phase}", 1) - 1

    def meet(self, label: str):
        """Wait until every rank is here."""
        if self.world.size == 1:
            return
        self.store.add(f"meet/{label}", 1)
        while self.store.add(f"meet/{label}", 0) < self.world.size:
            time.sleep(0.02)

    def stopping(self, signal_number: int) -> bool:
        """Has any rank been told to stop? Tells the others."""
        if signal_number:
            self.store.set("stop", str(signal_number))
        return bool(signal_number) or self.world.size > 1 and self.store.check(["stop"])

    def post(self, sums: Sums):
        """Publish this rank's sums so far."""
        self.store.set(f"sums/{self.world.rank}", json.dumps(sums))

    def total(self) -> Sums:
        """The sums that all ranks have published."""
        keys = [f"sums/{rank}" for rank in range(self.world.size)]
        return sum((Sums(*json.loads(self.store.get(key))) for key in keys if self.store.check([key])), Sums())


class Deadline:
    """When to stop adapting so that plain scoring of the rest still ends before the limit."""

    def __init__(self, began: float, limit: float, plain_rate: float):
        self.began, self.limit, self.plain_rate, self.longest, self.last = began, limit, plain_rate, 0.0, time.perf_counter()

    def resume(self):
        """After something that will not come again: it does not count as time between two questions."""
        self.last = time.perf_counter()

    def over(self, left: float) -> bool:
        """left: tokens that this rank has yet to score. Keeps room for the longest time between two questions."""
        now = time.perf_counter()
        self.longest, self.last = max(self.longest, now - self.last), now
        return self.limit > 0 and now - self.began + 1.25 * left / self.plain_rate + 2 * self.longest + 0.01 * self.limit > self.limit


class Adaptation:
    """Phased test-time training over all validation documents (document A; spec evaluation.md)."""

    def __init__(self, run: Run, model: GPT, data: Validation, name: str, began: float, plain_rate: float, bank: Callable | None = None):
        c = self.c = run.config
        self.run, self.model, self.data, self.name, self.bank = run, model, data, name, bank
        self.batches, self.phases = plan_phases(document_batches(find_documents(data.tokens), c), c)
        self.deadline = Deadline(began, c.eval_time_limit, plain_rate)
        self.rows = max(len(b.documents) for b in self.batches)
        model.requires_grad_(False)
        self.caps = torch.full((2,), c.logit_softcap, device=run.world.device, requires_grad=True) if c.asym_logit_rescale else None
        self.global_trainer = GlobalTrainer(run, model, self.caps)
        tilted = c.ngram_tilt_enabled and len(self.phases) > 1          # it learns between phases
        self.tilt, self.hints = Tilt(run.world, run.world.device) if tilted else None, None
        self.reader = Reader(model, self.rows, max(int(b.documents[0, 1]) for b in self.batches), self.caps, run.log, tilted)
        self.mark = torch.cuda.Event() if run.world.device.type == "cuda" else None
        self.mine, self.plain, self.adapting, self.read, self.current = Sums(), [], True, 0, 0

    def sums(self, documents: np.ndarray, scored: np.ndarray, losses: Tensor) -> Sums:
        """Of the first `scored` targets of each document; losses [1 or 2, documents, targets]: the network's, of targets and of hints."""
        places = np.concatenate([np.arange(a + 1, a + 1 + n) for a, n in zip(documents[:, 0], scored)])
        done = torch.arange(losses.shape[2], device=losses.device) < torch.from_numpy(scored).to(losses.device)[:, None]
        losses = losses[:, done].double()
        nats = losses[0]
        if self.tilt:
            at = torch.from_numpy(places).to(losses.device)
            hits = self.hints.tokens[at] == torch.from_numpy(self.data.tokens[places].astype(np.int64)).to(at.device)
            nats = self.tilt(*losses, self.hints.kinds[at], hits)
        if self.bank:
            self.bank(places, nats)
        return Sums(nats.sum().item(), len(places), int(self.data.byte_counts[places].sum()), (losses[0] - nats).sum().item())

    def leave_plain(self, documents: np.ndarray, scored: np.ndarray):
        """Have the rest of these documents scored without adapters, before the phase ends."""
        longest = self.c.eval_seq_len
        for (start, size), done in zip(documents, scored):
            self.plain += [(a, min(a + longest, start + size), max(a, start + done))
                           for a in range(start, start + size, longest) if a + longest > start + done and done < size]

    def score_plain(self):
        """Score what leave_plain has gathered."""
        if self.plain:
            row = plain_row(self.c, self.data)
            self.model.requires_grad_(True)             # as in plain evaluation: torch.compile's graphs ask
            more = sum_windows(self.run, self.model, self.data, pack_windows(np.array(self.plain), row), row,
                               Segments(None, self.c.eval_seq_len), self.name, caps_alone(self.c, self.caps))
            self.model.requires_grad_(False)
            if not math.isfinite(more.nats):
                raise UserError(f"{self.name}: the loss without adapters is {more.nats} too: the model is not usable", code=1,
                                everywhere=False)
            self.mine, self.plain = self.mine + more, []

    def read_batch(self, batch: DocumentBatch, stop: Callable[[int], bool]) -> Sums:
        """Score first, then adapt, chunk by chunk; stop(tokens scored in this batch) breaks off after a chunk."""
        reader = self.reader
        reader.begin(batch, self.data.tokens, self.hints and self.hints.tokens)
        banked = torch.zeros(1 + bool(self.tilt), len(batch.documents), len(reader.chunks()) * batch.chunk, device=self.run.world.device)
        sizes, scored = batch.documents[:, 1], np.zeros(len(batch.documents), np.int64)
        with compiling(self.model, self.c.ttt_compile and not reader.cache):
            for chunk, losses in zip(reader.chunks(), score_first(reader.chunks(), reader.score, reader.adapt)):
                banked[:, : losses.shape[1], chunk * batch.chunk: (chunk + 1) * batch.chunk] = losses
                scored = np.minimum(sizes, (chunk + 1) * batch.chunk)
                if stop(int(scored.sum())):
                    break
        reader.adapters.keep(reader.documents)
        wrong = ~banked.isfinite().all(2).all(0).cpu().numpy()
        for start, size in batch.documents[wrong]:
            self.run.log(f"ttt_non_finite: document at token {start} ({size} tokens) is scored without adapters")
        scored[wrong] = 0
        if not self.signals.received:
            self.leave_plain(batch.documents, scored)
        return self.sums(batch.documents, scored, banked)

    def stop(self, scored: int) -> bool:
        """Asked after every chunk: a signal, or just enough time left to score the rest of the data plainly?"""
        if self.signals.received:
            return True
        if self.c.eval_time_limit and self.mark:    # the clock runs no more than a chunk ahead of the device
            self.mark.synchronize()
            self.mark.record()
        later = (len(self.data.tokens) - 1 - self.read) / self.run.world.size
        if self.adapting and self.deadline.over(later + self.current - scored + sum(b - first for _, b, first in self.plain)):
            self.adapting = False
            self.run.log(f"ttt_time_limit: {time.perf_counter() - self.deadline.began:.1f} s of {self.c.eval_time_limit:.0f} s used; "
                         f"the rest is scored without adapters")
        return not self.adapting

    def score(self) -> Score:
        """Everything, in phases. Raises UserError on a signal (code 130)."""
        run, world, start = self.run, self.run.world, time.perf_counter()
        documents, boundaries = np.concatenate([b.documents for b in self.batches]), [p.documents for p in self.phases[:-1]]
        prefix = max(boundaries, default=0)
        run.log(f"ttt_phased: total_docs:{len(documents)} prefix_docs:{prefix} suffix_docs:{len(documents) - prefix} "
                f"num_phases:{len(boundaries)} boundaries:{boundaries}")
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        self.signals, self.crew = Signals(), Crew(world)
        self.progress = Progress(run.log, self.name, len(self.data.tokens) - 1)
        self.warm_up()
        if self.tilt:
            phase_of_batch = np.repeat(np.arange(len(self.phases)), [p.last - p.first for p in self.phases])
            parts = np.repeat(phase_of_batch, [len(b.documents) for b in self.batches])
            self.hints = find_hints(self.data.tokens, documents, parts, world.device)
            run.log(f"ngram_tilt: hints:{(self.hints.kinds >= 0).sum().item()} tokens:{len(self.data.tokens) - 1} "
                    f"t:{time.perf_counter() - start:.1f}s")
        try:
            for number, phase in enumerate(self.phases):
                self.read_phase(number, phase)
                self.crew.meet(f"phase {number}")
                self.finish_if_signalled()
                if phase.documents:
                    if self.tilt:
                        self.tilt.learn()
                    done, seconds = sum(len(b.documents) for b in self.batches[: phase.last]), time.perf_counter() - start
                    run.log(f"ttpp: phase:{number + 1}/{len(boundaries)} pd:{done} gd:{phase.documents} t:{seconds:.1f}s")
                    self.train_globally(documents[: phase.documents], self.batches[phase.last:])
            total = sum_over_ranks(run, self.data, self.mine, self.name)
            if self.tilt:
                without = total._replace(nats=total.nats + total.saved).bpb
                run.log(f"ngram_tilt: saved:{without - total.bpb:.8f} val_bpb without:{without:.8f}")
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return Score(total.loss, total.bpb, total.tokens, time.perf_counter() - start)

    def read_phase(self, number: int, phase: Phase):
        run, begun = self.run, sum(len(b.documents) for b in self.batches[: phase.first])
        self.reader.adapters.restart(self.c.seed + number)
        self.deadline.resume()
        while not self.crew.stopping(self.signals.received) and (i := phase.first + self.crew.take(number)) < phase.last:
            batch = self.batches[i]
            self.read, self.current = sum(b.tokens for b in self.batches[: i + 1]), batch.tokens
            if self.stop(0):
                self.leave_plain(batch.documents, np.zeros(len(batch.documents), np.int64))
                self.score_plain()              # before the next one is taken: all ranks share what is left
                continue
            got = self.read_batch(batch, self.stop)
            self.mine += got
            self.crew.post(self.mine)
            if run.world.rank == 0:
                total = self.crew.total()
                run.log(f"ttp: b{len(self.batches) - i}/{len(self.batches)} bl:{got.loss:.4f} bb:{got.bpb:.4f} rl:{total.loss:.4f} "
                        f"rb:{total.bpb:.4f} dl:{batch.documents[-1, 1]}-{batch.documents[0, 1]} gd:{int(begun > 0)}")
                self.progress(max(total.tokens, 1))
        if not self.signals.received:
            self.score_plain()
            self.crew.post(self.mine)

    def train_globally(self, documents: np.ndarray, rest: list[DocumentBatch]):
        """The end of a phase, unless any rank has run out of time."""
        self.deadline.resume()              # having waited for the other ranks
        left = sum(b.tokens for b in rest) / self.run.world.size
        if self.run.world.max(not self.adapting):
            self.adapting = False
            return
        self.learn(documents, lambda: self.signals.received or self.deadline.over(left))

    def learn(self, documents: np.ndarray, out_of_time: Callable[[], bool]):
        """One pass of the base weights over documents that have been scored."""
        self.model.requires_grad_(True)
        with compiling(self.model, self.c.ttt_compile):
            self.global_trainer(self.data.tokens, documents, out_of_time)
        for p in self.model.parameters():
            p.grad = None
        self.model.requires_grad_(False)

    def warm_up(self):
        """Compile, or capture as CUDA graphs, what most reading will need."""
        start, cached = time.perf_counter(), self.reader.cache is not None
        if self.reader.graphs.wanted if cached else self.c.ttt_compile and self.model.compiled:
            self.read_random(1 + cached)            # a graph is captured when its shape comes a second time
            self.run.log(f"ttt_warm_up: {'captured' if cached else 'compiled'} on random tokens in {time.perf_counter() - start:.1f}s")

    def read_random(self, rounds: int):
        """Random tokens in batches that pass through all sizes of most reading: of the cached protocol every rung of the ladder."""
        reader, chunk = self.reader, self.c.ttt_chunk_size
        ends, early = ([*reader.ladder[1:], 1], 1 - -self.c.ttt_live_tokens // chunk) if reader.cache else ([self.rows // 2] * 2, 3)
        sizes = np.array([early + sum(row < end for end in ends) for row in range(self.rows)]) * chunk
        sizes = np.minimum(sizes, reader.ids.shape[1] - chunk - 1)
        tokens = random_text(sizes[0] + self.rows + 1, self.c)
        documents = DocumentBatch(np.stack((np.arange(self.rows), sizes), 1), chunk)
        with compiling(self.model, self.c.ttt_compile and not reader.cache):
            for _ in range(rounds):
                reader.begin(documents, tokens)
                for _ in score_first(reader.chunks(), reader.score, reader.adapt):
                    pass
        self.run.world.sync()

    def rehearse(self):
        """Everything once, on random text."""
        documents = np.concatenate([b.documents for b in self.batches])
        enough = np.searchsorted(documents[:, 1].cumsum(), 3 * self.c.global_ttt_chunk_tokens) + 1
        self.read_random(1)
        if len(self.phases) > 1:
            self.learn(documents[:enough], lambda: False)

    def finish_if_signalled(self):
        """After a signal on any rank: the score of what is done, marked partial."""
        total, n = self.crew.total(), len(self.data.tokens) - 1       # before the collective: then the store may go
        if self.run.world.max(self.signals.received):
            self.run.log(f"partial {self.name} val_loss:{total.loss:.8f} val_bpb:{total.bpb:.8f} tokens:{total.tokens} of {n}")
            raise UserError(f"{self.name} stopped by a signal after {total.tokens} of {n} tokens; the score of these is partial", code=130)


@contextlib.contextmanager
def keeping_flags(model: GPT):
    """What of the model is trained may change inside a with-block."""
    grad = [p.requires_grad for p in model.parameters()]
    try:
        yield
    finally:
        for p, wanted in zip(model.parameters(), grad):
            p.requires_grad_(wanted)


def evaluate_adapted(run: Run, model: GPT, data: Validation, name: str, began: float, plain_rate: float,
                     bank: Callable | None = None) -> Score:
    """Test-time training over the validation documents; changes the model's weights in its global phases.

    began: perf_counter at the start of the evaluation budget. plain_rate: tokens a second of one rank without
    adapters. bank(places, nats): called with the targets' places in the text and their losses, document batch by document batch.
    """
    with keeping_flags(model):
        return Adaptation(run, model, data, name, began, plain_rate, bank).score()


def random_text(n: int, c: Config) -> np.ndarray:
    """Tokens uint16 [n] without a BOS, always the same."""
    return np.random.default_rng(0).integers(2, c.vocab_size, n).astype(np.uint16)


def rehearse_adaptation(run: Run, model: GPT, data: Validation):
    """Test-time training's kernels, compiled before any budget: on random text in documents of data's sizes, at a learning
    rate of 0 where it concerns the model, which stays as it is."""
    text = np.where(data.tokens == BOS, data.tokens, random_text(len(data.tokens), run.config))
    with keeping_flags(model):
        still = quietly(run)._replace(config=replace(run.config, global_ttt_lr=0.0, global_ttt_lr_mul=0.0))
        Adaptation(still, model, data._replace(tokens=text), "", time.perf_counter(), 1.0).rehearse()
    release_memory(run.world.device)


# ======================================================================================================================
# MAIN: the pipeline
# ======================================================================================================================


class Inputs(NamedTuple):
    shards: list[np.ndarray]
    validation: Validation
    paths: list[Path]


def preflight(run: Run) -> Inputs:
    """Everything that can be found wrong before time is spent: data, tokenizer, batch, output folder, coders."""
    c = run.config
    select_kernels(c)
    micro_batch(c, run.world.size)
    seq_schedule(c)
    chunk_rules(c)
    paths = find_shards(c, "train") if not c.ttt_eval_only else []
    shards = [read_shard(p, c.vocab_size) for p in paths]
    if shards:
        TokenStream(shards, 0, run.world.size, micro_batch(c, run.world.size)[1], c.train_seq_len)
    validation = load_validation(c, run.log)
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        if run.world.rank == 0:
            remove_leftovers(run.folder)
        probe = run.folder / f".probe.{os.getpid()}.tmp"
        probe.touch()
        probe.unlink()
    except OSError as e:
        raise UserError(f"cannot write to {run.folder.resolve()}: {e.strerror}; set ARTIFACT_DIR") from None
    if c.resume and not (run.folder / "checkpoint.safetensors").is_file():
        raise UserError(f"{run.folder / 'checkpoint.safetensors'} is missing: RESUME=1 needs the checkpoint of a stopped run")
    try:
        import safetensors  # noqa: F401  (needed at the end of training)
        if not (c.prequant_only or c.ttt_eval_only):
            COMPRESSORS[c.compressor].probe()
            if not packed_source():
                import python_minifier  # noqa: F401  (needed at the end to count the code's bytes)
    except ImportError as e:
        raise UserError(f"the package {e.name} is missing: pip install -r requirements.txt") from None
    return Inputs(shards, validation, paths + find_shards(c, "val"))


def warm_up(run: Run, trainer: Trainer, inputs: Inputs) -> float:
    """Everything that the training budget pays for, once, so that nothing is compiled in it; returns the seconds that are to
    be kept for what follows the loop."""
    c, rehearsed = run.config, []
    in_budget = c.max_wallclock_seconds > 0 and not c.prequant_only

    def rehearse():
        if in_budget:
            rehearsed[:] = [calibrate(quietly(run), trainer.model, trainer.average(), inputs.shards, 1, 1)]
            rehearsed[0]()
            if c.inq_steps:         # without them: steps are timed by themselves
                quantize_in_turn(quietly(run._replace(config=replace(c, inq_steps=0))), trainer, rehearsed[0], 0.0)
    seconds = trainer.warm_up(rehearse)
    if in_budget and c.inq_steps:
        trainer.step_seconds = seconds_a_step(trainer)
    return reserve_seconds(run, trainer, inputs, seconds, rehearsed) if c.gptq_reserve_seconds < 0 else c.gptq_reserve_seconds


def train(run: Run, trainer: Trainer, inputs: Inputs) -> dict[str, Tensor]:
    """Warm up, train, save the EMA weights; leaves them in the model and returns them under their file names."""
    c, model = run.config, trainer.model
    reset_peak_memory(run.world.device)         # before the warm-up: what a CUDA graph holds is counted when it is captured
    with run.ledger.stage("warmup"):
        reserve = warm_up(run, trainer, inputs)
    run.log(f"gptq:reserving {reserve:.2f}s, effective={1000 * max(c.max_wallclock_seconds - reserve, 0):.0f}ms")
    known = compiled_graphs()
    run.ledger.open()
    trainer.loop(reserve, lambda at: validate_in_training(run, model, inputs.validation, at))
    run.log(f"ledger recompilations:{compiled_graphs() - known} stage:train")
    if compiled_graphs() > known:
        run.log("warning: shapes that the warm-up had not seen were compiled inside the training budget")
    if run.world.device.type == "cuda":
        peak, held = (f() >> 20 for f in (torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved))
        run.log(f"peak memory allocated: {peak} MiB reserved: {held} MiB")
    check_replicas(run, "train", [*model.parameters(), *trainer.ema], trainer.step)
    with run.ledger.stage("ema", "train"):
        weights = trainer.average()
        import_weights(model, weights)
    if run.world.rank == 0:
        save_tensors(run.folder / "final_model.safetensors", weights, {"model": model_knobs(c), "step": trainer.step, "seed": c.seed,
                                                                      "cursor": trainer.cursor, "train_seconds": run.ledger.used["train"]})
    return export_weights(dict(model.named_parameters()), c.num_layers)


def compiled_graphs() -> int:
    """Graphs that torch.compile has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def quietly(run: Run) -> Run:
    """The run, without lines in its log or seconds in its ledger."""
    silent = Log(None, quiet=True)
    return run._replace(log=silent, ledger=Ledger(silent, run.world, 0))


USUAL_PASSES = 3        # of GPTQ, until the byte budget is met
CLOSING_PASSES = 2      # after all groups but one


def reserve_seconds(run: Run, trainer: Trainer, inputs: Inputs, rehearsal: float, rehearsed: list[Quantizer]) -> float:
    """Seconds that calibration, GPTQ and the training inside it will take, from a rehearsal on one batch: every further
    batch costs as much as one more. A fifth is added, but not to training steps, which count only where training will leave
    text for them; the slowest rank's figure holds for all. At most half the budget: on a machine that was busy in the
    rehearsal training still gets the other."""
    c, model, seconds = run.config, trainer.model, run.world.timed
    if not rehearsed:
        return 0.0
    total = rehearsal + (c.gptq_calibration_batches - 1) * seconds(lambda: collect_hessians(quietly(run), model, inputs.shards, 1))
    if c.clip_rule == "fisher":
        one = seconds(lambda: collect_sensitivity(quietly(run), model, inputs.shards, list(rehearsed[0].bits), {}, 1)) / 2
        total += max(c.fisher_batches / run.world.size - 2, 0) * one
    if c.target_bytes:
        rehearsed[0].done.clear()
        total += (USUAL_PASSES - 1) * seconds(rehearsed[0])
    total = 1.2 * total + 0.5
    if c.inq_steps:
        steps = min(c.iterations, (c.max_wallclock_seconds - total) / trainer.step_seconds)     # or more: without loops they are faster
        read = trainer.cursor + steps * c.train_batch_tokens + trainer.tokens_in_turn(rehearsed[0])
        if c.inq_reread or read <= sum(map(len, inputs.shards)):
            total += c.inq_steps * (c.inq_groups - 1) * trainer.step_seconds
    return run.world.max(min(total, c.max_wallclock_seconds / 2))


def seconds_a_step(trainer: Trainer, count: int = 4) -> float:
    """Of training with all loops, at a learning rate of 0: the weights stay."""
    world = trainer.run.world
    with contextlib.closing(Prefetcher(trainer.stream(), world.device)) as batches:
        trainer.refine(batches, 1, 0.0, {})
        seconds = world.timed(lambda: trainer.refine(batches, count, 0.0, {}))
    trainer.forget()
    return seconds / count


def release_memory(device: torch.device):
    """Give back the gigabytes of what is gone, before the next stage wants them."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def reset_peak_memory(device: torch.device):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def validate_in_training(run: Run, model: GPT, data: Validation, at: str):
    score = evaluate(run, model, data, "training")
    run.log(f"{at} val_loss: {score.loss:.4f} val_bpb: {score.bpb:.4f}")


def calibrate(run: Run, model: GPT, weights: dict[str, Tensor], shards: list[np.ndarray], hessian_batches: int,
              fisher_batches: int) -> Quantizer:
    """All that the training data can tell the quantiser. The model holds the same weights."""
    c, ledger = run.config, run.ledger
    with ledger.stage("hessians", "train"):
        hessians = collect_hessians(run, model, shards, hessian_batches)
        factors = prepare_all(run, hessians)
    sensitivity, counts = {}, None
    if c.clip_rule == "fisher":
        with ledger.stage("fisher", "train"):
            names = [name for name, t in weights.items() if is_quantised(name, t)]
            counts = token_counts(shards, c.vocab_size)
            sensitivity = collect_sensitivity(run, model, shards, names, factors, fisher_batches)
    with ledger.stage("clips", "train"):
        return Quantizer(run, Calibration(weights, hessians, sensitivity, counts), factors)


MULTIPLIERS = (-6.0, 8.0)           # of all steps, log2


class Packed(NamedTuple):
    coded: dict[str, IntTensor | HalfTensor]
    artifact: bytes                 # empty but on rank 0
    size: int                       # with the code
    at: float                       # log2 of the multiplier of all steps
    seconds: float                  # of quantising


def fit_bytes(run: Run, quantizer: Quantizer, code_bytes: int, first: float | None = None) -> Packed:
    """Quantise and pack; under TARGET_BYTES with the finest steps for which code and model still fit.

    A closed formula gives the size of the integers to within a per cent; what it is off by is learnt from each real
    packing, so two or three passes do. first: where to begin (log2). Raises UserError if the coarsest steps do not fit.
    """
    c, world, target = run.config, run.world, run.config.target_bytes
    seconds = dict.fromkeys(("gptq", "pack"), 0.0)

    def make(at: float) -> Packed:
        times = [time.perf_counter()]
        coded = quantizer(2.0 ** at)
        world.sync()
        times.append(time.perf_counter())
        artifact = world.together(lambda: write_artifact(coded, c) if world.rank == 0 else b"")
        size = int(world.broadcast(torch.tensor([float(len(artifact) + code_bytes)], dtype=torch.float64)).item())
        times.append(time.perf_counter())
        for name, a, b in zip(seconds, times, times[1:]):
            seconds[name] += b - a
        return Packed(coded, artifact, size, at, times[1] - times[0])

    def solve(rest: float) -> float:
        a, b = MULTIPLIERS
        for _ in range(20):
            a, b = ((a + b) / 2, b) if quantizer.estimate(2.0 ** ((a + b) / 2)) + rest > target * 0.9997 else (a, (a + b) / 2)
        return a if a == MULTIPLIERS[0] else b

    best, (low, high) = None, MULTIPLIERS
    floats = sum(t.numel() for name, t in quantizer.known.weights.items() if name not in quantizer.bits)
    at = first
    if at is None:
        at = solve(code_bytes + 1.2 * floats + 0.01 * quantizer.estimate(1.0)) if target else 0.0       # a first guess of the rest
    for attempt in range(1, 11):
        packed = make(at)
        if not target:
            best = packed
            break
        run.log(f"byte_budget pass:{attempt} multiplier:{2.0 ** at:.6f} bytes:{packed.size} target:{target}")
        if packed.size <= target and (best is None or packed.size > best.size):
            best = packed
        if packed.size <= target and (target - packed.size <= target / 1000 or at == MULTIPLIERS[0]):
            break
        low, high = (max(low, at), high) if packed.size > target else (low, min(high, at))
        guess = solve(packed.size - quantizer.estimate(2.0 ** at))
        at = guess if low < guess < high or guess == MULTIPLIERS[0] == low else (low + high) / 2
        if high - low < 1e-4:
            break
    for name in seconds:
        run.ledger.charge(name, seconds[name], "train" if name == "gptq" else "none")
    if best is None:
        raise UserError(f"the submission is {packed.size - target} bytes over TARGET_BYTES={target} even with steps "
                        f"{2.0 ** at:.0f} times as coarse: nothing was written; make the model smaller", code=3)
    return best


def compress(run: Run, trainer: Trainer, weights: dict[str, Tensor], inputs: Inputs) -> Path:
    """Calibration, GPTQ, packing; returns the artifact's path on disk. Over the cap: UserError with code 3, nothing kept."""
    c, log = run.config, run.log
    log("GPTQ:collecting Hessians from calibration data...")
    with run.ledger.stage("code"):
        code = shipped_script() if run.world.rank == 0 else b""
    code_bytes = int(run.world.broadcast(torch.tensor([float(len(code))], dtype=torch.float64)).item())
    quantizer = calibrate(run, trainer.model, weights, inputs.shards, c.gptq_calibration_batches, c.fisher_batches)
    packed = fit_bytes(run, quantizer, code_bytes)
    wanted, new = trainer.tokens_in_turn(quantizer), max(sum(map(len, inputs.shards)) - trainer.cursor, 0)
    closing = CLOSING_PASSES * packed.seconds
    if wanted > new and not c.inq_reread:
        log(f"inq: none: it wants {wanted} tokens that training has not read, of which there are {new} (INQ_REREAD=1: others too)")
    elif wanted and not run.world.max(affordable_steps(run, trainer, closing, c.inq_groups - 1)):
        log("inq: none: the training budget has no time left for it")
    elif wanted:
        try:
            quantize_in_turn(run, trainer, quantizer, packed.at, closing)
            packed = fit_bytes(run, quantizer, code_bytes, packed.at)
        except UserError as e:
            if e.code not in (1, 3):        # a gradient that is not finite, a last group too large
                raise
            log(f"warning: {e}; all matrices stay as quantised at once")
    run.ledger.close("train")
    with run.ledger.stage("report"):
        quantizer.log_table(packed.coded)
        entropy = entropy_bytes(packed.coded)
    path = run.folder / f"final_model.int{c.matrix_bits}.pglf"
    count = sum(t.q.numel() for t in packed.coded.values() if isinstance(t, IntTensor))
    log(f"order0_entropy bytes:{entropy:.0f} bits_per_weight:{8 * len(packed.artifact) / max(count, 1):.4f} "
        f"ratio:{len(packed.artifact) / max(entropy, 1):.4f}")
    log(f"Serialized model quantized+{c.compressor}: {len(packed.artifact)} bytes")
    log(f"Code size (wrapped): {code_bytes} bytes")
    log(f"Total submission size quantized+{c.compressor}: {packed.size} bytes")
    if packed.size > CAP_BYTES:
        raise UserError(f"the submission is {packed.size - CAP_BYTES} bytes over the cap of {CAP_BYTES}: nothing was written; "
                        "set TARGET_BYTES, raise the clip sigmas or lower the bits", code=3)
    if run.world.rank == 0:
        write_atomically(path, packed.artifact)
        write_atomically(run.folder / "final_model.train_gpt.py", code)
        save_tensors(run.folder / "hessian_report.safetensors", *hessian_report(quantizer, packed.coded))
    run.world.together(lambda: None)        # nobody reads before it is written
    return path


def hessian_report(quantizer: Quantizer, coded: dict[str, IntTensor | HalfTensor]) -> tuple[dict[str, Tensor], dict]:
    """Statistics of every quantised matrix for tools/hessian_report.py: tensors `NAME:what`, and the settings."""
    out = {}
    for name, w in quantizer.known.weights.items():
        h = quantizer.hessian.get(name)
        if h is not None:
            diagonal = h.diagonal()
            out[f"{name}:trace"] = diagonal.sum()
            out[f"{name}:columns"] = diagonal / diagonal.mean().clamp_min(1e-30)
            out[f"{name}:rows"] = row_importance(w, h)
            out[f"{name}:std"] = w.float().std(dim=1)
            out[f"{name}:step"] = coded[name].step
            reach = quantizer.union * largest(quantizer.bits[name])
            out[f"{name}:sigma"] = coded[name].step.float() * reach / w.float().std(dim=1).clamp_min(1e-12).cpu()
            out[f"{name}:error"] = torch.tensor(quantizer.errors[name])
            out[f"{name}:bits"] = torch.tensor(coded[name].bits)
            out[f"{name}:rate"] = torch.tensor(quantizer.rate(coded, name))
            if name in quantizer.known.sensitivity:
                out[f"{name}:fisher"] = quantizer.known.sensitivity[name].float()
    c = quantizer.c
    return out, {"seed": c.seed, "clip_rule": c.clip_rule, "num_layers": c.num_layers, "num_loops": c.num_loops,
                 "loop_start": c.loop_start, "loop_end": c.loop_end}


def score_artifact(run: Run, model: GPT, path: Path, data: Validation):
    """The submission's own score: read back from disk, unpacked, evaluated, inside the evaluation budget."""
    c, began = run.config, time.perf_counter()
    run.ledger.open()
    with run.ledger.stage("unpack", "eval"):
        coded = run.world.together(lambda: read_artifact(path, run.config))
        import_weights(model, restore(coded), str(path))
    check_replicas(run, "quantized", list(model.parameters()))
    with run.ledger.stage("eval_quantized", "eval"):
        plain = evaluate(run, model, data, "quantized")
        log_score(run, "diagnostic quantized", plain)
    if c.windowed_eval_enabled:
        with run.ledger.stage("eval_windowed", "eval"):
            log_score(run, "quantized_windowed", evaluate(run, model, data, "quantized_windowed", windowed=True))
    if c.sliding_window_enabled:
        with run.ledger.stage("eval_sliding", "eval"):
            log_score(run, "quantized_sliding_window", evaluate(run, model, data, "quantized_sliding_window", sliding=True))
    if c.ttt_enabled:
        name = "quantized_ttt_phased" if c.phased_ttt_enabled else "quantized_ttt"
        with run.ledger.stage("eval_ttt", "eval"):
            rate = plain.tokens / plain.seconds / run.world.size
            log_score(run, name, evaluate_adapted(run, model, data, name, began, rate))
        check_replicas(run, "ttt", list(model.parameters()))
    run.ledger.close("eval")


def pipeline(config: Config, world: World, log: Log):
    """One run, from what the environment asks for to the last number."""
    start, c = time.perf_counter(), config
    run = Run(config, world, log, Ledger(log, world, c.max_wallclock_seconds), Path(c.artifact_dir or "."))
    with run.ledger.stage("checks"):
        inputs = world.together(lambda: preflight(run))
    attention_name = world.together(lambda: choose_attention(c, world.device))
    log_provenance(run, attention_name, inputs.paths)
    torch._dynamo.config.cache_size_limit = 64              # a graph per pass shape, length and grad mode
    torch._dynamo.config.automatic_dynamic_shapes = False   # lengths are few and fixed; cu_seqlens is marked dynamic
    compiled = c.compile_enabled and world.device.type == "cuda" and attention_name != "sdpa"
    with run.ledger.stage("kernels"):
        drop_broken_kernels(c, world.device, log)
    with run.ledger.stage("model"):
        model = GPT(c, world.device, attention_name, compiled)
    log(f"model_params:{sum(p.numel() for p in model.parameters())}")
    path = run.folder / f"final_model.int{c.matrix_bits}.pglf"
    if c.ttt_enabled and not c.prequant_only and world.device.type == "cuda":
        with run.ledger.stage("ttt_rehearsal"):
            rehearse_adaptation(run, model, inputs.validation)
    if not c.ttt_eval_only:
        trainer = Trainer(run, model, inputs.shards)
        if c.quantize_only:
            saved, header = world.together(lambda: load_tensors(run.folder / "final_model.safetensors", c))
            import_weights(model, saved, str(run.folder / "final_model.safetensors"))
            trainer.cursor = header.get("cursor", 0)
            weights = export_weights(dict(model.named_parameters()), c.num_layers)
            run.ledger.open()
        else:
            weights = train(run, trainer, inputs)
        with run.ledger.stage("eval_prequant"):
            log_score(run, "diagnostic pre-quantization post-ema", evaluate(run, model, inputs.validation, "prequant"))
        if not c.prequant_only:
            weights = {name: w.detach().clone() for name, w in weights.items()}
            path = compress(run, trainer, weights, inputs)
        else:
            run.ledger.close("train")
        del trainer
        release_memory(world.device)
    if not c.prequant_only:
        score_artifact(run, model, path, inputs.validation)
    log(f"run_complete seconds:{time.perf_counter() - start:.1f}")


def main() -> int:
    world = log = config = None
    finished = False
    for number in STOP_SIGNALS:
        signal.signal(number, stop_now)
    try:
        config, warnings = load_config(dict(os.environ))
        if config.config_check:
            try:
                print("\n".join([*warnings, config_table(config)]), flush=True)
            except BrokenPipeError:         # `| head` has seen enough; what is left must not fail again at exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        choose_algorithms(config.deterministic)
        world = World()
        folder = Path(config.artifact_dir) if config.artifact_dir else Path("logs")
        log = world.together(lambda: Log(folder / f"{config.run_id}.txt", quiet=world.rank != 0))
        if world.life:
            world.life.log = log
        for line in warnings:
            log(line)
        pipeline(config, world, log)
        finished = True
    except UserError as e:
        finished = e.everywhere
        if world and world.life:
            ignore_signals()
            if e.code == 130:       # perhaps the launcher's, because a rank has died
                world.life.look()
        message = " ".join(str(e).splitlines())
        if log:
            log(f"error: {message}", console=False)
        if log and world.rank:
            if not e.everywhere:
                print(f"error: rank {world.rank}: {message}", file=sys.stderr)
        elif log or os.environ.get("RANK", "0") == "0" or (config and not world):       # what every rank finds is said once
            print(f"error: {message}", file=sys.stderr)
        return e.code
    except RuntimeError as e:
        if world and world.life:
            world.life.explain(e)
        raise
    finally:
        if world:
            world.close(finished)
    return 0


if __name__ == "__main__":
    exit_code = main()
    if "RANK" in os.environ:        # a thread of gloo sometimes aborts the interpreter's own exit, after everything is done
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    sys.exit(exit_code)
