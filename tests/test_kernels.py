"""KERNELS: every reference against float64, every fast kernel against its reference (Triton; here its interpreter)."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch
import toy
from torch.fx.experimental.proxy_tensor import make_fx

import train_gpt as tg

# Odd sizes everywhere: no power of two, one row, vocabularies above and below one block of the kernel.
SOFTCAP_CASES = [(1, 2, 30.0), (5, 384, 30.0), (3, 1000, 2.0), (7, 127, 30.0), (2, 8193, 30.0)]
HEADS_CASES = [(1, 3, 4, 2, 8, 2), (2, 37, 4, 4, 16, 8), (1, 65, 6, 1, 24, 4), (1, 5, 2, 1, 8, 0)]       # B, T, H, K, d, half
MLP_CASES = [(1, 1, 8, 16), (3, 43, 24, 48), (1, 150, 136, 272), (2, 65, 72, 528)]     # B, T, D, M: multiples of 16 bytes
GATED_CASES = [(1, 3, 4, 2, 8), (2, 37, 4, 4, 16), (1, 65, 6, 1, 24), (1, 33, 2, 1, 64)]
# B, T, H, K, d, position, window, spare room in the ring
PAST_CASES = [(2, 7, 4, 2, 8, 0, 20, 3), (1, 37, 4, 2, 16, 50, 21, 0), (1, 5, 2, 2, 64, 90, 300, 9), (2, 33, 6, 2, 24, 200, 70, 0),
              (1, 70, 4, 1, 16, 9, 100, 1), (1, 1, 2, 1, 16, 3, 2, 0), (1, 90, 2, 1, 16, 0, 10, 0)]


def softcap_inputs(n, v, device="cpu", dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = (30 * torch.randn(n, v, generator=g)).to(dtype).to(device)
    return logits, torch.randint(v, (n,), generator=g).to(device), torch.randn(n, generator=g).to(device)


def softcap_float64(logits, targets, grad, cap):
    """Losses and the gradient of sum(grad * losses), row by row."""
    x, losses, out = logits.double().cpu().numpy(), [], []
    for row, target, weight in zip(x, targets.tolist(), grad.tolist()):
        z = cap * np.tanh(row / cap)
        p = np.exp(z - z.max())
        total = z.max() + np.log(p.sum())
        p /= p.sum()
        p[target] -= 1
        losses.append(total - z[target])
        out.append(weight * p * (1 - np.tanh(row / cap) ** 2))
    return np.array(losses), np.array(out)


def near(actual, expected, tolerance, what=""):
    """Largest deviation relative to the largest value (never a vacuous comparison: all finite, some not zero)."""
    actual, expected = np.asarray(actual.detach().double().cpu()), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape and np.isfinite(actual).all(), what
    error = np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-9)
    assert error < tolerance, (what, error)


def poison(device):
    """Fill freed memory with NaN, so that an output that a kernel does not write shows up."""
    blocks = [torch.full((1 << 16,), float("nan"), device=device) for _ in range(64)]
    del blocks


def check_softcap(function, device, dtype, tolerance):
    for n, v, cap in SOFTCAP_CASES:
        logits, targets, grad = softcap_inputs(n, v, device, dtype)
        losses, grads = softcap_float64(logits, targets, grad, cap)
        logits.requires_grad_()
        poison(device)
        out = function(logits, targets, cap)
        assert out.dtype == torch.float32
        near(out, losses, 1e-5, "losses")
        out.backward(grad)
        near(logits.grad, grads, tolerance, "gradient")


def heads_inputs(B, T, H, K, d, half, device, dtype):
    g = torch.Generator().manual_seed(1)
    qkv = (torch.randn(B, T, (H + 2 * K) * d, generator=g) * torch.logspace(-2, 1, T)[:, None]).to(dtype).to(device)
    angles = torch.arange(T)[:, None] * torch.rand(half, generator=g)
    return qkv, (torch.rand(H, generator=g) + 1).to(device), angles.cos().to(device), angles.sin().to(device)


def heads_float64(qkv, gain, cos, sin, kv, copies):
    """The same in torch float64 without any of train_gpt's code (differentiable)."""
    B, T, _ = qkv.shape
    H, half = len(gain), cos.shape[1]
    q, k, v = qkv.view(B, T, H + 2 * kv, -1).split((H, kv, kv), 2)

    def turned(x):
        x = x / (x.square().mean(-1, keepdim=True) + reference.EPS).sqrt()
        a, b, rest = x[..., :half], x[..., half: 2 * half], x[..., 2 * half:]
        c, s = cos.double()[None, :, None], sin.double()[None, :, None]
        return torch.cat((a * c + b * s, b * c - a * s, rest), -1)

    return turned(q) * gain.double()[None, None, :, None], turned(k).repeat_interleave(copies, 2), v.repeat_interleave(copies, 2), v


