"""Toy documents, models and runs for the tests of test-time training; run as a program it is one rank of them."""

import json
import os
import signal
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

import train_gpt as tg

SETTINGS = dict(VOCAB_SIZE=64, NUM_LAYERS=5, MODEL_DIM=32, NUM_HEADS=4, NUM_KV_HEADS=2, MLP_MULT=2, XSA_LAST_N=5, ROPE_DIMS=4,
                LOOP_START=1, LOOP_END=2, PARALLEL_START_LAYER=3, GATE_WINDOW=8, EVAL_SEQ_LEN=48, TTT_EVAL_SEQ_LEN=48,
                VAL_BATCH_TOKENS=2048, TTT_ENABLED=1, TTT_PROTOCOL="published", TTT_CHUNK_SIZE=16, TTT_LIVE_TOKENS=16, TTT_BATCH_SIZE=3, TTT_LORA_RANK=4,
                TTT_LORA_LR=0.003, PHASED_TTT_PREFIX_DOCS=6, PHASED_TTT_NUM_PHASES=2, GLOBAL_TTT_CHUNK_TOKENS=64,
                GLOBAL_TTT_BATCH_SEQS=2, GLOBAL_TTT_OPTIMIZER="sgd", GLOBAL_TTT_LR=0.1, GLOBAL_TTT_AGAIN=1, EVAL_TIME_LIMIT=0)
# the default's global phases, at a rate that shows
DEALT = dict(PHASED_TTT_PREFIX_DOCS=0, PHASED_TTT_NUM_PHASES=3, GLOBAL_TTT_OPTIMIZER="muon", GLOBAL_TTT_AGAIN=0, GLOBAL_TTT_LR_MUL=0.1,
             TTT_BATCH_SIZE=2)
SIZES = (30, 70, 1, 17, 48, 49, 100, 25, 5, 33)         # of the documents, in tokens


class ListLog:
    """A Log that keeps its lines."""

    def __init__(self):
        self.lines = []

    def __call__(self, text, console=True):
        self.lines.append(text)


def one_world(device: str) -> tg.World:
    w = tg.World.__new__(tg.World)
    w.rank, w.size, w.local_rank, w.device = 0, 1, 0, torch.device(device)
    return w


def setting(device="cpu", **changes) -> tuple[tg.Run, tg.GPT]:
    """A run and a model in which nothing is at its initial value."""
    config = tg.load_config({name: str(value) for name, value in {**SETTINGS, **changes}.items()})[0]
    model = tg.GPT(config, torch.device(device))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g).to(device) * 0.1)
    world, log = one_world(device), ListLog()
    return tg.Run(config, world, log, tg.Ledger(log, world, 0), Path(".")), model


def documents(sizes=SIZES, seed=0) -> tg.Validation:
    r = np.random.default_rng(seed)
    phrases, texts = r.integers(2, 64, (3, 7)), []
    for size in sizes:
        text = np.r_[tg.BOS, r.integers(2, 64, size - 1)]
        for at in range(3, size - 7, 15):           # what n-gram hints live on
            text[at: at + 7] = phrases[r.integers(3)]
        texts.append(text)
    tokens = np.concatenate(texts).astype(np.uint16)
    return tg.Validation(tokens, np.where(tokens == tg.BOS, 0, r.integers(1, 5, len(tokens))))


def adapt(data: tg.Validation, run=None, model=None, plain_rate=1e9, began=None, **changes):
    """-> score, banked loss of every target (NaN: none), the log."""
    if run is None:
        run, model = setting(**changes)
    banked = np.full(len(data.tokens) - 1, np.nan)

    def bank(places, nats):
        assert np.isnan(banked[places - 1]).all(), "a token was scored twice"
        banked[places - 1] = nats.cpu()
    score = tg.evaluate_adapted(run, model, data, "quantized_ttt_phased", began or time.perf_counter(), plain_rate, bank)
    return score, banked, run.log.lines


def worker():
    """One rank: reads WORKER (JSON list of tasks: sizes, settings, what goes wrong), prints a line for each."""
    world = tg.World()
    log = tg.Log(None, quiet=world.rank != 0)
    world.life.SILENCE = 4.0
    for task in json.loads(os.environ["WORKER"]):
        run, model = setting(**task["settings"])
        run = run._replace(world=world, log=log, ledger=tg.Ledger(log, world, 0))

        def adapt(reader, chunk, adapt=tg.Reader.adapt):
            time.sleep(task.get("pause", 0))            # noqa: B023
            print("BANKED", flush=True)
            if task.get("kill") == world.rank and chunk == 1:       # noqa: B023
                os.kill(os.getpid(), signal.SIGKILL if task.get("how") != "stop" else signal.SIGSTOP)       # noqa: B023
            adapt(reader, chunk)
        tg.Reader.adapt, before = adapt, tg.Reader.adapt
        try:
            if task.get("rehearse"):
                tg.rehearse_adaptation(run, model, documents(task["sizes"]))
            score = tg.evaluate_adapted(run, model, documents(task["sizes"]), "quantized_ttt_phased", time.perf_counter(), 1e9)
            weights = float(sum(p.detach().double().sum() for p in model.parameters()))
            print("SCORE", json.dumps([score.loss, score.bpb, score.tokens, weights]), flush=True)
        except tg.UserError as e:
            print("USERERROR", e, flush=True)
            os._exit(e.code)
        except RuntimeError as e:
            world.life.explain(e)
        finally:
            tg.Reader.adapt = before
    world.close()


if __name__ == "__main__":
    worker()
