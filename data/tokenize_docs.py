"""JSON lines to token shards: parallel, streaming, restartable, with the byte sidecar for CaseOps validation.

    python data/tokenize_docs.py --docs docs.jsonl.xz --tokenizer fineweb_8192_bpe.model --out data/mine
    python data/tokenize_docs.py --docs a.jsonl b.jsonl.gz --train-tokenizer --vocab-size 8192 --caseops --out data/mine

Each line is {"text": "..."} or a JSON string; .gz, .xz and .zst (Python 3.14, or the zstandard package) are read as
they are. The first --val-docs documents are validation, in one shard; the rest training, in shards of at most
--shard-tokens tokens that begin and end with whole documents. Empty documents are left out and counted. A half of a
surrogate pair (JSON can spell one, UTF-8 cannot) becomes U+FFFD and is counted.

The folder then holds fineweb_train_*.bin, fineweb_val_000000.bin, tokenizer.model, manifest.json (counts, SHA-256, and
how far the tokenizer's normalised validation text is from the raw bytes), with --caseops fineweb_val_bytes_000000.bin.
A shard appears only when complete; after a kill the same command goes on from the last complete shard (progress.json)
and ends with the same bytes as an uninterrupted run. Memory does not depend on the size of the corpus: at most a few
batches of BATCH_BYTES per process are in flight, and shards go to disk as they grow.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import fcntl
import gzip
import io
import itertools
import json
import lzma
import math
import os
import signal
import sys
import threading
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from caseops import CONTROLS, encode, keeps_leading_space, piece_byte_counts, without_markers
from shards import (
    BOS_ID,
    HEADER_BYTES,
    AtomicFile,
    DataError,
    as_entries,
    header,
    list_shards,
    read_header,
    run,
    sha256_file,
    shard_name,
    sidecar_name,
    write_json,
)

CHALLENGE_VAL_DOCS = 50_000
BATCH_BYTES = 1 << 20  # of JSON lines per task: long enough that passing it on costs nothing, short enough to stream
TRAINING_SLICE = 50_000  # characters per "sentence" for the tokenizer trainer, which drops overlong ones without a word


# --- reading --------------------------------------------------------------------------------------------------------
def open_lines(path: Path):
    """A binary file of lines, decompressed by its suffix. Raises DataError where .zst cannot be read."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(path, "rb")
    if suffix == ".xz":
        return lzma.open(path, "rb")
    if suffix == ".zst":
        try:
            from compression import zstd  # Python 3.14

            return zstd.open(path, "rb")
        except ImportError:
            pass
        try:
            import zstandard

            return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(open(path, "rb"), closefd=True))
        except ImportError:
            raise DataError(f"{path}: reading .zst needs Python 3.14 or `pip install zstandard`") from None
    return open(path, "rb")


class Batch(NamedTuple):
    """Consecutive lines of one file; `first` counts lines over all files from 0, `number` within the file from 1."""

    path: Path
    number: int
    first: int
    lines: list[bytes]


def batches(paths: list[Path], skip: int = 0) -> Iterator[Batch]:
    """The lines of all files in order, in batches of about BATCH_BYTES, without the first `skip` lines.

    Raises DataError for a file that cannot be read or decompressed.
    """
    first = 0
    for path in paths:
        lines: list[bytes] = []
        size = number = 0
        try:
            with open_lines(path) as file:
                for line in file:
                    number += 1
                    if first + len(lines) < skip:
                        first += 1
                        continue
                    lines.append(line)
                    size += len(line)
                    if size >= BATCH_BYTES:
                        yield Batch(path, number - len(lines) + 1, first, lines)
                        first += len(lines)
                        lines, size = [], 0
        except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as e:
            raise DataError(f"{path}: damaged or truncated after line {number} ({e})") from e
        except OSError as e:
            raise DataError(f"{path}: cannot be read ({e.strerror or e})") from e
        if lines:
            yield Batch(path, number - len(lines) + 1, first, lines)
            first += len(lines)