def check_heads(function, device, dtype, tolerance):
    for (B, T, H, K, d, half), copies in zip(HEADS_CASES, (1, 2, 3, 2)):
        qkv, gain, cos, sin = heads_inputs(B, T, H, K, d, half, device, dtype)
        factor = torch.rand(B, T, generator=torch.Generator().manual_seed(9)).to(device) + 0.5 if copies == 2 else None
        exact = [qkv.double().cpu().requires_grad_(), gain.double().cpu().requires_grad_()]
        expected = heads_float64(*exact, cos.cpu(), sin.cpu(), K, copies)
        if factor is not None:
            expected = *expected[:2], *(v * factor.double().cpu()[..., None, None] for v in expected[2:])
        leaves = [qkv.requires_grad_(), gain.requires_grad_()]
        poison(device)
        out = function(leaves[0], factor, leaves[1], cos, sin, K, copies)
        g = torch.Generator().manual_seed(2)
        grads = [torch.randn(t.shape, generator=g).to(dtype) for t in expected]
        for a, b, name in zip(out, expected, ("q", "k", "v", "own")):
            near(a, b.detach(), tolerance, name)
        torch.autograd.backward(out, [x.to(device) for x in grads])
        torch.autograd.backward(expected, [x.double() for x in grads])
        near(leaves[0].grad, exact[0].grad, tolerance, "dqkv")
        near(leaves[1].grad, exact[1].grad, tolerance, "dgain")


