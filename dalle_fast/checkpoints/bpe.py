"""Caption tokenizers of other projects as files of the `tokenizers` library, giving the same ids.

youtokentome's model is text: counts of characters and of merges; code point and id of each character; the ids x, y -> z
of each merge, in order of priority; the ids of the unknown, padding, first and last token (-1: none).
"""

from __future__ import annotations

import gzip
import re
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from dalle_fast.weights import WeightError

SPACE = "▁"  # youtokentome writes one before each word
CLIP_MERGES = 49152 - 256 - 2
# What the family's cleaning (ftfy, HTML twice) does to well-formed text; mending text decoded in a wrong charset is left out.
CLEANED = (("[‘’‚‛]", "'"), ("[“”„‟]", '"'), ("ﬁ", "fi"), ("ﬂ", "fl"), ("ﬀ", "ff"))
ENTITIES = (("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&#39;", "'"), ("&amp;", "&"))
CLIP_WORD = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


def read(path: Path, family: str) -> Tokenizer:
    """youtokentome's model, CLIP's list of merges (plain or gzipped), or a JSON file of `tokenizers`, known by its content.

    ruDALL-E lowers captions and puts them between <BOS> and <EOS>; DALLE-pytorch gives them as they are.
    Raises WeightError for a file that can't be read or used.
    """
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        text = data.decode("utf-8")
        if text.lstrip().startswith("{"):
            return hugging_face(text)
        if re.match(r"\d+ \d+\s", text):
            return youtokentome(text, lower=family == "rudalle", ends=family == "rudalle")
        return clip_merges(text)
    except (OSError, EOFError, ValueError) as error:
        problem = getattr(error, "strerror", None) or str(error)
        raise WeightError(f"cannot read tokenizer {path}: {problem}") from None


def youtokentome(text: str, *, lower: bool, ends: bool) -> Tokenizer:
    """Raises ValueError for a file that is cut short or contradicts itself."""
    try:
        numbers = [int(word) for word in text.split()]
    except ValueError:
        raise ValueError("got a youtokentome model that is not all numbers") from None
    chars, merges = numbers[:2]
    if len(numbers) != 2 + 2 * chars + 3 * merges + 4:
        raise ValueError(f"got {len(numbers)} numbers for {chars} characters and {merges} merges")
    rest = iter(numbers[2:])
    pieces: dict[int, str] = {}
    for _ in range(chars):
        code, i = next(rest), next(rest)
        pieces[i] = chr(code)
    pairs = []
    for _ in range(merges):
        x, y, z = next(rest), next(rest), next(rest)
        if x not in pieces or y not in pieces or z in pieces:
            raise ValueError(f"got merge {x} {y} {z}, expected two known tokens and a new one")
        pieces[z] = pieces[x] + pieces[y]
        pairs.append((pieces[x], pieces[y]))
    for name, i in zip(("<UNK>", "<PAD>", "<BOS>", "<EOS>"), rest, strict=True):
        if i >= 0:
            if i in pieces:
                raise ValueError(f"got id {i} twice")
            pieces[i] = name
    vocab = {piece: i for i, piece in pieces.items()}
    if len(vocab) != len(pieces):
        twice = sorted(piece for i, piece in pieces.items() if vocab[piece] != i)
        raise ValueError(f"got several ids for {', '.join(map(repr, twice[:4]))}, which a tokenizers file cannot say")
    if SPACE not in vocab:
        raise ValueError(f"got no {SPACE}, which begins every word")
    unknown = "<UNK>" if "<UNK>" in vocab else None
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs, unk_token=unknown, fuse_unk=True))
    if lower:
        tokenizer.normalizer = normalizers.Lowercase()
    # Words end at the six ASCII blanks and at the mark itself; other blanks are characters like any.
    split = pre_tokenizers.Split(Regex(f"[\t-\r {SPACE}]+"), "removed")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.Metaspace(SPACE, prepend_scheme="always", split=False)]
    )
    if ends:
        tokens = [(name, vocab[name]) for name in ("<BOS>", "<EOS>") if name in vocab]
        if len(tokens) != 2:
            raise ValueError("got a model without <BOS> and <EOS>, which stand around every caption")
        tokenizer.post_processor = processors.TemplateProcessing(single="<BOS> $A <EOS>", special_tokens=tokens)
    hidden = [decoders.Replace(name, "") for name in ("<BOS>", "<EOS>", "<PAD>")]
    tokenizer.decoder = decoders.Sequence([*hidden, decoders.Metaspace(SPACE, prepend_scheme="always")])
    return tokenizer


def clip_merges(text: str) -> Tokenizer:
    """CLIP's byte-level BPE of 49408 tokens, lower case, from its list of merges. Raises ValueError if the list is short."""
    lines = [line.split() for line in text.split("\n")[1 : CLIP_MERGES + 1]]
    merges = [(line[0], line[1]) for line in lines if len(line) == 2]
    if len(merges) != CLIP_MERGES:
        raise ValueError(f"got no list of {CLIP_MERGES} merges, expected CLIP's bpe_simple_vocab_16e6.txt")
    pieces = [*_byte_letters(), *(letter + "</w>" for letter in _byte_letters()), *map("".join, merges)]
    vocab = {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, end_of_word_suffix="</w>"))
    replaced = [*CLEANED, *ENTITIES, *ENTITIES, (r"\s+", " ")]
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), *(normalizers.Replace(Regex(old), new) for old, new in replaced), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORD), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("</w>", " "), decoders.ByteLevel()])
    return tokenizer


def _byte_letters() -> list[str]:
    """One letter a byte, in the order of the vocabulary: printable bytes are themselves, the rest come from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def hugging_face(text: str) -> Tokenizer:
    """A JSON file of `tokenizers` as DALLE-pytorch uses it: nothing is put around the caption. Raises ValueError."""
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(str(error)) from None
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
