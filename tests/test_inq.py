"""INQ: matrices quantised in turn, with training in between."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import toy

import train_gpt as tg

SHARDS = [toy.row(1500, range(0, 1500, 23), 1)]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(tg, "SMALLEST_QUANTISED", 500)


def trained(folder, steps=0, **settings):
    """A trainer after some steps, its run, and a quantizer of its weights."""
    c = toy.config(**{"INQ_STEPS": 3, "INQ_GROUPS": 3, "INQ_LR": 0.3, **settings})
    run = toy.run(c, folder)
    trainer = tg.Trainer(run, toy.model(c), SHARDS)
    batches = tg.Prefetcher(trainer.stream(), run.world.device)
    for i in range(steps):
        trainer.take_step(batches, c.num_loops, 1 - i / steps)
    batches.close()
    trainer.forget()
    return trainer, run, tg.calibrate(run, trainer.model, exported(trainer), SHARDS, 2, 4)


def exported(trainer):
    return {n: t.detach().clone() for n, t in
            tg.export_weights(dict(trainer.model.named_parameters()), trainer.run.config.num_layers).items()}


def loss(trainer):
    batch = tg.to_batch(SHARDS[0][:1025], 32)
    return trainer.model.losses(batch.ids, batch.targets, batch.segments).mean().item()


@pytest.mark.parametrize("count", [2, 3, 4, 50])
def test_groups_take_every_matrix_once_from_the_last_layer_to_the_embedding(tmp_path, small, count):
    _, _, quantizer = trained(tmp_path)
    groups = tg.in_turn(quantizer, count)
    names = [name for group in groups for name in group]
    assert sorted(names) == sorted(quantizer.bits) and all(groups)
    assert names[-1] == "tok_emb.weight"
    layers = [int(name.split(".")[1]) for name in names[:-1]]
    assert layers == sorted(layers, reverse=True)
    if count < 5:
        sizes = [sum(quantizer.known.weights[name].numel() for name in group) for group in groups]
        assert len(groups) == count and max(sizes) < 2 * sum(sizes) / count


def test_what_is_done_stays_and_the_rest_trains(tmp_path, small):
    """Codes decode to the model's weights to the bit; what was not done has moved; its codes are of the moved weights."""
    trainer, run, quantizer = trained(tmp_path, 5)
    before, first = exported(trainer), quantizer(1.5)
    tg.quantize_in_turn(run, trainer, quantizer, math.log2(1.5))
    *groups, last = tg.in_turn(quantizer, 3)
    after = exported(trainer)
    assert set(quantizer.done) == {name for group in groups for name in group}
    for name, code in quantizer.done.items():
        assert torch.equal(code.decode(), after[name]), name
    for name, w in before.items():
        assert name in quantizer.done or not torch.equal(w, after[name]), name
    coded = quantizer(1.5)
    assert list(coded) == list(first)
    assert all(torch.equal(coded[name].q, quantizer.done[name].q) for name in quantizer.done)
    assert all(torch.equal(coded[name].q, first[name].q) for name in groups[0]), "the first group has seen no training"
    assert any(not torch.equal(coded[name].q, first[name].q) for name in groups[1])
    for name in last:
        step = coded[name].step.float()[:, None]
        assert (coded[name].decode() - after[name]).square().mean() < (first[name].decode() - after[name]).square().mean() + 1e-9
        assert ((coded[name].decode() - after[name]).abs() < 40 * step).all()
    small_one = next(name for name in before if name not in quantizer.bits)
    assert torch.allclose(coded[small_one].decode(), after[small_one], rtol=2 ** -8)
    tg.import_weights(trainer.model, tg.restore(coded))
    said = [line for line in run.log.lines if line.startswith("inq: ")]
    assert [re.sub(r" multiplier:\S+| last.*", "", line) for line in said] == [
        f"inq: group:{i + 1}/3 matrices:{len(group)} steps:3" for i, group in enumerate(groups)]
    assert "multiplier:1.500000 " in said[0]
    assert not [line for line in run.log.lines if "train_loss" in line]