def gated_float64(y, v, z, xsa, scale, factor):
    B, T, H, d = y.shape
    if xsa:
        unit = (v / v.norm(dim=-1, keepdim=True)).repeat_interleave(H // v.shape[2], 2)
        y = y - (y * unit).sum(-1, keepdim=True) * unit
    return y * (factor / (1 + (-scale * z).exp()))[..., None]


def check_gated(function, device, dtype, tolerance):
    for B, T, H, K, d in GATED_CASES:
        for xsa, scale, factor in ((True, 0.5, 1.0), (True, 1.0, 2.0), (False, 1.0, 1.0)):
            g = torch.Generator().manual_seed(3)
            inputs = [torch.randn(B, T, *shape, generator=g).to(dtype).to(device) for shape in ((H, d), (K, d), (H,))]
            exact = [t.double().cpu().requires_grad_() for t in inputs]
            expected = gated_float64(*exact, xsa, scale, factor)
            leaves = [t.requires_grad_() for t in inputs]
            poison(device)
            out = function(*leaves, xsa, scale, factor)
            near(out, expected.detach(), tolerance, "out")
            grad = torch.randn(out.shape, generator=g).to(dtype)
            out.backward(grad.to(device))
            expected.backward(grad.double())
            for a, b, name in zip(leaves, exact, "yvz"):
                if b.grad is None:
                    assert a.grad is None or not a.grad.any(), "v does not matter without XSA"
                else:
                    near(a.grad, b.grad, tolerance, f"d{name}")


def past_float64(q, k, v, keys, values, position, window):
    """Position by position over plain lists of what it sees (differentiable)."""
    B, T, H, d = q.shape
    P, group, out = keys.shape[1], H // k.shape[2], []
    for t in range(T):
        seen = range(max(position + t - window + 1, 0), position + t + 1)
        pick = lambda ring, live: torch.stack([live[:, p - position] if p >= position else ring[:, p % P]  # noqa: B023
                                               for p in seen], 1).repeat_interleave(group, 2)              # noqa: B023
        p = torch.softmax(torch.einsum("bhd,bphd->bhp", q[:, t], pick(keys, k)) / d ** 0.5, -1)
        out.append(torch.einsum("bhp,bphd->bhd", p, pick(values, v)))
    return torch.stack(out, 1)


def check_past(function, device, dtype, tolerance):
    """Windows smaller and larger than what is held, none held, a ring that has gone round, queries past one block."""
    for B, T, H, K, d, position, window, spare in PAST_CASES:
        g = torch.Generator().manual_seed(4)
        q, k, v = (torch.randn(B, T, heads, d, generator=g).to(dtype).to(device) for heads in (H, K, K))
        rings = torch.full((2, B, window - 1 + T + spare, K, d), float("nan"))      # what nobody may read
        for p in range(max(position - window + 1, 0), position):
            rings[:, :, p % rings.shape[2]] = torch.randn(2, B, K, d, generator=g)
        for i in range(T):
            rings[:, :, (position + i) % rings.shape[2]] = torch.stack((k, v)).float().cpu()[:, :, i]
        keys, values = rings.to(dtype).to(device)
        exact = [t.double().cpu().requires_grad_() for t in (q, k, v)]
        expected = past_float64(*exact, keys.double().cpu(), values.double().cpu(), position, window)
        leaves = [t.requires_grad_() for t in (q, k, v)]
        poison(device)
        out = function(*leaves, keys, values, torch.full((1,), position, device=device), window)
        near(out, expected.detach(), tolerance, "y")
        grad = torch.randn(out.shape, generator=g).to(dtype)
        out.backward(grad.to(device))
        expected.backward(grad.double())
        for a, b, name in zip(leaves, exact, "qkv"):
            near(a.grad, b.grad, tolerance, f"d{name}")


def total_float64(parts, weights, scale):
    """The weighted sum, and the same normed and scaled."""
    u = sum(x if weights is None else w * x for w, x in zip(parts if weights is None else weights, parts))
    return u, None if scale is None else u / (u.square().mean(-1, keepdim=True) + reference.EPS).sqrt() * scale


def sum_inputs(count, shape, weighed, device, dtype, seed=5):
    """Parts whose rows differ in size, and weights."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-1, 1, shape[1])[:, None]
    parts = [(torch.randn(shape, generator=g) * sizes).to(dtype).to(device) for _ in range(count)]
    return parts, torch.randn(count, shape[-1], generator=g).to(device) if weighed else None


def check_gradients(leaves, exact, tolerance):
    for i, (a, b) in enumerate(zip(leaves, exact)):
        if b is not None:
            assert (a.grad is None) == (b.grad is None)
            if b.grad is not None:
                near(a.grad, b.grad, tolerance, f"gradient {i}")


def leaves_of(*tensors):
    """Leaves that want gradients, and the same in float64 on the CPU; None stays None."""
    exact = [None if t is None else t.double().cpu().requires_grad_() for t in tensors]
    return [None if t is None else t.requires_grad_() for t in tensors], exact


def check_sum(function, device, dtype, tolerance):
    """One to three parts, with and without weights and norm; gradients into both results and into either."""
    for count, shape, weighed, scale, into in ((2, (1, 3, 5), True, None, "u"), (3, (2, 37, 48), True, 0.5, "un"), (2, (3, 70, 32), False, 2.0, "un"),
                                               (1, (1, 9, 40), False, 0.3, "n"), (3, (1, 17, 24), True, 1.0, "n"), (2, (1, 5, 8), False, 1.0, "u")):
        parts, weights = sum_inputs(count, shape, weighed, device, dtype)
        (*parts, weights), (*exact_parts, exact_weights) = leaves, exact = leaves_of(*parts, weights)
        expected = total_float64(exact_parts, exact_weights, scale)
        poison(device)
        out = function(tuple(parts), weights, None if scale is None else torch.tensor(scale, device=device))
        assert (out[1] is None) == (scale is None)
        g = torch.Generator().manual_seed(6)
        for a, b in zip(out, expected):
            if b is not None:
                near(a, b.detach(), tolerance, "out")
        pairs = [(out["un".index(i)], expected["un".index(i)], torch.randn(shape, generator=g).to(dtype)) for i in into]
        torch.autograd.backward([a for a, _, _ in pairs], [x.to(device) for _, _, x in pairs])
        torch.autograd.backward([b for _, b, _ in pairs], [x.double() for _, _, x in pairs])
        check_gradients(leaves, exact, 2 * tolerance)
    many = sum_inputs(17, (1, 65, 24), False, device, dtype)[0]         # no gradients there
    near(function(tuple(many), None, None)[0], sum(x.double().cpu() for x in many), tolerance)


def check_normed_linear(function, device, dtype, tolerance):
    """The product may come without its rows' factors: together they are exact, and so are the gradients of what reads them so."""
    for count, shape, outputs, gate_shape, residual in ((2, (1, 3, 8), 16, (2, 3), True), (3, (2, 37, 48), 24, None, True),
                                                        (2, (1, 70, 32), 40, (4, 32), False), (3, (1, 9, 24), 8, (3, 12), True)):
        parts, weights = sum_inputs(count, shape, True, device, dtype)
        g = torch.Generator().manual_seed(8)
        matrix = (torch.randn(outputs, shape[-1], generator=g) / shape[-1] ** 0.5).to(dtype).to(device)
        gate = None if gate_shape is None else torch.randn(gate_shape, generator=g).to(device)
        (*parts, weights, matrix, gate), exact = leaves, (*exact_parts, exact_weights, exact_matrix, exact_gate) = leaves_of(
            *parts, weights, matrix, gate)
        u, n = total_float64(exact_parts, exact_weights, 0.7)
        expected = [u, n @ exact_matrix.T, None if gate is None else n[..., : gate.shape[1]] @ exact_gate.T]
        poison(device)
        u, y, factor, z = function(tuple(parts), weights, torch.tensor(0.7, device=device), matrix, gate)
        assert (z is None) == (gate is None) and (factor is None or not factor.requires_grad)
        # the gradient of y as its readers give it: of what they do with y * factor, at a fixed factor
        out = [u, y if factor is None else y * factor[..., None], z]
        pairs = [(a, b) for a, b in zip(out if residual else out[1:], expected if residual else expected[1:]) if b is not None]
        for a, b in pairs:
            near(a, b.detach(), tolerance, "out")
        grads = [torch.randn(b.shape, generator=g).to(dtype) for _, b in pairs]
        torch.autograd.backward([a for a, _ in pairs], [x.to(device).to(a.dtype) for x, (a, _) in zip(grads, pairs)])
        torch.autograd.backward([b for _, b in pairs], [x.double() for x in grads])
        check_gradients(leaves, exact, 2 * tolerance)


def check_adamw(function, device, dtype, tolerance):
    """Three steps of torch.optim.AdamW in float64; the copy of the weights in the gradient's precision."""
    for shape, beta1 in (((1, 5), 0.0), ((3, 700), 0.9), ((2, 1024), 0.0)):
        g = torch.Generator().manual_seed(7)
        start = torch.randn(shape, generator=g)
        exact = start.double().requires_grad_()
        optimizer = torch.optim.AdamW([exact], lr=0.01, betas=(beta1, 0.99), eps=1e-10, weight_decay=0.5)
        weights, second = start.to(device), torch.zeros(shape, device=device)
        low, first = torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, device=device) if beta1 else None
        for step in (1, 2, 3):
            gradient = torch.randn(shape, generator=g).to(dtype)
            exact.grad = gradient.double()
            optimizer.step()
            function(weights, low, gradient.to(device), first, second, step, 0.01, beta1, 0.99, 0.5)
        near(weights, exact.detach(), 2e-5, "weights")
        near(low, exact.detach(), tolerance, "low")


