"""ARTIFACT: the container's checks, and the script that ships with it."""

import ast
import collections
import json
import pickle
import struct
import sys
import types
import zlib

import pytest
import test_coder
import torch
import toy
from hypothesis import given
from hypothesis import strategies as st

import train_gpt as tg


@pytest.fixture(scope="module")
def artifact():
    return tg.write_artifact(test_coder.codes(), toy.config(COMPRESSOR="brotli"))


def read(data, folder, **settings):
    path = folder / "model.pglf"
    path.write_bytes(data)
    return tg.read_artifact(path, toy.config(**settings))


@pytest.mark.parametrize("compressor", test_coder.QUICK)
def test_round_trip_through_a_file(tmp_path, compressor):
    coded = test_coder.codes()
    data = tg.write_artifact(coded, toy.config(COMPRESSOR=compressor))
    # the file says how it is packed: the reader's own COMPRESSOR does not matter
    assert test_coder.same(read(data, tmp_path, COMPRESSOR="lzma"), coded)


def test_equal_codes_make_equal_bytes():
    for compressor in test_coder.QUICK:
        a, b = (tg.write_artifact(test_coder.codes(), toy.config(COMPRESSOR=compressor)) for _ in range(2))
        assert a == b


@toy.hypothesis_settings(max_examples=300)
@given(st.data())
def test_every_changed_byte_is_found(artifact, tmp_path_factory, data):
    at = data.draw(st.integers(0, len(artifact) - 1))
    damaged = bytearray(artifact)
    damaged[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(tg.UserError) as e:
        read(bytes(damaged), tmp_path_factory.getbasetemp())
    assert "model.pglf is damaged" in str(e.value) and "\n" not in str(e.value) and e.value.code == 2


@toy.hypothesis_settings(max_examples=100)
@given(st.data())
def test_every_cut_and_every_tail_is_found(artifact, tmp_path_factory, data):
    keep = data.draw(st.integers(0, len(artifact) - 1))
    for wrong in (artifact[:keep], artifact + artifact[:keep] + b"x"):
        with pytest.raises(tg.UserError, match="is damaged"):
            read(wrong, tmp_path_factory.getbasetemp())


@pytest.mark.parametrize("change, words", [
    (lambda d: b"", "has 0 bytes"), (lambda d: d[:7], "has 7 bytes"), (lambda d: b"PK\x03\x04" + d[4:], "magic"),
    (lambda d: d[:4] + b"\x09\x00" + d[6:], "version is 9"), (lambda d: d[:30], "header is cut off"),
    (lambda d: d[:20] + bytes([d[20] ^ 1]) + d[21:], "header checksum"), (lambda d: d[:-1], "stream all is cut off"),
    (lambda d: d[:-5] + bytes([d[-5] ^ 1]) + d[-4:], "checksum of stream all"), (lambda d: d + b"\0", "total length")])
def test_the_damaged_field_is_named(artifact, tmp_path, change, words):
    with pytest.raises(tg.UserError, match=words):
        read(change(artifact), tmp_path)


def forge(header, streams=b""):
    """A file with right checksums around any header."""
    packed = zlib.compress(header if isinstance(header, bytes) else json.dumps(header).encode())
    return tg.ARTIFACT_HEAD.pack(tg.ARTIFACT_MAGIC, tg.ARTIFACT_VERSION, len(packed), zlib.crc32(packed)) + packed + streams


STREAM = tg.compress_brotli(b"\0" * 8)
GOOD = {"model": {}, "compressor": "brotli", "tensors": [["a", [2, 2], 6]],
        "streams": [["all", len(STREAM), zlib.crc32(STREAM)]]}


@pytest.mark.parametrize("change", [
    {}, {"model": None}, {"model": []}, {"model": "x"}, {"compressor": "zip"}, {"compressor": []}, {"compressor": None},
    {"compressor": {}}, {"tensors": None}, {"tensors": [["a"]]}, {"tensors": [["a", [2, -2], 6]]},
    {"tensors": [["a", [2.0, 2], 6]]}, {"tensors": [["a", 4, 6]]},
    {"tensors": [["a", [1 << 40, 1 << 40], 6]]}, {"tensors": [["a", [2, 2], 60]]}, {"tensors": [["a", [2, 2], 6, 3]]},
    {"tensors": [[None, [2, 2], 6]]}, {"tensors": [[["x"], [2, 2], 6]]}, {"tensors": [[5, [2, 2], 6]]}, {"tensors": [["a", [], 6]]},
    {"tensors": [["a", [2, 2], 6, 0, 7]]}, {"tensors": [["a", [2, 2], 6]] * 2}, {"tensors": {}}, {"tensors": []},
    {"streams": None}, {"streams": []}, {"streams": [["other", len(STREAM), zlib.crc32(STREAM)]]}, {"streams": [["all", -1, 0]]},
    {"streams": [["all", 1.5, 0]]}, {"streams": [[[], len(STREAM), zlib.crc32(STREAM)]]}, {"model": {"num_layers": 99}}])
def test_forged_headers_are_refused_in_one_line(tmp_path, change):
    """Checksums are right, the content is not: whatever it says, one line or tensors that match the header."""
    model = toy.model(toy.config())
    before = [p.detach().clone() for p in model.parameters()]
    try:
        coded = read(forge({**GOOD, **change}, STREAM), tmp_path)
        tg.import_weights(model, {n: t.decode() for n, t in coded.items()}, "artifact")
        raise AssertionError("a foreign artifact was taken")
    except tg.UserError as e:
        assert "\n" not in str(e) and e.code == 2
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before))


