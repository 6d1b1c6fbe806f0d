"""QUANTIZE: routing, steps, GPTQ against a slow float64 reference and against rounding, failures."""

import numpy as np
import pytest
import reference
import torch
import toy

import train_gpt as tg


def hessian(n, seed=0, samples=None, scales=True):
    """x x^T of correlated inputs with very unequal energies."""
    g = np.random.default_rng(seed)
    x = g.normal(size=(samples or 4 * n, n)) @ (np.eye(n) + 0.3 * g.normal(size=(n, n)))
    if scales:
        x = x * np.exp(g.normal(size=n))
    return torch.from_numpy(x.T @ x).float()


def matrices(n, rows, columns, seed=0):
    w = torch.from_numpy(np.random.default_rng(seed).normal(size=(n, rows, columns))).float()
    return w, torch.stack([hessian(columns, seed + i) for i in range(n)])


def steps_of(w, sigma=12.85, bits=6):
    return toy.row_steps(w, torch.full((len(w),), sigma), bits)


def weighted(w, q, step, h):
    e = (w - q.float() * step.float()[..., None]).double()
    return torch.einsum("nrc,ncd,nrd->n", e, h.double(), e)


# ------------------------------------------------------------------------------------------------------------------ GPTQ


@pytest.mark.parametrize("n, rows, columns, bits", [(1, 5, 7, 6), (3, 20, 40, 6), (2, 9, 130, 5), (2, 4, 300, 7), (1, 6, 33, 2)])
def test_gptq_equals_the_slow_reference(n, rows, columns, bits):
    """Column by column in float64 without blocks or Cholesky. Float32 may break a tie the other way, and one changed
    integer changes those after it in its row: a few in ten thousand may differ, and the error must be equal."""
    w, h = matrices(n, rows, columns)
    step = steps_of(w, 4.0 if bits == 2 else 12.85, bits)
    q = toy.gptq(w, h, step, bits)
    assert q.dtype == torch.int8 and q.abs().max() <= tg.largest(bits)
    for i in range(n):
        slow = reference.gptq(w[i].numpy(), h[i].numpy(), step[i].double().numpy(), tg.largest(bits))
        assert (q[i].numpy() != slow).mean() < 0.01
        one = slice(i, i + 1)
        a, b = (weighted(w[one], x[None], step[one], h[one]).item() for x in (q[i], torch.from_numpy(slow)))
        assert a == pytest.approx(b, rel=0.01)


@pytest.mark.parametrize("block_size", [1, 7, 64, 128, 1000])
def test_blocks_do_not_matter(block_size):
    w, h = matrices(2, 16, 96)
    step = steps_of(w)
    a, b = toy.gptq(w, h, step, 6, block_size=block_size), toy.gptq(w, h, step, 6, block_size=96)
    assert (a != b).float().mean() < 0.01        # ties, as above


def test_batching_does_not_matter():
    w, h = matrices(4, 16, 48)
    step = steps_of(w)
    together = toy.gptq(w, h, step, 6)
    for i in range(4):
        alone = toy.gptq(w[i: i + 1], h[i: i + 1], step[i: i + 1], 6)[0]
        assert (alone != together[i]).float().mean() < 0.01


def test_gptq_is_better_than_rounding_on_what_it_minimises():
    w, h = matrices(6, 40, 80)
    step = steps_of(w)
    rounded = (w / step.float()[..., None]).round().clamp(-31, 31)
    ratio = weighted(w, toy.gptq(w, h, step, 6), step, h) / weighted(w, rounded, step, h)
    assert (ratio < 0.7).all(), ratio            # correlated inputs: about 0.2 to 0.4


def test_without_correlation_gptq_is_rounding():
    w, _ = matrices(2, 10, 20)
    step = steps_of(w)
    h = torch.diag_embed(torch.rand(2, 20) + 0.1)
    assert torch.equal(toy.gptq(w, h, step, 6), (w / step.float()[..., None]).round().to(torch.int8))


def test_dead_inputs_get_zero_and_do_not_disturb_the_rest():
    w, h = matrices(1, 8, 30)
    dead = [0, 13, 29]
    h[:, dead] = 0
    h[:, :, dead] = 0
    step = steps_of(w)
    q = toy.gptq(w, h, step, 6)
    assert not q[:, :, dead].any()
    alive = [j for j in range(30) if j not in dead]
    slow = reference.gptq(w[0].numpy(), h[0].numpy(), step[0].double().numpy(), 31)
    assert (q[0].numpy()[:, alive] != slow[:, alive]).mean() < 0.01


@pytest.mark.parametrize("kind", ["zero", "nan"])
def test_a_hessian_without_information_gives_zero_or_rounding(kind):
    w, _ = matrices(1, 4, 10)
    step = steps_of(w)
    warnings = []
    h = torch.zeros(1, 10, 10) if kind == "zero" else torch.full((1, 10, 10), float("nan"))
    q = toy.gptq(w, h, step, 6, warnings.append)
    if kind == "zero":
        assert not q.any()                       # no input was ever active
    else:                                        # nothing is known of the inputs
        assert torch.equal(q, (w / step.float()[:, :, None]).round().clamp(-31, 31).to(torch.int8)) and warnings