def check_mlp(function, device, dtype, tolerance):
    """With and without the norm, one part and two, added onto their sum or not."""
    for (B, T, D, M), count, scale, onto in zip(MLP_CASES * 2, (1, 1, 2, 2, 1, 1, 1, 2), (None, 0.7, 0.7, 0.5, 1.0, None, 0.3, 2.0),
                                                (True, False, True, False, True, False, False, True)):
        g = torch.Generator().manual_seed(4)
        matrices = [(torch.randn(*shape, generator=g) / shape[-1] ** 0.5).to(dtype).to(device) for shape in ((M, D), (D, M))]
        parts = [torch.randn(B, T, D, generator=g).to(dtype).to(device) for _ in range(count)]
        for x in parts:
            x.view(-1, D)[-1] = 0           # a row of zeros: neither sign
        leaves, exact = leaves_of(*parts, *matrices)
        h, n = total_float64(exact[:count], None, scale)
        x = (h if n is None else n) @ exact[-2].T
        hidden = torch.where(x > 0, x, 0.5 * x) ** 2
        expected = (h if onto and scale else 0) + hidden @ exact[-1].T, hidden
        poison(device)
        out = function(tuple(leaves[:count]), None if scale is None else torch.tensor(scale, device=device), *leaves[count:], onto)
        assert not out[1].requires_grad
        for a, b, name in zip(out, expected, ("out", "hidden")):
            near(a, b.detach(), tolerance, name)
        grad = torch.randn(out[0].shape, generator=g).to(dtype)
        grad.view(-1, D)[-1] = 0            # there the norm's slope is 3000, and the rounding of every other row would count for nothing
        out[0].backward(grad.to(device))
        expected[0].backward(grad.double())
        check_gradients(leaves, exact, 2 * tolerance)


