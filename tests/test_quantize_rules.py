"""QUANTIZE: the clip rules against their formulas, mixed precision, the byte budget, inputs that are out of order."""

import math

import numpy as np
import pytest
import torch
import toy

import train_gpt as tg


def known(seed=0, layers=2, rows=96, columns=64, sensitive=None):
    """Weights, Hessians and sensitivities of a few matrices, and what they are called."""
    g = torch.Generator().manual_seed(seed)
    names = [f"blocks.{i}.{part}.weight" for i in range(layers) for part in ("attn.c_q", "attn.c_v", "mlp.fc")]
    weights = {n: torch.randn(rows, columns, generator=g) * 0.05 * (1 + i) for i, n in enumerate(names)}
    hessians = {}
    for n in names:
        x = torch.randn(4 * columns, columns, generator=g) * torch.rand(columns, generator=g)
        hessians.setdefault(tg.hessian_key(n), x.T @ x)
    sensitivity = {n: torch.rand(2, rows, generator=g, dtype=torch.float64) + 0.5 for n in names}
    return tg.Calibration(weights, hessians, sensitivity), names


def quantizer(calibration, monkeypatch, **settings):
    monkeypatch.setattr(tg, "SMALLEST_QUANTISED", 500)
    return tg.Quantizer(toy.run(toy.config(**settings)), calibration)


def test_adaptive_follows_the_formula_and_keeps_the_mean_of_ln_sigma():
    calibration, names = known()
    c = toy.config(CLIP_RULE="adaptive")
    clips = tg.adaptive_rule(names, calibration, c)
    size = {n: calibration.weights[n].numel() for n in names}
    mean = lambda sigma: sum(size[n] * math.log(sigma[n]) for n in names) / sum(size.values())
    sigmas = {n: clips[n].sigma for n in names}
    assert mean(sigmas) == pytest.approx(mean({n: tg.clip_sigma(n, c) for n in names}), abs=1e-9)
    assert all(6 <= s <= 24 for s in sigmas.values())
    offsets = []
    for n in names:
        h = calibration.hessians[tg.hessian_key(n)].double()
        sens = h.diagonal().mean() * calibration.weights[n].double().var(dim=1).mean()
        if 6 < sigmas[n] < 24:
            offsets.append(math.log(sigmas[n]) + 0.15 * math.log(sens))
    assert len(offsets) > 1 and np.ptp(offsets) < 1e-9


def test_adaptive_leaves_the_embedding_to_its_hand_set_sigma():
    calibration, names = known()
    calibration.weights["tok_emb.weight"] = torch.randn(80, 64)
    c = toy.config(CLIP_RULE="adaptive")
    assert tg.adaptive_rule([*names, "tok_emb.weight"], calibration, c)["tok_emb.weight"].sigma == 14.0
    assert tg.adaptive_rule(["tok_emb.weight"], calibration, c)["tok_emb.weight"].sigma == 14.0


def test_row_rule(monkeypatch):
    """PR 1412: c_r = c (1 + lambda (r_r - 1)), r_r = mean_j |W_rj| h_j over its mean, h_j = H_jj / mean(diag H)."""
    calibration, names = known()
    plain = quantizer(calibration, monkeypatch, CLIP_RULE="hand", STEP_GRID=0)(1.0)
    ruled = quantizer(calibration, monkeypatch, CLIP_RULE="hand", STEP_GRID=0, HESSIAN_CLIP_LAMBDA=0.175)(1.0)
    for n in names:
        h = calibration.hessians[tg.hessian_key(n)].diagonal()
        r = (calibration.weights[n].abs() * (h / h.mean())).mean(1)
        expected = plain[n].step.float() * (1 + 0.175 * (r / r.mean() - 1))
        assert torch.allclose(ruled[n].step.float(), expected, rtol=2e-3)


