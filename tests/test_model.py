"""MODEL: every part and every switch against the float64 reference, causality, and one forward for all callers."""

import math
import sys
import types

import numpy as np
import pytest
import reference
import torch
import toy

import train_gpt as tg

# Every switch of the network, one or two at a time. (name -> settings over toy.NETWORK)
VARIANTS = {
    "default": {},
    "lane_attn": dict(PARALLEL_FINAL_LANE="attn"),
    "lane_mlp": dict(PARALLEL_FINAL_LANE="mlp"),
    "sequential": dict(PARALLEL_START_LAYER=0),
    "gptj": dict(PARALLEL_START_LAYER=0, PARALLEL_RESIDUAL_START=3),
    "gptj_everywhere": dict(PARALLEL_START_LAYER=0, PARALLEL_RESIDUAL_START=0),
    "gated": dict(SPARSE_ATTN_GATE_ENABLED=0, GATED_ATTN_ENABLED=1),
    "attn_out_proj": dict(SPARSE_ATTN_GATE_ENABLED=0, ATTN_OUT_GATE_ENABLED=1),
    "attn_out_input": dict(SPARSE_ATTN_GATE_ENABLED=0, ATTN_OUT_GATE_ENABLED=1, ATTN_OUT_GATE_SRC="input"),
    "no_gate": dict(SPARSE_ATTN_GATE_ENABLED=0),
    "gate_scale": dict(SPARSE_ATTN_GATE_SCALE=2, GATE_WINDOW=32),
    "no_smear": dict(SMEAR_GATE_ENABLED=0),
    "no_skip_gates": dict(SKIP_GATES_ENABLED=0),
    "no_xsa": dict(XSA_LAST_N=0),
    "xsa_last_2": dict(XSA_LAST_N=2),
    "no_ln_scale": dict(LN_SCALE=0),
    "untied": dict(TIE_EMBEDDINGS=0),
    "yarn": dict(ROPE_YARN=1, ROPE_TRAIN_SEQ_LEN=8),
    "rope_all": dict(ROPE_DIMS=8, ROPE_BASE=100),
    "rope_none": dict(ROPE_DIMS=0),
    "one_kv_head": dict(NUM_KV_HEADS=1),
    "all_kv_heads": dict(NUM_KV_HEADS=4),
    "no_loops": dict(NUM_LOOPS=0),
    "one_loop": dict(NUM_LOOPS=1, LOOP_START=0, LOOP_END=0),
    "loop_everything": dict(LOOP_START=0, LOOP_END=5, PARALLEL_START_LAYER=0),
    "one_layer": dict(NUM_LAYERS=1, XSA_LAST_N=1, NUM_LOOPS=0, PARALLEL_START_LAYER=0),
    "two_layers": dict(NUM_LAYERS=2, XSA_LAST_N=1, NUM_LOOPS=0, PARALLEL_START_LAYER=1),
    "softcap": dict(LOGIT_SOFTCAP=2),
}
DOCUMENTS, LENGTH, LIMIT = (0, 5, 6, 17), 40, 12       # a one-token document; the last is cut at LIMIT
# Float32 against float64 through 10 passes of width 32: the worst deviation seen over all variants is 2e-5.
TOLERANCE = 1e-4


def packed(limit=LIMIT, length=LENGTH, documents=DOCUMENTS, seed=0) -> tg.Batch:
    return tg.to_batch(toy.row(length + 1, documents, seed), limit)


def weights_of(model):
    return {n: p.detach() for n, p in tg.export_weights(dict(model.named_parameters()), model.config.num_layers).items()}


def assert_close(actual, expected, tolerance=TOLERANCE):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape and np.isfinite(expected).all()
    worst = np.abs(actual - expected).max()
    assert worst <= tolerance, worst


@pytest.fixture(params=VARIANTS)
def variant(request):
    return toy.config(**VARIANTS[request.param])


# ---------------------------------------------------------------------------------------------------------------- parts