def trellis_float64(w, u, step, shrink, state, states):
    """Viterbi for one row, every survivor a plain list: errors of the best path and its last state."""
    nexts = tg.trellis_next(states)
    alive = {state: (0.0, [])}
    for j in range(len(w)):
        reached = {}
        for s, (cost, errors) in alive.items():
            x = (w[j] - sum(e * u[i, j] for i, e in enumerate(errors))) / step
            for branch in (0, 1):
                kind = s % 2 + 2 * branch
                n = min((4 * m + kind for m in range(-31, 32)), key=lambda n: abs(x / (1 + shrink) - n))
                total = cost + ((x - n) ** 2 + shrink * n * n) / u[j, j] ** 2
                if nexts[s, branch] not in reached or total < reached[nexts[s, branch]][0]:
                    reached[nexts[s, branch]] = total, [*errors, (x - n) * step / u[j, j]]
        alive = reached
    last = min(alive, key=lambda s: alive[s][0])
    return alive[last][1], last


def trellis_inputs(N, R, B, states, seed=0):
    g = np.random.default_rng(seed)
    w, step = g.normal(size=(N, R, B)), np.exp(0.5 * g.normal(size=(N, R))) / 5
    u = np.triu(0.5 / B ** 0.5 * g.normal(size=(N, B, B))) + np.eye(B) * np.exp(0.3 * g.normal(size=B))
    return w, u, step, 0.02 * g.random((N, R)), g.integers(0, states, (N, R))


def check_trellis(function, device, dtype, tolerance):
    """float32 whatever the dtype: it is called with weights."""
    for N, R, B, states in ((1, 3, 1, 4), (2, 5, 13, 4), (1, 4, 37, 8), (2, 3, 64, 16), (1, 2, 20, 32), (1, 2, 17, 64)):
        w, u, step, shrink, state = trellis_inputs(N, R, B, states)
        poison(device)
        to = lambda x: torch.from_numpy(x).to(device, torch.int64 if x.dtype.kind == "i" else torch.float32)
        errors, last = function(to(w), to(u), to(step), to(shrink), to(state), states)
        for n in range(N):
            for r in range(R):
                expected, end = trellis_float64(w[n, r], u[n], step[n, r], shrink[n, r], int(state[n, r]), states)
                near(errors[n, r], expected, 1e-4, (states, n, r))
                assert int(last[n, r]) == end


CHECKS = {"softcap_ce": check_softcap, "qkv_heads": check_heads, "gated_heads": check_gated, "leaky_mlp": check_mlp,
          "past_attention": check_past, "adamw": check_adamw,
          "trellis_block": check_trellis, "weighted_sum": check_sum, "normed_linear": check_normed_linear}


def test_every_kernel_has_a_check():
    assert set(CHECKS) == set(tg.KERNELS)


@pytest.mark.parametrize("name", CHECKS)
def test_references_equal_float64(name):
    # float32: 24 bits, sums of up to 8193 terms
    CHECKS[name](tg.KERNELS[name].reference, torch.device("cpu"), torch.float32, 2e-5)


def check_networks():
    """Whole networks of fast kernels, in float32: loss and every parameter's gradient equal the plain network's in float64. What one
    kernel leaves to the next (norm factors, rounded sums) has to meet."""
    for settings in (dict(NUM_LOOPS=1), dict(NUM_LOOPS=0, PARALLEL_START_LAYER=0, PARALLEL_RESIDUAL_START=3, SKIP_GATES_ENABLED=0)):
        found, call = [], tg.Kernel.__call__
        for dtype in (torch.float64, torch.float32):
            model = toy.randomise(tg.GPT(toy.config(**settings), torch.device("cpu"))).to(dtype)
            model.dtype, batch = dtype, tg.to_batch(toy.row(20), 32)
            if dtype == torch.float32:
                tg.Kernel.__call__ = lambda self, *args: self.fast(*args)
            try:
                loss = model.losses(batch.ids, batch.targets, batch.segments).mean()
                loss.backward()
            finally:
                tg.Kernel.__call__ = call
            found.append((loss, {name: p.grad for name, p in model.named_parameters()}))
        (exact, exact_grads), (loss, grads) = found
        near(loss, exact.detach(), 1e-6, "loss")
        for name, g in exact_grads.items():
            assert (g is None) == (grads[name] is None), name
            if g is not None:
                near(grads[name], g, 2e-5, name)


