"""CaseOps (`lossless_caps_caseops_v1`): capitals become control characters, so that a tokenizer sees one case.

    encode("Hello NASA, iPhone McDonald I") == "␁hello ␂nasa, i␃phone ␁mc␃donald ␁i"   (␁ for U+E001, and so on)

Over words (maximal runs of ASCII letters): all lower-case stays; two or more letters, all capitals: ALLCAPS + lower;
one capital first and the rest lower, or a single capital: TITLE + lower; otherwise TITLE if the first letter is a
capital, then the lower-cased letters, each later capital preceded by CAPNEXT. A literal control character is written
ESC + itself. Everything else is unchanged. The scheme is that of the challenge's CaseOps data
(romeerp/parameter-golf-caseops-v1); the code is our own.

`encode` is a bijection from all Python strings onto the strings that `decode` accepts: decode(encode(s)) == s for every
s, and decode raises CaseOpsError for everything that encode cannot have written.

Command line, for a look at what it does (UTF-8 from stdin to stdout):
    python data/caseops.py encode < text.txt | python data/caseops.py decode
"""

import argparse
import re
import sys
from collections.abc import Iterable

TITLE = "\ue001"
ALLCAPS = "\ue002"
CAPNEXT = "\ue003"
ESC = "\ue004"
CONTROLS = (TITLE, ALLCAPS, CAPNEXT, ESC)  # a CaseOps tokenizer has these four as user-defined symbols
NAMES = {TITLE: "TITLE", ALLCAPS: "ALLCAPS", CAPNEXT: "CAPNEXT", ESC: "ESC"}


class CaseOpsError(ValueError):
    """Text that encode cannot have written; `position` is the character index of the first fault."""

    def __init__(self, message: str, position: int):
        super().__init__(f"{message} at position {position}")
        self.position = position


class _Cache(dict):
    """word → function(word), remembered for the common words only, so that memory stays bounded."""

    LIMIT = 1 << 16
    LONGEST = 32

    def __init__(self, function):
        self.function = function

    def __missing__(self, word):
        value = self.function(word)
        if len(word) <= self.LONGEST and len(self) < self.LIMIT:
            self[word] = value
        return value


# --- encode ---------------------------------------------------------------------------------------------------------
_CONTROL = re.compile("([\ue001-\ue004])")
_CAPITAL = re.compile("([A-Z])")
# A word that begins with a capital. The lookbehind stands after the first letter: with the character class in front the
# engine skips to the next capital by itself, which makes the whole of encode 1.5 times as fast.
_CAPITAL_WORD = re.compile("([A-Z](?<![A-Za-z][A-Z])[A-Za-z]*)")
_NO_CAPITALS = bytes(b for b in range(256) if not 65 <= b <= 90)


def _encode_capital_word(word: str) -> str:
    """A word that begins with a capital, encoded."""
    lower = word.lower()
    if word[1:] == lower[1:]:
        return TITLE + lower
    if word.isupper():
        return ALLCAPS + lower
    return TITLE + lower[0] + _CAPITAL.sub(lambda m: CAPNEXT + m[0].lower(), word[1:])


_capital_words = _Cache(_encode_capital_word)


def encode(text: str) -> str:
    """Text with its ASCII capitals written as CaseOps markers; never fails.

    Lower-case words are never touched one by one: the pattern stops at capitals only, and known words come from a
    table. The expressions have no nested repeats, so the time is linear whatever the text.
    """
    if any(control in text for control in CONTROLS):
        text = _CONTROL.sub(ESC + r"\1", text)
    parts = _CAPITAL_WORD.split(text)
    if len(parts) > 1:
        parts[1::2] = map(_capital_words.__getitem__, parts[1::2])
        text = "".join(parts)
    # Any capital left is inside a word that began with a small letter (iPhone). They are rare: which letters they are
    # is found several times as fast by deleting all other bytes as by looking for each of the 26.
    for letter in set(text.encode("utf-8", "surrogatepass").translate(None, _NO_CAPITALS).decode("ascii")):
        text = text.replace(letter, CAPNEXT + letter.lower())
    return text