def parse(batch: Batch) -> Iterator[tuple[str, bool]]:
    """(text, whether a lone surrogate was replaced) per line; "" for blank lines.

    Raises DataError naming file and line for anything but a JSON string or an object with a string "text".
    """
    for offset, line in enumerate(batch.lines):
        if line.isspace():
            yield "", False
            continue
        try:
            value = json.loads(line)
        except ValueError as e:  # also bytes that are not UTF-8
            raise DataError(f"{batch.path} line {batch.number + offset}: not JSON ({e})") from None
        text = value.get("text") if isinstance(value, dict) else value
        if not isinstance(text, str):
            raise DataError(
                f'{batch.path} line {batch.number + offset}: expected a JSON string or an object with a string "text"'
            )
        try:
            text.encode()
            yield text, False
        except UnicodeEncodeError:
            yield text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), True


# --- tokenizers -----------------------------------------------------------------------------------------------------
def train_tokenizer(
    documents: Iterable[str], vocab_size: int, symbols: tuple[str, ...] = (), normalization: str = "nmt_nfkc"
) -> bytes:
    """A serialised SentencePiece BPE model: 0 pad, 1 BOS, 2 EOS, 3 unknown, then `symbols`, then 256 byte pieces.

    normalization: "nmt_nfkc" as the challenge's (NFKC; white space runs become one space) or "identity" (keeps
    everything: decode(encode(text)) == text). Raises DataError where SentencePiece refuses (too large a vocabulary).
    """
    import sentencepiece as spm

    model = io.BytesIO()
    slices = (text[i : i + TRAINING_SLICE] for text in documents for i in range(0, len(text), TRAINING_SLICE))
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=slices, model_writer=model, model_type="bpe", vocab_size=vocab_size, byte_fallback=True,
            character_coverage=0.9995, split_digits=True, normalization_rule_name=normalization,
            add_dummy_prefix=False, remove_extra_whitespaces=normalization != "identity",
            pad_id=0, bos_id=BOS_ID, eos_id=2, unk_id=3, user_defined_symbols=list(symbols),
            max_sentence_length=8 * TRAINING_SLICE, num_threads=2, minloglevel=2,
        )  # fmt: skip
    except RuntimeError as e:
        raise DataError(f"tokenizer of {vocab_size} pieces: SentencePiece refused ({e})") from e
    return model.getvalue()


def load_tokenizer(path: Path, caseops: bool = False):
    """The SentencePieceProcessor of a model file that can make shards.

    Raises DataError unless its BOS is 1, its ids fit uint16, it falls back to bytes, and with `caseops` each control
    character is one piece of its own.
    """
    import sentencepiece as spm

    try:
        sp = spm.SentencePieceProcessor(model_proto=Path(path).read_bytes())
    except (OSError, RuntimeError) as e:
        raise DataError(f"{path}: not a SentencePiece model ({getattr(e, 'strerror', None) or e})") from e
    if sp.bos_id() != BOS_ID:
        raise DataError(f"{path}: BOS id {sp.bos_id()}, expected {BOS_ID}")
    if sp.vocab_size() > 65536:
        raise DataError(f"{path}: {sp.vocab_size()} pieces, expected at most 65536 (ids are uint16)")
    if not any(sp.is_byte(i) for i in range(sp.vocab_size())):
        raise DataError(f"{path}: no byte pieces, so characters outside its vocabulary would be lost")
    for control in CONTROLS if caseops else ():
        if sp.piece_to_id(control) == sp.unk_id():
            raise DataError(f"{path}: U+{ord(control):04X} is no piece: not a CaseOps tokenizer (leave out --caseops?)")
    return sp


# --- one batch, in a worker -----------------------------------------------------------------------------------------
class Document(NamedTuple):
    """What the main process needs to know of a document besides its tokens; bytes are UTF-8."""

    line: int  # over all files, from 0
    tokens: int  # with BOS; 0 for an empty document, which is left out
    raw_bytes: int
    surrogates: bool
    normalized_bytes: int = 0  # of the text the tokenizer normalises to, validation only
    whitespace_bytes: int = 0  # of the difference: runs of white space, ends, and wide spaces


_worker: dict = {}


def start_worker(model: Path, caseops: bool, parent: int | None) -> None:
    """Load the tokenizer in a worker process; the worker ends when its parent is gone, however that ended."""
    if parent is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer

        def watch():
            while os.getppid() == parent:
                time.sleep(1)
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()
    sp = load_tokenizer(model, caseops)
    _worker.update(sp=sp, caseops=caseops, leading_space=keeps_leading_space(sp))


