"""The shard format and the sample set."""

import shutil
import struct

import numpy as np
import pytest
import sample
import sentencepiece as spm
import shards
from caseops import decode, without_markers
from shards import BOS_ID, AtomicFile, DataError, documents, list_shards, read_header, read_shard, write_shard


def test_bytes_of_a_shard(tmp_path):
    path = tmp_path / "fineweb_val_000000.bin"
    write_shard(path, [1, 300, 65535])
    expected = struct.pack("<256i", 20240520, 1, 3, *[0] * 253) + struct.pack("<3H", 1, 300, 65535)
    assert path.read_bytes() == expected
    assert read_header(path) == 3
    assert read_shard(path).tolist() == [1, 300, 65535]
    write_shard(path, [])
    assert read_shard(path).tolist() == []


@pytest.mark.parametrize(
    "fault, message",
    [
        (lambda raw: raw[:500], "500 bytes, expected at least the 1024"),
        (lambda raw: raw[:-1], r"1029 bytes, expected 1024 \+ 2 x 3 = 1030"),
        (lambda raw: raw + b"\0\0", "1032 bytes, expected"),
        (lambda raw: b"\1" + raw[1:], "expected 20240520"),
        (lambda raw: raw[:4] + b"\7" + raw[5:], "shard version 7, expected 1"),
        (lambda raw: raw[:8] + b"\xff\xff\xff\xff" + raw[12:], "expected"),
    ],
)
def test_faults_name_the_file_and_what_was_expected(tmp_path, fault, message):
    path = tmp_path / "fineweb_train_000000.bin"
    write_shard(path, [1, 2, 3])
    path.write_bytes(fault(path.read_bytes()))
    with pytest.raises(DataError, match=f"{path}.*{message}"):
        read_shard(path)


def test_missing_file_and_values_that_do_not_fit(tmp_path):
    with pytest.raises(DataError, match="nowhere.bin: cannot be read"):
        read_shard(tmp_path / "nowhere.bin")
    for values in ([1, 65536], [-1]):
        with pytest.raises(DataError, match="do not fit"):
            write_shard(tmp_path / "x.bin", values)
    assert list(tmp_path.iterdir()) == []


def test_documents_begin_with_bos():
    assert [d.tolist() for d in documents(np.array([1, 5, 6, 1, 1, 7]))] == [[1, 5, 6], [1], [1, 7]]
    assert list(documents(np.array([]))) == []
    with pytest.raises(DataError, match="begin with id 5, expected every document to begin with BOS = 1"):
        list(documents(np.array([5, 1, 2])))


def test_listing_keeps_sidecars_apart(tmp_path):
    for name in ("fineweb_val_000000.bin", "fineweb_val_bytes_000000.bin", "fineweb_train_000010.bin",
                 "fineweb_train_000002.bin", "other.bin", ".fineweb_val_000001.bin.7.tmp"):  # fmt: skip
        (tmp_path / name).touch()
    names = {split: [p.name for p in list_shards(tmp_path, split)] for split in ("train", "val", "val_bytes")}
    assert names == {
        "train": ["fineweb_train_000002.bin", "fineweb_train_000010.bin"],
        "val": ["fineweb_val_000000.bin"],
        "val_bytes": ["fineweb_val_bytes_000000.bin"],
    }


def test_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError):
        with AtomicFile(path) as f:
            f.write(b"new")
            _ = 1 / 0
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


# --- sample set -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["data_sample", "data_sample_caseops"])
def test_sample_set(name, request):
    folder = request.getfixturevalue(name)
    sp = spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert sp.bos_id() == BOS_ID and sp.vocab_size() == 1024
    train = read_shard(folder / "fineweb_train_000000.bin")
    val = read_shard(folder / "fineweb_val_000000.bin")
    assert int(train.max()) < 1024 and int(val.max()) < 1024
    assert 35_000 < len(val) < 65_000 < 200_000 < len(train)
    train_documents = {d.tobytes() for d in documents(train)}
    val_documents = [d.tobytes() for d in documents(val)]
    assert len(val_documents) > 100
    assert not train_documents.intersection(val_documents)
    lengths = sorted(len(d) // 2 for d in val_documents)
    assert lengths[0] < 40 and sum(length > 256 for length in lengths) > 10
    assert not any(sp.decode(d.tolist())[0].isspace() for d in documents(val))


def test_sample_sidecar_and_same_text(data_sample, data_sample_caseops):
    plain, caseops = (
        spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        for folder in (data_sample, data_sample_caseops)
    )
    val = read_shard(data_sample_caseops / "fineweb_val_000000.bin")
    counts = read_shard(data_sample_caseops / "fineweb_val_bytes_000000.bin")
    assert len(val) == len(counts)
    texts = [plain.decode(d.tolist()) for d in documents(read_shard(data_sample / "fineweb_val_000000.bin"))]
    at = 0
    for document, text in zip(documents(val), texts, strict=True):
        encoded = caseops.decode(document.tolist())
        assert decode(encoded) == text
        assert int(counts[at]) == 0
        size = int(counts[at : at + len(document)].sum())
        assert size == len(text.encode()) == len(without_markers(encoded).encode())
        at += len(document)


def test_sample_is_deterministic_and_skips_work(data_sample, data_run, tmp_path):
    out = tmp_path / "again"
    result = data_run("sample.py", "--out", out)
    assert result.returncode == 0 and "up to date" not in result.stdout
    contents = {p.name: p.read_bytes() for p in data_sample.iterdir()}
    assert {p.name: p.read_bytes() for p in out.iterdir()} == contents
    stamps = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    assert data_run("sample.py", "--out", out).stdout == f"{out}: up to date\n"
    assert stamps == {p: p.stat().st_mtime_ns for p in out.iterdir()}


def test_sample_that_does_not_match_is_made_again(data_sample, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(data_sample, out)
    described = sample.describe(1024, False)
    assert sample.up_to_date(out, described)
    for other in (sample.describe(512, False), sample.describe(1024, True), {**described, "python": "CPython 2.7"}):
        assert not sample.up_to_date(out, other)
    for name in ("fineweb_val_000000.bin", "tokenizer.model", "manifest.json"):
        whole = (out / name).read_bytes()
        (out / name).write_bytes(whole[:-2])
        assert not sample.up_to_date(out, described), name
        (out / name).unlink()
        assert not sample.up_to_date(out, described), name
        (out / name).write_bytes(whole)
    assert sample.up_to_date(out, described)


def test_sample_refuses_other_vocabularies(data_run, tmp_path):
    result = data_run("sample.py", "--out", tmp_path / "x", "--vocab-size", 8192)
    assert result.returncode == 2
    assert result.stderr == "error: --vocab-size 8192: expected 512 to 1024\n"
    assert not (tmp_path / "x").exists()


def test_scripts_have_help_and_start_without_torch(data_run):
    for script in ("sample.py", "download.py", "tokenize_docs.py", "verify.py", "caseops.py"):
        result = data_run(script, "--help")
        assert result.returncode == 0 and "usage:" in result.stdout, script
        assert "import torch" not in (shards.Path(shards.__file__).parent / script).read_text()
