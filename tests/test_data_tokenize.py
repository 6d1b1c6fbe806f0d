"""JSON lines to shards: round trips, restarts, faults, memory."""

import gzip
import itertools
import json
import lzma
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
import sentencepiece as spm
import tokenize_docs
from caseops import CONTROLS, decode
from shards import DataError, documents, list_shards, read_shard, sha256_file

NASTY = [
    "Emoji 😀👩‍👩‍👧 and FLAGS 🇩🇪, McDonald's iPhone NASA.",
    "中文文本，沒有空格。日本語テキスト",
    "tabs\tand\nnewlines\r\n\n and   several  spaces ",
    "ends in spaces   ",
    "markers " + "".join(CONTROLS) + " in the text, A" + CONTROLS[0] + "B",
    "compatibility: ﬁRST … ² Ａ ™ \u00a0 e\u0301 \u3000x",
    "▁ lower one eighth block",
    "\x00\x01 controls <s> </s> <0x41> <unk>",
    "I",
]


def text_documents(folder, repeat=1):
    """The sample's validation documents and the nasty ones, shuffled."""
    sp = spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    texts = [sp.decode(d.tolist()) for d in documents(read_shard(folder / "fineweb_val_000000.bin"))]
    texts = (texts + NASTY) * repeat
    random.Random(3).shuffle(texts)
    return texts


def write_lines(path, texts):
    path.write_text("".join(json.dumps(t if i % 2 else {"text": t, "id": i}) + "\n" for i, t in enumerate(texts)))
    return path


@pytest.fixture(scope="module")
def texts(data_sample):
    return text_documents(data_sample)


@pytest.fixture(scope="module")
def docs(texts, tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("docs") / "docs.jsonl", texts)