def tokenize_batch(batch: Batch, with_bytes: bool) -> tuple[list[Document], np.ndarray, np.ndarray | None]:
    """(documents, their token ids one after the other, with_bytes and CaseOps: original bytes per token).

    Raises DataError for a bad line, or if a document's byte counts do not add up to its normalised text.
    """
    sp, caseops = _worker["sp"], _worker["caseops"]
    texts = list(parse(batch))
    encoded = [encode(text) for text, _ in texts] if caseops else [text for text, _ in texts]
    ids = sp.encode(encoded, num_threads=1)
    documents, tokens, counts = [], [], []
    for i, ((text, replaced), document_ids) in enumerate(zip(texts, ids)):
        raw = len(text) if text.isascii() else len(text.encode())
        if not document_ids:  # blank, or nothing left after normalisation
            documents.append(Document(batch.first + i, 0, raw, replaced))
            continue
        tokens.append(BOS_ID)
        tokens.extend(document_ids)
        normalized = whitespace = 0
        if with_bytes:
            decoded = sp.decode(document_ids)
            normalized = len((without_markers(decoded) if caseops else decoded).encode())
            if normalized != raw:
                whitespace = raw - len(" ".join(text.split()).encode())
            if caseops:
                pieces = sp.id_to_piece(document_ids)
                document_counts = piece_byte_counts(pieces, leading_space=_worker["leading_space"])
                if sum(document_counts) != normalized:
                    raise DataError(
                        f"{batch.path} line {batch.number + i}: bytes per token add up to {sum(document_counts)},"
                        f" expected the {normalized} of the normalised text"
                    )
                counts.append(0)
                counts.extend(document_counts)
        documents.append(Document(batch.first + i, 1 + len(document_ids), raw, replaced, normalized, whitespace))
    return documents, as_entries(tokens), as_entries(counts) if with_bytes and caseops else None


def tokenized(batch_stream: Iterator[Batch], model: Path, caseops: bool, val_lines: int, processes: int):
    """(batch, tokenize_batch's result) in the order of the input, with at most 2·processes + 1 batches in flight.

    Lines before `val_lines` get their bytes per token. Raises DataError if a worker dies.
    """
    if processes == 1:
        start_worker(model, caseops, None)
        for batch in batch_stream:
            yield batch, tokenize_batch(batch, batch.first < val_lines)
        return
    start_worker(model, caseops, None)  # before the pool: a bad tokenizer is reported once, by this process
    pool = concurrent.futures.ProcessPoolExecutor(
        processes, initializer=start_worker, initargs=(model, caseops, os.getpid())
    )
    waiting: collections.deque = collections.deque()
    try:
        for batch in batch_stream:
            waiting.append((batch, pool.submit(tokenize_batch, batch, batch.first < val_lines)))
            if len(waiting) > 2 * processes:
                batch, future = waiting.popleft()
                yield batch, future.result()
        while waiting:
            batch, future = waiting.popleft()
            yield batch, future.result()
    except concurrent.futures.process.BrokenProcessPool:
        raise DataError("a worker process died (out of memory? try fewer --processes)") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


# --- writing --------------------------------------------------------------------------------------------------------
class ShardWriter:
    """A shard that grows on disk under a temporary name; `commit` completes the header and renames it."""

    def __init__(self, path: Path):
        self.path, self.entries = path, 0
        self.atomic = AtomicFile(path)
        self.file = self.atomic.__enter__()
        self.file.write(bytes(HEADER_BYTES))

    def append(self, values: np.ndarray) -> None:
        with self.naming():
            self.file.write(values.tobytes())
        self.entries += len(values)

    def commit(self) -> None:
        with self.naming():
            self.file.seek(0)
            self.file.write(header(self.entries))
            self.atomic.__exit__(None, None, None)

    @contextlib.contextmanager
    def naming(self):
        """Errors of the disk, when it is full say, name the shard."""
        try:
            yield
        except OSError as e:
            raise DataError(f"{self.path}: cannot be written ({e.strerror or e})") from e

    def abandon(self) -> None:
        with contextlib.suppress(OSError):  # closing flushes, which fails again on a full disk
            self.atomic.__exit__(DataError, None, None)


