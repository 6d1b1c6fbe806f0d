"""OPTIMIZERS: Newton-Schulz against SVD, Muon and AdamW against their formulas, clipping, coverage, state."""

import numpy as np
import pytest
import torch
import toy

import train_gpt as tg

SHAPES = [(3, 24, 24), (2, 16, 40), (2, 40, 16), (1, 1, 7), (1, 7, 1)]


def spectrum(shape, seed=0, low=0.05):
    """Matrices with known singular values between `low` and 1 (relative to their Frobenius norm's scale)."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64) + low


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("coefficients", [tg.POLAR_EXPRESS, tg.PLAIN_MUON])
@pytest.mark.parametrize("steps", [1, 5])
def test_newton_schulz_acts_on_singular_values_alone(shape, coefficients, steps):
    """In float64 the iteration is U p(S) V^T with the scalar polynomial p, S divided by its norm: square, wide and tall."""
    x = spectrum(shape)
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    s = s / (s.square().sum(1, keepdim=True).sqrt() + 1e-7)
    for i in range(steps):
        a, b, c = coefficients[min(i, len(coefficients) - 1)]
        s = a * s + b * s ** 3 + c * s ** 5
    out = tg.newton_schulz(x, steps, coefficients, torch.float64)
    assert out.shape == x.shape
    assert (out - (u * s[:, None]) @ vt).abs().max() < 1e-9


@pytest.mark.parametrize("shape", SHAPES[:3])
@pytest.mark.parametrize("dtype, slack", [(torch.float64, 0.0), (torch.float32, 1e-4), (torch.bfloat16, 0.08)])
@pytest.mark.parametrize("name, low, high", [("polar", 0.85, 1.15), ("plain", 0.65, 1.25)])
def test_newton_schulz_is_near_the_orthogonal_factor(shape, dtype, slack, name, low, high):
    """Every singular value of the result is near 1 and the singular vectors are kept (bfloat16: 8 bits, 15 products)."""
    coefficients = tg.POLAR_EXPRESS if name == "polar" else tg.PLAIN_MUON
    g = torch.Generator().manual_seed(1)
    u, _ = torch.linalg.qr(torch.randn(shape[0], shape[1], shape[1], generator=g, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(shape[0], shape[2], shape[2], generator=g, dtype=torch.float64))
    k = min(shape[1:])
    s = torch.linspace(0.1, 1, k, dtype=torch.float64)      # condition number 10
    x = (u[:, :, :k] * s) @ v[:, :, :k].mT
    out = tg.newton_schulz(x, 5, coefficients, dtype)
    assert out.dtype == dtype
    values = torch.linalg.svdvals(out.double())
    assert low - slack < values.min() and values.max() < high + slack, (values.min(), values.max())
    aligned = torch.einsum("nri,nrc,nci->ni", u[:, :, :k], out.double(), v[:, :, :k])
    assert low - slack < aligned.min()


def test_newton_schulz_of_zero_is_zero():
    assert not tg.newton_schulz(torch.zeros(2, 5, 3), 5).any()


# ------------------------------------------------------------------------------------------------------------------ Muon


def make(**settings):
    c = toy.config(**settings)
    model = toy.model(c)
    return c, model, tg.Optimizers(model, c, toy.world())


def set_gradients(model, seed, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=g) * scale
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("polar, normalise", [(1, 1), (0, 1), (1, 0)])
def test_muon_equals_its_formula_over_three_steps(polar, normalise):
    """b <- mu b + g; update g + mu b; unit rows; Newton-Schulz; W <- W (1 - lr wd) - lr max(1, rows/cols)^1/2 X."""
    c, model, optimizers = make(POLAR_EXPRESS=polar, MUON_ROW_NORMALIZE=normalise, GRAD_CLIP_NORM=0, MATRIX_LR=0.1, MUON_WD=0.3)
    w = {n: p.detach().double().clone() for n, p in model.named_parameters() if n.endswith("bank")}
    b = {n: torch.zeros_like(t) for n, t in w.items()}
    for step, lr_mul in enumerate((1.0, 0.5, 0.25)):
        grads = dict(zip(dict(model.named_parameters()), set_gradients(model, step)))
        mu = 0.92 + (0.97 - 0.92) * step / 20
        optimizers.start_reduce()
        optimizers.step(lr_mul, step)
        for n, t in w.items():
            g = grads[n].double()
            b[n] = mu * b[n] + g
            for i in range(len(t)):
                u = g[i] + mu * b[n][i]
                if normalise:
                    u = torch.stack([row / row.norm() for row in u])
                x = tg.newton_schulz(u[None], 5, tg.POLAR_EXPRESS if polar else tg.PLAIN_MUON, torch.float64)[0]
                scale = max(1, t.shape[1] / t.shape[2]) ** 0.5
                t[i] = t[i] * (1 - 0.1 * lr_mul * 0.3) - 0.1 * lr_mul * scale * x
    for n, t in w.items():
        error = (dict(model.named_parameters())[n] - t).abs().max().item()
        assert error < 1e-4, (n, error)     # float32 through 15 products; a step moves weights by 0.02


def test_momentum_warms_up():
    c, model, optimizers = make(MUON_MOMENTUM_WARMUP_STEPS=10)
    seen = []
    optimizers.muon.step = lambda lr, momentum: seen.append(momentum)
    for step in (0, 5, 10, 1000):
        set_gradients(model, 0)
        optimizers.start_reduce()
        optimizers.step(1.0, step)
    assert seen == pytest.approx([0.92, 0.945, 0.97, 0.97])


# ----------------------------------------------------------------------------------------------------------------- AdamW


@pytest.mark.parametrize("tied", [1, 0])
def test_adamw_equals_its_formula_with_each_groups_rate_and_decay(tied):
    c, model, optimizers = make(TIE_EMBEDDINGS=tied, GRAD_CLIP_NORM=0, ADAM_EPS=1e-6, TIED_EMBED_LR=0.03, EMBED_LR=0.6, HEAD_LR=0.008,
                                SCALAR_LR=0.02, ADAM_WD=0.5, EMBED_WD=0.25)
    names = [n for n, _ in model.named_parameters() if not n.endswith("bank")]
    w = {n: p.detach().double().clone() for n, p in model.named_parameters()}
    m, v = ({n: torch.zeros_like(w[n]) for n in names} for _ in range(2))
    for step, lr_mul in enumerate((1.0, 0.5, 0.25), 1):
        grads = dict(zip(dict(model.named_parameters()), set_gradients(model, step)))
        optimizers.start_reduce()
        optimizers.step(lr_mul, step)
        for n in names:
            lr, wd = {"tok_emb": (0.03 if tied else 0.6, 0.25), "lm_head": (0.008, 0.25)}.get(n, (0.02, 0.5))
            lr *= lr_mul
            g = grads[n].double()
            m[n] = 0.9 * m[n] + 0.1 * g
            v[n] = 0.99 * v[n] + 0.01 * g * g
            update = (m[n] / (1 - 0.9 ** step)) / ((v[n] / (1 - 0.99 ** step)).sqrt() + 1e-6)
            w[n] = w[n] * (1 - lr * wd) - lr * update
    now = dict(model.named_parameters())
    for n in names:
        assert (now[n] - w[n]).abs().max() < 1e-5, n        # float32; a step moves weights by the rate


@pytest.mark.parametrize("settings", [{}, dict(TIE_EMBEDDINGS=0), dict(SPARSE_ATTN_GATE_ENABLED=0), dict(SMEAR_GATE_ENABLED=0),
                                      dict(PARALLEL_START_LAYER=0), dict(NUM_LAYERS=1, XSA_LAST_N=1, NUM_LOOPS=0, PARALLEL_START_LAYER=0)])
def test_every_parameter_has_exactly_one_optimizer(settings):
    _, model, optimizers = make(**settings)
    adam = [p for group in optimizers.adam.param_groups for p in group["params"]]
    ids = [id(p) for p in (*optimizers.muon.banks, *adam)]
    assert sorted(ids) == sorted(id(p) for p in model.parameters()) and len(set(ids)) == len(ids)
    assert len(optimizers.muon.banks) == 4


def test_a_step_frees_gradients_and_moves_everything():
    _, model, optimizers = make()
    before = [p.detach().clone() for p in model.parameters()]
    set_gradients(model, 0)
    optimizers.start_reduce()
    optimizers.step(1.0, 0)
    assert all(p.grad is None for p in model.parameters())
    assert all((p != b).any() for p, b in zip(model.parameters(), before))


def test_parameters_without_gradient_count_as_zero():
    _, model, optimizers = make(ADAM_WD=0)
    before = model.smear_gate.detach().clone()
    set_gradients(model, 0)
    model.smear_gate.grad = None
    optimizers.start_reduce()
    optimizers.step(1.0, 0)
    assert torch.equal(model.smear_gate, before)


# -------------------------------------------------------------------------------------------------------------- clipping


@pytest.mark.parametrize("scale, clip", [(1.0, 0.3), (1e-4, 0.3), (1.0, 0.0)])
def test_the_global_norm_is_clipped(scale, clip):
    """Banks and the rest together, to the limit, only when above; what comes back is the norm before."""
    _, model, optimizers = make(GRAD_CLIP_NORM=clip)
    grads = set_gradients(model, 3, scale)
    seen = {}
    muon_step, adam_step = optimizers.muon.step, optimizers.adam.step

    def spy_muon(lr, momentum):
        seen["muon"] = [g.clone() for g in optimizers.muon.grads]
        muon_step(lr, momentum)

    def spy_adam():
        seen["adam"] = [p.grad.clone() for p in optimizers.large + optimizers.small]
        adam_step()

    optimizers.muon.step, optimizers.adam.step = spy_muon, spy_adam
    optimizers.start_reduce()
    total = optimizers.step(1.0, 0)
    norm = np.sqrt(sum(g.double().square().sum().item() for g in grads))
    assert total.item() == pytest.approx(norm, rel=1e-5)            # float32 sums
    clipped = np.sqrt(sum(g.double().square().sum().item() for g in seen["muon"] + seen["adam"]))
    assert clipped == pytest.approx(min(norm, clip) if clip else norm, rel=1e-4)


# ----------------------------------------------------------------------------------------------------------------- state


def test_state_survives_saving_bit_for_bit():
    _, a, oa = make()
    for step in range(3):
        set_gradients(a, step)
        oa.start_reduce()
        oa.step(1.0, step)
    saved = {n: t.clone() for n, t in oa.save().items()}
    _, b, ob = make()
    with torch.no_grad():
        for p, q in zip(b.parameters(), a.parameters()):
            p.copy_(q)
    ob.load(saved)
    for model, optimizers in ((a, oa), (b, ob)):
        set_gradients(model, 9)
        optimizers.start_reduce()
        optimizers.step(0.7, 3)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert all(torch.equal(oa.save()[n], t) for n, t in ob.save().items())


def test_reset_forgets_everything():
    _, a, oa = make()
    start = [p.detach().clone() for p in a.parameters()]
    results = []
    for _ in range(2):
        with torch.no_grad():
            for p, s in zip(a.parameters(), start):
                p.copy_(s)
        for step in range(2):
            set_gradients(a, step)
            oa.start_reduce()
            oa.step(1.0, step)
        results.append([p.detach().clone() for p in a.parameters()])
        oa.reset()
    assert all(torch.equal(x, y) for x, y in zip(*results))