def contents(folder):
    """Every visible file of an output folder."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}


def decoded(folder, split):
    sp = spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return [sp.decode(d.tolist()) for path in list_shards(folder, split) for d in documents(read_shard(path))]


@pytest.mark.parametrize("caseops", [False, True])
def test_round_trip(caseops, texts, docs, data_sample, data_sample_caseops, data_run, tmp_path):
    tokenizer = (data_sample_caseops if caseops else data_sample) / "tokenizer.model"
    out = tmp_path / "out"
    options = ["--caseops"] if caseops else []
    result = data_run("tokenize_docs.py", "--docs", docs, "--tokenizer", tokenizer, "--out", out,
                      "--val-docs", 40, "--shard-tokens", 9000, *options)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "not comparable" in result.stderr
    expected = [t.replace("▁", " ") for t in texts]  # U+2581 is SentencePiece's own sign for a space
    text_of = decode if caseops else str
    assert [text_of(t) for t in decoded(out, "val")] == expected[:40]
    assert [text_of(t) for t in decoded(out, "train")] == expected[40:]
    train = list_shards(out, "train")
    assert len(train) > 3 and all(len(read_shard(path)) <= 9000 for path in train)

    state = json.loads((out / "manifest.json").read_text())["state"]
    assert all(sha256_file(out / name) == entry["sha256"] for name, entry in state["files"].items())
    assert sum(e.get("documents", 0) for e in state["files"].values()) == len(texts)
    val = state["files"]["fineweb_val_000000.bin"]
    assert val["raw_bytes"] == sum(len(t.encode()) for t in texts[:40])
    assert val["normalized_bytes"] == sum(len(t.encode()) for t in expected[:40])
    assert sum(e.get("raw_bytes", 0) for e in state["files"].values()) == sum(len(t.encode()) for t in texts)
    assert not (out / "progress.json").exists() and not list(out.glob(".*.tmp"))

    sidecars = list_shards(out, "val_bytes")
    assert len(sidecars) == caseops
    if caseops:
        counts, tokens, at = read_shard(sidecars[0]), read_shard(out / "fineweb_val_000000.bin"), 0
        assert len(counts) == len(tokens)
        for document, text in zip(documents(tokens), expected):
            assert int(counts[at]) == 0
            assert int(counts[at : at + len(document)].sum()) == len(text.encode())
            at += len(document)


def test_normalisation_is_counted(data_run, tmp_path):
    texts = ["Two  spaces, and\n\n\nlines. " * 3 + "…", "plain"] + [f"training document {i} " * 20 for i in range(200)]
    docs = write_lines(tmp_path / "d.jsonl", texts)
    out = tmp_path / "out"
    result = data_run("tokenize_docs.py", "--docs", docs, "--train-tokenizer", "--vocab-size", 320, "--out", out,
                      "--val-docs", 2, "--caseops")  # fmt: skip
    assert result.returncode == 0, result.stderr
    sp = spm.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
    assert sp.vocab_size() == 320 and all(sp.decode([sp.piece_to_id(c)]) == c for c in CONTROLS)
    val = json.loads((out / "manifest.json").read_text())["state"]["files"]["fineweb_val_000000.bin"]
    change = val["changed_by_normalization"]
    raw = sum(len(t.encode()) for t in texts[:2])
    assert val["raw_bytes"] == raw
    assert val["normalized_bytes"] == len("Two spaces, and lines. ") * 3 + 3 + len("plain")
    assert change == {"bytes": val["normalized_bytes"] - raw, "by_white_space": -9, "by_characters": 0}
    assert int(read_shard(out / "fineweb_val_bytes_000000.bin").sum()) == val["normalized_bytes"]


def test_tokenizer_never_sees_validation(tmp_path):
    docs = write_lines(tmp_path / "d.jsonl", ["", "val one", "  ", "val two", "Train One", "train two", "train three"])
    encoded = list(tokenize_docs.tokenizer_text([docs], 2, True, 1))
    assert encoded == ["\ue001train \ue001one", "train two", "train three"]
    assert list(tokenize_docs.tokenizer_text([docs], 2, False, 15e-6)) == ["Train One", "train "]


def test_compressed_several_files_and_any_number_of_processes(docs, data_sample, data_run, tmp_path):
    lines = docs.read_bytes().splitlines(keepends=True)
    first, second = b"".join(lines[:100]), b"".join(lines[100:])
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(first))
    (tmp_path / "b.jsonl.xz").write_bytes(lzma.compress(second.rstrip(b"\n")))
    common = ["--tokenizer", data_sample / "tokenizer.model", "--val-docs", 40, "--shard-tokens", 9000]
    results = {}
    for name, paths, processes in (
        ("plain", [docs], 1),
        ("compressed", [tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl.xz"], 3),
    ):
        out = tmp_path / name
        result = data_run("tokenize_docs.py", "--docs", *paths, "--out", out, "--processes", processes, *common)
        assert result.returncode == 0, result.stderr
        results[name] = {k: v for k, v in contents(out).items() if k.endswith(".bin")}
    assert results["plain"] == results["compressed"]
    damaged = tmp_path / "c.jsonl.gz"
    damaged.write_bytes((tmp_path / "a.jsonl.gz").read_bytes()[:-500])
    result = data_run("tokenize_docs.py", "--docs", damaged, "--out", tmp_path / "x", *common)
    assert result.returncode == 2 and f"{damaged}: damaged or truncated" in result.stderr


def test_zst(docs, data_sample, data_run, tmp_path):
    packed = tmp_path / "docs.jsonl.zst"
    try:
        from compression import zstd as module
    except ImportError:
        module = pytest.importorskip("zstandard")
    packed.write_bytes(module.compress(docs.read_bytes()))
    out = tmp_path / "out"
    common = ["--tokenizer", data_sample / "tokenizer.model", "--val-docs", 40]
    result = data_run("tokenize_docs.py", "--docs", packed, "--out", out, *common)
    assert result.returncode == 0, result.stderr
    assert len(decoded(out, "val") + decoded(out, "train")) == len(docs.read_text().splitlines())


def test_empty_documents_and_lone_surrogates(data_sample, data_run, tmp_path):
    docs = tmp_path / "d.jsonl"
    docs.write_text('""\n"one"\n\n{"text": "tw\\ud800o"}\n"   "\n"three \\ud83d\\ude00"\n"four"\n')
    out = tmp_path / "out"
    result = data_run("tokenize_docs.py", "--docs", docs, "--tokenizer", data_sample / "tokenizer.model",
                      "--out", out, "--val-docs", 2)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert decoded(out, "val") == ["one", "tw\ufffdo"]
    assert decoded(out, "train") == ["   ", "three 😀", "four"]  # this tokenizer keeps spaces
    state = json.loads((out / "manifest.json").read_text())["state"]
    assert (state["empty_documents"], state["documents_with_lone_surrogates"]) == (2, 1)


@pytest.mark.parametrize(
    "line, message",
    [
        ("{not json", "line 3: not JSON"),
        ("[1]", 'line 3: expected a JSON string or an object with a string "text"'),
        ('{"content": "x"}', "line 3: expected"),
        ('{"text": 7}', "line 3: expected"),
    ],
)
def test_bad_lines_are_named(line, message, data_sample, data_run, tmp_path):
    docs = tmp_path / "d.jsonl"
    docs.write_text(f'"a"\n"b"\n{line}\n"c"\n')
    out = tmp_path / "out"
    result = data_run("tokenize_docs.py", "--docs", docs, "--tokenizer", data_sample / "tokenizer.model",
                      "--out", out, "--val-docs", 1, "--processes", 2)  # fmt: skip
    assert result.returncode == 2
    assert f"{docs} {message}" in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr
    assert not list(out.glob("fineweb_*"))


def test_refusals(docs, texts, data_sample, data_sample_caseops, data_run, tmp_path):
    plain, caseops = data_sample / "tokenizer.model", data_sample_caseops / "tokenizer.model"
    no_bos, no_bytes = tmp_path / "no_bos.model", tmp_path / "no_bytes.model"
    for path, options in ((no_bos, dict(byte_fallback=True, bos_id=2, eos_id=1)), (no_bytes, {})):
        with open(path, "wb") as f:
            spm.SentencePieceTrainer.train(
                sentence_iterator=iter(texts), model_writer=f, model_type="bpe", vocab_size=400, minloglevel=2,
                **options,
            )  # fmt: skip
    out = tmp_path / "out"
    for options, message in [
        (["--tokenizer", plain, "--caseops"], "U+E001 is no piece: not a CaseOps tokenizer"),
        (["--tokenizer", no_bos], f"{no_bos}: BOS id 2, expected 1"),
        (["--tokenizer", no_bytes], "no byte pieces"),
        (["--tokenizer", docs], f"{docs}: not a SentencePiece model"),
        (["--tokenizer", tmp_path / "none"], "not a SentencePiece model (No such file or directory)"),
        ([], "expected either --tokenizer MODEL or --train-tokenizer"),
        (["--tokenizer", plain, "--train-tokenizer"], "expected either"),
        (["--tokenizer", plain, "--val-docs", len(texts)], "nothing is left for training"),
        (["--tokenizer", plain], f"{len(texts)} documents, all of them validation (--val-docs 50000)"),
        (["--tokenizer", plain, "--val-docs", -1], "--val-docs -1: expected at least 0"),
        (["--train-tokenizer", "--vocab-size", 60_000, "--val-docs", 40], "SentencePiece refused"),
        (["--train-tokenizer", "--val-docs", len(texts)], f"all documents are validation: lower --val-docs {len(texts)}"),
        *((["--train-tokenizer", "--tokenizer-mb", mb], f"--tokenizer-mb {mb}: expected a number above 0") for mb in ("nan", "inf", "0.0")),
        (["--tokenizer", plain, "--docs", tmp_path / "none"], "none: no such file"),
    ]:
        result = data_run("tokenize_docs.py", "--docs", docs, "--out", out, *options)
        assert result.returncode == 2, message
        last = result.stderr.splitlines()[-1]
        assert last.startswith("error: ") and message in last and "Traceback" not in result.stderr, result.stderr
        assert not out.exists() or not list(out.glob("fineweb_*")), message

    # What others put there is never touched, nor what was made with other settings.
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "fineweb_val_000000.bin").write_bytes(b"mine")
    common = ["--docs", docs, "--tokenizer", caseops]
    result = data_run("tokenize_docs.py", *common, "--out", foreign, "--val-docs", 40)
    assert result.returncode == 2 and "already there and not made by this command" in result.stderr
    assert contents(foreign) == {"fineweb_val_000000.bin": b"mine"}
    assert data_run("tokenize_docs.py", *common, "--out", out, "--val-docs", 40).returncode == 0
    before = contents(out)
    result = data_run("tokenize_docs.py", *common, "--out", out, "--val-docs", 41)
    assert result.returncode == 2 and "made with val_docs 40, now 41" in result.stderr
    result = data_run("tokenize_docs.py", *common, "--out", out, "--val-docs", 40)
    assert result.returncode == 0 and "complete already" in result.stdout
    assert contents(out) == before


def test_other_text_of_the_same_size_is_another_input(data_sample, data_run, tmp_path):
    docs = write_lines(tmp_path / "d.jsonl", ["one", "two"])
    common = ["--docs", docs, "--tokenizer", data_sample / "tokenizer.model", "--out", tmp_path / "out", "--val-docs", 1]
    assert data_run("tokenize_docs.py", *common).returncode == 0
    write_lines(docs, ["one", "six"])
    result = data_run("tokenize_docs.py", *common)
    assert result.returncode == 2 and "made with docs" in result.stderr and sha256_file(docs) in result.stderr


def test_kill_in_the_middle_then_the_same_bytes(data_sample, data_sample_caseops, data_run, tmp_path):
    # With half a surrogate pair in each, so that a count that is off by one after a restart shows in the manifest.
    docs = write_lines(tmp_path / "d.jsonl", [text + " \ud83d" for text in text_documents(data_sample, repeat=60)])
    common = ["--docs", docs, "--tokenizer", data_sample_caseops / "tokenizer.model", "--caseops",
              "--val-docs", 500, "--shard-tokens", 200_000, "--processes", 2]  # fmt: skip
    whole, out = tmp_path / "whole", tmp_path / "killed"
    assert data_run("tokenize_docs.py", *common, "--out", whole).returncode == 0
    script = tokenize_docs.__file__
    kills = 0
    for shards_seen in (1, 4):
        process = subprocess.Popen([sys.executable, script, *map(str, common), "--out", str(out)],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        while process.poll() is None and len(list(out.glob("fineweb_train_*.bin"))) < shards_seen:
            time.sleep(0.002)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        complete = contents(out)
        for name in complete:
            if name.endswith(".bin"):
                assert complete[name] == contents(whole)[name]  # a part never has a name
    assert kills == 2
    result = data_run("tokenize_docs.py", *common, "--out", out)
    assert result.returncode == 0, result.stderr
    assert "going on after line" in result.stdout
    assert contents(out) == contents(whole)
    assert not list(out.glob(".*.tmp"))


def test_changed_shards_are_not_built_upon(data_sample, docs, data_run, tmp_path):
    out = tmp_path / "out"
    common = ["--docs", docs, "--tokenizer", data_sample / "tokenizer.model", "--out", out, "--val-docs", 40]
    assert data_run("tokenize_docs.py", *common).returncode == 0
    shard = out / "fineweb_train_000000.bin"
    raw = bytearray(shard.read_bytes())
    raw[2000] ^= 1
    shard.write_bytes(raw)
    result = data_run("tokenize_docs.py", *common)
    assert result.returncode == 2 and f"{shard}: changed since it was made" in result.stderr


class Deadly:
    """Ends the worker process that unpickles it, as the system does when memory runs out."""

    first = 0

    def __reduce__(self):
        return os._exit, (9,)


def test_dead_worker_is_one_line(data_sample):
    stream = tokenize_docs.tokenized(iter([Deadly()]), data_sample / "tokenizer.model", False, 0, 2)
    with pytest.raises(DataError, match="a worker process died"):
        list(stream)


def test_full_disk_is_one_line_and_can_be_gone_on_from(docs, data_sample, data_run, tmp_path):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
    out, whole = tmp_path / "out", tmp_path / "whole"
    common = ["--docs", docs, "--tokenizer", data_sample / "tokenizer.model", "--val-docs", 40]
    result = data_run("tokenize_docs.py", *common, "--out", out, preexec_fn=limit)
    assert result.returncode == 2
    last = result.stderr.splitlines()[-1]
    assert last == f"error: {out / 'fineweb_train_000000.bin'}: cannot be written (File too large)"
    assert "Traceback" not in result.stderr
    assert [p.name for p in out.glob("fineweb_*")] == ["fineweb_val_000000.bin"] and not list(out.glob(".*.tmp"))
    assert data_run("tokenize_docs.py", *common, "--out", out).returncode == 0
    assert data_run("tokenize_docs.py", *common, "--out", whole).returncode == 0
    assert contents(out) == contents(whole)


def test_input_is_read_only_a_few_batches_ahead(data_sample):
    line = json.dumps("some text").encode()
    read = []

    def endless():
        for i in itertools.count():
            read.append(i)
            yield tokenize_docs.Batch("x", i + 1, i, [line])

    stream = tokenize_docs.tokenized(endless(), data_sample / "tokenizer.model", False, 0, 2)
    for i, (batch, (documents_, _, _)) in enumerate(itertools.islice(stream, 20)):
        assert batch.first == i == documents_[0].line  # in order
        assert len(read) <= i + 1 + 2 * 2
    stream.close()


def test_memory_does_not_grow_with_the_corpus(data_sample, tmp_path):
    # Measured by a small process in between: a child's peak begins at that of the process that forked it.
    measure = "import os, sys; _, status, usage = os.wait4(os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ), 0); "
    measure += "print(status, usage.ru_maxrss)"
    peaks, sizes = [], []  # bytes
    for repeat in (60, 300):
        docs = write_lines(tmp_path / f"{repeat}.jsonl", text_documents(data_sample, repeat))
        options = ["--docs", docs, "--out", tmp_path / str(repeat), "--tokenizer", data_sample / "tokenizer.model",
                   "--val-docs", 100, "--processes", 1]  # fmt: skip
        command = [sys.executable, "-c", measure, sys.executable, tokenize_docs.__file__, *map(str, options)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        status, peak = map(int, output.splitlines()[-1].split())
        assert status == 0
        peaks.append(1024 * peak)
        sizes.append(docs.stat().st_size)
    # Even the tokens alone, if kept, would take 0.8 bytes for each byte of text.
    assert peaks[1] - peaks[0] < 0.5 * (sizes[1] - sizes[0]), (peaks, sizes)
