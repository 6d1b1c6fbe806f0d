"""Check a data folder before money is spent on training on it.

    python data/verify.py data/datasets/fineweb10B_sp8192 [--tokenizer data/tokenizers/fineweb_8192_bpe.model]

Reads every token of every shard and prints a table and a verdict. Checked: headers and sizes; shard numbers without
gaps; SHA-256 against a manifest.json in the folder; ids below the vocabulary's size; BOS at the start of every
document; documents without tokens; the byte sidecar's length, its zeros at BOS and its counts against the tokenizer's
pieces; validation documents that are also training documents (a published trap: a script that keeps 10,000 validation
documents puts four fifths of the challenge's 50,000 into training); the number of validation documents.

A training shard may begin in the middle of a document that the shard before it began (the published ones do): the two
parts are joined before documents are compared. Without a tokenizer (DIR/tokenizer.model, or the one that belongs to a
published folder's name in ../../tokenizers/) byte counts and vocabulary are not checked, which is said.

Exit code 0: good, warnings included; 1: something failed; 2: there is nothing to check.
"""

import argparse
import array
import hashlib
import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from caseops import CONTROLS, keeps_leading_space, piece_byte_counts
from shards import BOS_ID, DataError, list_shards, read_shard, run, sha256_file, sidecar_name

CHALLENGE_VAL_DOCS = 50_000
CHUNK = 1 << 22  # tokens looked at together
# A sidecar made from SentencePiece's surfaces (slices of the raw text) counts white space that normalisation collapsed
# and puts a character's bytes on its last byte piece; ours counts the normalised text. Such differences are small.
SIDECAR_TOLERANCE = 0.005  # of all bytes
SIDECAR_TOKENS = 0.1  # share of tokens; a sidecar shifted by one token differs in most


class Finding(NamedTuple):
    level: str  # "ok", "warn" or "FAIL"
    check: str
    message: str


class Row(NamedTuple):
    """One shard of the table; documents are those that begin in it, bytes None where unknown."""

    name: str
    documents: int
    tokens: int
    bytes: int | None
    largest_id: int


class Vocabulary:
    """What the checks need of a tokenizer. Raises DataError if the file is not a SentencePiece model."""

    def __init__(self, path: Path):
        import sentencepiece as spm

        try:
            self.sp = spm.SentencePieceProcessor(model_proto=path.read_bytes())
        except (OSError, RuntimeError) as e:
            raise DataError(f"{path}: not a SentencePiece model ({getattr(e, 'strerror', None) or e})") from e
        self.size = self.sp.vocab_size()
        self.caseops = all(self.sp.piece_to_id(c) != self.sp.unk_id() for c in CONTROLS)
        self.leading_space = keeps_leading_space(self.sp)
        pieces = self.sp.id_to_piece(list(range(self.size)))
        self.bytes = np.array([piece_byte_counts([p], leading_space=True)[0] for p in pieces], dtype=np.int64)
        self.begins_with_space = np.array([p.startswith("▁") for p in pieces])
        self.is_boundary = np.array(
            [self.sp.is_control(i) or self.sp.is_unknown(i) or self.sp.is_unused(i) for i in range(self.size)]
        )

    def count_bytes(self, tokens: np.ndarray, previous: int = BOS_ID) -> int:
        """Bytes of the tokens' text by the table: a leading ▁ counts 0 after a boundary token (evaluation's rule).

        For CaseOps text an escaped control character counts 0 instead of 3, which only the sidecar knows.
        """
        before = np.concatenate([[previous], tokens[:-1]])
        spaces = self.begins_with_space[tokens] & self.is_boundary[before]
        return int(self.bytes[tokens].sum() - (0 if self.leading_space else spaces.sum()))


def find_tokenizer(folder: Path) -> Path | None:
    """The folder's own tokenizer.model, or the published one that belongs to its name; None if neither is there."""
    if (folder / "tokenizer.model").is_file():
        return folder / "tokenizer.model"
    name = re.fullmatch(r"fineweb10B_sp(\d+)(.*)", folder.resolve().name)
    if name:
        path = folder.resolve().parent.parent / "tokenizers" / f"fineweb_{name[1]}_bpe{name[2]}.model"
        if path.is_file():
            return path
    return None