class Output:
    """The output folder: what has been completed so far, and the shards being written.

    state: "lines", the first line that is in no complete shard; "files", per name the entries, documents, bytes and
    SHA-256; and how many documents were left out or changed.
    """

    def __init__(self, folder: Path, settings: dict, shard_tokens: int):
        self.folder, self.settings, self.shard_tokens = folder, settings, shard_tokens
        self.state = {"lines": 0, "empty_documents": 0, "documents_with_lone_surrogates": 0, "files": {}}
        self.pending = collections.Counter()  # counts since the last complete shard
        self.writers: list[ShardWriter] = []
        self.names: list[str] = []
        self.train_shards = 0

    def resume(self) -> bool:
        """Take over what an earlier run with the same settings completed; True if that is everything.

        Raises DataError for a folder with other data, or with files that are not as they were left.
        """
        ours = False
        for name in ("manifest.json", "progress.json"):
            path = self.folder / name
            if not path.exists():
                continue
            try:
                found = json.loads(path.read_text())
                there, state = found["settings"], found["state"]
                files = state["files"].items()
            except (ValueError, KeyError, TypeError, AttributeError):
                raise DataError(f"{path}: not written by tokenize_docs.py; choose another --out") from None
            ours = True
            if not files:
                continue  # it ended before its first complete shard: nothing to go on from, nothing to lose
            for key, value in self.settings.items():
                if there.get(key) != value:
                    raise DataError(f"{path}: made with {key} {there.get(key)}, now {value}; choose another --out")
            for file, entry in files:
                shard = self.folder / file
                if read_header(shard) != entry["entries"] or sha256_file(shard) != entry["sha256"]:
                    raise DataError(f"{shard}: changed since it was made; delete the folder to start anew")
            self.state = state
            self.train_shards = sum(file.startswith("fineweb_train") for file in state["files"])
            if name == "manifest.json":
                return True
        if not ours:
            for path in sorted(self.folder.iterdir()):
                if path.name.startswith("fineweb_") or path.name == "tokenizer.model":
                    raise DataError(f"{path}: already there and not made by this command; choose another --out")
            self.save()  # from here on what is in the folder is ours, also if we are killed before the first shard
        for leftover in self.folder.glob(".*.tmp"):
            leftover.unlink()
        for split in ("train", "val", "val_bytes"):  # named, but not yet recorded when we were killed: made again
            for path in list_shards(self.folder, split):
                if path.name not in self.state["files"]:
                    path.unlink()
        return False

    def save(self, name: str = "progress.json") -> None:
        content = {"made_by": "data/tokenize_docs.py", "settings": self.settings, "state": self.state}
        write_json(self.folder / name, content)

    def begin(self, names: list[str]) -> None:
        self.names = names
        self.writers = [ShardWriter(self.folder / name) for name in names]

    def complete(self, next_line: int) -> None:
        """Give the open shard (and its sidecar) their names, and record that lines before `next_line` are done."""
        for name, writer in zip(self.names, self.writers):
            writer.commit()
            entry = {"entries": writer.entries, "sha256": sha256_file(writer.path)}
            if not name.startswith("fineweb_val_bytes"):
                entry |= {k: self.pending.pop(k, 0) for k in ("documents", "raw_bytes")}
            if name.startswith("fineweb_val_0"):
                normalized = self.pending.pop("normalized_bytes", 0)
                whitespace = self.pending.pop("whitespace_bytes", 0)
                entry |= {
                    "normalized_bytes": normalized,
                    "changed_by_normalization": {
                        "bytes": normalized - entry["raw_bytes"],
                        "by_white_space": -whitespace,
                        "by_characters": normalized - entry["raw_bytes"] + whitespace,
                    },
                }
            self.state["files"][name] = entry
        self.writers = []
        self.count_left_out()
        self.state["lines"] = next_line
        self.save()

    def count_left_out(self) -> None:
        for key in ("empty_documents", "documents_with_lone_surrogates"):
            self.state[key] += self.pending.pop(key, 0)

    def abandon(self) -> None:
        for writer in self.writers:
            writer.abandon()
        self.writers = []