def test_fisher_steps_are_inverse_to_the_root_of_sensitivity():
    calibration, names = known()
    exact = {n: s.mean(0).expand(2, -1) for n, s in calibration.sensitivity.items()}
    c = toy.config(CLIP_RULE="fisher")
    clips = tg.fisher_rule(names, calibration._replace(sensitivity=exact), c)
    products = []
    for n in names:
        w = calibration.weights[n].double()
        step = clips[n].sigma * clips[n].rows.double() * w.std(dim=1) / tg.largest(c.matrix_bits)
        products.append(step * exact[n][0].sqrt())
    products = torch.cat(products)
    capped = torch.cat([clips[n].sigma * clips[n].rows.double() > 1.99 * tg.clip_sigma(n, c) for n in names])
    assert (~capped).sum() > 50 and products[~capped].std() / products[~capped].mean() < 5e-3


def test_fisher_keeps_what_was_not_measured_at_its_hand_set_sigma():
    calibration, names = known()
    del calibration.sensitivity[names[0]]
    c = toy.config(CLIP_RULE="fisher")
    assert tg.fisher_rule(names, calibration, c)[names[0]] == tg.Clip(tg.clip_sigma(names[0], c))
    assert tg.fisher_rule(names, calibration._replace(sensitivity={}), c) == tg.hand_rule(names, calibration, c)


@pytest.mark.parametrize("rows", [torch.zeros(2, 96, dtype=torch.float64), torch.full((2, 96), 1e300, dtype=torch.float64),
                                  torch.cat((torch.zeros(2, 95, dtype=torch.float64), torch.full((2, 1), 1e6, dtype=torch.float64)), 1)])
def test_fisher_survives_sensitivities_that_say_nothing(rows):
    calibration, names = known()
    calibration.sensitivity[names[0]] = rows
    for clip in tg.fisher_rule(names, calibration, toy.config(CLIP_RULE="fisher")).values():
        assert math.isfinite(clip.sigma) and clip.sigma > 0 and clip.rows.isfinite().all() and (clip.rows > 0).all()


def test_noise_between_the_halves_is_not_taken_for_differences_between_rows():
    g = torch.Generator().manual_seed(1)
    prior = torch.ones(4000, dtype=torch.float64)
    noise = torch.rand(2, 4000, generator=g, dtype=torch.float64) + 0.5
    assert tg.steady(noise, prior).std() < 0.1 * noise.mean(0).std()
    real = (torch.rand(4000, generator=g, dtype=torch.float64) + 0.5).expand(2, -1)
    assert torch.allclose(tg.steady(real, prior), real[0], rtol=1e-2)
    absent = torch.cat((torch.zeros(2, 10, dtype=torch.float64), noise), 1)
    assert tg.steady(absent, torch.ones(4010, dtype=torch.float64))[:10].min() > 0.1


def test_neighbours_are_those_of_equal_rank():
    values = torch.arange(1000, dtype=torch.float64)
    shuffled = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    smooth = tg.neighbours_mean(values[shuffled], shuffled.double())
    assert torch.allclose(smooth[(shuffled > 40) & (shuffled < 960)], values[shuffled][(shuffled > 40) & (shuffled < 960)])


def test_sensitivity_is_the_mean_squared_gradient_through_gptqs_error(monkeypatch):
    """Against a loop over batches with autograd; without factors: plain squared gradients."""
    c = toy.config()
    model, run, shard = toy.model(c), toy.run(c), toy.row(2000, range(0, 2000, 40))
    names = ["blocks.1.mlp.fc.weight", "tok_emb.weight"]
    hessians = tg.collect_hessians(run, model, [shard], 2)
    factors = tg.prepare_all(run, hessians)
    plain = tg.collect_sensitivity(run, model, [shard], names, {}, 4)
    seen = tg.collect_sensitivity(run, model, [shard], names, factors, 4)
    stream = tg.TokenStream([shard], 0, 1, tg.micro_batch(c, 1)[1], c.train_seq_len)
    totals = {n: [0.0, 0.0] for n in names}
    for _ in range(4):
        batch = tg.to_batch(stream.next()[0], c.train_seq_len)
        model.zero_grad()
        model.losses(batch.ids, batch.targets, batch.segments).sum().backward()
        gradients = tg.export_weights({n: p.grad for n, p in model.named_parameters()}, c.num_layers)
        for n in names:
            g, f = gradients[n], factors[tg.hessian_key(n)]
            v = f.u / f.u.diagonal()[:, None]
            totals[n][0] += g.square().sum(1) / 4
            totals[n][1] += (g[:, f.order] @ v.T).square().sum(1) / 4
    for n in names:
        assert torch.allclose(plain[n].sum(0).float(), totals[n][0], rtol=1e-3, atol=1e-6)
        assert torch.allclose(seen[n].sum(0).float(), totals[n][1], rtol=1e-3, atol=1e-6)