def fingerprint(*parts: np.ndarray) -> int:
    """64 bits of a document's tokens, BOS left out."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part.tobytes())
    return int.from_bytes(digest.digest(), "little")


class Check:
    """Runs the checks of one folder; `findings` and `rows` are the result."""

    def __init__(self, folder: Path, vocabulary: Vocabulary | None, vocab_size: int | None, max_overlap: float):
        self.folder, self.vocabulary, self.max_overlap = folder, vocabulary, max_overlap
        self.vocab_size = vocab_size or (vocabulary.size if vocabulary else None)
        self.findings: list[Finding] = []
        self.rows: list[Row] = []
        self.empty = 0

    def add(self, level: str, check: str, message: str) -> None:
        self.findings.append(Finding(level, check, message))

    def numbers(self, paths: list[Path], split: str) -> None:
        """Shards must be numbered from 0 without gaps."""
        numbers = [int(path.stem.rsplit("_", 1)[1]) for path in paths]
        missing = sorted(set(range(max(numbers) + 1)) - set(numbers))
        if missing:
            self.add("FAIL", "numbering", f"{split} shards {', '.join(map(str, missing[:8]))} are missing")

    def read(self, path: Path) -> np.ndarray | None:
        try:
            return read_shard(path)
        except DataError as e:
            self.add("FAIL", "header", str(e))
            return None

    def ids(self, path: Path, tokens: np.ndarray) -> int:
        """The largest id, checked against the vocabulary's size."""
        largest = max((int(tokens[i : i + CHUNK].max()) for i in range(0, len(tokens), CHUNK)), default=0)
        if self.vocab_size and largest >= self.vocab_size:
            where = int(np.argmax(np.asarray(tokens) >= self.vocab_size))
            message = f"{path.name}: id {int(tokens[where])} at token {where}, expected less than {self.vocab_size}"
            self.add("FAIL", "ids", message)
        return largest

    def split(self, split: str, paths: list[Path]) -> np.ndarray:
        """Check a split's shards; the fingerprints of its documents (uint64, in order).

        Documents that go on in the next shard are joined. Adds table rows and findings.
        """
        fingerprints = array.array("Q")
        open_parts: list[np.ndarray] = []  # the document that the shards so far have not ended

        def close() -> None:
            if open_parts:
                if sum(map(len, open_parts)) == 0:
                    self.empty += 1
                fingerprints.append(fingerprint(*open_parts))
                open_parts.clear()

        for k, path in enumerate(paths):
            tokens = self.read(path)
            if tokens is None:
                continue
            if len(tokens) == 0:
                self.add("FAIL", "header", f"{path.name}: no tokens")
                continue
            largest = self.ids(path, tokens)
            starts = np.flatnonzero(np.asarray(tokens) == BOS_ID)
            if len(starts) == 0:
                self.add("FAIL", "BOS", f"{path.name}: no BOS (id {BOS_ID}) in {len(tokens):,} tokens")
            elif starts[0] != 0 and k == 0:
                message = f"{path.name}: begins with id {int(tokens[0])}, expected BOS (id {BOS_ID})"
                self.add("FAIL", "BOS", message)
            if len(starts) == 0 or starts[0] != 0:
                open_parts.append(np.array(tokens[: starts[0] if len(starts) else len(tokens)]))
            for start, end in zip(starts, [*starts[1:], len(tokens)]):
                close()
                open_parts.append(np.array(tokens[start + 1 : end]))
            size = None
            if self.vocabulary and largest < self.vocabulary.size:
                size = sum(
                    self.vocabulary.count_bytes(tokens[i : i + CHUNK], int(tokens[i - 1]) if i else BOS_ID)
                    for i in range(0, len(tokens), CHUNK)
                )
            if split == "val":
                size = self.sidecar(path, tokens, starts, largest, size)
            self.rows.append(Row(path.name, len(starts), len(tokens), size, largest))
        close()
        return np.array(fingerprints, dtype=np.uint64)

    def sidecar(self, path: Path, tokens: np.ndarray, starts: np.ndarray, largest: int, size: int | None) -> int | None:
        """Check a validation shard's byte sidecar; the shard's bytes (by the sidecar where there is one)."""
        beside = self.folder / sidecar_name(int(path.stem.rsplit("_", 1)[1]))
        vocabulary = self.vocabulary
        if not beside.exists():
            if vocabulary and vocabulary.caseops:
                message = f"{beside.name} is missing, expected beside {path.name} (the tokenizer is a CaseOps one)"
                self.add("FAIL", "sidecar", message)
            return size
        counts = self.read(beside)
        if counts is None:
            return size
        if len(counts) != len(tokens):
            message = f"{beside.name}: {len(counts):,} entries, expected {len(tokens):,}, one per token of {path.name}"
            self.add("FAIL", "sidecar", message)
            return size
        total = int(np.asarray(counts, dtype=np.int64).sum())
        at_bos = np.flatnonzero(np.asarray(counts)[starts])
        if len(at_bos):
            message = f"{beside.name}: {len(at_bos)} BOS tokens with bytes, the first at token {int(starts[at_bos[0]])}"
            self.add("FAIL", "sidecar", message + ", expected 0")
        if vocabulary is None or largest >= vocabulary.size:
            message = f"{beside.name}: counts not compared with the pieces, no tokenizer for these ids"
            self.add("warn", "sidecar", message)
            return total
        differing, expected_total, first = 0, 0, None
        for start, end in zip(starts, [*starts[1:], len(tokens)]):
            pieces = vocabulary.sp.id_to_piece(tokens[start:end].tolist())
            expected = np.array(piece_byte_counts(pieces, leading_space=vocabulary.leading_space))
            expected_total += int(expected.sum())
            wrong = np.flatnonzero(expected != counts[start:end])
            differing += len(wrong)
            if len(wrong) and first is None:
                at = int(start + wrong[0])
                first = f"first at token {at}: {int(counts[at])}, expected {int(expected[wrong[0]])}"
        if differing:
            # Both the sum and the places count: a sidecar shifted by one token has nearly the right sum.
            far = abs(total - expected_total) > SIDECAR_TOLERANCE * expected_total
            far |= differing > SIDECAR_TOKENS * len(tokens)
            self.add(
                "FAIL" if far else "warn",
                "sidecar",
                f"{beside.name}: {differing:,} of {len(tokens):,} counts differ from the pieces', {first};"
                f" sum {total:,}, expected {expected_total:,}",
            )
        else:
            self.add("ok", "sidecar", f"{beside.name}: {len(counts):,} counts equal the pieces', sum {total:,} bytes")
        return total

    def overlap(self, train: np.ndarray, val: np.ndarray) -> None:
        """Validation documents that training has too."""
        shared = int(np.isin(val, train).sum())
        if shared:
            share = shared / len(val)
            self.add(
                "FAIL" if share > self.max_overlap else "warn",
                "overlap",
                f"{shared:,} of {len(val):,} validation documents ({share:.2%}) are also training documents",
            )
        else:
            message = f"none of {len(val):,} validation documents among {len(train):,} training documents"
            self.add("ok", "overlap", message)
        for split, prints in (("training", train), ("validation", val)):
            repeated = len(prints) - len(np.unique(prints))
            if repeated:
                self.add("warn", "repeats", f"{repeated:,} of {len(prints):,} {split} documents repeat an earlier one")

    def manifest(self) -> None:
        """Files against the SHA-256 that tokenize_docs.py or sample.py wrote down."""
        path = self.folder / "manifest.json"
        if not path.exists():
            if (self.folder / "progress.json").exists():
                self.add("FAIL", "manifest", "progress.json: tokenize_docs.py has not finished this folder")
            return
        try:
            content = json.loads(path.read_text())
            files = {k: v["sha256"] for k, v in content.get("state", content)["files"].items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            self.add("warn", "manifest", "manifest.json: lists no SHA-256, files not compared")
            return
        wrong = []
        for name, expected in files.items():
            if not (self.folder / name).is_file():
                wrong.append(f"{name} is missing")
            elif sha256_file(self.folder / name) != expected:
                wrong.append(f"{name} has another SHA-256")
        for message in wrong:
            self.add("FAIL", "manifest", message)
        if not wrong:
            self.add("ok", "manifest", f"{len(files)} files have the SHA-256 of manifest.json")

    def run(self) -> None:
        splits = {split: list_shards(self.folder, split) for split in ("train", "val")}
        prints = {}
        for split, paths in splits.items():
            if not paths:
                self.add("FAIL", "shards", f"no fineweb_{split}_*.bin")
                continue
            self.numbers(paths, split)
            prints[split] = self.split(split, paths)
        if len(prints) == 2:
            self.overlap(prints["train"], prints["val"])
        for path in list_shards(self.folder, "val_bytes"):
            if path.name.replace("_bytes", "") not in {p.name for p in splits["val"]}:
                self.add("FAIL", "sidecar", f"{path.name} has no validation shard beside it")
        if self.empty:
            self.add("warn", "BOS", f"{self.empty:,} documents have no tokens after BOS")
        if "val" in prints and len(prints["val"]) != CHALLENGE_VAL_DOCS:
            self.add(
                "warn",
                "validation",
                f"{len(prints['val']):,} documents, the challenge has {CHALLENGE_VAL_DOCS:,}: scores not comparable",
            )
        self.manifest()
        if not self.vocab_size:
            self.add("warn", "ids", "no tokenizer and no --vocab-size: ids not checked")
        for check, message in (
            ("header", "magic, version and size of every shard"),
            ("ids", f"all below {self.vocab_size}"),
            ("BOS", "begins every document"),
        ):
            if not any(finding.check == check for finding in self.findings):
                self.add("ok", check, message)


def report(check: Check) -> str:
    """The table, the findings and the verdict."""
    lines = [f"{'shard':28} {'documents':>10} {'tokens':>13} {'bytes':>14} {'tokens/byte':>11} {'largest id':>10}"]
    totals: dict[str, list] = {}
    for row in check.rows:
        split = row.name.split("_")[1]
        total = totals.setdefault(split, [0, 0, 0])
        total[0] += row.documents
        total[1] += row.tokens
        total[2] = None if total[2] is None or row.bytes is None else total[2] + row.bytes
        lines.append(line(row.name, row.documents, row.tokens, row.bytes) + f" {row.largest_id:>10}")
    for split, (documents, tokens, size) in totals.items():
        lines.append(line(f"all of {split}", documents, tokens, size))
    lines.append("")
    order = {"FAIL": 0, "warn": 1, "ok": 2}
    lines += [f"{f.level:4} {f.check}: {f.message}" for f in sorted(check.findings, key=lambda f: order[f.level])]
    failed = sum(f.level == "FAIL" for f in check.findings)
    warned = sum(f.level == "warn" for f in check.findings)
    lines.append(f"{'BAD' if failed else 'GOOD'}: {failed} failures, {warned} warnings")
    return "\n".join(lines)


def line(name: str, documents: int, tokens: int, size: int | None) -> str:
    rate = f"{tokens / size:.4f}" if size else "-"
    return f"{name:28} {documents:>10,} {tokens:>13,} {f'{size:,}' if size is not None else '-':>14} {rate:>11}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder with fineweb_{train,val}_*.bin")
    parser.add_argument("--tokenizer", type=Path, help="the SentencePiece model the shards were made with")
    parser.add_argument("--vocab-size", type=int, help="ids must be below it (default: the tokenizer's)")
    parser.add_argument(
        "--max-overlap", type=float, default=0.01, help="share of validation documents in training that fails (0.01)"
    )
    args = parser.parse_args()
    if not args.folder.is_dir():
        raise DataError(f"{args.folder}: no such folder, expected one with fineweb_train_*.bin and fineweb_val_*.bin")
    if not list_shards(args.folder, "train") + list_shards(args.folder, "val"):
        raise DataError(f"{args.folder}: no fineweb_train_NNNNNN.bin or fineweb_val_NNNNNN.bin in it")
    tokenizer = args.tokenizer or find_tokenizer(args.folder)
    check = Check(args.folder, Vocabulary(tokenizer) if tokenizer else None, args.vocab_size, args.max_overlap)
    check.run()
    print(f"{args.folder}, tokenizer {tokenizer or 'not found'}\n{report(check)}")
    return 1 if any(finding.level == "FAIL" for finding in check.findings) else 0


if __name__ == "__main__":
    run(main)