@pytest.mark.parametrize("header", [b"", b"[]", b"5", b"null", b"{", b"\xff\xfe", b"[" * 100000, b'{"tensors": 1e999}', b" " * (2 << 20)])
def test_headers_that_are_not_ours(tmp_path, header):
    with pytest.raises(tg.UserError, match="model.pglf"):
        read(forge(header), tmp_path)


def test_a_pickle_is_not_run(tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    with pytest.raises(tg.UserError, match="magic"):
        read(pickle.dumps(Attack()), tmp_path)
    assert not (tmp_path / "pwned").exists()
    names = {n.names[0].name if isinstance(n, ast.Import) else n.module for n in ast.walk(ast.parse(toy.SCRIPT.read_text()))
             if isinstance(n, (ast.Import, ast.ImportFrom))}
    assert not names & {"pickle", "marshal", "shelve", "dill"}
    assert "torch.load" not in toy.SCRIPT.read_text()


def test_another_configuration_is_named(artifact, tmp_path):
    for settings in (dict(NUM_LOOPS=1), dict(ROPE_BASE=77), dict(SMEAR_GATE_ENABLED=0)):
        name = next(iter(settings))
        with pytest.raises(tg.UserError, match=f"was made with {name}="):
            read(artifact, tmp_path, **settings)


def test_a_missing_artifact_says_what_makes_it(tmp_path):
    with pytest.raises(tg.UserError, match="nowhere.pglf cannot be read: No such file.*QUANTIZE_ONLY"):
        tg.read_artifact(tmp_path / "nowhere.pglf", toy.config())
    (tmp_path / "folder.pglf").mkdir()
    with pytest.raises(tg.UserError, match="cannot be read"):
        tg.read_artifact(tmp_path / "folder.pglf", toy.config())


def test_the_head_is_as_documented(artifact):
    magic, version, length, crc = struct.unpack_from("<4sHII", artifact)
    assert (magic, version) == (b"PGLF", 2)
    packed = artifact[14: 14 + length]
    header = json.loads(zlib.decompress(packed))
    assert zlib.crc32(packed) == crc and header["compressor"] == "brotli"
    assert sum(size for _, size, _ in header["streams"]) + 14 + length == len(artifact)


# ---------------------------------------------------------------------------------------------------------------- script


@pytest.fixture(scope="module")
def packed():
    return tg.pack_script(toy.SCRIPT.read_text())


def test_the_packed_script_is_small_and_the_same_program(packed, monkeypatch):
    """What the shipped file unpacks to has as many functions and the same table, without docstrings and comments."""
    assert len(packed) < 52_000         # what may be spent; the goal of the specification is 24,000, see the README's limits
    module = types.ModuleType("packed")
    module.__file__ = "x"
    monkeypatch.setitem(sys.modules, "packed", module)
    exec(compile(packed.replace(b'exec(compile(s,n,"exec"))', b""), "wrapper", "exec"), vars(module))
    small, full = ast.parse(module.PACKED_SOURCE), ast.parse(toy.SCRIPT.read_text())
    kinds = lambda tree: collections.Counter(type(n) for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.Lambda)))
    assert kinds(small) == kinds(full)
    kept = lambda tree: {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name.endswith("_reference")}
    assert kept(small) == kept(full)
    # (an f-string constant may hold anything: docstrings are a body's first expression)
    assert not any(ast.get_docstring(n) for n in ast.walk(small) if isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.Module)))
    knobs = lambda tree: [ast.unparse(n.target) for c in ast.walk(tree) if isinstance(c, ast.ClassDef) and len(c.body) > 100
                          for n in c.body if isinstance(n, ast.AnnAssign)]
    assert knobs(small) == knobs(full)


@given(st.one_of(st.binary(max_size=300), st.lists(st.sampled_from(b'"\\\r\n\0\x007x\xff')).map(bytes)))
def test_any_bytes_survive_between_triple_quotes(data):
    source = b'#coding:latin1\nx = """' + tg.escape(data).encode("latin1") + b'"""\n'
    scope = {}
    exec(compile(source, "literal", "exec"), scope)
    assert scope["x"].encode("latin1") == data


def test_packing_is_deterministic(packed):
    assert tg.pack_script.__wrapped__(toy.SCRIPT.read_text()) == packed


def test_shipped_code_relies_on_no_assert():
    """Minifying may strip asserts: checks must raise."""
    assert not [n.lineno for n in ast.walk(ast.parse(toy.SCRIPT.read_text())) if isinstance(n, ast.Assert)]


def test_a_packed_script_ships_itself(packed, tmp_path, monkeypatch):
    path = tmp_path / "train_gpt.py"
    path.write_bytes(packed)
    monkeypatch.setattr(tg, "PACKED_SOURCE", "small source", raising=False)
    monkeypatch.setattr(tg, "__file__", str(path))
    assert tg.shipped_script() == packed and tg.script_source() == "small source"


def test_kernels_keep_their_constants_in_the_shipped_script():
    """However a kernel is decorated: without its annotations Triton would take constants for numbers."""
    source = tg.script_source()
    assert tg.slim_source(source).count(".constexpr") == source.count(": tl.constexpr") > 40


def test_packing_leaves_nothing_on_what_all_syntax_trees_share(packed):
    """Triton deep-copies a context for every `x += y` of a kernel: with the minifier's links to its tree a kernel took 18 s."""
    shared = [node for node in ast.walk(ast.parse("x = -a + b\nx += not c\ndel x[a and b, c < d]")) if not node._fields]
    assert len(shared) > 10 and not any(node.__dict__ for node in shared)
