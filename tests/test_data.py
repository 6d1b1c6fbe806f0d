"""DATA: shards and their errors, the cursor over them, segments, prefetching, bytes of every token."""

import os
import threading

import numpy as np
import pytest
import reference
import toy
from hypothesis import given
from hypothesis import strategies as st

import train_gpt as tg

# ---------------------------------------------------------------------------------------------------------------- shards


def test_shard_reads_back(tmp_path):
    tokens = toy.row(1000, (0, 10))
    path = toy.write_shard(tmp_path / "fineweb_train_000000.bin", tokens)
    assert (tg.read_shard(path, toy.VOCAB) == tokens).all()


def bad_shards(folder):
    """Name -> (path, words that the error must hold)."""
    good = toy.row(100)
    over = good.copy()
    over[57] = 500
    p = lambda name: folder / f"fineweb_train_{name}.bin"
    cases = {
        "empty": (p("000001"), ["0 bytes", "1024"]),
        "short header": (p("000002"), ["100 bytes", "1024"]),
        "magic": (toy.write_shard(p("000003"), good, magic=12345), ["12345", "20240520"]),
        "version": (toy.write_shard(p("000004"), good, version=2), ["20240520, 2", "version 1"]),
        "truncated": (toy.write_shard(p("000005"), good, count=101), ["1224", "1226", "101 tokens"]),
        "too long": (toy.write_shard(p("000006"), good, count=99), ["1224", "1222"]),
        "negative": (toy.write_shard(p("000007"), good, count=-5), ["1224"]),
        "no tokens": (toy.write_shard(p("000008"), []), ["no tokens"]),
        "vocabulary": (toy.write_shard(p("000009"), over), ["500", "VOCAB_SIZE=384"]),
        "vanished": (p("000010"), ["cannot be read"]),
        "folder": (p("000011"), ["cannot be read"]),
    }
    p("000001").write_bytes(b"")
    p("000002").write_bytes(b"x" * 100)
    p("000010").symlink_to(folder / "nowhere")
    p("000011").mkdir()
    return cases


@pytest.mark.parametrize("case", ["empty", "short header", "magic", "version", "truncated", "too long", "negative", "no tokens",
                                  "vocabulary", "vanished", "folder"])
def test_bad_shards_are_named(tmp_path, case):
    path, words = bad_shards(tmp_path)[case]
    with pytest.raises(tg.UserError) as e:
        tg.read_shard(path, toy.VOCAB)
    for word in [path.name, *words]:
        assert word in str(e.value), str(e.value)


def test_every_validation_token_is_checked_and_training_sampled(tmp_path):
    tokens = toy.row(200_000)
    tokens[100_001] = 500                           # not one of the sampled
    path = toy.write_shard(tmp_path / "fineweb_val_000000.bin", tokens)
    with pytest.raises(tg.UserError, match="token id 500"):
        tg.read_shard(path, toy.VOCAB, sample=False)
    tokens[100_001] = 5
    tokens[-3:] = 500
    tokens[::2] = 501
    with pytest.raises(tg.UserError, match="token id 501"):
        tg.read_shard(toy.write_shard(path, tokens), toy.VOCAB, sample=True)


def test_shards_are_found_in_name_order_without_sidecars(tmp_path):
    for name in ("fineweb_val_000010", "fineweb_val_000002", "fineweb_val_bytes_000002", "fineweb_train_000000", "other_val_000000"):
        toy.write_shard(tmp_path / f"{name}.bin", [1])
    c = toy.config(DATA_PATH=tmp_path)
    assert [p.stem for p in tg.find_shards(c, "val")] == ["fineweb_val_000002", "fineweb_val_000010"]