def test_a_failed_cholesky_is_tried_again_then_rounded():
    """Three matrices in one batch: good, in need of more damping, hopeless. Each gets what it needs, all is logged."""
    w, h = matrices(3, 6, 12)
    h[1] = torch.eye(12)
    h[1, 0, 1] = h[1, 1, 0] = 1.05               # eigenvalue -0.05: 1% damping is too little, 10% is enough
    h[2] = torch.eye(12)
    h[2, 0, 1] = h[2, 1, 0] = 100.0              # no damping up to 1000% makes this positive
    step, log = steps_of(w), []
    q = toy.gptq(w, h, step, 6, log.append)
    assert len(log) == 4 and "failed for 2 matrices" in log[0] and all("failed for 1 matrices" in line for line in log[1:])
    assert "warning" in log[3] and "rounded to nearest" in log[3] and "warning" not in log[0]
    assert torch.equal(q[2], (w[2] / step[2].float()[:, None]).round().to(torch.int8))
    assert (q[0] != toy.gptq(w[:1], h[:1], step[:1], 6, log.append)[0]).float().mean() < 0.01
    assert len(log) == 4
    slow = reference.gptq(w[1].numpy(), h[1].numpy(), step[1].double().numpy(), 31, damping=0.1)
    assert (q[1].numpy() != slow).mean() < 0.02


def test_inverse_factor():
    """U upper triangular with U^T U = (H + damping)^-1."""
    h = torch.stack([hessian(20, i) for i in range(3)])
    u = tg.inverse_factor(h, print).double()
    assert not torch.tril(u, -1).any() and (u.diagonal(dim1=1, dim2=2) > 0).all()
    damped = h.double() + 0.01 * h.double().diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(20)
    assert (u.mT @ u @ damped - torch.eye(20)).abs().max() < 1e-3       # float32 factors of matrices with condition 1e4


def test_gptq_changes_no_argument():
    w, h = matrices(1, 4, 10)
    step = steps_of(w)
    kept = [t.clone() for t in (w, h, step)]
    toy.gptq(w, h, step, 6)
    assert all(torch.equal(a, b) for a, b in zip((w, h, step), kept))


# ----------------------------------------------------------------------------------------------------------------- steps


@pytest.mark.parametrize("bits", [2, 5, 6, 7, 8])
def test_row_steps_follow_the_rows_deviation(bits):
    w, _ = matrices(2, 30, 50)
    w = w * torch.logspace(-2, 2, 30)[:, None]
    step = toy.row_steps(w, torch.tensor([12.85, 6.0]), bits)
    assert step.dtype == torch.float16
    expected = torch.tensor([12.85, 6.0])[:, None] * w.double().std(2) / (2 ** (bits - 1) - 1)
    assert (step.double() / expected - 1).abs().max() < 2 ** -4        # float16, or a grid of at least 8 to the octave


def test_a_constant_row_has_a_usable_step():
    step = toy.row_steps(torch.zeros(1, 3, 10), torch.tensor([12.85]), 6)
    assert (step > 0).all() and torch.isfinite(step.float()).all()


@pytest.mark.parametrize("name, group", [
    ("blocks.0.attn.c_q.weight", "early"), ("blocks.2.mlp.fc.weight", "early"), ("blocks.3.attn.proj.weight", "loop"),
    ("blocks.5.mlp.proj.weight", "loop"), ("blocks.6.attn.c_k.weight", "mid"), ("blocks.8.mlp.fc.weight", "late"),
    ("blocks.10.attn.c_v.weight", "late"), ("tok_emb.weight", "")])
def test_clip_sigmas_by_role_and_group(name, group):
    c, _ = tg.load_config(dict(CLIP_MULT_EARLY="2", CLIP_MULT_LOOP="3", CLIP_MULT_MID="5", CLIP_MULT_LATE="7", ATTN_CLIP_SIGMAS="13",
                               MLP_CLIP_SIGMAS="11", EMBED_CLIP_SIGMAS="17"))
    assert tg.layer_group(name, c) == group
    base = 13 if ".attn." in name else 11 if ".mlp." in name else 17
    assert tg.clip_sigma(name, c) == base * {"early": 2, "loop": 3, "mid": 5, "late": 7, "": 1}[group]


# --------------------------------------------------------------------------------------------------------------- routing


def quantised(monkeypatch, **settings):
    """All codes of a toy model, its float weights and Hessians; matrices above 500 elements are quantised."""
    monkeypatch.setattr(tg, "SMALLEST_QUANTISED", 500)
    c = toy.config(**{"CLIP_RULE": "hand", "QUANTIZER": "scalar", "SMALL_MANTISSA_BITS": 10, **settings})
    model, run = toy.model(c), toy.run(c)
    weights = {n: p.detach().clone() for n, p in tg.export_weights(dict(model.named_parameters()), c.num_layers).items()}
    hessians = tg.collect_hessians(run, model, [toy.row(1000, range(0, 1000, 40))], 4)
    return toy.quantize(run, weights, hessians), weights, hessians, run


