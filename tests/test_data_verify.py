"""verify.py finds every planted fault, and nothing in good folders."""

import json
import shutil

import numpy as np
import pytest
from shards import BOS_ID, documents, read_shard, sidecar_name, write_shard

TRAIN, VAL, SIDECAR = "fineweb_train_000000.bin", "fineweb_val_000000.bin", sidecar_name(0)


@pytest.fixture
def folder(data_sample_caseops, tmp_path):
    """A copy of the CaseOps sample without its manifest, so that a fault is not found by its SHA-256 alone."""
    copy = tmp_path / "copy"
    shutil.copytree(data_sample_caseops, copy)
    (copy / "manifest.json").unlink()
    return copy


def tokens(folder, name):
    return np.array(read_shard(folder / name))


def alter(folder, name, change):
    values = tokens(folder, name)
    write_shard(folder / name, change(values))


def put(values, at, value):
    values[at] = value
    return values


@pytest.mark.parametrize("name", ["data_sample", "data_sample_caseops"])
def test_good_folders(name, request, data_run):
    folder = request.getfixturevalue(name)
    result = data_run("verify.py", folder)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "GOOD: 0 failures, 1 warnings" in result.stdout  # it is not the challenge's validation
    assert "documents, the challenge has 50,000" in result.stdout
    # The table's numbers, against their own count.
    manifest = json.loads((folder / "manifest.json").read_text())["files"]
    for split in ("train", "val"):
        row = next(line.split() for line in result.stdout.splitlines() if line.startswith(f"fineweb_{split}"))
        array = tokens(folder, row[0])
        assert int(row[1].replace(",", "")) == int((array == BOS_ID).sum()) == manifest[row[0]]["documents"]
        assert int(row[2].replace(",", "")) == len(array)
        assert int(row[5]) == int(array.max())
    if "caseops" in name:
        assert int(row[3].replace(",", "")) == int(read_shard(folder / SIDECAR).sum())


def overlap_of(share):
    """Put the first `share` of the validation documents, one at least, into the training shard."""

    def plant(folder):
        val = list(documents(tokens(folder, VAL)))
        alter(folder, TRAIN, lambda t: np.concatenate([t, *val[: max(1, int(share * len(val)))]]))

    return plant


def double_spaces(folder):
    """The known trap: bytes counted once more for each piece that begins with a space."""
    import sentencepiece as spm

    sp = spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    pieces = sp.id_to_piece(tokens(folder, VAL).tolist())
    alter(folder, SIDECAR, lambda c: c + np.array([p.startswith("▁") for p in pieces], dtype=np.uint16))