def test_norm():
    x = torch.randn(5, 7, 16) * torch.logspace(-5, 3, 7)[:, None]
    assert_close(tg.norm(x), reference.rms_norm(x.double().numpy()), 1e-5)


@pytest.mark.parametrize("dims", [0, 2, 4, 8])
@pytest.mark.parametrize("yarn", [0, 1])
def test_rotary(dims, yarn):
    c = toy.config(ROPE_DIMS=dims, ROPE_YARN=yarn, ROPE_TRAIN_SEQ_LEN=8)
    x = torch.randn(2, 20, 4, 8)
    base = c.rope_base * ((20 / 8) ** (dims / (dims - 2)) if yarn and dims > 2 else 1)
    expected = [[[reference.rotate(x[b, t, h].double().numpy(), t, dims, base) for h in range(4)] for t in range(20)] for b in range(2)]
    assert_close(tg.rotate(x, *tg.rotary_table(20, c, 20, "cpu")), expected, 1e-5)


def test_yarn_changes_nothing_within_the_training_context():
    c = toy.config(ROPE_YARN=1, ROPE_TRAIN_SEQ_LEN=32)
    assert torch.equal(tg.rotary_table(64, c, 32, "cpu")[0], tg.rotary_table(64, toy.config(), 32, "cpu")[0])
    assert not torch.equal(tg.rotary_table(64, c, 33, "cpu")[0], tg.rotary_table(64, c, 32, "cpu")[0])


@pytest.mark.parametrize("kv", [1, 2, 4])
def test_own_value_is_removed(kv):
    y, v = torch.randn(1, 9, 4, 8), torch.randn(1, 9, kv, 8)
    out = tg.remove_own_value(y, v)
    assert_close(out[0], reference.remove_own_value(y[0].double().numpy(), v[0].double().numpy()), 1e-5)
    dots = (out.view(1, 9, kv, -1, 8) * v[:, :, :, None]).sum(-1)
    assert dots.abs().max() < 1e-5      # what is left is orthogonal to the value


def test_smear_and_its_bos_mask():
    model = toy.model(toy.config())
    batch = packed()
    ids = batch.ids[0].tolist()
    x = tg.embed(batch.ids, model.tok_emb, model.smear_gate, model.smear_lambda, torch.float32)[0]
    table = model.tok_emb.detach().double().numpy()
    expected = reference.smear(table[ids], ids, model.smear_gate[0].detach().double().numpy(), model.smear_lambda.item())
    assert_close(x.detach(), reference.rms_norm(expected), 1e-5)
    plain = tg.embed(batch.ids, model.tok_emb, None, None, torch.float32)[0]
    same = (x == plain).all(-1)
    assert same.nonzero().flatten().tolist() == list(DOCUMENTS)


