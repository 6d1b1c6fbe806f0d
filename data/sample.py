"""A small train/validation set from text that every machine has, in seconds and offline.

    python data/sample.py              # data/sample/: train and val shards, tokenizer.model
    python data/sample.py --caseops    # data/sample_caseops/: the same through CaseOps, with the byte sidecar

The text is the documentation of the running Python's standard library: docstrings from its sources (read, never
imported) and the language reference's topics. It is the same for a given Python version, and none of it is in the
repository. One document is a module's docstring, a function, a class with its methods, or a topic; a docstring that
occurs several times is kept once, so no document is in both splits. Documents are ordered by hash; validation takes
them from the front until it has about VAL_TOKENS tokens, training the rest: the same with and without --caseops. The
SentencePiece BPE tokenizer (byte fallback; 0 pad, 1 BOS, 2 EOS, 3 unknown, with --caseops 4..7 the four control
characters) is trained on the training documents alone and normalises nothing.

Work is skipped when the output matches its manifest.json (Python and sentencepiece versions, arguments, these sources,
files by SHA-256).
"""

import argparse
import ast
import hashlib
import json
import platform
import sys
import sysconfig
import time
import warnings
from pathlib import Path

import numpy as np
from shards import BOS_ID, AtomicFile, DataError, run, sha256_file, shard_name, sidecar_name, write_json, write_shard

HERE = Path(__file__).resolve().parent
SOURCES = ("sample.py", "tokenize_docs.py", "caseops.py", "shards.py")
VAL_TOKENS = 45_000  # evaluation on two CPU cores must be quick
VAL_LONGEST = 2_000  # tokens; longer documents train
CHARACTERS_PER_TOKEN = 2.4  # of this text with 1,024 pieces, measured
LEAST_TEXT = 500_000  # characters; below it the standard library's sources are not really there
# Tests are not documentation; the rest is not part of every installation, or not the library.
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3", "distutils",
           "ensurepip", "idlelib", "turtledemo", "encodings", "lib-dynload"}  # fmt: skip


def signature(node: ast.AST) -> str:
    """`name(a, b=1)` of a function, `Name(Base)` of a class."""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {node.name}({bases})" if bases else f"class {node.name}"
    return f"{node.name}({ast.unparse(node.args)})"


def module_documents(source: str, name: str, seen: set[str]) -> list[str]:
    """The documents of one module's source: its docstring, its functions, its classes with their methods.

    `seen` holds every docstring used so far and is added to: a docstring goes into one document only.
    """

    def docstring(node) -> str | None:
        text = ast.get_docstring(node)
        if not text or text in seen:
            return None
        seen.add(text)
        return text

    def add(title: str, text: str | None) -> None:
        if text:
            documents.append(f"{title}\n\n{text}".strip())

    documents: list[str] = []
    tree = ast.parse(source)
    add(f"Module {name}", docstring(tree))
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    for node in tree.body:
        if isinstance(node, functions):
            add(signature(node), docstring(node))
        elif isinstance(node, ast.ClassDef):
            sections = [docstring(node)]
            for member in node.body:
                if isinstance(member, functions):
                    text = docstring(member)
                    sections.append(text and f"{signature(member)}\n\n{text}")
            add(signature(node), "\n\n".join(text for text in sections if text))
    return documents