def test_missing_data_names_the_command(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(tg.UserError, match=r"data/sample.py.*data/download.py --variant sp384.*DATA_PATH"):
            tg.find_shards(toy.config(DATA_PATH=path), "train")


# ---------------------------------------------------------------------------------------------------------------- spans


def stream(parts, rank=0, size=1, tokens=9, limit=100):
    return tg.TokenStream([np.asarray(p, np.uint16) for p in parts], rank, size, tokens, limit)


def test_spans_follow_each_other_over_shard_ends_and_epochs():
    """Spans of n+1 tokens, nothing skipped or repeated: over shard ends, into the next epoch."""
    s = stream([range(0, 13), range(13, 14), range(14, 37)])
    got = np.concatenate([s.next()[0] for _ in range(11)])
    assert got.tolist() == [i % 37 for i in range(110)]
    assert s.cursor == 110 and s.epoch == 110 // 37 + 1


@toy.hypothesis_settings(max_examples=60)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.sampled_from([1, 2, 3, 4]), st.integers(1, 12))
def test_ranks_share_out_the_stream(lengths, size, tokens):
    """All ranks together see what one rank would see in the same number of spans: disjoint, in order, complete."""
    total = sum(lengths)
    cuts = np.cumsum([0, *lengths])
    parts = [range(a, b) for a, b in zip(cuts, cuts[1:])]
    if total < size * (tokens + 1):
        with pytest.raises(tg.UserError, match=f"hold {total} tokens: one step needs {size * (tokens + 1)}"):
            stream(parts, 0, size, tokens)
        return
    ranks = [stream(parts, rank, size, tokens) for rank in range(size)]
    alone = stream(parts, 0, 1, tokens)
    for _ in range(7):
        together = [r.next() for r in ranks]
        one = [alone.next()[0].tolist() for _ in range(size)]
        assert [row.tolist() for row, _ in together] == one
        assert {cursor for _, cursor in together} == {alone.cursor}


def test_two_ranks_see_disjoint_tokens_within_an_epoch():
    ranks = [stream([range(1000)], rank, 2, 24) for rank in (0, 1)]
    seen = [set(np.concatenate([r.next()[0] for _ in range(20)]).tolist()) for r in ranks]
    assert len(seen[0]) == len(seen[1]) == 500 and not seen[0] & seen[1]


def test_a_shard_cut_short_while_it_is_mapped_is_one_line(tmp_path):
    """Without the check this ends the process with SIGBUS. A deleted shard stays readable through its map."""
    path = toy.write_shard(tmp_path / "fineweb_train_000000.bin", toy.row(50_000))
    s = tg.TokenStream([tg.read_shard(path, toy.VOCAB)], 0, 1, 20_000, 64)
    os.truncate(path, 40_000)
    with pytest.raises(tg.UserError, match=f"{path} was cut short during the run: it has 40000 bytes, expected 101024"):
        s.next()
    path.unlink()
    other = toy.write_shard(tmp_path / "fineweb_train_000001.bin", toy.row(50_000))
    s = tg.TokenStream([tg.read_shard(other, toy.VOCAB)], 0, 1, 20_000, 64)
    other.unlink()
    assert s.next()[0].tolist() == toy.row(50_000)[:20_001].tolist()


def test_a_token_over_the_vocabulary_is_an_error_of_its_rank_alone():
    """Else the rank signs off as if all had met it, and the others wait for it."""
    tokens = toy.row(1000)
    tokens[30] = 60000
    first, second = (tg.TokenStream([tokens], rank, 2, 24, 64, toy.VOCAB) for rank in (0, 1))
    first.next()
    with pytest.raises(tg.UserError, match="token id 60000") as e:
        second.next()
    assert not e.value.everywhere


def test_restart_at_a_cursor():
    s = stream([range(100), range(100, 130)])
    for _ in range(4):
        _, cursor = s.next()
    expected = [s.next()[0].tolist() for _ in range(20)]
    again = stream([range(100), range(100, 130)])
    again.cursor = cursor
    assert [again.next()[0].tolist() for _ in range(20)] == expected


def test_prefetcher_gives_the_stream_in_order_and_its_cursor_is_of_what_was_used(world):
    tokens = toy.row(400, (0, 50, 51, 300))
    batches = tg.Prefetcher(stream([tokens], tokens=24), world.device)
    plain = stream([tokens], tokens=24)
    try:
        for _ in range(10):
            batch = batches.next()
            row, cursor = plain.next()
            assert batches.cursor == batch.cursor == cursor
            assert batch.ids[0].tolist() == row[:-1].tolist() and batch.targets[0].tolist() == row[1:].tolist()
    finally:
        batches.close()
    assert not batches.thread.is_alive()


def test_prefetcher_hands_errors_over_and_always_closes(world):
    class Vanishing:
        limit = cursor = 0

        def __init__(self, error):
            self.error = error

        def next(self):
            raise self.error

    for error, expected in ((OSError("gone"), tg.UserError), (ZeroDivisionError(), ZeroDivisionError)):
        batches = tg.Prefetcher(Vanishing(error), world.device)
        with pytest.raises(expected):
            batches.next()
        batches.close()


def test_prefetcher_closes_when_an_error_waits_behind_a_full_queue(world):
    class Soon:
        limit, cursor, left = 10, 0, 2

        def next(self):
            if not self.left:
                raise OSError("gone")
            self.left -= 1
            return toy.row(11), 0

    batches = tg.Prefetcher(Soon(), world.device, depth=2)
    while not batches.queue.full():
        pass
    closing = threading.Thread(target=batches.close, daemon=True)
    closing.start()
    closing.join(5)         # the thread polls every 0.2 s
    assert not closing.is_alive()


