"""TRAIN: any number of ranks, warm-up, resuming, signals, the clock, averages, non-finite numbers."""

import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import toy

import train_gpt as tg

SHARDS = [toy.row(700, range(0, 700, 23), 1), toy.row(300, range(0, 300, 31), 2)]


def trainer(folder, shards=SHARDS, **settings):
    c = toy.config(**settings)
    run = toy.run(c, folder)
    return tg.Trainer(run, toy.model(c), shards), run


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def state(t: tg.Trainer):
    """Weights, averages and optimizer state."""
    return [p.detach().clone() for p in (*t.model.parameters(), *t.ema, *(v for _, v in sorted(t.optimizers.save().items())))]


def never(_):
    raise AssertionError("no validation was asked for")


# ----------------------------------------------------------------------------------------------------------------- ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """{size: [result of each rank]} of tests/ranks.py."""
    out = tmp_path_factory.mktemp("ranks")
    done = subprocess.run([sys.executable, "-W", "ignore", str(Path(__file__).with_name("ranks.py")), str(out), "1", "2", "3", "4"],
                          env=toy.clean_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return {size: [torch.load(out / f"{size}_{rank}.pt", weights_only=False) for rank in range(size)] for size in (1, 2, 3, 4)}


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_different_replicas_are_found(ranks, size):
    """One bit of one parameter or average, or a step more, on one rank: every rank says which."""
    for rank in range(size):
        same, *changed = ranks[size][rank]["replicas"]
        assert re.fullmatch(rf"parameters_checksum stage:train ranks:{size} step:5 crc32:[0-9a-f]{{8}} equal:1", same[0]) and same[1] is None
        for line, error in changed:
            if size == 1:
                assert line.endswith("equal:1") and error is None
            else:
                assert line.endswith("equal:0") and f"rank {size - 1} has" in error and error.count("rank ") == 1
    assert "at step 6, expected" in ranks[max(size, 2)][0]["replicas"][3][1]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_stay_equal(ranks, size):
    for other in ranks[size][1:]:
        for key in ("weights", "ema", "start"):
            assert same(ranks[size][0][key], other[key]), key
        assert other["norms"] == ranks[size][0]["norms"]
        assert other["scores"] == ranks[size][0]["scores"]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_any_number_of_ranks_trains_the_same_weights(ranks, size):
    """Five steps from rank 0's weights, the same global batches. Only the order of float32 sums differs; Newton-Schulz and
    AdamW's division blow that up in small directions, hence relative to how far the weights moved. Averaging wrongly,
    losing a bank slice or clipping before averaging is off by more than 0.05."""
    one, many = ranks[1][0], ranks[size][0]
    assert same(one["start"], many["start"])
    assert many["norms"] == pytest.approx(one["norms"], rel=1e-3)
    for key in ("weights", "ema"):
        for a, b, s in zip(one[key], many[key], one["start"]):
            assert (a - b).norm() < 0.01 * (a - s).norm(), key


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_ranks_read_disjoint_spans_and_together_the_same_batch(ranks, size):
    from ranks import SPANS, TOKENS
    joined = np.concatenate(SHARDS_OF_RANKS)
    for step in range(5):
        rows = [r["tokens"][step].reshape(-1, TOKENS + 1) for r in ranks[size]]
        order = np.stack(rows, 1).reshape(-1)            # micro-step by micro-step, rank by rank
        first = step * SPANS * (TOKENS + 1)
        assert order.tolist() == joined[first: first + SPANS * (TOKENS + 1)].tolist()


@pytest.mark.parametrize("size", [2, 3, 4])
def test_any_number_of_ranks_quantises_in_turn_alike(ranks, size):
    """Ranks are equal to the bit; one rank's codes are those of the first group, and nearly those of the rest, which has been
    trained by sums in another order: a rounding that falls the other way moves a weight by a step, of a few in a hundred."""
    one, (codes, done, weights) = ranks[1][0]["inq"], ranks[size][0]["inq"]
    for other in ranks[size][1:]:
        assert all(torch.equal(t, other["inq"][0][n]) for n, t in codes.items()) and same(weights, other["inq"][2])
    assert done == one[1] and codes.keys() == one[0].keys()
    assert torch.equal(codes[done[0]], one[0][done[0]])
    for name, t in codes.items():
        assert (t != one[0][name]).float().mean() < 0.05, name


SHARDS_OF_RANKS = [toy.row(3000, range(0, 3000, 23), 1), toy.row(500, range(0, 500, 31), 2)]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_checkpoint_of_four_ranks_loads_on_any_number(ranks, size):
    for r in ranks[size]:
        assert r["reloaded"].keys() == ranks[4][0]["optimizer"].keys()
        assert all(torch.equal(t, ranks[4][0]["optimizer"][n]) for n, t in r["reloaded"].items())


@pytest.mark.parametrize("size", [2, 3, 4])
def test_hessians_are_averaged_over_all_ranks(ranks, size):
    """The same twelve spans: a rank's sum over its share / its batches, averaged over ranks, is the one-rank figure."""
    for name, h in ranks[1][0]["hessians"].items():
        for r in ranks[size]:
            error = (r["hessians"][name] - h).norm() / h.norm()
            assert error < 1e-5, name           # float32 sums in another order


@pytest.mark.parametrize("size", [2, 3, 4])
def test_quantising_is_shared_out_and_whole_on_every_rank(ranks, size):
    for r in ranks[size]:
        assert r["coded"].keys() == ranks[1][0]["coded"].keys()
        for name, codes in ranks[1][0]["coded"].items():
            assert torch.equal(r["coded"][name][0], codes[0]), name


@pytest.mark.parametrize("size", [2, 3, 4])
def test_scores_do_not_depend_on_the_number_of_ranks(ranks, size):
    for a, b in zip(ranks[1][0]["scores"], ranks[size][0]["scores"]):
        assert b == pytest.approx(a, rel=1e-12)        # float64 sums of equal float32 losses
        assert a[2] == 1236


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_an_error_on_one_rank_stops_all(ranks, size):
    assert {r["error"] for r in ranks[size]} == {("only here", 7)}


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("when, step", [("stopped", "[34]"), ("stopped_late", "4")])
def test_a_signal_to_one_rank_stops_all_and_none_before_the_checkpoint_is_there(ranks, size, when, step):
    """In a step, and after the ranks last asked each other."""
    for error, code, written in (r[when] for r in ranks[size]):
        assert re.search(f"signal 15 after step {step}; RESUME=1", error) and code == 130 and written


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_training_goes_on_when_a_checkpoint_cannot_be_written(ranks, size):
    for error, steps, warnings in (r["full"] for r in ranks[size]):
        assert error is None and steps == 4 and warnings == ["warning: disk full; training goes on"] * 2


# --------------------------------------------------------------------------------------------------------------- warm-up


def test_warm_up_leaves_no_trace(tmp_path):
    """WARMUP_STEPS=0 and 3, bit for bit: weights, average, optimizer state, data; in every looping state."""
    results = []
    for steps in (0, 3):
        t, run = trainer(tmp_path, WARMUP_STEPS=steps, ITERATIONS=4, LOOP_PHASE2_AT=0.8)
        rehearsed = []
        t.warm_up(lambda: rehearsed.append(1))
        assert len(rehearsed) == 2 and t.step == 0
        if steps:
            assert same(t.ema, t.model.parameters())
        t.loop(0.0, never)
        results.append(state(t))
    assert same(*results)


def test_warm_up_visits_every_looping_state(tmp_path):
    t, _ = trainer(tmp_path, WARMUP_STEPS=2, LOOP_PHASE2_AT=0.8)
    seen = []
    take = t.take_step
    t.take_step = lambda batches, loops, lr: (seen.append(loops), take(batches, loops, lr))
    t.warm_up(lambda: None)
    assert seen == [0, 0, 1, 1, 2, 2]


def test_warm_up_visits_every_segment_length(tmp_path):
    t, _ = trainer(tmp_path, WARMUP_STEPS=1, TRAIN_SEQ_LEN=32, TRAIN_SEQ_SCHEDULE="8@0.1,16@0.7", ENABLE_LOOPING_AT=0.35)
    seen = []
    take = t.take_step
    t.take_step = lambda batches, loops, lr: (seen.append((loops, batches.stream.limit)), take(batches, loops, lr))
    t.warm_up(lambda: None)
    assert seen == [(0, 8), (0, 16), (2, 16), (2, 32)]


# ------------------------------------------------------------------------------------------------------------------ loop


def test_looping_and_learning_rate_follow_the_steps_without_a_budget(tmp_path):
    t, run = trainer(tmp_path, ITERATIONS=10, LOOP_PHASE2_AT=0.65, WARMDOWN_FRAC=0.5, MIN_LR=0.2)
    seen = []
    t.take_step = lambda batches, loops, lr: (batches.next(), seen.append((loops, lr)), setattr(t, "step", t.step + 1))
    t.loop(0.0, never)
    assert [loops for loops, _ in seen] == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [lr for _, lr in seen] == pytest.approx([1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    looped = [line for line in run.log.lines if line.startswith("layer_loop:enabled")]
    assert len(looped) == 2 and "step:4 frac:0.400 encoder:[0, 1, 2, 1] decoder:[2, 3, 4, 5]" in looped[0]


def test_segments_grow_with_the_schedule_and_no_token_is_lost(tmp_path):
    """Batches of the loop against spans of the stream cut by the rule, one by one."""
    t, run = trainer(tmp_path, ITERATIONS=10, TRAIN_SEQ_LEN=32, TRAIN_SEQ_SCHEDULE="16@0.65,8@0.2")
    seen = []
    t.take_step = lambda batches, loops, lr: (seen.append(batches.next()), setattr(t, "step", t.step + 1))
    t.loop(0.0, never)
    stream = t.stream()
    stream.cursor = 0
    for batch, limit in zip(seen, [8] * 2 + [16] * 5 + [32] * 3, strict=True):
        row, cursor = stream.next()
        expected = tg.to_batch(row, limit)
        assert torch.equal(batch.ids, expected.ids) and torch.equal(batch.segments.cu_seqlens, expected.segments.cu_seqlens)
        assert batch.cursor == cursor and batch.segments.longest == limit
    assert [line for line in run.log.lines if line.startswith("train_seq_len:")] == [
        "train_seq_len:8 step:0 frac:0.000", "train_seq_len:16 step:2 frac:0.200", "train_seq_len:32 step:7 frac:0.700"]


def test_no_segment_is_longer_than_train_seq_len():
    c = toy.config(TRAIN_SEQ_LEN=32, TRAIN_SEQ_SCHEDULE="2048@0.5")
    assert c.seq_len_at(0.0) == c.seq_len_at(0.7) == 32


@pytest.mark.parametrize("text", ["8", "8@", "8@0", "8@1.5", "1@0.5", "8@nan", "8@0.5@1", "8:0.5"])
def test_bad_schedules(text):
    with pytest.raises(tg.UserError, match="TRAIN_SEQ_SCHEDULE"):
        tg.seq_schedule(toy.config(TRAIN_SEQ_SCHEDULE=text))


def test_gradients_accumulate_to_the_mean_over_micro_steps(tmp_path):
    """4 micro-steps of 32 tokens and the mean of their four gradients, one by one."""
    t, _ = trainer(tmp_path, TRAIN_BATCH_TOKENS=128, GRAD_ACCUM_STEPS=4, GRAD_CLIP_NORM=0)
    reference = toy.model(t.run.config)
    stream, sums = t.stream(), [torch.zeros_like(p, dtype=torch.float64) for p in reference.parameters()]
    losses = []
    for _ in range(4):
        batch = tg.to_batch(stream.next()[0], 32)
        reference.zero_grad()
        loss = reference.losses(batch.ids, batch.targets, batch.segments, 1).mean()
        loss.backward()
        losses.append(loss.item())
        for s, p in zip(sums, reference.parameters()):
            s += p.grad.double() / 4
    seen = {}
    t.optimizers.step = lambda lr, step: seen.update(grads=[p.grad.clone() for p in t.model.parameters()]) or torch.tensor(1.0)
    batches = tg.Prefetcher(t.stream(), t.run.world.device)
    t.take_step(batches, 1, 1.0)
    batches.close()
    for a, b in zip(seen["grads"], sums):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-9        # float32 sums
    assert t.pending.loss() == pytest.approx(np.mean(losses), rel=1e-6)


def test_average_follows_its_formula(tmp_path):
    t, _ = trainer(tmp_path, ITERATIONS=4, EMA_DECAY=0.7)
    expected = [p.detach().double() for p in t.model.parameters()]
    take = t.take_step

    def spy(*args):
        take(*args)
        for e, p in zip(expected, t.model.parameters()):
            e.mul_(0.7).add_(0.3 * p.detach().double())

    t.take_step = spy
    t.loop(0.0, never)
    for e, average in zip(expected, t.ema):
        assert (e - average).abs().max() < 1e-5      # float32


def test_training_learns(tmp_path):
    t, run = trainer(tmp_path, shards=[np.tile(toy.row(33, (0,)), 40)], ITERATIONS=40, WARMDOWN_FRAC=0.3, TRAIN_LOG_EVERY=1)
    t.loop(0.0, never)
    losses = [float(line.split("train_loss: ")[1].split()[0]) for line in run.log.lines if "train_loss" in line]
    # 32 tokens that repeat: their unigram entropy is below ln 33; the start is random weights, over ln 384 = 5.95
    assert len(losses) == 40 and losses[0] > 5.9 and losses[-1] < 2.0


def test_log_line_keeps_its_form(tmp_path):
    t, run = trainer(tmp_path, ITERATIONS=12, TRAIN_LOG_EVERY=6)
    t.loop(0.0, never)
    lines = [line for line in run.log.lines if "train_loss" in line]
    assert [line.split("/")[0] for line in lines] == ["1", "2", "3", "4", "5", "6", "12"]
    import re
    assert all(re.match(r"\d+/12 train_loss: \d+\.\d{4} train_time: \d+\.\dm tok/s: \d+ ", line) for line in lines)


def test_epochs_are_logged_once_each(tmp_path, monkeypatch):
    """300 tokens, 129 a step: the stream starts again in the 3rd and 5th step, however far the prefetcher has read."""
    class Eager(tg.Prefetcher):
        def __init__(self, *args):
            super().__init__(*args)
            while not self.queue.full():
                time.sleep(0.001)

    monkeypatch.setattr(tg, "Prefetcher", Eager)
    t, run = trainer(tmp_path, shards=[SHARDS[1]], ITERATIONS=6)
    t.loop(0.0, never)
    assert [line for line in run.log.lines if "epoch" in line] == ["data epoch:2 step:3", "data epoch:3 step:5"]


def test_validation_in_training_is_on_time_and_not_counted(tmp_path):
    t, run = trainer(tmp_path, ITERATIONS=6, VAL_LOSS_EVERY=2)
    seen = []

    def validate(at):
        seen.append((at, t.step))
        time.sleep(0.3)

    start = time.perf_counter()
    t.loop(0.0, validate)
    wall = time.perf_counter() - start
    assert seen == [("2/6", 2), ("4/6", 4), ("6/6", 6)]
    assert run.ledger.used["train"] < wall - 0.85        # three times 0.3 s, less timer noise


# ---------------------------------------------------------------------------------------------------- checkpoint, resume


@pytest.mark.parametrize("stop", [3, 5])
def test_resuming_equals_an_uninterrupted_run_bit_for_bit(tmp_path, stop):
    settings = dict(ITERATIONS=8, LOOP_PHASE2_AT=0.8, CHECKPOINT_EVERY=stop)
    whole, _ = trainer(tmp_path / "whole", **{**settings, "CHECKPOINT_EVERY": 0})
    whole.loop(0.0, never)

    first, _ = trainer(tmp_path / "parts", **settings)
    take = first.take_step

    def die(*args):
        if first.step == stop + 1:
            raise KeyboardInterrupt          # between two checkpoints
        take(*args)

    first.take_step = die
    with pytest.raises(KeyboardInterrupt):
        first.loop(0.0, never)
    second, run = trainer(tmp_path / "parts", **settings, RESUME=1)
    second.loop(0.0, never)
    assert any(line.startswith(f"resumed step:{stop} ") for line in run.log.lines)
    assert second.step == whole.step == 8
    assert same(state(second), state(whole))


def test_elapsed_time_is_resumed(tmp_path):
    t, _ = trainer(tmp_path, ITERATIONS=2)
    t.loop(0.0, never)
    t.clock.before += 100
    t.save(0)
    again, run = trainer(tmp_path, ITERATIONS=3, RESUME=1, MAX_WALLCLOCK_SECONDS=101, TRAIN_LOG_EVERY=1)
    again.loop(0.0, never)
    assert run.ledger.used["train"] > 100


def test_resume_refuses_what_does_not_fit(tmp_path):
    t, _ = trainer(tmp_path)
    t.clock = tg.Clock(t.run.world, 0)
    path = t.save(0)
    for settings, words in ((dict(SEED=2), "SEED=1337"), (dict(ROPE_BASE=500), "ROPE_BASE")):
        with pytest.raises(tg.UserError, match=words):
            trainer(tmp_path, RESUME=1, **settings)[0].loop(0.0, never)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(tg.UserError, match="checkpoint.safetensors is damaged"):
        trainer(tmp_path, RESUME=1)[0].loop(0.0, never)
    path.unlink()
    with pytest.raises(tg.UserError, match="checkpoint.safetensors is missing"):
        trainer(tmp_path, RESUME=1)[0].loop(0.0, never)


def test_resume_refuses_another_kind_of_file(tmp_path):
    t, _ = trainer(tmp_path)
    tg.save_tensors(tmp_path / "checkpoint.safetensors", t.average(), {"model": tg.model_knobs(t.run.config), "seed": 1337})
    with pytest.raises(tg.UserError, match="checkpoint.safetensors"):
        trainer(tmp_path, RESUME=1)[0].loop(0.0, never)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_resumes_to_the_same(tmp_path, number):
    kept = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    settings = dict(ITERATIONS=6, TRAIN_SEQ_SCHEDULE="8@0.5,16@0.8")        # resumed between two lengths of segments
    whole, _ = trainer(tmp_path / "whole", **settings)
    whole.loop(0.0, never)
    try:
        t, _ = trainer(tmp_path / "parts", **settings)
        take = t.take_step

        def interrupted(*args):
            if t.step == 3:
                os.kill(os.getpid(), number)
            take(*args)

        t.take_step = interrupted
        with pytest.raises(tg.UserError, match=f"signal {int(number)} after step 4.*RESUME=1") as e:
            t.loop(0.0, never)
        assert e.value.code == 130 and t.step == 4
        again, _ = trainer(tmp_path / "parts", **settings, RESUME=1)
        again.loop(0.0, never)
        assert same(state(again), state(whole))
    finally:
        for n, handler in kept.items():
            signal.signal(n, handler)


def test_a_signal_after_the_last_question_is_not_lost(tmp_path, monkeypatch):
    kept = {n: signal.signal(n, tg.stop_now) for n in tg.STOP_SIGNALS}
    monkeypatch.setattr(tg.Signals, "any_rank", lambda *_: os.kill(os.getpid(), signal.SIGTERM) or 0)
    try:
        with pytest.raises(tg.UserError, match="stopped by signal 15"):
            trainer(tmp_path, ITERATIONS=1)[0].loop(0.0, never)
    finally:
        for n, handler in kept.items():
            signal.signal(n, handler)


# ------------------------------------------------------------------------------------------------------------ non-finite


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_never_reaches_the_average(tmp_path, bad):
    t, run = trainer(tmp_path, ITERATIONS=6)
    losses, take, good = t.model.losses, t.take_step, []
    t.model.losses = lambda *args: losses(*args) * (bad if t.step == 3 else 1.0)

    def spy(*args):
        take(*args)
        if t.step == 4:
            good.extend(e.clone() for e in t.ema)      # of steps 1 to 3: step 4's result is still pending

    t.take_step = spy
    with pytest.raises(tg.UserError, match=r"non-finite gradient at step 4 .*ranks \[0\].* last finite loss \d") as e:
        t.loop(0.0, never)
    assert e.value.code not in (0, 3, 130)
    tensors, saved = tg.load_tensors(tmp_path / "last_good_ema.safetensors", t.run.config)
    assert saved["step"] == 3 and all(x.isfinite().all() for x in tensors.values())
    names = [n for n, _ in t.model.named_parameters()]
    expected = tg.export_weights(dict(zip(names, good)), t.run.config.num_layers)
    assert all(torch.equal(x, expected[n]) for n, x in tensors.items())
    assert math.isfinite(t.last_loss)


# ----------------------------------------------------------------------------------------------------------------- clock


class FakeTime:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(tg.time, "perf_counter", lambda: self.now)


def test_the_clock_counts_and_pauses(monkeypatch, world):
    fake = FakeTime(monkeypatch)
    clock = tg.Clock(world, 50.0, elapsed=7.0)
    fake.now += 3
    assert clock.read() == pytest.approx(10)
    with clock.paused():
        fake.now += 1000
    fake.now += 1
    assert clock.read() == pytest.approx(11)


def test_the_clock_stops_before_the_limit(monkeypatch, world):
    """Steps of 2 s, limit 21 s: a step that would end past it is not begun."""
    fake = FakeTime(monkeypatch)
    clock, step = tg.Clock(world, 21.0), 0
    while True:
        elapsed, received = clock.tick(step, 0)
        assert received == 0
        if clock.out_of_time(elapsed):
            break
        fake.now += 2
        step += 1
    assert 21 - 3 * 2 <= clock.read() <= 21


def test_no_limit_never_stops(monkeypatch, world):
    fake = FakeTime(monkeypatch)
    clock = tg.Clock(world, 0.0)
    for step in range(5):
        assert not clock.out_of_time(clock.tick(step, 0)[0])
        fake.now += 1e6


def test_ranks_agree_seldom_and_extrapolate_alike(monkeypatch):
    """Two ranks with clocks of their own: schedule and stop come from rank 0's."""
    fakes = [100.0, 500.0]
    current = [0]
    monkeypatch.setattr(tg.time, "perf_counter", lambda: fakes[current[0]])
    worlds = [toy.world(rank, 2) for rank in range(2)]
    clocks = []
    for rank in range(2):
        current[0] = rank
        clocks.append(tg.Clock(worlds[rank], 100.0))
    agreements = heard = 0
    for step in range(200):
        mailbox = []
        for rank in range(2):            # first pass: what each rank would send
            current[0] = rank
            worlds[rank].sum = lambda t, op=None: mailbox.append(t.clone()) or t
            saved = dict(vars(clocks[rank]))
            clocks[rank].tick(step, 15 if rank == 1 and step >= 150 else 0)
            vars(clocks[rank]).update(saved)
        results = []
        for rank in range(2):
            current[0] = rank
            worlds[rank].sum = lambda t, op=None: torch.stack(mailbox).amax(0)
            results.append(clocks[rank].tick(step, 15 if rank == 1 and step >= 150 else 0))
        assert results[0] == results[1]
        agreements += len(mailbox) == 2
        assert len(mailbox) in (0, 2)
        heard = heard or results[0][1]
        assert abs(results[0][0] - (fakes[0] - 100)) <= tg.AGREE_SECONDS
        fakes[0] += 0.1
        fakes[1] += 0.13
    assert heard == 15          # rank 1's signal reached rank 0
    assert agreements < 200 / 4


def test_a_first_pace_that_is_far_too_fast_does_not_last(monkeypatch):
    """Python runs ahead of the device at first: the step that it has only launched took no time."""
    fake = FakeTime(monkeypatch)
    world = toy.world(0, 2)
    monkeypatch.setattr(world, "sum", lambda t, op=None: t)
    clock = tg.Clock(world, 1000.0)
    for step in range(40):
        elapsed = clock.tick(step, 0)[0]
        fake.now += 0.001 if step == 0 else 0.12
    assert abs(elapsed - clock.read()) < 1.5


def test_a_stall_is_seen_within_a_second_of_steps(monkeypatch):
    """A step that takes seven seconds (something compiles) among fast ones, with two ranks: the budget does not pass unseen."""
    fake = FakeTime(monkeypatch)
    world = toy.world(0, 2)
    monkeypatch.setattr(world, "sum", lambda t, op=None: t)
    clock, step, _stalled = tg.Clock(world, 13.0), 0, False
    while True:
        elapsed, _ = clock.tick(step, 0)
        if clock.out_of_time(elapsed):
            break
        fake.now += 0.3
        if step == 9:
            fake.now += 7
        step += 1
    assert 13 - 1.3 < clock.read() <= 13


# ------------------------------------------------------------------------------------------------------------ micro_batch


@pytest.mark.parametrize("total, accumulate, size, expected", [
    (786432, 0, 1, (8, 98304)), (786432, 0, 8, (1, 98304)), (786432, 0, 2, (4, 98304)), (786432, 0, 3, (4, 65536)),
    (4096, 1, 1, (1, 4096)), (4096, 2, 4, (2, 512)), (786432, 0, 16, (1, 49152))])
def test_micro_batches(total, accumulate, size, expected):
    c = toy.config(TRAIN_BATCH_TOKENS=total, GRAD_ACCUM_STEPS=accumulate)
    assert tg.micro_batch(c, size) == expected


@pytest.mark.parametrize("total, accumulate, size", [(100, 3, 1), (100, 1, 3), (7, 0, 1), (786431, 0, 8)])
def test_a_batch_that_does_not_divide_is_refused(total, accumulate, size):
    with pytest.raises(tg.UserError, match=f"TRAIN_BATCH_TOKENS={total}.*{size} ranks"):
        tg.micro_batch(toy.config(TRAIN_BATCH_TOKENS=total, GRAD_ACCUM_STEPS=accumulate), size)