def standard_library_documents() -> list[str]:
    """All documents, each once, in the order of their hashes. Raises DataError where Python came without sources."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    seen: set[str] = set()
    documents = []
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).parts
        if SKIPPED.intersection(parts) or any(part.startswith(("config-", "_sysconfigdata")) for part in parts):
            continue
        try:
            with warnings.catch_warnings():  # invalid escapes in somebody's strings are no news here
                warnings.simplefilter("ignore")
                source = path.read_text(encoding="utf-8")
                documents += module_documents(source, ".".join(parts)[:-3].removesuffix(".__init__"), seen)
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue  # a template or a foreign file in the library's folder
    try:
        from pydoc_data.topics import topics

        documents += [text.strip() for _, text in sorted(topics.items()) if text.strip() not in seen]
    except ImportError:
        pass  # some distributions package it separately
    documents = list(dict.fromkeys(documents))
    size = sum(map(len, documents))
    if size < LEAST_TEXT:
        raise DataError(
            f"{folder}: {size} characters of documentation, expected at least {LEAST_TEXT}:"
            " this Python came without the sources of its standard library"
        )
    return sorted(documents, key=lambda text: hashlib.sha256(text.encode()).digest())


def describe(vocab_size: int, caseops: bool) -> dict:
    """What decides the output, byte for byte."""
    import sentencepiece

    sources = b"".join((HERE / name).read_bytes() for name in SOURCES)
    return {
        "made_by": "data/sample.py",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "sentencepiece": sentencepiece.__version__,
        "sources_sha256": hashlib.sha256(sources).hexdigest(),
        "vocab_size": vocab_size,
        "caseops": caseops,
    }


def up_to_date(out: Path, description: dict) -> bool:
    """Whether the folder's manifest says the same as `description` and every file it names is as it says."""
    try:
        manifest = json.loads((out / "manifest.json").read_text())
        return {k: v for k, v in manifest.items() if k != "files"} == description and all(
            sha256_file(out / name) == entry["sha256"]
            for name, entry in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def build(out: Path, vocab_size: int, caseops: bool) -> dict:
    """Write shards, tokenizer and (with caseops) the sidecar to `out`; returns the manifest. Raises DataError."""
    import sentencepiece as spm
    from caseops import CONTROLS, encode, keeps_leading_space, piece_byte_counts
    from tokenize_docs import train_tokenizer

    # Validation is cut by an estimate of its tokens, so that the tokenizer can be trained without it.
    estimate, val, train = 0, [], []
    for text in standard_library_documents():
        length = int(len(text) / CHARACTERS_PER_TOKEN) + 1
        if estimate < VAL_TOKENS and length <= VAL_LONGEST:
            estimate += length
            val.append(text)
        else:
            train.append(text)
    if caseops:
        train, val = [encode(text) for text in train], [encode(text) for text in val]
    model = train_tokenizer(train, vocab_size, CONTROLS if caseops else (), "identity")
    sp = spm.SentencePieceProcessor(model_proto=model)

    def shard(documents: list[str]) -> np.ndarray:
        return np.array([t for ids in sp.encode(documents) for t in (BOS_ID, *ids)], dtype=np.uint16)

    arrays = {shard_name("train", 0): shard(train), shard_name("val", 0): shard(val)}
    if caseops:
        ids = arrays[shard_name("val", 0)]
        arrays[sidecar_name(0)] = piece_byte_counts(sp.id_to_piece(ids.tolist()), leading_space=keeps_leading_space(sp))
    for name, values in arrays.items():
        write_shard(out / name, values)
    with AtomicFile(out / "tokenizer.model") as f:
        f.write(model)
    documents = {shard_name("train", 0): len(train), shard_name("val", 0): len(val)}
    files = {}
    for name in [*arrays, "tokenizer.model"]:
        files[name] = {"sha256": sha256_file(out / name)}
        if name in arrays:
            files[name]["entries"] = len(arrays[name])
        if name in documents:
            files[name]["documents"] = documents[name]
    manifest = {**describe(vocab_size, caseops), "files": files}
    write_json(out / "manifest.json", manifest)  # last: until it is there the folder counts as unfinished
    return manifest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="output folder (default data/sample or data/sample_caseops)")
    parser.add_argument("--vocab-size", type=int, default=1024, help="pieces, 512 to 1024 (default 1024)")
    parser.add_argument("--caseops", action="store_true", help="CaseOps text, tokenizer and byte sidecar")
    args = parser.parse_args()
    if not 512 <= args.vocab_size <= 1024:
        raise DataError(f"--vocab-size {args.vocab_size}: expected 512 to 1024")
    out = args.out or HERE / ("sample_caseops" if args.caseops else "sample")
    if up_to_date(out, describe(args.vocab_size, args.caseops)):
        print(f"{out}: up to date")
        return 0
    start = time.perf_counter()
    manifest = build(out, args.vocab_size, args.caseops)
    for name, entry in manifest["files"].items():
        if "documents" in entry:
            print(f"{name}: {entry['entries']:,} tokens in {entry['documents']:,} documents")
    print(f"{out}: {args.vocab_size} pieces, {time.perf_counter() - start:.1f} s")
    return 0


if __name__ == "__main__":
    sys.dont_write_bytecode = True
    run(main)