def test_mixed_precision_counts_and_order(monkeypatch):
    calibration, names = known(layers=4)
    q = quantizer(calibration, monkeypatch, CLIP_RULE="hand", QUANTIZER="scalar", MIXED_PRECISION_HESSIAN=1,
                  MIXED_PRECISION_LOW_FRAC=0.25, MIXED_PRECISION_HIGH_FRAC=0.5)
    bits = [q.bits[n] for n in sorted(names, key=lambda n: tg.input_sensitivity(n, calibration))]
    assert bits == [5] * 3 + [6] * 3 + [7] * 6
    coded = q(1.0)
    assert all(coded[n].bits == q.bits[n] and coded[n].q.abs().max() <= tg.largest(q.bits[n]) for n in names)


@pytest.mark.parametrize("settings, words", [
    (dict(ADAPTIVE_HESSIAN_CLIP=1, CLIP_RULE="fisher"), ["ADAPTIVE_HESSIAN_CLIP=1", "CLIP_RULE=fisher"]),
    (dict(ADAPTIVE_HESSIAN_CLIP=1, CLIP_RULE="hand"), ["ADAPTIVE_HESSIAN_CLIP=1", "CLIP_RULE=hand"]),
    (dict(MIXED_PRECISION_HESSIAN=1, CLIP_RULE="fisher"), ["MIXED_PRECISION_HESSIAN=1", "CLIP_RULE"]),
    (dict(MIXED_PRECISION_BITS_LOW=7, MIXED_PRECISION_BITS_HIGH=5), ["MIXED_PRECISION_BITS_LOW=7", "MIXED_PRECISION_BITS_HIGH=5"]),
    (dict(MLP_CLIP_SIGMAS=0), ["MLP_CLIP_SIGMAS"]), (dict(ATTN_CLIP_SIGMAS=-3), ["ATTN_CLIP_SIGMAS"]),
    (dict(MATRIX_BITS=1), ["MATRIX_BITS", "2"]), (dict(EMBED_BITS=9), ["EMBED_BITS", "8"]),
    (dict(TARGET_BYTES=-1), ["TARGET_BYTES"]), (dict(TARGET_BYTES=16_000_001), ["TARGET_BYTES"]),
])
def test_settings_that_contradict_or_exceed(settings, words):
    with pytest.raises(tg.UserError) as e:
        toy.config(**settings)
    assert all(word in str(e.value) for word in words)


def test_adaptive_by_its_own_name():
    assert toy.config(ADAPTIVE_HESSIAN_CLIP=1).clip_rule == "adaptive"


@pytest.mark.parametrize("row", [torch.zeros(64), torch.full((64,), 0.7), torch.full((64,), -1e-3), torch.eye(64)[3] * 5])
@pytest.mark.parametrize("rule", ["hand", "fisher"])
def test_rows_without_variance_come_back(monkeypatch, row, rule):
    """A row of zeros, constant rows, a row of one value: none is destroyed, none destroys its neighbours."""
    calibration, names = known()
    calibration.weights[names[0]][5] = row
    back = quantizer(calibration, monkeypatch, CLIP_RULE=rule)(1.0)[names[0]].decode()
    w = calibration.weights[names[0]]
    assert back.isfinite().all() and (back - w)[:5].square().mean() < (0.05 if rule == "hand" else 0.15) * w[:5].square().mean()
    assert (back[5] - row).abs().mean() <= 0.1 * row.abs().mean() + 1e-4


