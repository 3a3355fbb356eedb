"""Caption tokenizers of other projects as `tokenizers` files: the same ids, by a plain BPE and by the families' own code."""

from __future__ import annotations

import gzip
import importlib.util
import itertools
import re
from collections import Counter
from pathlib import Path

import peer_packages
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from dalle_fast.checkpoints import bpe
from dalle_fast.tokenizer import CaptionError, CaptionTokenizer
from dalle_fast.weights import WeightError

WORDS = "красный куб на синем столе зелёный круг над красным квадратом кубы круги столы красота a red cube aaaa aaaaaa"
CAPTIONS = (
    "красный куб",
    "  Зелёный   КРУГ\tнад столом ",
    "кубики! a red cube, 你好 aaaaa aaaaaaa",
    "▁красный▁куб",
    "ццц€€€ц красный€куб",
)


def train(merges: int) -> tuple[str, dict[str, int], list[tuple[int, int, int]]]:
    """A youtokentome model of the words above: its text, the characters' ids and the merges."""
    words = ["▁" + word for word in WORDS.split()]
    chars = {char: i for i, char in enumerate(sorted(set("".join(words))), 4)}  # 0 … 3 are the special tokens
    rows, rules = [[chars[char] for char in word] for word in words], []
    for new in range(4 + len(chars), 4 + len(chars) + merges):
        pairs = Counter(pair for row in rows for pair in itertools.pairwise(row))
        x, y = min(pairs, key=lambda pair: (-pairs[pair], pair))
        rules.append((x, y, new))
        rows = [merge(row, x, y, new) for row in rows]
    lines = [f"{len(chars)} {merges}", *(f"{ord(c)} {i}" for c, i in chars.items())]
    lines += [" ".join(map(str, rule)) for rule in rules]
    return "\n".join([*lines, "1 0 2 3"]) + "\n", chars, rules


def merge(row: list[int], x: int, y: int, new: int) -> list[int]:
    out: list[int] = []
    for i in row:
        if out and out[-1] == x and i == y:
            out[-1] = new
        else:
            out.append(i)
    return out


def encode(text: str, chars: dict[str, int], rules: list[tuple[int, int, int]]) -> list[int]:
    """BPE as defined: the first rule that applies, from the left, again and again; a run of unknown characters is one id."""
    out = []
    for word in re.split(r"[\t-\r ▁]+", text):
        if word:
            ids = [chars.get(char, -1) for char in "▁" + word]
            row = [i for j, i in enumerate(ids) if i >= 0 or ids[j - 1] >= 0]
            for x, y, new in rules:
                row = merge(row, x, y, new)
            out += [1 if i < 0 else i for i in row]
    return out


@pytest.mark.parametrize("caption", CAPTIONS)
def test_youtokentome(tmp_path: Path, caption: str) -> None:
    text, chars, rules = train(40)
    (tmp_path / "bpe.model").write_text(text, encoding="utf-8")
    plain = bpe.read(tmp_path / "bpe.model", "dalle-pytorch")
    assert plain.encode(caption).ids == encode(caption, chars, rules)
    assert max(plain.encode("красный куб").ids) >= 4 + len(chars)  # merges do apply
    russian = bpe.read(tmp_path / "bpe.model", "rudalle")
    assert russian.encode(caption).ids == [2, *encode(caption.lower(), chars, rules), 3]
    assert russian.decode(russian.encode("красный куб").ids, skip_special_tokens=False).strip() == "красный куб"


@pytest.mark.skipif(
    importlib.util.find_spec("youtokentome") is None, reason="needs youtokentome, which needs a compiler"
)
def test_youtokentome_itself(tmp_path: Path) -> None:
    import youtokentome

    (tmp_path / "text").write_text(f"{WORDS}\n" * 9, encoding="utf-8")
    theirs = youtokentome.BPE.train(data=str(tmp_path / "text"), vocab_size=70, model=str(tmp_path / "bpe.model"))
    ours = bpe.read(tmp_path / "bpe.model", "dalle-pytorch")
    for caption in CAPTIONS:
        assert ours.encode(caption).ids == theirs.encode([caption], output_type=youtokentome.OutputType.ID)[0]


def test_captions_in_a_script_the_model_does_not_know(tmp_path: Path) -> None:
    (tmp_path / "bpe.model").write_text(train(20)[0], encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(bpe.read(tmp_path / "bpe.model", "rudalle").to_str(), encoding="utf-8")
    tokenizer = CaptionTokenizer(tmp_path / "tokenizer.json", 16)
    assert tokenizer.encode("красный куб")[0, 0] == 2 and tokenizer.encode("красный куб")[0, -1] == 0
    with pytest.raises(CaptionError):
        tokenizer.encode("你好")


CLIP_CAPTIONS = (
    "an armchair in the shape of an avocado",
    "A  Red\ncube's 3 corners, they're 100% round!!!",
    "“curly” ‘quotes’ &amp; &amp;lt;tags&gt; naïve café — 你好 🙂",
    "don't I'll we've he'd I'm it's 2023ish snake_case",
)


def test_clip_merges(tmp_path: Path) -> None:
    with peer_packages.dalle_pytorch_tokenizer() as peer:
        path, theirs = tmp_path / "merges.txt.gz", peer.tokenizer
        path.write_bytes(gzip.compress(Path(peer.default_bpe()).read_bytes(), 1))
        ours = bpe.read(path, "dalle-pytorch")
        assert ours.get_vocab_size() == theirs.vocab_size
        for caption in CLIP_CAPTIONS:
            assert ours.encode(caption).ids == theirs.encode(caption), caption
        assert ours.decode(theirs.encode("a red cube's corner")).strip() == "a red cube 's corner"


def test_hugging_face(tmp_path: Path) -> None:
    tokenizer = Tokenizer(
        models.WordLevel({"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "red": 3, "cube": 4}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = bpe.read(tmp_path / "tokenizer.json", "dalle-pytorch")
    assert ours.encode("red cube").ids == [3, 4]  # DALLE-pytorch takes away what stands around a caption
    with peer_packages.dalle_pytorch_tokenizer() as peer:
        assert peer.HugTokenizer(tmp_path / "tokenizer.json").tokenize("red cube")[0, :2].tolist() == [3, 4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2 1\n97 4\n", "numbers for 2 characters and 1 merges"),
        ("1 0\n97 x\n1 0 2 3\n", "not all numbers"),
        ("1 1\n9601 4\n4 9 5\n1 0 2 3\n", "merge 4 9 5"),
        ("1 0\n97 4\n1 0 2 3\n", "no ▁"),
        ("1 0\n9601 2\n1 0 2 3\n", "id 2 twice"),
        ("3 4\n9601 4\n97 5\n98 6\n4 5 7\n5 6 8\n7 6 9\n4 8 10\n1 0 2 3\n", "several ids for '▁ab'"),
        ("1 0\n9601 4\n1 0 -1 -1\n", "without <BOS> and <EOS>"),
        ("#version: 0.2\na b\n", "no list of 48894 merges"),
        ("{", "cannot read tokenizer"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "file").write_text(text, encoding="utf-8")
    with pytest.raises(WeightError, match=message) as error:
        bpe.read(tmp_path / "file", "rudalle")
    assert "\n" not in str(error.value)
    with pytest.raises(WeightError, match="No such file"):
        bpe.read(tmp_path / "absent", "rudalle")
