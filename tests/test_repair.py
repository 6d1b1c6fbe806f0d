"""REPAIR: LQER's factors, their coding, which matrices get them, and the way back."""

import pytest
import test_quantize_rules as rules
import torch
import toy

import train_gpt as tg


def test_asymmetric_factors_are_the_documents_integers():
    """A: int2 with one scale max|A| / 1.5, values -2 .. 1. B: int4 in groups of 64, scale max / 7.5, values -8 .. 7."""
    a, b = torch.randn(40, 4), torch.randn(4, 96)
    code = tg.code_factor(a, 2, a.numel())
    assert len(code.step) == 1 and code.step.item() == pytest.approx(a.abs().max().item() / 1.5, rel=1e-3)
    assert torch.equal(code.q, (a / code.step.float()).round().clamp(-2, 1).to(torch.int8))
    code = tg.code_factor(b, 4, 64)
    groups = b.reshape(-1, 64)
    assert torch.allclose(code.step.float(), groups.abs().amax(1) / 7.5, rtol=1e-3)
    assert torch.equal(code.q.view(-1, 64), (groups / code.step.float()[:, None]).round().clamp(-8, 7).to(torch.int8))
    assert (code.decode() - b).abs().max() <= 1.01 * code.step.float().max()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_symmetric_factors_have_a_scale_for_each_row(bits):
    x = torch.randn(5, 33)
    code = tg.code_factor(x, bits)
    assert len(code.step) == 5 and code.q.abs().max() <= tg.largest(bits)
    assert (code.decode() - x).abs().max() <= 0.51 * code.step.float().max() + 1e-3


def test_low_rank_is_the_truncated_svd():
    e = torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(e)
    for rank in (1, 4, 20):
        a, b = tg.low_rank(e, rank)
        assert torch.allclose(a @ b, u[:, :rank] @ torch.diag(s[:rank]) @ v[:rank], atol=1e-4)


@pytest.mark.parametrize("settings", [dict(), dict(LQER_ASYM_ENABLED=0), dict(CLIP_RULE="fisher"),
                                      dict(CLIP_RULE="fisher", QUANTIZER="trellis8"),
                                      dict(LQER_RANK=1000), dict(LQER_ASYM_GROUP=4096), dict(LQER_TOP_K=0), dict(LQER_TOP_K=99)])
def test_repaired_codes_survive_every_quick_coder_and_help(monkeypatch, tmp_path, settings):
    """A rank above the matrix's, a group larger than the tensor, no tensor, more tensors than there are."""
    calibration, names = rules.known()
    given = {"CLIP_RULE": "hand", "QUANTIZER": "scalar", "LQER_ENABLED": 1, "MATRIX_BITS": 3, **settings}
    plain = rules.quantizer(calibration, monkeypatch, **{**given, "LQER_ENABLED": 0})(1.0)
    q = rules.quantizer(calibration, monkeypatch, **given)
    coded = q(1.0)
    repaired = [n for n in names if n + ".lqer_a" in coded]
    assert len(repaired) == min(int(given.get("LQER_TOP_K", 3)), len(names))
    restored = tg.restore(coded)
    assert list(restored) == list(tg.restore(plain))
    for n in repaired:
        a, b = coded[n + ".lqer_a"], coded[n + ".lqer_b"]
        assert a.q.shape[1] == b.q.shape[0] == min(int(given.get("LQER_RANK", 4)), 64)
        if given.get("LQER_ASYM_GROUP") == 4096 or given.get("LQER_ASYM_ENABLED") == 0:
            assert len(b.step) == len(b.q) and b.bits == 4
        assert torch.allclose(restored[n], coded[n].decode() + a.decode() @ b.decode())
    for coder in ("entropy", "lzma"):
        path = tmp_path / coder
        path.write_bytes(tg.write_artifact(coded, toy.config(COMPRESSOR=coder)))
        back = tg.restore(tg.read_artifact(path, toy.config()))
        assert all(torch.equal(back[n], restored[n]) for n in restored)


def test_the_worst_are_chosen_by_the_norm(monkeypatch):
    calibration, names = rules.known()
    coded = rules.quantizer(calibration, monkeypatch, CLIP_RULE="hand", LQER_ENABLED=1, LQER_TOP_K=2)(1.0)
    size = {n: (calibration.weights[n] - coded[n].decode()).norm().item() for n in names}
    assert {n for n in names if n + ".lqer_a" in coded} == set(sorted(names, key=size.get)[-2:])
