"""CALIBRATE: Hessians against the float64 reference."""

import numpy as np
import pytest
import reference
import torch
import toy

import train_gpt as tg


def test_keys_share_what_matrices_share():
    keys = {n: tg.hessian_key(n) for n in ("blocks.3.attn.c_q.weight", "blocks.3.attn.c_k.weight", "blocks.3.attn.c_v.weight",
                                           "blocks.3.attn.proj.weight", "blocks.10.mlp.fc.weight", "blocks.0.mlp.proj.weight",
                                           "tok_emb.weight", "lm_head.weight")}
    assert list(keys.values()) == ["blocks.3.attn"] * 3 + ["blocks.3.attn.proj", "blocks.10.mlp.fc", "blocks.0.mlp.proj", "head", "head"]


@pytest.mark.parametrize("settings", [{}, dict(PARALLEL_START_LAYER=0, PARALLEL_RESIDUAL_START=3, TIE_EMBEDDINGS=0)])
def test_hessians_equal_their_definition(settings):
    """Sum over positions and passes of x x^T, divided by the batches; the first batches of the training stream."""
    c = toy.config(TRAIN_BATCH_TOKENS=40, TRAIN_SEQ_LEN=16, **settings)
    model = toy.model(c)
    shard = toy.row(500, range(0, 500, 13))
    actual = tg.collect_hessians(toy.run(c), model, [shard], 3)
    weights = {n: p.detach() for n, p in tg.export_weights(dict(model.named_parameters()), c.num_layers).items()}
    network, expected = reference.Reference(weights, c), {}

    def record(name, x):
        for row in x:
            expected[name] = expected.get(name, 0) + np.outer(row, row) / 3

    for batch in range(3):
        span = shard[batch * 41: (batch + 1) * 41]
        network.losses(span[:-1].tolist(), span[1:].tolist(), 16, record=record)
    assert actual.keys() == expected.keys()
    for name, h in expected.items():
        error = np.abs(actual[name].double().numpy() - h).max() / np.abs(h).max()
        assert error < 1e-4, (name, error)          # float32 activations through 10 passes


def test_calibration_leaves_the_model_alone():
    c = toy.config()
    model = toy.model(c)
    before = [p.detach().clone() for p in model.parameters()]
    tg.collect_hessians(toy.run(c), model, [toy.row(1000)], 1)
    assert all(torch.equal(p, b) and p.grad is None for p, b in zip(model.parameters(), before))
    assert torch.is_grad_enabled()


def test_matmul_precision_is_put_back():
    before = torch.get_float32_matmul_precision()
    with pytest.raises(ZeroDivisionError), tg.matmul_precision("high"):
        assert torch.get_float32_matmul_precision() == "high"
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == before
