"""CaseOps: the bijection, what decode rejects, and bytes per piece for tokenizers of every kind."""

import io
import os
import random
import string
import time

import caseops
import pytest
import sentencepiece as spm
from caseops import ALLCAPS, CAPNEXT, ESC, TITLE, CaseOpsError, decode, encode, piece_byte_counts, without_markers
from hypothesis import given, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("DATA_EXAMPLES", 6000))
T, A, C, E = TITLE, ALLCAPS, CAPNEXT, ESC

# Letters, markers, and characters that case mapping or normalisation treats specially.
NASTY = "aabBZ" + "".join(caseops.CONTROLS) + " \t\n'-1▁ÉéßİıǅſK\u0301ﬁＡ…😀中\u2028\ud800\x00"
nasty_text = st.text(alphabet=st.sampled_from(NASTY), max_size=40)
encoded_like = st.text(alphabet=st.sampled_from("abB é" + "".join(caseops.CONTROLS)), max_size=12)


def encode_slowly(text):
    """The specification, one character at a time."""
    out, i = [], 0
    while i < len(text):
        j = i
        while j < len(text) and text[j] in string.ascii_letters:
            j += 1
        word = text[i:j]
        if not word:
            out.append(ESC + text[i] if text[i] in (TITLE, ALLCAPS, CAPNEXT, ESC) else text[i])
            i += 1
            continue
        capitals = [c in string.ascii_uppercase for c in word]
        if not any(capitals):
            out.append(word)
        elif all(capitals) and len(word) > 1:
            out.append(ALLCAPS + word.lower())
        else:
            for k, c in enumerate(word):
                out.append(("" if not capitals[k] else CAPNEXT if k else TITLE) + c.lower())
        i = j
    return "".join(out)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", ""),
        ("all lower, 123", "all lower, 123"),
        ("Hello", T + "hello"),
        ("NASA's I", A + "nasa's " + T + "i"),
        ("iPhone", "i" + C + "phone"),
        ("McDonald", T + "mc" + C + "donald"),
        ("ABc aBC", T + "a" + C + "bc a" + C + "b" + C + "c"),
        ("ÉCOLE", "É" + A + "cole"),  # É is no ASCII letter: the word begins after it
        ("x" + T, "x" + E + T),
        (E + E, E + E + E + E),
    ],
)
def test_worked_examples(text, expected):
    assert encode(text) == expected
    assert decode(expected) == text


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.one_of(st.text(), nasty_text, st.text(alphabet="aAbB -", max_size=30)))
def test_round_trip_and_specification(text):
    encoded = encode(text)
    assert decode(encoded) == text
    assert encoded == encode_slowly(text)


def test_round_trip_of_forty_thousand_random_strings():
    rng = random.Random(1)
    for _ in range(40_000):
        text = "".join(rng.choices(NASTY, k=rng.randrange(24)))
        encoded = encode(text)
        assert decode(encoded) == text, ascii(text)
        assert encoded == encode_slowly(text), ascii(text)


@settings(max_examples=EXAMPLES, deadline=None)
@given(encoded_like)
def test_decode_accepts_exactly_what_encode_writes(text):
    try:
        decoded = decode(text)
    except CaseOpsError as e:
        assert 0 <= e.position <= len(text)
        # Up to the fault the text is fine: with its last word whole, encode writes it.
        before = text[: e.position]
        assert encode(decode(before)) == before
    else:
        assert encode(decoded) == text


@pytest.mark.parametrize(
    "text, position",
    [
        (T, 0),
        ("hi " + A, 3),
        ("word" + C, 4),
        ("word" + E, 4),
        ("ab" + T + "c", 2),  # in the middle of a word
        ("ab" + A + "cd", 2),
        (T + "ab" + T + "c", 3),
        (A + "ab" + A + "cd", 3),
        (A + "ab" + C + "cd", 3),
        (T + " x", 0),
        (A + "1", 0),
        (T + "é", 0),
        (T + T + "a", 0),  # doubled
        ("a" + C + C + "b", 1),
        (T + A + "ab", 0),
        (C + "ab", 0),  # a word begins with TITLE
        (" x " + C + "ab", 3),
        (E + "a", 0),
        (E + T + E, 2),
        (A + "a", 0),  # one capital is TITLE
        (T + "a" + C + "b", 0),  # all capitals are ALLCAPS
        ("Plain", 0),
        (T + "hello NASA", 7),
        (T + "hello " + E + T + " i" + C + "phone " + T, 18),
    ],
)
def test_malformed_is_rejected_with_its_position(text, position):
    with pytest.raises(CaseOpsError, match=f"at position {position}$") as caught:
        decode(text)
    assert caught.value.position == position
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("unit, end", [("a", "B"), ("aB", ""), ("A", ""), ("Ab", ""), (TITLE, ""), ("a A", "")])
def test_time_is_linear(unit, end):
    text = unit * 10**6 + end
    start = time.perf_counter()
    assert decode(encode(text)) == text
    assert time.perf_counter() - start < 10  # quadratic: hours