def test_routing(monkeypatch):
    coded, weights, _, _ = quantised(monkeypatch, EMBED_BITS=7, MATRIX_BITS=5)
    assert list(coded) == list(weights)
    for name, t in coded.items():
        large = weights[name].ndim == 2 and weights[name].numel() > 500 and name.endswith(".weight")
        if name.endswith("attn_gate_w"):
            assert isinstance(t, tg.IntTensor) and t.bits == 8
        elif large:
            assert isinstance(t, tg.IntTensor) and t.bits == (7 if name == "tok_emb.weight" else 5)
            assert t.q.abs().max() <= tg.largest(t.bits) and t.q.abs().max() > 0
        else:
            assert isinstance(t, tg.HalfTensor)
            assert torch.equal(t.values, weights[name].half())
        assert t.decode().shape == weights[name].shape
    kinds = {type(t) for n, t in coded.items() if n.endswith(("c_q.weight", "fc.weight", "proj.weight"))}
    assert kinds == {tg.IntTensor}


def test_small_matrices_stay_float16():
    assert not tg.is_quantised("blocks.0.attn.c_q.weight", torch.zeros(256, 256))
    assert tg.is_quantised("blocks.0.attn.c_q.weight", torch.zeros(257, 256))
    assert not tg.is_quantised("skip_weights", torch.zeros(300, 300)) and not tg.is_quantised("blocks.0.attn_scale", torch.zeros(70000))


def test_gate_rows_are_int8(monkeypatch):
    coded, weights, _, _ = quantised(monkeypatch)
    for name, t in coded.items():
        if name.endswith("attn_gate_w"):
            w = weights[name]
            assert (t.q.abs().amax(1) == 127).all()
            limit = w.abs().amax(1, keepdim=True) / 127
            assert ((t.decode() - w).abs() <= 0.6 * limit).all()        # half a step, and float16's rounding of the step
    coded, _, _, _ = quantised(monkeypatch, GATED_ATTN_QUANT_GATE=0)
    assert all(isinstance(t, tg.HalfTensor) for n, t in coded.items() if n.endswith("attn_gate_w"))


def test_quantised_weights_are_near_and_losses_too(monkeypatch):
    """At 8 bits everything is within half a step in the Hessian's sense, and the network's losses barely move."""
    fine = dict(MATRIX_BITS=8, EMBED_BITS=8, ATTN_CLIP_SIGMAS=5, MLP_CLIP_SIGMAS=5, EMBED_CLIP_SIGMAS=5)
    coded, weights, hessians, run = quantised(monkeypatch, **fine)
    c = run.config
    a, b = toy.model(c), toy.model(c)
    tg.import_weights(b, {n: t.decode() for n, t in coded.items()})
    row = tg.to_batch(toy.row(200, range(0, 200, 40), 7), 32)
    with torch.no_grad():
        x, y = (m.losses(row.ids, row.targets, row.segments) for m in (a, b))
    assert not torch.equal(x, y) and abs((x - y).mean().item()) < 0.05


def test_untied_embeddings_are_rounded_and_heads_go_through_gptq(monkeypatch):
    coded, weights, hessians, _ = quantised(monkeypatch, TIE_EMBEDDINGS=0)
    t = coded["tok_emb.weight"]
    assert torch.equal(t.q, (weights["tok_emb.weight"] / t.step.float()[:, None]).round().clamp(-63, 63).to(torch.int8))
    head = coded["lm_head.weight"]
    rounded = (weights["lm_head.weight"] / head.step.float()[:, None]).round().clamp(-63, 63)
    assert (head.q != rounded).any()


def test_the_summary_counts_the_weighted_error(monkeypatch):
    coded, weights, hessians, run = quantised(monkeypatch)
    total = [0.0, 0.0]
    for name, t in coded.items():
        if isinstance(t, tg.IntTensor) and t.bits < 8:
            h = hessians[tg.hessian_key(name)].double()
            for i, e in enumerate((weights[name] - t.decode(), weights[name])):
                total[i] += torch.einsum("rc,cd,rd->", e.double(), h, e.double()).item()
    line = next(line for line in run.log.lines if line.startswith("gptq_summary"))
    assert float(line.split("weighted_error:")[1].split()[0]) == pytest.approx(total[0] / total[1], rel=1e-3)


@pytest.mark.gpu
def test_gptq_on_the_gpu_equals_the_slow_reference():
    w, h = matrices(2, 64, 256)
    step = steps_of(w)
    q = toy.gptq(w.cuda(), h.cuda(), step.cuda(), 6).cpu()
    for i in range(2):
        slow = reference.gptq(w[i].numpy(), h[i].numpy(), step[i].double().numpy(), 31)
        assert (q[i].numpy() != slow).mean() < 0.01
