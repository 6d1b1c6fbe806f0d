"""CODER: every compressor gives back exactly what went in; sizes; entropy."""

import lzma
import math
import shutil
import tracemalloc

import brotli
import numpy as np
import pytest
import torch
import toy
from hypothesis import given
from hypothesis import strategies as st

import train_gpt as tg

QUICK = [name for name in tg.COMPRESSORS if name != "pergroup"]
needs_lrzip = pytest.mark.skipif(not shutil.which("lrzip"), reason="needs the lrzip program")
ALL = [pytest.param(name, marks=[needs_lrzip] if name == "pergroup" else []) for name in tg.COMPRESSORS]


def same(a, b):
    """Equal codes, order included; float16 by bits (NaN and -0 too)."""
    assert list(a) == list(b)
    for name, x in a.items():
        y = b[name]
        assert type(x) is type(y), name
        if isinstance(x, tg.IntTensor):
            assert x.bits == y.bits and torch.equal(x.q, y.q) and y.q.dtype == torch.int8, name
            x, y = x.step, y.step
        else:
            x, y = x.values, y.values
        assert x.shape == y.shape and x.dtype == y.dtype == torch.float16
        assert torch.equal(x.contiguous().view(torch.int16), y.contiguous().view(torch.int16)), name
    return True


def int_tensor(rng, rows, columns, bits=6, spread=None):
    limit = tg.largest(bits)
    q = np.clip(np.rint(rng.normal(size=(rows, columns)) * (spread or limit / 4)), -limit, limit).astype(np.int8)
    return tg.IntTensor(torch.from_numpy(q), torch.from_numpy(np.exp(rng.normal(size=rows)).astype(np.float16)), bits)


def codes(seed=0, size=40):
    """Codes as quantize makes them: several layers of each role, gates, scales, scalars."""
    rng = np.random.default_rng(seed)
    out = {"tok_emb.weight": int_tensor(rng, 3 * size, size, 7)}
    for i in range(3):
        out[f"blocks.{i}.attn.c_q.weight"] = int_tensor(rng, size, size)
        out[f"blocks.{i}.attn.attn_gate_w"] = int_tensor(rng, 4, 8, 8)
        out[f"blocks.{i}.attn_scale"] = tg.HalfTensor(torch.from_numpy(rng.normal(size=size).astype(np.float16)))
        out[f"blocks.{i}.mlp.fc.weight"] = int_tensor(rng, 2 * size, size, 5)
    out["smear_lambda"] = tg.HalfTensor(torch.tensor([0.25]).half())
    out["parallel_post_lambdas"] = tg.HalfTensor(torch.ones(3, 2, 2).half())
    return out


def round_trip(coded, compressor, folder=None):
    return tg.decode(tg.encode(coded, compressor, folder), tg.specs_of(coded), compressor, folder)


@pytest.mark.parametrize("compressor", ALL)
def test_round_trip(compressor, tmp_path, monkeypatch):
    monkeypatch.setattr(tg, "SMALLEST_QUANTISED", 1000)         # so that pergroup uses lrzip
    coded = codes()
    assert same(round_trip(coded, compressor, tmp_path), coded)
    assert not list(tmp_path.iterdir())


@st.composite
def any_codes(draw):
    """Random names in random order, shapes from 1 upward, bits, extreme values, constant tensors, odd float16."""
    out = {}
    rng = np.random.default_rng(draw(st.integers(0, 2 ** 32)))
    for _ in range(draw(st.integers(1, 6))):
        name = draw(st.sampled_from(["tok_emb.weight", "blocks.{}.attn.c_q.weight", "blocks.{}.mlp.proj.weight", "blocks.{}.attn_scale",
                                     "blocks.{}.attn.attn_gate_w", "smear_lambda", "x"])).format(draw(st.integers(0, 11)))
        if draw(st.booleans()):
            rows, columns, bits = draw(st.integers(1, 90)), draw(st.integers(1, 40)), draw(st.integers(2, 8))
            limit = tg.largest(bits)
            kind = draw(st.sampled_from(["gauss", "flat", "zero", "extreme", "one row"]))
            q = {"gauss": lambda: np.clip(np.rint(rng.normal(size=(rows, columns)) * limit / 4), -limit, limit),
                 "flat": lambda: rng.integers(-limit, limit + 1, (rows, columns)), "zero": lambda: np.zeros((rows, columns)),
                 "extreme": lambda: rng.choice([-limit, limit], (rows, columns)),
                 "one row": lambda: np.outer(np.arange(rows) == rows - 1, rng.integers(-limit, limit + 1, columns))}[kind]()
            steps = rng.choice([2.0 ** -14, 6e-8, 0.0, 65504, 0.1, 1.5], rows) if draw(st.booleans()) else np.exp(rng.normal(size=rows))
            out[name] = tg.IntTensor(torch.from_numpy(q.astype(np.int8)), torch.from_numpy(steps.astype(np.float16)), bits)
        else:
            shape = draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
            patterns = rng.integers(0, 65536, math.prod(shape)).astype(np.uint16)
            if draw(st.booleans()):
                patterns[:] = 0x3C00            # all ones
            out[name] = tg.HalfTensor(torch.from_numpy(patterns.view(np.float16)).view(shape))
    return out