def test_later_matrices_make_up_for_earlier_ones(tmp_path, small):
    """A network that has learnt its data, coarse steps: in turn the loss ends lower than all at once, before or after as
    many steps of training."""
    settings = dict(INQ_STEPS=20, INQ_GROUPS=4, INQ_LR=0.1, QUANTIZER="scalar")
    losses = {}
    for way in ("at once", "trained on, then at once", "in turn"):
        trainer, run, quantizer = trained(tmp_path, 150, **settings)
        if way == "in turn":
            tg.quantize_in_turn(run, trainer, quantizer, 2.0)
        elif way != "at once":
            batches = tg.Prefetcher(trainer.stream(), run.world.device)
            for _ in range(3):
                trainer.refine(batches, 20, 0.1, {})
            batches.close()
            quantizer.update(exported(trainer))
        tg.import_weights(trainer.model, tg.restore(quantizer(4.0)))
        losses[way] = loss(trainer)
    assert losses["in turn"] < min(losses["at once"], losses["trained on, then at once"]), losses


def test_an_estimate_is_of_what_is_open(tmp_path, small):
    """The closed formula of all matrices is that of those done and of those open."""
    _, _, quantizer = trained(tmp_path)
    whole = quantizer.estimate(1.3)
    groups = tg.in_turn(quantizer, 2)
    parts = []
    for names in groups:
        quantizer.done = dict.fromkeys(names)
        parts.append(quantizer.estimate(1.3))
    assert sum(parts) == pytest.approx(whole) and min(parts) > 0


def test_what_training_changes_in_bytes_is_shared_out_over_what_is_open(tmp_path, small):
    """Weights that grow by a tenth take log2(1.1) bits more each: coarser steps of what is open bring the sum back."""
    _, _, quantizer = trained(tmp_path, QUANTIZER="scalar", CLIP_RULE="hand")
    whole, weights = quantizer.estimate(0.25), {n: t.clone() for n, t in quantizer.known.weights.items()}
    assert quantizer.steer(-2.0, whole) == -2.0
    quantizer.finish(tg.in_turn(quantizer, 3)[0], 0.25)
    assert quantizer.spent + quantizer.estimate(0.25) == pytest.approx(whole) and quantizer.spent > 0
    quantizer.update({n: 1.1 * t for n, t in weights.items()})
    grown = quantizer.spent + quantizer.estimate(0.25)
    at = quantizer.steer(-2.0, whole)
    assert at == pytest.approx(-2 + math.log2(1.1), abs=0.02)
    assert grown > 1.005 * whole and quantizer.spent + quantizer.estimate(2.0 ** at) == pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize("code", [1, 3, 130])
def test_what_fails_in_turn_leaves_the_artifact_of_all_at_once(tmp_path, small, monkeypatch, code):
    """A gradient that is not finite (1), a last group too large (3); a signal (130) still ends the run."""
    trainer, run, _ = trained(tmp_path, 5)
    monkeypatch.setattr(tg, "shipped_script", lambda: b"#" * 1000)
    real, calls = tg.fit_bytes, []

    def fit(*args):
        calls.append(args)
        if len(calls) == 2:
            raise tg.UserError("9 bytes over", code=code)
        return real(*args)
    if code == 3:
        monkeypatch.setattr(tg, "fit_bytes", fit)
    else:
        take = trainer.take_step
        monkeypatch.setattr(trainer, "take_step", lambda *args: (take(*args), trainer.model.tok_emb.data.fill_(float("nan"))) if code == 1
                            else tg.stop_now(15, None))
    compress = lambda: tg.compress(run, trainer, exported(trainer), tg.Inputs(SHARDS, None, []))
    if code == 130:
        with pytest.raises(tg.UserError, match="signal 15"):
            compress()
        return
    path = compress()
    said = next(line for line in run.log.lines if line.endswith("all matrices stay as quantised at once"))
    assert ("9 bytes over" if code == 3 else "non-finite gradient") in said
    tg.import_weights(trainer.model, tg.restore(tg.read_artifact(path, run.config)))
    assert math.isfinite(loss(trainer))


