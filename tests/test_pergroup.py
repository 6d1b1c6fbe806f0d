"""CODER: pergroup and the lrzip program: round trip, order of rows, and a program that is missing, fails or hangs."""

import os
import shutil
import stat

import numpy as np
import pytest
import test_entropy_coder as coder
import torch
import toy

import train_gpt as tg

needs_lrzip = pytest.mark.skipif(not shutil.which("lrzip"), reason="needs lrzip")


def codes():
    return {"tok_emb.weight": coder.ints(90, 20, 1), "blocks.0.mlp.fc.weight": coder.ints(40, 20, 2), "attn_scale": tg.HalfTensor(torch.randn(7).half()),
            "blocks.1.mlp.fc.weight": coder.ints(40, 20, 3, grid=0), "blocks.0.attn.attn_gate_w": coder.ints(4, 12, 4, bits=8),
            "blocks.0.mlp.fc.weight.lqer_a": tg.code_factor(torch.randn(40, 20), 2, 800), "blocks.1.attn.proj.weight": coder.ints(30, 30)}


def fake(folder, monkeypatch, script):
    """A program called lrzip that runs `script`."""
    path = folder / "lrzip"
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin")


@needs_lrzip
def test_round_trip_leaves_nothing_behind(monkeypatch, tmp_path):
    monkeypatch.setattr(tg, "SMALLEST_QUANTISED", 500)
    coded = codes()
    streams = tg.encode(coded, "pergroup", tmp_path)
    assert set(streams) == {"tok_emb.weight", "blocks.mlp.fc.weight", "blocks.attn.proj.weight", "order", "rest"}
    assert coder.same(tg.decode(streams, tg.specs_of(coded), "pergroup", tmp_path), coded)
    assert not list(tmp_path.iterdir())


def test_round_trip_with_a_stand_in(monkeypatch, tmp_path):
    """The format alone, with a copying program for lrzip (its arguments end in -o TARGET SOURCE)."""
    fake(tmp_path, monkeypatch, 'for s; do t="$u"; u="$v"; v="$s"; done; cp "$v" "$u"\n')
    monkeypatch.setattr(tg, "SMALLEST_QUANTISED", 500)
    coded = codes()
    streams = tg.encode(coded, "pergroup", tmp_path)
    specs = tg.specs_of(coded)
    assert coder.same(tg.decode(streams, specs, "pergroup", tmp_path), coded)
    with pytest.raises(ValueError, match="holds 799 bytes"):
        tg.decode({**streams, "blocks.attn.proj.weight": streams["blocks.attn.proj.weight"][:799]}, specs, "pergroup", tmp_path)
    with pytest.raises(ValueError, match="permutation"):
        tg.decode({**streams, "order": tg.compress_brotli(bytes(2 * 170))}, specs, "pergroup", tmp_path)


def test_order_visits_nearest_rows():
    q = torch.randint(-20, 21, (300, 16), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    order = tg.similarity_order(q).astype(int)
    assert np.array_equal(np.sort(order), np.arange(300)) and order[0] == 0
    left = set(range(1, 300))
    for a, b in zip(order, order[1:]):
        distance = lambda i, a=a: (q[a].int() - q[i].int()).abs().sum().item()
        assert distance(b) == min(map(distance, left))
        left.remove(b)


def test_a_missing_program_is_found_before_training(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(tg.UserError, match="apt-get install lrzip"):
        tg.COMPRESSORS["pergroup"].probe()


def test_a_program_that_fails_is_one_line(monkeypatch, tmp_path):
    fake(tmp_path, monkeypatch, "echo something broke >&2; exit 3\n")
    with pytest.raises(tg.UserError, match=r"lrzip failed \(exit code 3\): something broke"):
        tg.lrzip(b"data", tmp_path)
    fake(tmp_path, monkeypatch, "exit 0\n")                 # says nothing, writes nothing
    with pytest.raises(tg.UserError, match="lrzip failed"):
        tg.lrzip(b"data", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["lrzip"]


def test_a_program_that_hangs_is_stopped(monkeypatch, tmp_path):
    fake(tmp_path, monkeypatch, "exec sleep 60\n")
    monkeypatch.setattr(tg, "LRZIP_SECONDS", 0.3)
    with pytest.raises(tg.UserError, match="did not finish"):
        tg.lrzip(b"data", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["lrzip"]


def test_no_room_for_its_files_is_one_line(monkeypatch, tmp_path):
    """A full disk, or a folder that cannot be written: a file in its place here."""
    monkeypatch.setattr(tg, "SMALLEST_QUANTISED", 500)
    (tmp_path / "file").write_bytes(b"")
    config = toy.config(COMPRESSOR="pergroup", ARTIFACT_DIR=str(tmp_path / "file"))
    with pytest.raises(tg.UserError, match="cannot pack with pergroup: temporary files in .*file: Not a directory"):
        tg.write_artifact(codes(), config)
    specs = tg.specs_of(codes())
    streams = {**dict.fromkeys(tg.pergroup_layout(specs)[0], b"x"), "rest": b"", "order": b""}
    monkeypatch.setattr(tg, "decompress_brotli", lambda data, size: bytes(size))
    with pytest.raises(tg.UserError, match="cannot be unpacked: temporary files in"):
        tg.decode_checked({"compressor": "pergroup", "tensors": specs}, streams, tmp_path / "file" / "model.pglf")


def test_preflight_asks_the_coder(monkeypatch, tmp_path, toy_data):
    """COMPRESSOR=pergroup without the program stops before any step."""
    monkeypatch.setenv("PATH", str(tmp_path))
    c = toy.config(COMPRESSOR="pergroup", DATA_PATH=str(toy_data), TOKENIZER_PATH=str(toy_data / "tokenizer.model"), ARTIFACT_DIR=str(tmp_path))
    with pytest.raises(tg.UserError, match="apt-get install lrzip"):
        tg.preflight(toy.run(c, tmp_path))