# --- decode ---------------------------------------------------------------------------------------------------------
# Whatever needs work: an escape, a marked word, a capital inside a small word, and anything that must not be there.
_MARKED = re.compile(
    "(\ue004[\ue001-\ue004]|\ue001[a-z]+(?:\ue003[a-z]+)*|\ue002[a-z]+|\ue003[a-z]|[\ue001-\ue004A-Z])"
)
_SHOULD_BE_ALLCAPS = re.compile("\ue001[a-z](?:\ue003[a-z])+")
_AFTER_CAPNEXT = re.compile("\ue003([a-z])")


def _decode_marked(unit: str) -> str | None:
    """The text of one match of _MARKED, None if encode cannot have written it there or anywhere."""
    first = unit[0]
    if len(unit) == 1:
        return None
    if first == ESC:
        return unit[1]
    if first == ALLCAPS:
        return unit[1:].upper() if len(unit) > 2 else None
    if first == TITLE and _SHOULD_BE_ALLCAPS.fullmatch(unit):
        return None
    if first == TITLE:
        unit = unit[1].upper() + unit[2:]
    return _AFTER_CAPNEXT.sub(lambda m: m[1].upper(), unit)


_marked_units = _Cache(_decode_marked)


def decode(text: str) -> str:
    """The text that `encode` was given.

    Raises CaseOpsError, with the position of the first fault, for a marker in the middle of a word, before anything but
    a small ASCII letter, doubled, or at the end; for an ESC that escapes no control character; for a plain capital; and
    for a word marked in another way than encode's (ALLCAPS before one letter, TITLE and CAPNEXT where ALLCAPS belongs).
    """
    parts = _MARKED.split(text)
    before = ""  # the previous marked unit
    for i in range(1, len(parts), 2):
        gap, unit = parts[i - 1], parts[i]
        decoded = _marked_units[unit]
        if decoded is None:
            _reject(parts, i)
        if unit[0] != ESC:
            last = gap[-1:] or before[-1:]
            in_word = "a" <= last <= "z"
            if unit[0] == CAPNEXT:
                # Right after a gap the word is a small one; without a gap it must be such a word going on.
                if not in_word or (not gap and before[0] != CAPNEXT):
                    _reject(parts, i)
            elif in_word:
                _reject(parts, i)
        parts[i] = decoded
        before = unit
    return "".join(parts)


def _reject(parts: list[str], i: int) -> None:
    """Raise the CaseOpsError that says what is wrong with the marked unit parts[i] (earlier ones are decoded)."""
    encoded_before = sum(len(encode(parts[k])) if k % 2 else len(parts[k]) for k in range(i))
    # An escape decodes to a control character, which encode writes as two again; a CAPNEXT unit decodes to a bare
    # capital, which encode writes as TITLE + letter: both keep the length, so the sum is the position.
    unit, position = parts[i], encoded_before
    rest = parts[i + 1]
    following = rest[:1] or (parts[i + 2][:1] if i + 2 < len(parts) else "")
    name = NAMES.get(unit[0])
    if name is None:
        raise CaseOpsError(f"plain capital {unit!r} where a marker and a small letter were expected", position)
    if unit[0] == ESC:
        found = f"before {following!r}" if following else "at the end of the text"
        raise CaseOpsError(f"ESC {found}, expected one of U+E001..U+E004 after it,", position)
    if len(unit) == 1:
        found = f"before {following!r}" if following else "at the end of the text"
        raise CaseOpsError(f"{name} {found}, expected a small ASCII letter after it,", position)
    previous = parts[i - 1][-1:] or (parts[i - 2][-1:] if i > 1 else "")
    in_word = previous.isascii() and previous.isalpha()
    if in_word and unit[0] != CAPNEXT:
        raise CaseOpsError(f"{name} in the middle of a word", position)
    if unit[0] == CAPNEXT:
        where = "in a word that ALLCAPS began" if in_word else "at the beginning of a word"
        raise CaseOpsError(f"CAPNEXT {where}", position)
    expected = "TITLE for a single capital" if unit[0] == ALLCAPS else "ALLCAPS for a word all in capitals"
    raise CaseOpsError(f"{name} where encode writes {expected}", position)