@pytest.mark.parametrize(["left", "expected"], [(100.0, [3, 3]), (8.5, [2, 2]), (0.0, [0, 0]), (-5.0, [0, 0])])
def test_there_are_fewer_steps_where_time_is_short(tmp_path, small, left, expected):
    """Two seconds a step, ten that are to be kept."""
    trainer, run, quantizer = trained(tmp_path, MAX_WALLCLOCK_SECONDS=1000)
    trainer.step_seconds = 2.0
    run.ledger.used["train"] = 1000 - 10 - left

    def refine(batches, steps, lr_mul, held):
        run.ledger.used["train"] += 2.0 * steps
    trainer.refine = refine
    tg.quantize_in_turn(run, trainer, quantizer, 0.0, closing=10.0)
    steps = [int(line.split("steps:")[1].split()[0]) for line in run.log.lines if line.startswith("inq: ")]
    assert steps == expected and run.ledger.used["train"] <= max(990.0, 990 - left) + 0.9


def test_timing_a_step_leaves_no_trace(tmp_path, small):
    """Weights, averages, optimizer state, the place in the data: to the bit."""
    results = []
    for timed in (False, True):
        trainer, run, _ = trained(tmp_path, ITERATIONS=4)
        if timed:
            assert tg.seconds_a_step(trainer) > 0
            assert trainer.step == 0 and not run.log.lines[-1].startswith("1/")
        trainer.loop(0.0, lambda at: None)
        results.append([*trainer.model.parameters(), *trainer.ema, *(v for _, v in sorted(trainer.optimizers.save().items()))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_training_goes_on_where_the_loop_stopped(tmp_path, small):
    trainer, run, quantizer = trained(tmp_path, ITERATIONS=4)
    trainer.loop(0.0, lambda at: None)
    assert trainer.cursor == 4 * 129 and np.array_equal(trainer.stream().next()[0], SHARDS[0][4 * 129: 5 * 129])


def test_repairs_are_of_what_was_quantised_last(tmp_path, small):
    """Training has made up for the errors of the others as they are."""
    trainer, run, quantizer = trained(tmp_path, LQER_ENABLED=1, LQER_TOP_K=2, LQER_RANK=2)
    tg.quantize_in_turn(run, trainer, quantizer, 1.0)
    repaired = {name.rsplit(".lqer_", 1)[0] for name in quantizer(2.0) if ".lqer_" in name}
    assert len(repaired) == 2 and repaired <= set(tg.in_turn(quantizer, 3)[-1])


def test_a_run_quantises_in_turn_and_its_artifact_is_what_the_model_held(tmp_path, small, monkeypatch):
    """compress, with a byte budget: the artifact has the codes that training has seen, and ends just under the target."""
    trainer, run, _ = trained(tmp_path, 5, TARGET_BYTES=0)
    monkeypatch.setattr(tg, "shipped_script", lambda: b"#" * 1000)
    inputs = tg.Inputs(SHARDS, None, [])
    size = len(tg.compress(run, trainer, exported(trainer), inputs).read_bytes()) + 1000
    target = int(0.9 * size)
    trainer, run, _ = trained(tmp_path, 5)
    run = run._replace(config=replace(run.config, target_bytes=target))
    coded = tg.read_artifact(tg.compress(run, trainer, exported(trainer), inputs), run.config)
    total = next(int(line.split()[-2]) for line in run.log.lines if line.startswith("Total submission size"))
    assert 0.99 * target < total <= target
    held, weights = exported(trainer), tg.restore(coded)
    groups = [line for line in run.log.lines if line.startswith("inq: ")]
    assert len(groups) == 2
    equal = {name for name, w in weights.items() if torch.equal(w, held[name])}
    done = len(tg.in_turn(tg.Quantizer(run, tg.Calibration(exported(trainer), {}, {}, None), {}), 3)[-1])
    assert len([name for name in weights if tg.is_quantised(name, weights[name])]) - done <= len(equal)


@pytest.mark.parametrize("reserve", [-1, 2])
def test_what_a_budget_pays_for_is_rehearsed_before_it(tmp_path, small, monkeypatch, reserve):
    """Hessians, Fisher, GPTQ and steps in turn, whether the reserve is measured or given; nothing of it stays."""
    c = toy.config(INQ_STEPS=3, INQ_GROUPS=3, INQ_REREAD=1, MAX_WALLCLOCK_SECONDS=1000, GPTQ_RESERVE_SECONDS=reserve, WARMUP_STEPS=1)
    run = toy.run(c, tmp_path)
    trainer = tg.Trainer(run, toy.model(c), SHARDS)
    before = [p.detach().clone() for p in (*trainer.model.parameters(), *trainer.ema)]
    called = []

    def watch(name):
        real = getattr(tg, name)
        monkeypatch.setattr(tg, name, lambda *args: (called.append(name), real(*args))[1])
    for name in ("collect_hessians", "collect_sensitivity", "quantize_in_turn"):
        watch(name)
    refine, steps = trainer.refine, []
    monkeypatch.setattr(trainer, "refine", lambda *args: (steps.extend([args[1]] * bool(args[3])), refine(*args)))
    kept = tg.warm_up(run, trainer, tg.Inputs(SHARDS, None, []))
    assert set(called) == {"collect_hessians", "collect_sensitivity", "quantize_in_turn"}
    assert trainer.step_seconds > 0 and trainer.step == 0 and trainer.cursor == 0
    assert kept == 2 if reserve == 2 else kept > 6 * trainer.step_seconds
    assert steps == [0] * 4, "steps of training are timed by themselves, and kept for once"
    assert all(torch.equal(a, b) for a, b in zip(before, (*trainer.model.parameters(), *trainer.ema), strict=True))
    assert not run.log.lines, "a rehearsal is not a run"


def test_training_keeps_half_of_a_budget_that_the_rehearsal_would_fill(tmp_path, small):
    """As on a machine that other programs slowed down while the reserve was measured."""
    c = toy.config(INQ_STEPS=1000, INQ_GROUPS=3, INQ_REREAD=1, MAX_WALLCLOCK_SECONDS=2, WARMUP_STEPS=1)
    run = toy.run(c, tmp_path)
    assert tg.warm_up(run, tg.Trainer(run, toy.model(c), SHARDS), tg.Inputs(SHARDS, None, [])) == 1


@pytest.mark.parametrize("steps, step_seconds, iterations, kept", [
    (1, 200, 10 ** 6, True), (1, 10, 10 ** 6, False), (1, 10, 5, True), (1000, 200, 10 ** 6, False)])
def test_steps_for_which_training_leaves_no_text_have_no_seconds(tmp_path, small, steps, step_seconds, iterations, kept):
    """1,500 tokens are eleven steps of 129: training of 1000 s takes five, a hundred, five by ITERATIONS, or too many are wanted."""
    c = toy.config(INQ_STEPS=steps, INQ_GROUPS=2, ITERATIONS=iterations, TRAIN_BATCH_TOKENS=128, MAX_WALLCLOCK_SECONDS=1000)
    run = toy.run(c, tmp_path)
    trainer = tg.Trainer(run, toy.model(c), SHARDS)
    trainer.step_seconds = step_seconds
    rehearsed = [tg.calibrate(run, trainer.model, exported(trainer), SHARDS, 1, 1)]
    reserve = tg.reserve_seconds(run, trainer, tg.Inputs(SHARDS, None, []), 0.0, rehearsed)
    assert (step_seconds < reserve < step_seconds + 9) if kept else reserve < 9


def test_exported_weights_keep_nothing_of_autograd_alive(tmp_path):
    """A parameter's AccumulateGrad node that outlives a backward pass breaks the capture of the micro-step's graph."""
    trainer, _, _ = trained(tmp_path)
    views = tg.export_weights(dict(trainer.model.named_parameters()), trainer.run.config.num_layers)
    assert all(t.grad_fn is None for t in views.values())
    bases = {p.data_ptr() for p in trainer.model.parameters()}
    assert bases <= {t.data_ptr() for t in views.values()}, "views, not copies"


@pytest.mark.parametrize("settings", [{}, dict(MAX_WALLCLOCK_SECONDS=1000, WARMUP_STEPS=1)])
def test_a_network_too_small_to_be_quantised_has_no_turns(tmp_path, monkeypatch, settings):
    """There are no groups to train between."""
    c = toy.config(INQ_STEPS=2, **settings)
    run, inputs = toy.run(c, tmp_path), tg.Inputs(SHARDS, None, [])
    monkeypatch.setattr(tg, "shipped_script", lambda: b"#" * 1000)
    trainer = tg.Trainer(run, toy.model(c), SHARDS)
    tg.warm_up(run, trainer, inputs)
    coded = tg.read_artifact(tg.compress(run, trainer, exported(trainer), inputs), c)
    assert coded.keys() == exported(trainer).keys()
    assert not [line for line in run.log.lines if line.startswith("inq: ")]


@pytest.mark.parametrize("cursor, settings, turns", [(0, {}, 2), (226, {}, 2), (227, {}, 0), (10 ** 6, {}, 0), (10 ** 6, {"INQ_REREAD": 1}, 2)])
def test_only_text_that_training_has_not_read_is_trained_on(tmp_path, small, monkeypatch, cursor, settings, turns):
    """On text read before, the steps would teach the network what it has memorised: then all matrices are quantised at once."""
    text = [toy.row(1000, seed=3)]
    monkeypatch.setattr(tg, "shipped_script", lambda: b"#" * 1000)
    coded = []
    for steps in (3, 0):
        c = toy.config(INQ_STEPS=steps, INQ_GROUPS=3, INQ_LR=0.3, TRAIN_BATCH_TOKENS=128, **settings)
        run = toy.run(c, tmp_path)
        trainer = tg.Trainer(run, toy.model(c), text)
        trainer.cursor = cursor
        coded.append(tg.read_artifact(tg.compress(run, trainer, exported(trainer), tg.Inputs(text, None, [])), c))
        lines = [line for line in run.log.lines if line.startswith("inq: ")]
        none = f"inq: none: it wants 774 tokens that training has not read, of which there are {max(1000 - cursor, 0)} "
        assert len(lines) == turns if steps and turns else lines == [none + "(INQ_REREAD=1: others too)"] * bool(steps)
    same = all(torch.equal(coded[0][name].decode(), coded[1][name].decode()) for name in coded[0])
    assert same == (turns == 0)


@pytest.mark.parametrize("used, turns", [(10.0, 2), (995.0, 0)])
def test_without_time_for_a_step_nothing_is_taken_in_turn(tmp_path, small, monkeypatch, used, turns):
    """Turns without steps would cost two more quantisations, and gain nothing."""
    trainer, run, _ = trained(tmp_path, MAX_WALLCLOCK_SECONDS=1000)
    monkeypatch.setattr(tg, "shipped_script", lambda: b"#" * 1000)
    trainer.step_seconds = 3.0
    run.ledger.used["train"] = used
    tg.compress(run, trainer, exported(trainer), tg.Inputs(SHARDS, None, []))
    lines = [line for line in run.log.lines if line.startswith("inq: ")]
    assert len(lines) == 2 if turns else lines == ["inq: none: the training budget has no time left for it"]