def attention_case(heads, kv, cuts, total, d=8, device="cpu", dtype=torch.float32, seed=0):
    """q, k, v, padded cu_seqlens, and the float64 result for those very numbers."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, total, n, d, generator=g).to(dtype) for n in (heads, kv, kv))
    starts = [max(c for c in cuts if c <= t) for t in range(total)]
    expected = reference.attention(*(t[0].double().numpy() for t in (q, k, v)), starts)
    cu = torch.from_numpy(tg.pad_cu_seqlens(np.array(cuts), total)).to(device)
    return *(t.to(device) for t in (q, k, v)), cu, expected


@pytest.mark.parametrize("heads, kv", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("cuts", [(0,), (0, 1, 2, 3), (0, 13), (0, 5, 6, 30)])
def test_sdpa_attention(heads, kv, cuts):
    q, k, v, cu, expected = attention_case(heads, kv, cuts, 31)
    assert_close(tg.attend_sdpa(q, k, v, tg.Segments(cu, 31))[0], expected, 1e-5)
    if cuts == (0,):
        assert_close(tg.attend_sdpa(q, k, v, None)[0], expected, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["fa3", "varlen", "sdpa"])
@pytest.mark.parametrize("heads, kv", [(8, 4), (8, 1), (4, 4)])
@pytest.mark.parametrize("cuts, total", [((0,), 64), ((0, 1, 2, 3), 129), ((0, 5, 70, 71, 130), 257)])
def test_attention_backends_on_the_gpu(backend, heads, kv, cuts, total):
    """Forward against float64 and gradients against sdpa's in float64, bfloat16 inputs."""
    c, device = toy.config(), torch.device("cuda")
    try:
        tg.choose_attention(tg.Config(**{**tg.asdict(c), "attention_backend": backend}), device)
    except tg.UserError:
        pytest.skip(f"{backend} is not on this machine")
    longest = max(np.diff([*cuts, total]))
    q, k, v, cu, expected = attention_case(heads, kv, cuts, total, d=64, device=device, dtype=torch.bfloat16)
    inputs = [t.requires_grad_() for t in (q, k, v)]
    y = tg.ATTENTION[backend](*inputs, tg.Segments(cu, int(longest)))
    # bfloat16 keeps 8 bits: outputs up to 3 are rounded by up to 2^-8; probabilities are rounded once more inside
    assert_close(y[0].detach().cpu().double(), expected, 0.03)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(device)
    y.backward(dy.to(y.dtype))
    exact = [t.detach().double().cpu().requires_grad_() for t in inputs]
    tg.attend_sdpa(*exact, tg.Segments(cu.cpu(), int(longest))).backward(dy.to(torch.bfloat16).double().cpu())
    for got, want in zip(inputs, exact):
        error = (got.grad.double().cpu() - want.grad).norm() / want.grad.norm()
        assert error < 0.02, (backend, error)       # relative; bfloat16's own rounding gives 0.004


def test_unusable_backends_are_refused_and_auto_finds_one():
    cpu = torch.device("cpu")
    assert tg.choose_attention(toy.config(), cpu) == "sdpa"
    for name in ("fa3", "varlen"):
        with pytest.raises(tg.UserError, match=f"ATTENTION_BACKEND={name} .*sdpa"):
            tg.choose_attention(toy.config(ATTENTION_BACKEND=name), cpu)


@pytest.mark.parametrize("switch", [True, False])
def test_deterministic_runs_leave_a_flash_attention_without_the_switch(switch, monkeypatch):
    module = types.ModuleType("flash_attn_interface")
    exec(f"def flash_attn_varlen_func(q, k, v{', deterministic=False' if switch else ''}, **_): pass", module.__dict__)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", types.ModuleType("varlen"))
    chosen = [tg.choose_attention(toy.config(DETERMINISTIC=d), torch.device("cuda")) for d in (0, 1)]
    assert chosen == ["fa3", "fa3" if switch else "varlen"]


# ------------------------------------------------------------------------------------------------------- whole network


def test_losses_equal_the_reference(variant):
    model, batch = toy.model(variant), packed()
    expected = reference.Reference(weights_of(model), variant).losses(batch.ids[0].tolist(), batch.targets[0].tolist(), LIMIT)
    with torch.no_grad():
        actual = model.losses(batch.ids, batch.targets, batch.segments)[0]
    assert_close(actual, expected)
    assert np.ptp(expected) > 0.5       # a constant would prove nothing


@pytest.mark.parametrize("name", ["default", "no_skip_gates", "sequential", "gptj", "loop_everything"])
@pytest.mark.parametrize("loops", [0, 1, 2])
def test_losses_with_fewer_loops_equal_the_reference(name, loops):
    c = toy.config(**VARIANTS[name])
    model, batch = toy.model(c), packed()
    expected = reference.Reference(weights_of(model), c).losses(batch.ids[0].tolist(), batch.targets[0].tolist(), LIMIT, loops)
    with torch.no_grad():
        assert_close(model.losses(batch.ids, batch.targets, batch.segments, loops)[0], expected)