def interpret():
    """Body of the interpreter's process: fast kernels on CPU tensors."""
    torch.set_num_threads(1)
    check_networks()
    for name, check in CHECKS.items():
        check(tg.KERNELS[name].fast, torch.device("cpu"), torch.float32, 5e-5)
        tg.try_kernel(tg.KERNELS[name], toy.config(), torch.device("cpu"))
        print(f"{name} ok")


@pytest.mark.skipif(tg.triton is None, reason="Triton is not installed")
@pytest.mark.skipif(tg.triton is not None and tg.triton.__version__.startswith("3.5."), reason="its interpreter refuses numpy 2.4 and these descriptors")
def test_triton_kernels_equal_float64_under_the_interpreter():
    """TRITON_INTERPRET must be set before triton is loaded, hence a process."""
    folders = [str(toy.SCRIPT.parent), str(Path(__file__).parent)]
    code = f"import sys; sys.path[:0] = {folders!r}; import test_kernels; test_kernels.interpret()"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [word for name in CHECKS for word in (name, "ok")]


@pytest.mark.skipif(tg.triton is None, reason="Triton is not installed")
@pytest.mark.parametrize("name", ["softcap_ce", "qkv_heads", "gated_heads", "leaky_mlp", "normed_linear"])
def test_any_number_of_rows_and_positions_is_one_graph(name):
    """Traced with unknown sizes, a kernel must not pin the first two down: test-time training would compile for each."""
    ones = torch.ones
    inputs = {"softcap_ce": lambda: (ones(37, 50), ones(37, dtype=torch.int64), 30.0),
              "qkv_heads": lambda: (ones(5, 37, 8 * 16), None, ones(4), ones(37, 3), ones(37, 3), 2, 2),
              "gated_heads": lambda: (ones(5, 37, 4, 16), ones(5, 37, 2, 16), ones(5, 37, 4), True, 1.0, 1.0),
              "leaky_mlp": lambda: (ones(5, 37, 16), ones(()), ones(48, 16), ones(16, 48), True),
              "normed_linear": lambda: (ones(5, 37, 16), ones(2, 16), ones(()), ones(24, 16), ones(4, 3))}[name]()
    rest, parts = inputs[1:], {"leaky_mlp": 2, "normed_linear": 2}.get(name)
    call = lambda x: tg.KERNELS[name].fast((x,) * parts if parts else x, *rest)
    graph = make_fx(call, tracing_mode="symbolic", _allow_non_fake_inputs=True)(inputs[0])
    x = next(node for node in graph.graph.nodes if node.op == "placeholder").meta["val"]
    known = x.fake_mode.shape_env.replacements
    free = [size for size in x.shape[: 1 if name == "softcap_ce" else 2] if isinstance(size, torch.SymInt)]
    assert free and not any(known.get(size.node.expr, size.node.expr).is_number for size in free)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CHECKS)
# bfloat16 outputs are rounded to 8 bits (2^-9 relative), and gradients pass through one or two such roundings
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
def test_kernels_equal_float64_on_the_gpu(name, dtype, tolerance):
    CHECKS[name](tg.KERNELS[name].fast, torch.device("cuda"), dtype, tolerance)