def write_shards(output: Output, stream, val_docs: int, caseops: bool, progress) -> None:
    """Distribute the documents of `tokenized`'s stream over validation and training shards.

    Raises DataError if nothing is left for training; the validation shard then does not appear.
    """
    state = output.state
    in_val = val_docs > 0 and shard_name("val", 0) not in state["files"]
    val_names = [shard_name("val", 0)] + ([sidecar_name(0)] if caseops else [])
    try:
        if in_val:
            output.begin(val_names)
        line = state["lines"]
        for batch, (documents, tokens, counts) in stream:
            start = 0
            for document in documents:
                line = document.line + 1
                if not document.tokens:
                    output.pending["empty_documents"] += 1
                    continue
                if in_val and output.pending["documents"] == val_docs:
                    output.complete(document.line)
                    in_val = False
                end = start + document.tokens
                if in_val and not document.normalized_bytes:  # blank lines moved validation past the estimate
                    one = Batch(batch.path, batch.number + document.line - batch.first, document.line,
                                [batch.lines[document.line - batch.first]])  # fmt: skip
                    (document,), _, one_counts = tokenize_batch(one, True)
                elif in_val and caseops:
                    one_counts = counts[start:end]
                if not in_val:
                    if output.writers and output.writers[0].entries + document.tokens > output.shard_tokens:
                        output.complete(document.line)
                    if not output.writers:
                        output.begin([shard_name("train", output.train_shards)])
                        output.train_shards += 1
                output.writers[0].append(tokens[start:end])
                if in_val and caseops:
                    output.writers[1].append(one_counts)
                output.pending.update(
                    documents=1, raw_bytes=document.raw_bytes,
                    normalized_bytes=document.normalized_bytes * in_val,
                    whitespace_bytes=document.whitespace_bytes * in_val,
                    documents_with_lone_surrogates=int(document.surrogates),
                )  # fmt: skip
                start = end
            progress(sum(map(len, batch.lines)))
        if in_val:
            raise DataError(
                f"{output.pending['documents']} documents, all of them validation (--val-docs {val_docs}):"
                " nothing is left for training"
            )
        if output.writers:
            output.complete(line)
        if output.train_shards == 0:
            raise DataError("no documents in the input")
        output.count_left_out()
    finally:
        output.abandon()