@pytest.mark.parametrize("name", ["default", "no_loops", "one_loop", "loop_everything", "one_layer", "two_layers"])
def test_layer_order_equals_the_reference(name):
    c = toy.config(**VARIANTS[name])
    for loops in range(c.num_loops + 1):
        assert c.pass_order(loops) == reference.layer_order(c, loops)


def test_gradients_equal_finite_differences():
    """One number of every parameter, by central differences of the float64 reference."""
    c = toy.config()
    model, batch = toy.model(c), packed(length=20, documents=(0, 8))
    model.losses(batch.ids, batch.targets, batch.segments).mean().backward()
    weights = {n: p.double().numpy().copy() for n, p in weights_of(model).items()}
    grads = {n: g for n, g in tg.export_weights({n: p.grad for n, p in model.named_parameters()}, c.num_layers).items()}
    rng = np.random.default_rng(0)
    names = [n for n in weights if not n.startswith("blocks.") or n.split(".")[1] in "15"]
    for name in names:
        w, g = weights[name], grads[name].double().numpy()
        at = np.unravel_index(np.abs(g).argmax() if rng.random() < 0.5 else rng.integers(w.size), w.shape)
        losses = []
        for delta in (1e-5, -1e-5):
            kept = w[at]
            w[at] += delta
            losses.append(reference.Reference(weights, c).losses(batch.ids[0].tolist(), batch.targets[0].tolist(), LIMIT).mean())
            w[at] = kept
        slope = (losses[0] - losses[1]) / 2e-5
        # leaky_relu^2 has a continuous derivative, so differences are good to 1e-8; the rest is float32
        assert abs(slope - g[at]) < 1e-5 + 1e-3 * abs(slope), (name, at, slope, g[at])


def test_taps_see_every_matrix_input():
    c = toy.config()
    model, batch = toy.model(c), packed()
    seen, expected = {}, {}
    record = lambda store: lambda name, x: store.setdefault(name, []).append(np.asarray(x, np.float64).reshape(LENGTH, -1))
    with torch.no_grad():
        model.losses(batch.ids, batch.targets, batch.segments, tap=record(seen))
    reference.Reference(weights_of(model), c).losses(batch.ids[0].tolist(), batch.targets[0].tolist(), LIMIT, record=record(expected))
    assert seen.keys() == expected.keys()
    assert {tg.hessian_key(n) for n in weights_of(model) if tg.role_of(n).bits} == seen.keys()
    for name, values in expected.items():
        assert len(seen[name]) == len(values) == (3 if ".1." in name or ".2." in name else 1)
        for a, b in zip(seen[name], values):
            assert_close(a, b, 1e-4 * max(1, np.abs(b).max()))


# ------------------------------------------------------------------------------------------------------------ causality


@pytest.mark.parametrize("position", [4, 9, 16, 25])        # 4 and 16 end documents: SmearGate would carry them on
def test_a_token_changes_nothing_before_it_nor_outside_its_document(variant, position):
    """Exactly nothing: rows of a matrix product do not depend on other rows' values."""
    model, batch = toy.model(variant), packed(limit=100)
    changed = batch.ids.clone()
    changed[0, position] = changed[0, position] % (toy.VOCAB - 4) + 4
    with torch.no_grad():
        a, b = (model(ids, batch.segments)[0] for ids in (batch.ids, changed))
    end = next((d for d in DOCUMENTS if d > position), LENGTH)
    different = (a != b).any(-1).nonzero().flatten().tolist()
    assert different and different[0] == position and different[-1] < end
    assert position + 1 == end or len(different) > 1        # it does reach later tokens of its document


@pytest.mark.parametrize("position", [3, 9, 25])
def test_causality_in_plain_rows(variant, position):
    """Rows without segments (test-time training): nothing before the token, nothing in the other row."""
    model = toy.model(variant)
    ids = torch.from_numpy(np.stack([toy.row(30, (0,), s) for s in (1, 2)]).astype(np.int64))
    changed = ids.clone()
    changed[1, position] = changed[1, position] % (toy.VOCAB - 4) + 4
    with torch.no_grad():
        a, b = model(ids), model(changed)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1, :position], b[1, :position])
    assert not torch.equal(a[1, position:], b[1, position:])