def test_caches_stay_bounded():
    letters = string.ascii_lowercase
    for a in letters:
        encode(" ".join(f"X{a}{b}{c}{d}" for b in letters for c in letters for d in letters[:8]))
    encode("Y" + "x" * 1000)
    assert len(caseops._capital_words) <= caseops._Cache.LIMIT
    assert max(map(len, caseops._capital_words)) <= caseops._Cache.LONGEST
    assert encode("Xzzzz") == TITLE + "xzzzz"


# --- bytes per piece ------------------------------------------------------------------------------------------------
def test_piece_byte_counts_worked():
    assert piece_byte_counts(["<s>", "▁", T, "he", "llo", "▁w", "<0xC3>", "<0xA9>"]) == [0, 0, 0, 2, 3, 2, 1, 1]
    assert piece_byte_counts(["<s>", "▁the", "▁", A, "usa", "<s>", "▁a"]) == [0, 3, 1, 0, 3, 0, 1]
    assert piece_byte_counts(["<s>", "▁the"], leading_space=True) == [0, 4]
    assert piece_byte_counts([E, T, T, "a"]) == [0, 3, 0, 1]  # the escaped one is text
    assert piece_byte_counts([E, E, E, T]) == [0, 3, 0, 3]
    assert piece_byte_counts(["<0xEE>", "<0x80>", "<0x81>", "a"]) == [0, 0, 0, 1]  # TITLE spelt in bytes
    spelt = ["<0xEE>", "<0x80>", "<0x84>", "<0xEE>", "<0x80>", "<0x82>"]
    assert piece_byte_counts(spelt) == [0, 0, 0, 1, 1, 1]  # ESC ALLCAPS
    assert piece_byte_counts([E, "<0xEE>", "<0x80>", "<0x84>", T]) == [0, 1, 1, 1, 0]
    assert piece_byte_counts(["<0xEE>", "<0x80>", "<0x85>", "▁"]) == [1, 1, 1, 1]  # U+E005 is nobody's marker
    assert piece_byte_counts(["▁" + T, "▁▁" + E + C + "é"]) == [0, 2 + 3 + 2]  # pieces merged from several
    assert piece_byte_counts([]) == []


TRAINING_TEXT = ["The quick Brown FOX of McDonald jumps, 中文 and é, over the LAZY dog number 42."] * 50


def make_tokenizer(symbols, **options):
    # Without the symbols it has never seen a marker, so that it must spell them in bytes.
    texts = map(encode, TRAINING_TEXT) if symbols else (text.lower() for text in TRAINING_TEXT)
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=340,
        byte_fallback=True, pad_id=0, bos_id=1, eos_id=2, unk_id=3, hard_vocab_limit=False, minloglevel=2,
        user_defined_symbols=symbols, **options,
    )  # fmt: skip
    return spm.SentencePieceProcessor(model_proto=model.getvalue())


KEEP = dict(normalization_rule_name="identity", remove_extra_whitespaces=False)
TOKENIZERS = {
    "keeps everything": (list(caseops.CONTROLS), dict(add_dummy_prefix=False, **KEEP)),
    "dummy prefix": (list(caseops.CONTROLS), dict(add_dummy_prefix=True, **KEEP)),
    "as the challenge's": (list(caseops.CONTROLS), dict(add_dummy_prefix=False, normalization_rule_name="nmt_nfkc")),
    "SentencePiece's defaults": (list(caseops.CONTROLS), {}),
    "markers spelt in bytes": ([], dict(add_dummy_prefix=False, **KEEP)),
}


@pytest.fixture(scope="module", params=TOKENIZERS, ids=lambda name: name.replace(" ", "-"))
def tokenizer(request):
    symbols, options = TOKENIZERS[request.param]
    sp = make_tokenizer(symbols, **options)
    return request.param, sp, caseops.keeps_leading_space(sp)


@settings(max_examples=EXAMPLES // 20, deadline=None)
@given(text=nasty_text)
def test_bytes_add_up(tokenizer, text):
    name, sp, leading_space = tokenizer
    text = text.replace("\ud800", "")  # UTF-8 has none; tokenize_docs.py replaces them
    ids = sp.encode(encode(text))
    pieces = sp.id_to_piece(ids)
    counts = piece_byte_counts(["<s>", *pieces], leading_space=leading_space)
    assert len(counts) == len(ids) + 1 and min(counts) >= 0
    assert sum(counts) == len(without_markers(sp.decode(ids)).encode())
    if name == "keeps everything" and "▁" not in text:  # U+2581 is SentencePiece's own sign for a space
        assert sum(counts) == len(text.encode())
        assert decode(sp.decode(ids)) == text


def test_without_markers_is_as_long_as_decoded_text():
    text = "Ünï NASA " + "".join(caseops.CONTROLS) + " iPhone"
    assert len(without_markers(encode(text)).encode()) == len(text.encode())
    assert without_markers(encode("ﬁ" + "RST").replace("ﬁ", "fi")) == "first"  # which decode rejects


def test_command_line(data_run):
    text = "Hello NASA, é " + TITLE
    encoded = data_run("caseops.py", "encode", input=text)
    assert (encoded.returncode, encoded.stdout) == (0, encode(text))
    assert data_run("caseops.py", "decode", input=encoded.stdout).stdout == text
    wrong = data_run("caseops.py", "decode", input="abc" + ESC)
    assert wrong.returncode == 2 and "position 3" in wrong.stderr and wrong.stderr.count("\n") == 1