# --- bytes per piece ------------------------------------------------------------------------------------------------
_BOUNDARY = ("", "<s>", "</s>", "<pad>", "<unk>")
_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")
_MARKER_OR_ESCAPE = re.compile("\ue004([\ue001-\ue004])|[\ue001-\ue004]")
_MARKER_UTF8 = {c.encode(): c for c in CONTROLS}  # EE 80 81 .. EE 80 84


def _utf8_length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def without_markers(text: str) -> str:
    """CaseOps text without its markers and ESCs: as many UTF-8 bytes as the decoded text, in small letters.

    Unlike decode it takes any text. A tokenizer that normalises can bring capitals or letters next to a marker after
    encode has run (full-width "Ａ" becomes "A", the ligature "ﬁ" becomes "fi"), and decode rejects those.
    """
    return _MARKER_OR_ESCAPE.sub(lambda m: m[1] or "", text)


def keeps_leading_space(sp) -> bool:
    """Whether a SentencePieceProcessor's decode returns a ▁ that begins the text as a space.

    It does not where a dummy prefix is added (the ▁ may be that) or outer white space is removed.
    """
    adds_prefix = sp.id_to_piece(sp.encode("a"))[0].startswith("▁")
    return not adds_prefix and sp.decode(sp.encode(" a")) == " a"


def piece_byte_counts(surfaces: Iterable[str], leading_space: bool = False) -> list[int]:
    """Bytes of original text that each piece of a CaseOps-encoded text stands for, one number per piece.

    surfaces: SentencePiece's pieces in order (`sp.encode(text, out_type=str)`, `sp.id_to_piece(ids)`), where ▁ is a
    space (1 byte) and `<0xNN>` is a byte (1). Markers and ESC count 0, an escaped character its own 3 bytes, also where
    they are spelt as three byte pieces. Control pieces (`<s>` and the like, or "" for any other) count 0.
    A ▁ that begins the text, or follows a control piece, is SentencePiece's dummy prefix and counts 0 unless
    leading_space is true: pass keeps_leading_space(sp).

    The sum is the UTF-8 length of without_markers(sp.decode(ids)): the original text as the tokenizer normalises it.

        piece_byte_counts(["<s>", "▁", "\\ue001", "he", "llo", "▁w", "<0xC3>", "<0xA9>"]) == [0, 0, 0, 2, 3, 2, 1, 1]
    """
    counts: list[int] = []
    escaped = False  # ESC came just before: the next control character is text
    at_start = True  # nothing but boundary pieces so far
    run: list[int] = []  # values of the last three byte pieces that came in a row
    for piece in surfaces:
        byte = _BYTE.fullmatch(piece) if len(piece) == 6 and piece[0] == "<" else None
        if byte:
            counts.append(1)
            at_start = False
            run = [*run[-2:], int(byte[1], 16)]
            control = _MARKER_UTF8.get(bytes(run))
            if control is None:
                continue
            run = []
            if escaped:
                escaped = False  # its three bytes are text and keep their 1 each
            else:
                counts[-3:] = 0, 0, 0
                escaped = control == ESC
            continue
        run = []
        if piece in _BOUNDARY:
            counts.append(0)
            if piece:
                at_start, escaped = True, False
            continue
        count = _utf8_length(piece) - 2 * piece.count("▁")  # ▁ takes 3 bytes and stands for one space
        if at_start and piece[0] == "▁" and not leading_space:
            count -= 1
        at_start = False
        if not piece.isascii() and (escaped or _CONTROL.search(piece)):
            for char in piece:
                if char in NAMES and not escaped:
                    count -= 3
                    escaped = char == ESC
                else:
                    escaped = False
        else:
            escaped = False
        counts.append(count)
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("direction", choices=("encode", "decode"), help="what to do with the UTF-8 text on stdin")
    args = parser.parse_args()
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
        result = encode(text) if args.direction == "encode" else decode(text)
    except UnicodeDecodeError as e:
        print(f"error: stdin is not UTF-8: byte {e.object[e.start]:#04x} at offset {e.start}", file=sys.stderr)
        return 2
    except CaseOpsError as e:
        print(f"error: stdin is not CaseOps text: {e}", file=sys.stderr)
        return 2
    sys.stdout.buffer.write(result.encode("utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