@pytest.mark.parametrize("damage", [0.0, float("nan"), float("inf")])
def test_a_broken_hessian_does_not_stop_the_others(monkeypatch, damage):
    calibration, names = known()
    calibration.hessians[tg.hessian_key(names[0])] *= damage
    q = quantizer(calibration, monkeypatch, CLIP_RULE="hand")
    coded = q(1.0)
    q.log_table(coded)
    line = next(line for line in q.run.log.lines if line.startswith("gptq_summary"))
    assert math.isfinite(float(line.split("weighted_error:")[1]))
    assert (coded[names[2]].decode() - calibration.weights[names[2]]).square().mean() < 0.05 * calibration.weights[names[2]].square().mean()


def test_a_multiplier_scales_steps_and_cuts_nothing_off(monkeypatch):
    calibration, names = known()
    for rule in ("hand", "fisher"):
        q = quantizer(calibration, monkeypatch, CLIP_RULE=rule, STEP_GRID=0)
        one, two, tiny = (q(m) for m in (1.0, 2.0, 1e-3))
        for n in names:
            assert torch.allclose(two[n].step.float(), 2 * one[n].step.float(), rtol=2e-3)
            reach = tiny[n].step.float() * tg.largest(tiny[n].bits)
            assert (reach >= 0.999 * calibration.weights[n].abs().amax(1)).all()
    assert q.estimate(2.0) < q.estimate(1.0)


def fit(calibration, monkeypatch, tmp_path, **settings):
    monkeypatch.setattr(tg, "SMALLEST_QUANTISED", 500)
    run = toy.run(toy.config(ARTIFACT_DIR=str(tmp_path), **settings), tmp_path)
    q = tg.Quantizer(run, calibration)
    return tg.fit_bytes(run, q, 1000), run


@pytest.mark.parametrize("rule, coder, target", [("hand", "entropy", 30_000), ("fisher", "entropy", 25_000), ("adaptive", "brotli", 28_000),
                                                 ("hand", "lzma", 20_000)])
def test_the_budget_is_met_to_a_thousandth_and_never_exceeded(monkeypatch, tmp_path, rule, coder, target):
    calibration, _ = known(layers=3, rows=128)
    packed, run = fit(calibration, monkeypatch, tmp_path, CLIP_RULE=rule, COMPRESSOR=coder, TARGET_BYTES=target)
    assert target * 0.998 <= packed.size <= target and packed.size == len(packed.artifact) + 1000
    assert sum(line.startswith("byte_budget") for line in run.log.lines) <= 10


def test_no_budget_is_one_pass_with_the_rules_own_steps(monkeypatch, tmp_path):
    calibration, names = known()
    packed, run = fit(calibration, monkeypatch, tmp_path, CLIP_RULE="hand", TARGET_BYTES=0)
    plain = quantizer(calibration, monkeypatch, CLIP_RULE="hand", TARGET_BYTES=0)(1.0)
    assert all(torch.equal(packed.coded[n].q, plain[n].q) for n in names)
    assert not any(line.startswith("byte_budget") for line in run.log.lines)


def test_a_budget_larger_than_the_model_ends_at_the_finest_steps(monkeypatch, tmp_path):
    calibration, _ = known()
    packed, _ = fit(calibration, monkeypatch, tmp_path, TARGET_BYTES=10_000_000)
    assert packed.size < 100_000


def test_a_budget_that_cannot_be_met_says_by_how_much(monkeypatch, tmp_path):
    calibration, _ = known()
    calibration.weights["skip_weights"] = torch.randn(50, 100)
    with pytest.raises(tg.UserError, match=r"is \d+ bytes over TARGET_BYTES=5000") as e:
        fit(calibration, monkeypatch, tmp_path, TARGET_BYTES=5000)
    assert e.value.code == 3