# ------------------------------------------------------------------------------------------------------ one forward


def adapters(c, rows, rank=3, zero=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    D, kv = c.model_dim, c.num_kv_heads * c.head_dim

    def lora(inputs, outputs):
        b = torch.zeros(rows, outputs, rank) if zero else torch.randn(rows, outputs, rank, generator=g) * 0.3
        return tg.LoRA(torch.randn(rows, rank, inputs, generator=g) / inputs ** 0.5, b, 1.7)

    passes = tuple(tg.PassAdapters(lora(D, D), lora(D, kv), lora(D, kv), lora(D, D), lora(D, D)) for _ in c.pass_order(c.num_loops)[0])
    return tg.Adapters(passes, lora(D, c.vocab_size))


def test_packed_row_batch_and_zero_adapters_give_the_same_losses(variant):
    model, length = toy.model(variant), 8       # 8: YaRN's training context in the "yarn" variant
    rows = np.stack([toy.row(length + 1, (0,), s) for s in range(4)])
    ids, targets = (torch.from_numpy(x.astype(np.int64)) for x in (rows[:, :-1], rows[:, 1:]))
    cu = torch.from_numpy(tg.pad_cu_seqlens(np.arange(4) * length, 4 * length))
    with torch.no_grad():
        plain = model.losses(ids, targets)
        one_row = model.losses(ids.view(1, -1), targets.view(1, -1), tg.Segments(cu, length)).view(4, -1)
        adapted = model.losses(ids, targets, adapters=adapters(variant, 4))
        both = model.losses(ids.view(1, -1), targets.view(1, -1), tg.Segments(cu, length), adapters=adapters(variant, 1)).view(4, -1)
    assert torch.equal(adapted, plain)          # adding exact zeros
    assert_close(one_row, plain)                # positions differ: rotary tables round differently
    assert torch.equal(both, one_row)


def test_adapters_equal_merged_matrices():
    """q, k, v and head adapters: W + scale B A, row by row; one set of adapters per pass, here all passes alike."""
    c = toy.config()
    model = toy.model(c)
    ids = torch.from_numpy(np.stack([toy.row(20, (0,), s) for s in (1, 2)]).astype(np.int64))
    one = adapters(c, 2, zero=False)
    same = one.passes[0]._replace(o=None, mlp=None)
    given = tg.Adapters((same,) * len(one.passes), one.head)
    with torch.no_grad():
        actual = model.losses(ids[:, :-1], ids[:, 1:], adapters=given)
        for row in range(2):
            merged = toy.model(toy.config(TIE_EMBEDDINGS=0))
            tg.import_weights(merged, {**weights_of(model), "lm_head.weight": model.tok_emb})
            delta = lambda a, row=row: a.scale * a.b[row] @ a.a[row]
            L = c.num_layers
            merged.qo_bank[:L] += delta(same.q)
            merged.kv_bank[:L] += delta(same.k)
            merged.kv_bank[L:] += delta(same.v)
            merged.lm_head += delta(one.head)
            assert_close(actual[row], merged.losses(ids[row: row + 1, :-1], ids[row: row + 1, 1:])[0])
    assert (actual - model.losses(ids[:, :-1], ids[:, 1:])).abs().max() > 0.1


@pytest.mark.parametrize("name", ["sequential", "gptj", "default"])
def test_output_and_mlp_adapters_read_the_normed_inputs(name):
    """In one last pass (linear in them): out = without + scale_of_the_branch * adapter(normed input)."""
    c = toy.config(**{**VARIANTS[name], "NUM_LOOPS": 0, "PARALLEL_FINAL_LANE": "attn"})
    model = toy.model(c)
    ids = torch.from_numpy(toy.row(20)[None].astype(np.int64))
    last = c.num_layers - 1
    extra = adapters(c, 1, zero=False).passes[0]
    empty = [tg.NO_ADAPTERS] * last
    inputs = {}
    with torch.no_grad():
        base = model(ids, tap=lambda n, x: inputs.setdefault(n, x))
        scales = model.attn_scale[last], model.mlp_scale[last]
        add = model.parallel_post_lambdas[last][:, 0] if name == "default" else torch.ones(2)
        for kind, source, scale, lane in (("o", "attn", scales[0], add[0]), ("mlp", "mlp.fc", scales[1], add[1])):
            if kind == "o" and name == "sequential":
                continue                        # the MLP after it is not linear
            lora = getattr(extra, kind)
            out = model(ids, adapters=tg.Adapters((*empty, tg.PassAdapters(**{kind: lora}))))
            assert_close(out - base, lane * scale * lora(inputs[f"blocks.{last}.{source}"]))


# --------------------------------------------------------------------------------------------------------- parameters


def test_initial_values():
    c = toy.config(TIE_EMBEDDINGS=0)
    model = tg.GPT(c, torch.device("cpu"))
    L, D = c.num_layers, c.model_dim
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert shapes["qo_bank"] == (2 * L, D, D) and shapes["kv_bank"] == (2 * L, 16, D)
    assert shapes["mlp_up_bank"] == (L, 2 * D, D) and shapes["mlp_down_bank"] == (L, D, 2 * D)
    assert not model.qo_bank[L:].any() and not model.mlp_down_bank.any()
    for w in (*model.qo_bank[:L], *model.kv_bank, *model.mlp_up_bank):
        small = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
        assert (small - torch.eye(len(small))).abs().max() < 1e-5      # orthogonal, gain 1 (float32 QR)
    assert abs(model.tok_emb.std().item() / 0.005 - 1) < 0.05          # 12,288 samples: 0.6% deviation
    assert (model.q_gain == 5).all() and (model.parallel_resid_lambdas == 1.1).all() and (model.parallel_post_lambdas == 1).all()
    assert (model.resid_mix[:, 0] == 1).all() and not model.resid_mix[:, 1].any()
    for name in ("attn_gate_w", "skip_gates", "smear_gate", "smear_lambda"):
        assert not getattr(model, name).any()
    for name in ("attn_scale", "mlp_scale", "skip_weights"):
        assert (getattr(model, name) == 1).all()
    assert len(model.skip_weights) == c.pass_order(c.num_loops)[1]


def test_initial_loss_is_that_of_a_uniform_guess():
    c = toy.config()
    batch = packed()
    with torch.no_grad():
        losses = tg.GPT(c, torch.device("cpu")).losses(batch.ids, batch.targets, batch.segments)
    # std 0.005 at width 32: logits within 0.2
    assert abs(losses.mean().item() - math.log(toy.VOCAB)) < 0.05


def test_the_seed_decides_the_weights():
    make = lambda seed: tg.GPT(toy.config(SEED=seed), torch.device("cpu")).state_dict()
    a, b, c = make(1), make(1), make(2)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert not torch.equal(a["tok_emb"], c["tok_emb"]) and not torch.equal(a["qo_bank"], c["qo_bank"])


def test_weights_survive_export_and_import(variant):
    a, b = toy.model(variant, 1), toy.model(variant, 2)
    tg.import_weights(b, {n: t.clone() for n, t in weights_of(a).items()})
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


def test_file_names_are_the_published_ones():
    names = set(weights_of(toy.model(toy.config())))
    expected = {"tok_emb.weight", "skip_weights", "skip_gates", "smear_gate.weight", "smear_lambda",
                "parallel_resid_lambdas", "parallel_post_lambdas"}
    expected |= {f"blocks.{i}.{n}" for i in range(6) for n in (
        "attn.c_q.weight", "attn.c_k.weight", "attn.c_v.weight", "attn.proj.weight", "mlp.fc.weight", "mlp.proj.weight",
        "attn.q_gain", "attn.attn_gate_w", "attn_scale", "mlp_scale", "resid_mix")}
    assert names == expected


def test_import_names_what_does_not_fit():
    model = toy.model(toy.config())
    good = weights_of(model)
    before = {n: t.clone() for n, t in good.items()}
    for tensors, words in (({n: t for n, t in good.items() if n != "skip_gates"}, "lacks skip_gates"),
                           ({**good, "other": torch.zeros(1)}, "has unknown other"),
                           ({**good, "smear_lambda": torch.zeros(2)}, r"smear_lambda has shape \[2\]: expected \[1\]")):
        with pytest.raises(tg.UserError, match=words):
            tg.import_weights(model, tensors, "file")
    assert all(torch.equal(t, before[n]) for n, t in weights_of(model).items())


# ------------------------------------------------------------------------------------------------------------------ GPU


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["default", "gptj", "sequential", "gated", "attn_out_proj", "untied"])
def test_compiled_is_as_exact_as_eager_on_the_gpu(name, monkeypatch):
    """Losses and gradients in bfloat16, compiled and eager, against float32 on the CPU. Fusion rounds at other places, so a
    tensor of one number may come out better or worse: the errors of all tensors together must not be half as large again,
    nor any of them twice the eager path's worst. Head size 64, as FlashAttention wants."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo.config, "cache_size_limit", 64)
    monkeypatch.setattr(torch._dynamo.config, "automatic_dynamic_shapes", False)
    c = toy.config(**{**VARIANTS[name], "MODEL_DIM": 256, "ROPE_DIMS": 16, "VOCAB_SIZE": 1024})
    row, results = toy.row(513, (0, 100, 101, 300), vocab=1024), []
    for device, compiled in (("cpu", False), ("cuda", False), ("cuda", True)):
        device = torch.device(device)
        model = toy.randomise(tg.GPT(c, device, tg.choose_attention(c, device), compiled).cpu()).to(device)
        model.rope_tables.clear()
        batch = tg.to_device(tg.to_batch(row, 128), device)
        losses = model.losses(batch.ids, batch.targets, batch.segments)
        losses.mean().backward()
        results.append([losses.detach().cpu(), *(p.grad.float().cpu() for p in model.parameters())])
    names = ["losses", *(n for n, _ in model.named_parameters())]
    exact = results[0]
    eager, compiled = (torch.tensor([(x - e).norm() / e.norm().clamp_min(1e-6) for x, e in zip(r, exact)]) for r in results[1:])
    table = "\n".join(f"{n}: eager {a:.5f} compiled {b:.5f}" for n, a, b in zip(names, eager, compiled))
    assert compiled[0] < 1.5 * eager[0] + 1e-4 and compiled.norm() < 1.5 * eager.norm() and compiled.max() < 2 * eager.max(), table


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["fa3", "varlen", "sdpa"])
def test_losses_on_the_gpu_are_near_the_reference(backend):
    device = torch.device("cuda")
    c = toy.config(MODEL_DIM=256, ROPE_DIMS=16, ATTENTION_BACKEND=backend)
    try:
        name = tg.choose_attention(c, device)
    except tg.UserError:
        pytest.skip(f"{backend} is not on this machine")
    model = toy.randomise(tg.GPT(c, torch.device("cpu"))).to(device)
    model.dtype, model.shapes = torch.bfloat16, [s._replace(attention=name) for s in model.shapes]
    batch = packed()
    expected = reference.Reference({n: t.cpu() for n, t in weights_of(model).items()}, c).losses(
        batch.ids[0].tolist(), batch.targets[0].tolist(), LIMIT)
    on_gpu = tg.to_device(batch, device)
    with torch.no_grad():
        actual = model.losses(on_gpu.ids, on_gpu.targets, on_gpu.segments)[0].cpu()
    # random logits of deviation ~10 in bfloat16 (8 bits, 10 passes): a wrong network is off by several nats
    assert_close(actual, expected, 1.0)
    assert abs(actual.double().mean().item() - expected.mean()) < 0.1