def tokenizer_text(paths: list[Path], val_docs: int, caseops: bool, megabytes: float) -> Iterator[str]:
    """The first `megabytes` (10^6 characters) of the training documents, never validation's, as tokenizers see them."""
    texts = (text for batch in batches(paths) for text, _ in parse(batch) if text.strip())
    left = int(megabytes * 1e6)
    for text in itertools.islice(texts, val_docs, None):
        if left <= 0:
            return
        text = text[:left]
        left -= len(text)
        yield encode(text) if caseops else text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, nargs="+", required=True, help="JSON lines, plain or .gz/.xz/.zst")
    parser.add_argument("--out", type=Path, required=True, help="output folder, new or this command's own")
    parser.add_argument("--tokenizer", type=Path, help="a SentencePiece model with BOS 1 and byte pieces")
    parser.add_argument("--train-tokenizer", action="store_true", help="train one on the training documents instead")
    parser.add_argument("--vocab-size", type=int, default=8192, help="pieces of the trained tokenizer (default 8192)")
    parser.add_argument("--tokenizer-mb", type=float, default=50, help="text for its training, 10^6 characters (50)")
    parser.add_argument("--normalization", choices=("nmt_nfkc", "identity"), default="nmt_nfkc",
                        help="of the trained tokenizer: as the challenge's (default), or none")  # fmt: skip
    parser.add_argument("--caseops", action="store_true", help="encode capitals, write the validation byte sidecar")
    parser.add_argument("--val-docs", type=int, default=CHALLENGE_VAL_DOCS, help="validation documents (default 50000)")
    parser.add_argument("--shard-tokens", type=int, default=100_000_000, help="at most, per training shard (10^8)")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser.add_argument("--processes", type=int, default=cores, help="default: all cores")
    args = parser.parse_args()

    if bool(args.tokenizer) == args.train_tokenizer:
        raise DataError("expected either --tokenizer MODEL or --train-tokenizer")
    for name, least in (("val_docs", 0), ("shard_tokens", 1), ("processes", 1), ("vocab_size", 300)):
        if getattr(args, name) < least:
            raise DataError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected at least {least}")
    if args.val_docs != CHALLENGE_VAL_DOCS:
        print(
            f"warning: {args.val_docs} validation documents, the challenge has {CHALLENGE_VAL_DOCS}:"
            " scores on these shards are not comparable with its",
            file=sys.stderr,
        )
    if not 0 < args.tokenizer_mb < math.inf:
        raise DataError(f"--tokenizer-mb {args.tokenizer_mb}: expected a number above 0")
    for path in args.docs:
        if not path.is_file():
            raise DataError(f"{path}: no such file, expected JSON lines")
    if args.train_tokenizer:
        tokenizer = {"trained": args.vocab_size, "mb": args.tokenizer_mb, "normalization": args.normalization}
    else:
        load_tokenizer(args.tokenizer, args.caseops)  # says what is wrong with it before anything is written
        tokenizer = {"sha256": sha256_file(args.tokenizer)}
    settings = {
        "docs": [[path.name, path.stat().st_size, sha256_file(path)] for path in args.docs],
        "caseops": args.caseops,
        "val_docs": args.val_docs,
        "shard_tokens": args.shard_tokens,
        "tokenizer": tokenizer,
    }

    args.out.mkdir(parents=True, exist_ok=True)
    lock = open(args.out / ".lock", "w")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, workers do not inherit and outlive it
    except OSError:
        raise DataError(f"{args.out}: another tokenize_docs.py is writing there") from None
    output = Output(args.out, settings, args.shard_tokens)
    if output.resume():
        print(f"{args.out}: complete already")
        return 0
    if output.state["lines"]:
        complete = len(output.state["files"])
        print(f"{args.out}: going on after line {output.state['lines']:,}, {complete} files are complete")

    start = time.perf_counter()
    model = args.out / "tokenizer.model"
    if not output.state["files"]:  # later shards must have the tokenizer of the first
        if args.train_tokenizer:
            symbols = CONTROLS if args.caseops else ()
            text = tokenizer_text(args.docs, args.val_docs, args.caseops, args.tokenizer_mb)
            first = next(text, None)
            if first is None and args.val_docs:
                raise DataError(f"all documents are validation: lower --val-docs {args.val_docs}")
            if first is None:
                raise DataError("no documents in the input")
            text = itertools.chain([first], text)
            serialized = train_tokenizer(text, args.vocab_size, symbols, args.normalization)
            print(f"tokenizer trained, {time.perf_counter() - start:.1f} s")
        else:
            serialized = args.tokenizer.read_bytes()
        with AtomicFile(model) as f:
            f.write(serialized)

    from tqdm import tqdm

    start = time.perf_counter()
    done = 0
    with tqdm(unit="B", unit_scale=True, disable=not sys.stderr.isatty(), desc="tokenizing") as bar:

        def progress(size: int) -> None:
            nonlocal done
            done += size
            bar.update(size)

        stream = tokenized(
            batches(args.docs, output.state["lines"]), model, args.caseops, args.val_docs, args.processes
        )
        with contextlib.closing(stream):  # ends the workers whatever happens
            write_shards(output, stream, args.val_docs, args.caseops, progress)
    seconds = time.perf_counter() - start
    output.state["tokenizer_sha256"] = sha256_file(model)
    output.save("manifest.json")
    (args.out / "progress.json").unlink()

    for name, entry in output.state["files"].items():
        if "documents" in entry:
            print(
                f"{name}: {entry['documents']:,} documents, {entry['entries']:,} tokens, {entry['raw_bytes']:,} bytes,"
                f" {entry['entries'] / entry['raw_bytes']:.4f} tokens a byte"
            )
        if "normalized_bytes" in entry:
            change = entry["changed_by_normalization"]
            print(
                f"  normalised: {entry['normalized_bytes']:,} bytes ({change['bytes']:+,}:"
                f" {change['by_white_space']:+,} by white space, {change['by_characters']:+,} by characters)"
            )
    left_out, replaced = output.state["empty_documents"], output.state["documents_with_lone_surrogates"]
    if left_out or replaced:
        print(f"left out {left_out:,} empty documents; replaced lone surrogates in {replaced:,}")
    print(f"{args.out}: {done / 1e6:.1f} MB of JSON lines, {seconds:.1f} s, {args.processes} processes,"
          f" {done / 1e6 / seconds * 60 / args.processes:.0f} MB a minute and process")  # fmt: skip
    return 0


if __name__ == "__main__":
    run(main)
