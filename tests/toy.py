"""Toy configurations, models and data for the tests. Everything is deterministic."""

import functools
import io
import json
import os
import random
import sys
from pathlib import Path

import numpy as np
import torch

import train_gpt as tg

SCRIPT = Path(tg.__file__).resolve()
tg.pack_script = functools.cache(tg.pack_script)        # five seconds, and every run in this process ships the same
VOCAB = 384
# The smallest network with every part of the default recipe: recurrence, skips, lanes, XSA, sparse gates, SmearGate.
NETWORK = dict(VOCAB_SIZE=VOCAB, NUM_LAYERS=6, MODEL_DIM=32, NUM_HEADS=4, NUM_KV_HEADS=2, MLP_MULT=2, XSA_LAST_N=6,
               ROPE_DIMS=4, LOOP_START=1, LOOP_END=2, NUM_LOOPS=2, PARALLEL_START_LAYER=4, GATE_WINDOW=8)
TRAINING = dict(TRAIN_BATCH_TOKENS=128, TRAIN_SEQ_LEN=32, GRAD_ACCUM_STEPS=1, ITERATIONS=5, MAX_WALLCLOCK_SECONDS=0,
                WARMUP_STEPS=0, EVAL_SEQ_LEN=32, EVAL_STRIDE=8, VAL_BATCH_TOKENS=1024, GPTQ_CALIBRATION_BATCHES=2,
                MUON_MOMENTUM_WARMUP_STEPS=20, EMA_DECAY=0.9, FISHER_BATCHES=4, QUANTIZER="trellis4", INQ_STEPS=0)


def env(**settings) -> dict[str, str]:
    """Environment of a toy run."""
    return {name: str(value) for name, value in {**NETWORK, **TRAINING, **settings}.items()}


def config(**settings) -> tg.Config:
    return tg.load_config(env(**settings))[0]


def world(rank=0, size=1) -> tg.World:
    """A world on the CPU, whatever the machine has."""
    w = tg.World.__new__(tg.World)
    w.rank, w.size, w.local_rank, w.device = rank, size, rank, torch.device("cpu")
    return w


class ListLog:
    """A Log that keeps its lines."""

    def __init__(self):
        self.lines = []

    def __call__(self, text, console=True):
        self.lines.append(text)


def run(c: tg.Config, folder=".", log=None, on=None) -> tg.Run:
    log, on = log or ListLog(), on or world()
    return tg.Run(c, on, log, tg.Ledger(log, on, c.max_wallclock_seconds), Path(folder))


def randomise(model: torch.nn.Module, seed=0) -> torch.nn.Module:
    """Every parameter moved off its initial value, so that no switch is a no-op: gates open halfway, matrices mix."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=g)
            if name.endswith("bank"):
                p.copy_(noise / p.shape[-1] ** 0.5)
            elif name in ("tok_emb", "lm_head"):
                p.copy_(noise)
            elif name.startswith("q_gain"):
                p.copy_(1.5 + 0.3 * noise)
            elif name in ("attn_gate_w", "smear_gate", "smear_lambda", "skip_gates"):
                p.copy_(0.7 * noise + 0.3)
            else:
                p.add_(0.3 * noise)
    return model


def model(c: tg.Config, seed=0, **options) -> tg.GPT:
    return randomise(tg.GPT(c, torch.device("cpu"), **options), seed)


def row(length: int, documents=(0,), seed=0, vocab=VOCAB) -> np.ndarray:
    """uint16 tokens with a BOS at each of `documents` and none elsewhere."""
    ids = np.random.default_rng(seed).integers(4, vocab, length).astype(np.uint16)
    ids[list(documents)] = tg.BOS
    return ids


def write_shard(path: Path, tokens, magic=tg.MAGIC, version=tg.VERSION, count=None) -> Path:
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())
    return path


def sentences(documents: int, seed: int) -> list[str]:
    """Documents of words drawn by Zipf's law, each word mostly followed by its favourites: easy to learn a little."""
    rng = random.Random(seed)
    letters = random.Random(1)                      # one vocabulary for every seed
    words = ["".join(letters.choice("aeioustrnlmk") for _ in range(letters.randint(2, 7))) for _ in range(60)]
    favourites = {w: letters.sample(words, 3) for w in words}
    out = []
    for _ in range(documents):
        word, text = rng.choice(words), []
        for _ in range(rng.randint(10, 60)):
            text.append(word)
            word = rng.choice(favourites[word]) if rng.random() < 0.85 else rng.choice(words)
        out.append(" ".join(text) + ".")
    return out