FAULTS = {
    "truncated": (lambda d: (d / TRAIN).write_bytes((d / TRAIN).read_bytes()[:-10]), "bytes, expected 1024 + 2 x"),
    "wrong magic": (lambda d: (d / VAL).write_bytes(b"x" + (d / VAL).read_bytes()[1:]), "expected 20240520"),
    "empty shard": (lambda d: write_shard(d / TRAIN, []), f"{TRAIN}: no tokens"),
    "id too large": (lambda d: alter(d, VAL, lambda t: put(t, 77, 1024)), f"{VAL}: id 1024 at token 77, expected less"),
    "no BOS at all": (lambda d: alter(d, TRAIN, lambda t: np.where(t == 1, 9, t)), f"{TRAIN}: no BOS (id 1)"),
    "no BOS at the start": (lambda d: alter(d, VAL, lambda t: put(t, 0, 9)), f"{VAL}: begins with id 9, expected BOS"),
    "sidecar missing": (lambda d: (d / SIDECAR).unlink(), f"{SIDECAR} is missing, expected beside {VAL}"),
    "sidecar too short": (lambda d: alter(d, SIDECAR, lambda c: c[:-1]), "one per token of"),
    "sidecar shifted": (lambda d: alter(d, SIDECAR, lambda c: np.roll(c, 1)), "counts differ from the pieces'"),
    "bytes at BOS": (lambda d: alter(d, SIDECAR, lambda c: put(c, 0, 1)), "1 BOS tokens with bytes, the first at"),
    "spaces counted twice": (double_spaces, "counts differ from the pieces'"),
    "sidecar without shard": (lambda d: shutil.copy(d / SIDECAR, d / sidecar_name(1)), "has no validation shard"),
    "gap in the numbers": (lambda d: (d / TRAIN).rename(d / "fineweb_train_000002.bin"), "train shards 0, 1 are mis"),
    "no training shards": (lambda d: (d / TRAIN).unlink(), "no fineweb_train_*.bin"),
    "no validation shards": (lambda d: (d / VAL).unlink(), "no fineweb_val_*.bin"),
    "validation in training": (overlap_of(0.8), "%) are also training documents"),
    "unfinished": (lambda d: (d / "progress.json").write_text("{}"), "has not finished this folder"),
    "changed since": (
        lambda d: (d / "manifest.json").write_text(json.dumps({"files": {TRAIN: {"sha256": "0" * 64}}})),
        f"{TRAIN} has another SHA-256",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_found(fault, folder, data_run):
    plant, message = FAULTS[fault]
    plant(folder)
    result = data_run("verify.py", folder)
    assert result.returncode == 1, result.stdout + result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("FAIL")]
    assert any(message in line for line in lines), result.stdout
    assert "BAD: " in result.stdout and "Traceback" not in result.stderr


def test_a_few_common_documents_are_a_warning(folder, data_run):
    plant = overlap_of(0.005)  # one document: crawls do repeat pages
    plant(folder)
    result = data_run("verify.py", folder)
    assert result.returncode == 0
    assert "warn overlap: 1 of" in result.stdout
    assert data_run("verify.py", folder, "--max-overlap", 0).returncode == 1


def test_documents_cut_by_a_shard_boundary_are_joined(folder, data_run):
    train, val = tokens(folder, TRAIN), list(documents(tokens(folder, VAL)))
    train = np.concatenate([train, max(val, key=len)])
    cut = len(train) - 5  # inside that document, as in the published shards
    write_shard(folder / TRAIN, train[:cut])
    write_shard(folder / "fineweb_train_000001.bin", np.concatenate([train[cut:], [1, 5, 6]]))
    result = data_run("verify.py", folder)
    assert result.returncode == 0, result.stdout
    assert "warn overlap: 1 of" in result.stdout and "BOS: begins every document" in result.stdout


def test_empty_documents_are_a_warning(folder, data_run):
    alter(folder, TRAIN, lambda t: np.concatenate([t, [1, 1]]))
    result = data_run("verify.py", folder)
    assert result.returncode == 0 and "warn BOS: 2 documents have no tokens after BOS" in result.stdout


def test_published_layout_finds_its_tokenizer_and_none_is_said(folder, data_run, tmp_path):
    place = tmp_path / "datasets" / "fineweb10B_sp8192_lossless_caps_caseops_v1_reserved"
    place.parent.mkdir()
    (tmp_path / "tokenizers").mkdir()
    model = tmp_path / "tokenizers" / "fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model"
    shutil.move(folder / "tokenizer.model", model)
    shutil.move(folder, place)
    result = data_run("verify.py", place)
    assert result.returncode == 0 and f"tokenizer {model}" in result.stdout, result.stdout
    model.unlink()
    result = data_run("verify.py", place)
    assert result.returncode == 0 and "no tokenizer and no --vocab-size: ids not checked" in result.stdout
    result = data_run("verify.py", place, "--vocab-size", 1000)
    assert result.returncode == 1 and "expected less than 1000" in result.stdout


def test_nothing_to_check(data_run, tmp_path):
    for path, message in ((tmp_path / "none", "no such folder"), (tmp_path, "no fineweb_train_NNNNNN.bin")):
        result = data_run("verify.py", path)
        assert result.returncode == 2 and message in result.stderr and result.stderr.count("\n") == 1