# ------------------------------------------------------------------------------------------------------------- segments


@toy.hypothesis_settings(max_examples=200)
@given(st.lists(st.sampled_from([1, 5, 6]), min_size=1, max_size=40), st.integers(1, 12))
def test_segments_against_a_walk(ids, limit):
    ids = np.array(ids)
    assert tg.segment_bounds(ids, limit).tolist() == sorted(set(reference.segment_starts(ids, limit)))


def test_cu_seqlens_are_padded_with_the_total():
    for starts in (1, 62, 63, 64, 65, 200):
        cu = tg.pad_cu_seqlens(np.arange(starts), 1000)
        assert len(cu) % tg.PAD_SEGMENTS == 0 and cu.dtype == np.int32
        assert cu[:starts].tolist() == list(range(starts)) and set(cu[starts:].tolist()) == {1000}


def test_batch_is_shifted_by_one():
    row = toy.row(33, (0, 7, 20))
    batch = tg.to_batch(row, 8, 5)
    assert batch.ids.tolist() == [row[:-1].tolist()] and batch.targets.tolist() == [row[1:].tolist()] and batch.cursor == 5
    cu = batch.segments.cu_seqlens.unique().tolist()
    assert cu == [0, 7, 15, 20, 28, 32] and batch.segments.longest == 8


# ---------------------------------------------------------------------------------------------------------------- bytes

# Between any two documents everything that has fooled byte counting: emoji with joiners, CJK, tabs, runs of spaces,
# spaces at both ends, newlines, combining marks, and characters that only byte pieces can spell.
TEXTS = [
    "plain words only", "a", "two  spaces   and    more", "\ttabs\t\tinside\t", "line\nbreaks\r\n\n",
    "emoji \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 end",
    "\u4f60\u597d\uff0c\u4e16\u754c \u6771\u4eac", "caf\u00e9 na\u00efve e\u0301", " space first", "space last ", "   ", "\u0000null",
    "mixed \u4f60 \t \U0001f680  x", "\ufb01\u00bd\u2126",
]


@pytest.fixture(scope="module")
def tokenizers():
    """SentencePiece models with and without a dummy prefix, of ordinary text: rare characters become byte pieces."""
    import sentencepiece as spm
    texts = toy.sentences(100, 3) + ["tabs\tand  spaces   in   runs \u4f60\u597d \u4f60\u597d"] * 20
    return {prefix: spm.SentencePieceProcessor(model_proto=toy.train_tokenizer(texts, add_dummy_prefix=prefix)) for prefix in (True, False)}


@pytest.mark.parametrize("prefix", [True, False])
def test_bytes_add_up_to_the_text(tokenizers, prefix):
    """Document by document, the sum equals the UTF-8 length of the text; without a dummy prefix a leading space is text."""
    sp = tokenizers[prefix]
    table = tg.token_byte_table(sp)
    tokens = np.array([t for ids in sp.encode(TEXTS) for t in (tg.BOS, *ids)])
    counts = tg.count_bytes(tokens, table)
    starts = [*np.flatnonzero(tokens == tg.BOS), len(tokens)]
    for text, a, b in zip(TEXTS, starts, starts[1:]):
        assert counts[a] == 0 and counts[a:b].sum() == len(text.encode()), text
    assert tg.check_byte_counts(tokens, counts, sp) == len(TEXTS)


@toy.hypothesis_settings(max_examples=200)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), min_size=1, max_size=4))
def test_bytes_of_any_text(tokenizers, texts):
    """U+2581 is SentencePiece's own space (the text cannot be told from one with spaces), so it is left out."""
    sp = tokenizers[True]
    texts = [t.replace("\u2581", "_") for t in texts]
    tokens = np.array([t for ids in sp.encode(texts) for t in (tg.BOS, *ids)])
    assert tg.count_bytes(tokens, tg.token_byte_table(sp)).sum() == sum(len(t.encode()) for t in texts)


def test_space_counts_once_and_never_after_a_boundary(tokenizers):
    """The known trap: a space counted both in the piece and before it."""
    sp = tokenizers[True]
    word = next(i for i in range(4, sp.vocab_size()) if sp.id_to_piece(i).startswith("\u2581") and len(sp.id_to_piece(i)) > 2)
    letters = len(sp.id_to_piece(word)) - 1
    space = sp.piece_to_id("\u2581")
    table = tg.token_byte_table(sp)
    after = lambda *ids: tg.count_bytes(np.array(ids), table).tolist()
    assert after(tg.BOS, word, word) == [0, letters, letters + 1]
    assert after(sp.unk_id(), word) == [0, letters]
    assert after(tg.BOS, space, word, space) == [0, 0, letters + 1, 1]
    byte = sp.piece_to_id("<0xE4>")
    assert after(tg.BOS, byte, word) == [0, 1, letters + 1]


