"""The same toy training on several numbers of ranks (gloo, one machine); run by test_train.py.

    python ranks.py OUT 1 2 3 4        # OUT/<size>_<rank>.pt: everything that must not depend on the number of ranks

Twelve spans a step, so that 1 rank x 12 micro-steps, 2 x 6, 3 x 4 and 4 x 3 see the same global batch.
"""

import os
import signal
import sys
import time
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import numpy as np
import torch
import torch._dynamo  # noqa: F401  (AdamW loads it on its first step: once here, not in every child)
import toy

import train_gpt as tg

SPANS, TOKENS, STEPS = 12, 16, 5


def run(out: Path, size: int, rank: int, store: str):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    world = toy.world(rank, size)
    c = toy.config(TRAIN_BATCH_TOKENS=SPANS * TOKENS, GRAD_ACCUM_STEPS=SPANS // size, TRAIN_SEQ_LEN=10, GRAD_CLIP_NORM=0.5,
                   CHECKPOINT_EVERY=0)
    tg.SMALLEST_QUANTISED = 500
    shards = [toy.row(3000, range(0, 3000, 23), 1), toy.row(500, range(0, 500, 31), 2)]
    r = toy.run(c, out / str(size), toy.ListLog(), world)
    trainer = tg.Trainer(r, toy.model(c, seed=rank), shards)       # rank 0's weights must win
    result = {"start": [p.detach().clone() for p in trainer.model.parameters()], "norms": [], "tokens": []}
    stream = trainer.stream()
    batches = tg.Prefetcher(stream, world.device)
    spans = trainer.stream()
    for step in range(STEPS):
        trainer.take_step(batches, (0, 0, 1, 2, 2)[step], 1 - 0.1 * step)
        result["norms"].append(trainer.pending.grad_norm())
        trainer.settle()
        result["tokens"].append(np.concatenate([spans.next()[0] for _ in range(trainer.accumulate)]))
    batches.close()
    result["weights"] = [p.detach().clone() for p in trainer.model.parameters()]
    result["replicas"] = [replicas(r, trainer, change, world) for change in ("nothing", "parameter", "average", "step")]
    result["ema"] = [e.clone() for e in trainer.ema]
    trainer.clock = tg.Clock(world, 0.0)
    trainer.save(batches.cursor)
    optimizer = {k: v.clone() for k, v in trainer.optimizers.save().items()}
    result["optimizer"] = optimizer

    # the checkpoint of four ranks goes on on any number of ranks (written last, so the sizes run in falling order)
    world.sum(torch.zeros(1))
    tensors, _ = tg.load_tensors(out / "4" / "checkpoint.safetensors", c)
    trainer.optimizers.load(tensors)
    result["reloaded"] = {k: v.clone() for k, v in trainer.optimizers.save().items()}

    # from here on everybody has the same weights, so that only summation order differs
    model = toy.model(c)
    hessians = tg.collect_hessians(r, model, shards, SPANS // size)
    result["hessians"] = hessians
    weights = {n: t.detach().clone() for n, t in tg.export_weights(dict(model.named_parameters()), c.num_layers).items()}
    exact = {n: torch.eye(len(h)) + 0.1 for n, h in hessians.items()}
    result["coded"] = {n: tuple(t) for n, t in toy.quantize(r, weights, exact).items()}
    in_turn = r._replace(config=replace(c, inq_steps=2, inq_groups=3, inq_lr=0.1))
    trainer = tg.Trainer(in_turn, model, shards)
    quantizer = tg.Quantizer(in_turn, tg.Calibration(weights, exact, {}, None))
    tg.quantize_in_turn(in_turn, trainer, quantizer, 0.0)
    result["inq"] = {n: t.decode() for n, t in quantizer(1.0).items()}, list(quantizer.done), [p.detach().clone() for p in model.parameters()]
    tg.import_weights(model, weights)
    tokens = toy.row(1237, range(0, 1237, 41), 3)
    data = tg.Validation(tokens, np.arange(len(tokens)) % 7)
    result["scores"] = [tg.evaluate(r, model, data, "plain")[:3], tg.evaluate(r, model, data, "sliding", sliding=True)[:3]]

    # an error on one rank is everybody's
    def fail():
        if rank == size - 1:
            raise tg.UserError("only here", code=7)
    try:
        world.together(fail)
        result["error"] = None
    except tg.UserError as e:
        result["error"] = (str(e), e.code)
    result["log"] = r.log.lines
    for name in ("stopped", "stopped_late", "full"):
        result[name] = checkpointed(name, out / f"{name}{size}", shards, world)
    torch.save(result, out / f"{size}_{rank}.pt")
    world.sum(torch.zeros(1))
    torch.distributed.destroy_process_group()


def replicas(r: tg.Run, trainer: tg.Trainer, change: str, world: tg.World) -> tuple[str, str | None]:
    """The checksum's line after `change` on the last rank, and the error, if any. The change is undone."""
    last = world.rank == world.size - 1
    target = {"parameter": list(trainer.model.parameters())[-1].data, "average": trainer.ema[0]}.get(change)
    bits = None if target is None else target.view(-1)[-1:].view(torch.int32)
    try:
        if last and bits is not None:
            bits ^= 1                   # the least significant bit of one number
        tg.check_replicas(r, "train", [*trainer.model.parameters(), *trainer.ema], STEPS + (last and change == "step"))
        error = None
    except tg.UserError as e:
        error = str(e)
    if last and bits is not None:
        bits ^= 1
    return next(line for line in reversed(r.log.lines) if line.startswith("parameters_checksum")), error


def checkpointed(what: str, folder: Path, shards, world: tg.World):
    """Four steps. stopped: the last rank alone gets a signal, rank 0 writes slowly and gets the launcher's signal meanwhile,
    if it had none. full: no checkpoint can be written."""
    c = toy.config(TRAIN_BATCH_TOKENS=SPANS * TOKENS, GRAD_ACCUM_STEPS=SPANS // world.size, TRAIN_SEQ_LEN=10, ITERATIONS=4,
                   CHECKPOINT_EVERY=2 if what == "full" else 0)
    r = toy.run(c, folder, toy.ListLog(), world)
    trainer, write, last = tg.Trainer(r, toy.model(c), shards), tg.write_atomically, world.rank == world.size - 1
    step, settle = trainer.take_step, trainer.settle

    def take_step(*args):
        if what == "stopped" and last and trainer.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        step(*args)

    def settle_(*args):
        if what == "stopped_late" and last and trainer.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        settle(*args)

    def slow_write(*args):
        if what == "full":
            raise tg.UserError("disk full", everywhere=False)
        time.sleep(0.3)
        if not last:
            os.kill(os.getpid(), signal.SIGTERM)
        write(*args)

    trainer.take_step, trainer.settle, tg.write_atomically = take_step, settle_, slow_write
    for number in tg.STOP_SIGNALS:
        signal.signal(number, tg.stop_now)
    error = None
    try:
        trainer.loop(0.0, None)
    except tg.UserError as e:
        error = e
    tg.write_atomically = write
    if what == "full":
        return error, trainer.step, [line for line in r.log.lines if line.startswith("warning")]
    return str(error), getattr(error, "code", None), (folder / "checkpoint.safetensors").is_file()


def main() -> int:
    out, sizes = Path(sys.argv[1]), sorted(map(int, sys.argv[2:]), reverse=True)
    context, codes = get_context("fork"), []
    for size in sizes:
        children = [context.Process(target=run, args=(out, size, rank, str(out / f"store{size}"))) for rank in range(size)]
        for child in children:
            child.start()
        for child in children:
            child.join()
        codes += [child.exitcode for child in children]
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