@pytest.mark.parametrize("compressor", QUICK)
@toy.hypothesis_settings(max_examples=120)
@given(any_codes())
def test_round_trip_of_anything(compressor, coded):
    """Every float16 bit pattern (NaN, infinities, -0) and every integer within the bits."""
    assert same(round_trip(coded, compressor), coded)


@needs_lrzip
@toy.hypothesis_settings(max_examples=8)
@given(any_codes())
def test_pergroup_round_trip_of_anything(tmp_path_factory, coded):
    kept, tg.SMALLEST_QUANTISED = tg.SMALLEST_QUANTISED, 100
    try:
        assert same(round_trip(coded, "pergroup", tmp_path_factory.getbasetemp()), coded)
    finally:
        tg.SMALLEST_QUANTISED = kept


def test_steps_that_serve_parts_of_rows_survive():
    """LQER factors: fewer or more steps than rows."""
    rng = np.random.default_rng(0)
    q = torch.from_numpy(rng.integers(-7, 8, (4, 32)).astype(np.int8))
    for n in (1, 2, 8, 16):
        coded = {"a": tg.IntTensor(q, torch.rand(n).half(), 4)}
        for compressor in QUICK:
            assert same(round_trip(coded, compressor), coded)
        expected = (q.float().reshape(n, -1) * coded["a"].step.float()[:, None]).view(4, 32)
        assert torch.equal(coded["a"].decode(), expected)


@pytest.mark.parametrize("compressor", ALL)
def test_wrong_sizes_and_rubbish_raise(compressor, tmp_path):
    coded = codes()
    streams, specs = tg.encode(coded, compressor, tmp_path), tg.specs_of(coded)
    for wrong in (specs[:-1], [*specs, tg.Spec("more", (3,), 0)], [specs[0]._replace(shape=(7, 7)), *specs[1:]]):
        try:
            decoded = tg.decode(streams, wrong, compressor, tmp_path)
        except Exception:
            continue
        # an adaptive coder may read something: it must not be what was written
        assert list(decoded) != list(coded) or decoded["tok_emb.weight"].q.shape != coded["tok_emb.weight"].q.shape
    for name in streams:
        with pytest.raises(Exception):                      # read_artifact turns any kind into one line
            tg.decode({**streams, name: b"rubbish"}, specs, compressor, tmp_path)


def test_a_bomb_does_not_unpack():
    """A small stream that would unpack to far more than the specs allow is stopped early."""
    specs = [tg.Spec("a", (10, 10), 6)]
    bomb = bytes(200_000_000)
    quick = {"format": lzma.FORMAT_RAW, "filters": [{"id": lzma.FILTER_LZMA2, "preset": 0}]}
    packed = {"brotli": brotli.compress(bomb, quality=1), "lzma": lzma.compress(bomb, **quick)}
    del bomb
    for compressor, stream in packed.items():
        tracemalloc.start()
        with pytest.raises(Exception):
            tg.decode({"all": stream}, specs, compressor)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 80_000_000        # lzma's own dictionary takes 67 MB


# ---------------------------------------------------------------------------------------------------------------- entropy


def test_entropy_of_known_distributions():
    fair = tg.IntTensor(torch.tensor([[-1, 1] * 8] * 4, dtype=torch.int8), torch.ones(4).half(), 6)
    assert tg.entropy_bytes({"blocks.0.attn.c_q.weight": fair}) == pytest.approx(64 / 8)
    constant = tg.IntTensor(torch.full((4, 16), 5, dtype=torch.int8), torch.ones(4).half(), 6)
    assert tg.entropy_bytes({"a": constant}) == 0
    # one table per role: two layers that differ cost the entropy of their mixture
    mixed = {"blocks.0.x": constant, "blocks.1.x": constant._replace(q=-constant.q)}
    assert tg.entropy_bytes(mixed) == pytest.approx(128 / 8)
    assert tg.entropy_bytes({"a": constant, "b": constant._replace(q=-constant.q)}) == 0
    assert tg.entropy_bytes({"a": tg.HalfTensor(torch.ones(3).half())}) == 0


@pytest.mark.parametrize("compressor", QUICK)
def test_sizes_are_near_the_entropy(compressor):
    """200,000 Gaussian integers: brotli and lzma within 15% of order 0 (they model bytes), ours within 2%."""
    rng = np.random.default_rng(0)
    coded = {f"blocks.{i}.attn.c_q.weight": int_tensor(rng, 200, 250) for i in range(4)}
    coded = {n: t._replace(step=torch.ones_like(t.step)) for n, t in coded.items()}
    size = sum(map(len, tg.encode(coded, compressor).values()))
    assert tg.entropy_bytes(coded) * 0.98 < size < tg.entropy_bytes(coded) * (1.02 if compressor == "entropy" else 1.15)


def test_coding_groups():
    assert tg.coding_group("blocks.10.attn.c_q.weight") == tg.coding_group("blocks.0.attn.c_q.weight") == "blocks.attn.c_q.weight"
    assert tg.coding_group("tok_emb.weight") == "tok_emb.weight"