def train_tokenizer(texts: list[str], vocab=VOCAB, **options) -> bytes:
    import sentencepiece as spm
    model = io.BytesIO()
    settings = dict(vocab_size=vocab, model_type="bpe", byte_fallback=True, character_coverage=1.0, pad_id=0, bos_id=1,
                    eos_id=2, unk_id=3, normalization_rule_name="identity", remove_extra_whitespaces=False,
                    num_threads=1, minloglevel=2, max_sentence_length=1 << 16)
    spm.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=model, **{**settings, **options})
    return model.getvalue()


def write_data(folder: Path, vocab=VOCAB) -> Path:
    """A data set of about 20,000 training tokens in two shards and 1,500 validation tokens in two."""
    import sentencepiece as spm
    train, val = sentences(400, 11), sentences(30, 12)
    proto = train_tokenizer(train, vocab)
    sp = spm.SentencePieceProcessor(model_proto=proto)
    flat = lambda texts: np.array([t for ids in sp.encode(texts) for t in (tg.BOS, *ids)], np.uint16)
    for split, tokens in (("train", flat(train)), ("val", flat(val))):
        cut = len(tokens) // 2 + 7                  # in the middle of a document
        write_shard(folder / f"fineweb_{split}_000000.bin", tokens[:cut])
        write_shard(folder / f"fineweb_{split}_000001.bin", tokens[cut:])
    (folder / "tokenizer.model").write_bytes(proto)
    return folder


def data_env(data: Path, out: Path, **settings) -> dict[str, str]:
    """Environment of a toy run over the data set in `data`, writing to `out`."""
    return env(DATA_PATH=data, TOKENIZER_PATH=Path(data) / "tokenizer.model", ARTIFACT_DIR=out, **{"RUN_ID": "run", **settings})


def clean_environment() -> dict[str, str]:
    """This process's environment without anything that the trainer reads."""
    ours = {f.name.upper() for f in tg.fields(tg.Config)} | set(tg.ALIASES) | {"RANK", "WORLD_SIZE", "LOCAL_RANK"}
    return {k: v for k, v in os.environ.items() if k not in ours}


def script(settings: dict[str, str], path: Path = SCRIPT, timeout=120, **options):
    """Run a trainer script on the CPU in its own process; the result has returncode, stdout and stderr."""
    import subprocess
    environment = {**clean_environment(), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **settings}
    return subprocess.run([sys.executable, str(path)], env=environment, capture_output=True, text=True, timeout=timeout, **options)


def shards(folder: Path, split="train") -> list[np.ndarray]:
    return [np.fromfile(p, "<u2", offset=tg.HEADER_BYTES) for p in sorted(folder.glob(f"fineweb_{split}_0*.bin"))]


def hypothesis_settings(**options):
    from hypothesis import HealthCheck, settings
    return settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, **options)


def dump(value) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def row_steps(w_NRC: torch.Tensor, sigma_N: torch.Tensor, bits: int) -> torch.Tensor:
    """Step of every row under hand-set sigmas, float16 [N, R]."""
    return tg.snap_steps(tg.raw_steps(w_NRC, sigma_N, bits), w_NRC, bits)


def gptq(w_NRC, h_NCC, step_NR, bits: int, warn=print, block_size: int = 128) -> torch.Tensor:
    """Scalar GPTQ from the Hessians on."""
    return tg.round_scalar(w_NRC, tg.prepare(h_NCC, warn), step_NR, bits, block_size)


def quantize(run: tg.Run, weights: dict, hessians: dict, sensitivity: dict | None = None, counts=None) -> dict:
    """Weights under their file names -> their codes, all at once, with the clips of the rule."""
    quantizer = tg.Quantizer(run, tg.Calibration(weights, hessians, sensitivity or {}, counts))
    coded = quantizer()
    quantizer.log_table(coded)
    return coded