def test_wrong_byte_counts_are_found(tokenizers):
    sp = tokenizers[True]
    tokens = np.array([t for ids in sp.encode(TEXTS[:3]) for t in (tg.BOS, *ids)])
    counts = tg.count_bytes(tokens, tg.token_byte_table(sp))
    counts[3] += 1
    with pytest.raises(tg.UserError, match="add up to"):
        tg.check_byte_counts(tokens, counts, sp)


def test_unknown_pieces_do_not_stop_the_run(tokenizers):
    """An unknown piece stands for 0 bytes but decodes to a mark: such a document proves nothing and is passed over."""
    sp = tokenizers[True]
    tokens = np.array([tg.BOS, *sp.encode("plain"), sp.unk_id(), tg.BOS, *sp.encode("words")])
    tg.check_byte_counts(tokens, tg.count_bytes(tokens, tg.token_byte_table(sp)), sp)


# ----------------------------------------------------------------------------------------------------------- validation


def config_of(folder, **settings):
    return toy.config(DATA_PATH=folder, TOKENIZER_PATH=folder / "tokenizer.model", **settings)


def test_validation_joins_its_shards(toy_data):
    log = toy.ListLog()
    data = tg.load_validation(config_of(toy_data), log)
    assert (data.tokens == np.concatenate(toy.shards(toy_data, "val"))).all()
    assert len(data.tokens) == len(data.byte_counts) and "byte_check" in log.lines[0]
    text = sum(len(t.encode()) for t in toy.sentences(30, 12))
    assert data.byte_counts.sum() == text


def test_validation_without_bos(toy_data, tmp_path):
    toy.write_shard(tmp_path / "fineweb_val_000000.bin", toy.row(100, ()))
    (tmp_path / "tokenizer.model").write_bytes((toy_data / "tokenizer.model").read_bytes())
    with pytest.raises(tg.UserError, match="no BOS"):
        tg.load_validation(config_of(tmp_path), toy.ListLog())


def test_validation_of_one_token(toy_data, tmp_path):
    toy.write_shard(tmp_path / "fineweb_val_000000.bin", [1])
    with pytest.raises(tg.UserError, match="1 token"):
        tg.load_validation(config_of(tmp_path), toy.ListLog())


@pytest.mark.parametrize("content, words", [(None, "missing"), (b"", "not a SentencePiece model"),
                                            (b"rubbish" * 50, "not a SentencePiece model")])
def test_bad_tokenizers(toy_data, tmp_path, content, words):
    if content is not None:
        (tmp_path / "t.model").write_bytes(content)
    with pytest.raises(tg.UserError, match=words) as e:
        tg.load_tokenizer(toy.config(TOKENIZER_PATH=tmp_path / "t.model"))
    assert "\n" not in str(e.value) and "t.model" in str(e.value)


def test_tokenizer_of_another_size(toy_data):
    with pytest.raises(tg.UserError, match="has 384 pieces: expected VOCAB_SIZE=512"):
        tg.load_tokenizer(config_of(toy_data, VOCAB_SIZE=512))


def test_caseops_counts_come_from_the_sidecar(toy_data, tmp_path):
    for path in toy_data.iterdir():
        os.link(path, tmp_path / path.name)
    sizes = [len(s) for s in toy.shards(tmp_path, "val")]
    sidecar = np.random.default_rng(0).integers(0, 9, sum(sizes))
    toy.write_shard(tmp_path / "fineweb_val_bytes_000000.bin", sidecar[: sizes[0]])
    with pytest.raises(tg.UserError, match="fineweb_val_bytes_000001.bin is missing"):
        tg.load_validation(config_of(tmp_path, CASEOPS_ENABLED=1), toy.ListLog())
    toy.write_shard(tmp_path / "fineweb_val_bytes_000001.bin", sidecar[sizes[0]:])
    assert (tg.load_validation(config_of(tmp_path, CASEOPS_ENABLED=1), toy.ListLog()).byte_counts == sidecar).all()


def test_missing_sidecar(toy_data):
    with pytest.raises(tg.UserError, match="bytes_.*download.py --variant caseops"):
        tg.load_validation(config_of(toy_data, CASEOPS_ENABLED=1), toy.ListLog())