@pytest.mark.gpu
def test_softcap_at_the_real_size():
    """65,536 rows of 8,192 logits: offsets beyond 2^31 bytes."""
    logits, targets, _ = softcap_inputs(64, 8192, "cuda", torch.bfloat16)
    big = logits.repeat(65536 // 64 * 5, 1)                     # 2.7e9 elements: past 2^31
    losses = tg.KERNELS["softcap_ce"].fast(big, targets.repeat(65536 // 64 * 5), 30.0)
    expected = tg.KERNELS["softcap_ce"].reference(logits, targets, 30.0)
    assert (losses.view(-1, 64) - expected).abs().max() < 1e-3


def test_cpu_and_disabled_kernels_use_the_reference():
    called = []
    pair = tg.Kernel(lambda x: called.append("reference"), lambda x: called.append("fast"))
    pair(torch.zeros(1))
    assert called == ["reference"]

    class OnCuda:
        is_cuda = True

    pair(OnCuda())
    pair.enabled = False
    pair(OnCuda())
    assert called == ["reference", "fast", "reference"]


def test_a_kernel_that_does_not_run_gives_way_to_its_reference(monkeypatch):
    """As on a GPU for which Triton has no code: one line, and the plain version from then on."""
    def broken(*_):
        raise RuntimeError("no kernel image\nis available")

    pairs = {"good": tg.Kernel(lambda x: x, lambda x: 2 * x, lambda c, device: (torch.ones(2),)),
             "bad": tg.Kernel(lambda x: x, broken, lambda c, device: (torch.ones(2),)),
             "off": tg.Kernel(lambda x: x, broken, lambda c, device: (torch.ones(2),), enabled=False)}
    monkeypatch.setattr(tg, "KERNELS", pairs)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    lines = []
    tg.drop_broken_kernels(toy.config(), torch.device("cuda"), lines.append)
    assert lines == ["kernel bad does not run on this GPU (RuntimeError: no kernel image): its plain version serves"]
    assert [p.enabled for p in pairs.values()] == [True, False, False]


def test_kernels_are_switched_off_by_name():
    states = lambda **settings: (tg.select_kernels(toy.config(**settings)), {n: p.enabled for n, p in tg.KERNELS.items()})[1]
    have = tg.triton is not None
    try:
        assert states() == dict.fromkeys(tg.KERNELS, have)
        assert not any(states(KERNELS_OFF="all").values())
        assert states(KERNELS_OFF="qkv_heads")["qkv_heads"] is False and states(KERNELS_OFF=" qkv_heads , ")["gated_heads"] is have
        assert states(FUSED_CE_ENABLED=0)["softcap_ce"] is False
        with pytest.raises(tg.UserError, match="KERNELS_OFF='softcap'.*softcap_ce"):
            tg.select_kernels(toy.config(KERNELS_OFF="softcap"))
    finally:
        tg.select_kernels(toy.config())


def test_compiled_kernels_are_counted(monkeypatch):
    monkeypatch.setattr(tg, "COMPILED", [])
    lines, times = [], SimpleNamespace(total=1.5e6)
    for name, hit in (("first", False), ("sum_kernel", False), ("sum_kernel", True), ("sum_kernel", False)):
        tg.note_compiled(src=None, metadata={"name": name}, metadata_group={}, times=times, cache_hit=hit)
    tg.log_compiled(lines.append, 1, "eval")
    tg.log_compiled(lines.append, 3, "train")
    assert lines == ["ledger kernels_compiled:2 seconds:3.0 stage:eval (sum_kernel 2)", "ledger kernels_compiled:0 seconds:0.0 stage:train"]
    if hasattr(tg.triton, "knobs"):
        assert tg.triton.knobs.compilation.listener is tg.note_compiled


def test_a_budget_counts_its_own_kernels_only(monkeypatch):
    """The evaluation between training and quantisation belongs to no budget."""
    monkeypatch.setattr(tg, "COMPILED", [])
    run = toy.run(toy.config())
    for name, budget in (("warmup", "none"), ("loop", "train"), ("eval_prequant", "none"), ("inq", "train")):
        with run.ledger.stage(name, budget):
            tg.COMPILED.append((name, 1.0))
        if name == "warmup":
            run.ledger.open()
    run.ledger.close("train")
    assert run.log.lines[-2] == "ledger kernels_compiled:2 seconds:2.0 stage:train (loop 1, inq 1)"


@pytest.mark.skipif(tg.triton is None, reason="Triton is not installed")
def test_what_varies_in_a_run_makes_no_program_of_its_own():
    """Numbers of rows and positions, odd or even, and scales at any place of [layers, 2] share one compiled kernel."""
    general = {name: [p.name for p in kernel.params if p.do_not_specialize or p.do_not_specialize_on_alignment]
               for name, kernel in vars(tg).items() if hasattr(kernel, "params") and name.endswith("_kernel")}
    assert general == {"softcap_ce_kernel": [], "sum_kernel": ["scale", "N"], "sum_backward_kernel": ["scale", "N"],
                       "qkv_heads_kernel": ["N", "T"], "gated_heads_kernel": ["N"], "leaky_mlp_kernel": ["M"],
                       "past_attention_kernel": ["T"], "past_attention_live_kernel": ["T"], "adamw_kernel": [], "trellis_kernel": []}
