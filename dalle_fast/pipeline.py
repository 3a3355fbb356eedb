"""Text in, ranked pictures out: the one class that users import."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dalle_fast import sampling
from dalle_fast.config import ModelConfig
from dalle_fast.engine import Engine
from dalle_fast.loading import check_device, load_engine
from dalle_fast.model import DalleModel
from dalle_fast.packed_model import PackedModel
from dalle_fast.ranking import ClipRanker
from dalle_fast.regions import Box, known_outside
from dalle_fast.sampling import SamplingSettings
from dalle_fast.tokenizer import CaptionTokenizer

DEMO = Path(__file__).parent / "assets" / "demo"
GREY = (236, 238, 241)  # rows that are not drawn yet


class ImageTokenizer(Protocol):
    """Pixels [B, 3, H, W] in 0..1 to tokens [B, h, w] and back."""

    def encode(self, pixels: Tensor) -> Tensor: ...
    def decode(self, tokens: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Picture:
    """One candidate, with all that is needed to draw it again."""

    caption: str
    candidate: int
    settings: SamplingSettings
    tokens: Tensor = field(repr=False)  # [cells] int64
    image: Image.Image = field(repr=False)
    log_likelihood: float = 0.0  # log p(drawn tokens | caption and what comes before each), nats
    known_log_p: float | None = None  # the same of the known tokens after the first drawn one, if it was asked for
    score: float | None = None  # CLIP, 100 x cosine, once ranked by it


class Pipeline:
    """A model folder made ready: caption -> tokens -> pictures.

    >>> pipeline = Pipeline.load()                       # the bundled model
    >>> for picture in pipeline.sample("a red cube", n=8):
    ...     picture.image.save(f"{picture.candidate}.png")

    Raises what `load`, `sample` and the others say; all errors of usage are ValueErrors of one line.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: CaptionTokenizer,
        images: ImageTokenizer,
        folder: Path,
        clip: str | Path | None = None,
        *,
        reload: Callable[..., Engine] | None = None,
        choices: Mapping[str, str] | None = None,
    ) -> None:
        """choices: the device, dtype, backend and tails that `load` was asked for. reload(chunk=k) loads the engine again for k
        known tokens at a time; without it, regions keep the engine."""
        self.engine, self.tokenizer, self.images, self.folder = engine, tokenizer, images, folder
        self.choices = dict(choices or {})
        self._clip, self._reload = clip, reload
        self._ranker: ClipRanker | None = None
        self._model: DalleModel | None = None

    @classmethod
    def load(
        cls,
        folder: str | Path | None = None,
        *,
        device: str = "auto",
        dtype: str = "auto",
        backend: str = "auto",
        clip: str | Path | None = None,
        chunk: int = 1,
        fp8_tails: bool = False,
    ) -> Pipeline:
        """Reads a model folder (the bundled model if None): config.json, model.safetensors, tokenizer.json, an image
        tokenizer, and optionally a CLIP folder `clip`.

        device "auto", "cpu", "cuda", "cuda:1"…; dtype "auto", "float32", "bfloat16", "float16", "int8", "int4"; backend
        "auto" or one of backends.MODULES; chunk: known tokens fed at a time. Each takes a slot in every ring, so 1 is best
        for whole pictures; `regenerate` loads the engine again with more unless that is given here. fp8_tails: the longest
        caches in 8 bits, for nearly twice the candidates a wave on a GPU (`cache.Cache`).
        Raises WeightError for files that are missing or don't fit, ValueError for an unknown device, dtype or backend,
        BackendUnavailable for a backend that can't run here.
        """
        path = DEMO if folder is None else Path(folder)
        choices = {"device": device, "dtype": dtype, "backend": backend} | ({"tails": "fp8"} if fp8_tails else {})
        reload = partial(load_engine, path, device=device, dtype=dtype, backend=backend, fp8_tails=fp8_tails)
        engine = reload(chunk=chunk)
        tokenizer = CaptionTokenizer(path / "tokenizer.json", engine.config.caption_len)
        return cls(engine, tokenizer, load_image_tokenizer(path), path, clip, reload=reload, choices=choices)

    @property
    def config(self) -> ModelConfig:
        return self.engine.config

    @cached_property
    def size(self) -> tuple[int, int]:
        """(width, height) of the model's pictures, in pixels."""
        blank = torch.zeros(1, self.config.height, self.config.width, dtype=torch.int64)
        pixels = self.images.decode(blank)
        return pixels.shape[3], pixels.shape[2]

    @property
    def ranker(self) -> ClipRanker:
        """The CLIP model, loaded when first needed. Raises as load_ranker does."""
        if self._ranker is None:
            self._ranker = load_ranker(self.folder, self._clip, device=check_device(self.choices.get("device", "cpu")))
        return self._ranker

    def sample(
        self,
        caption: str | Sequence[str],
        n: int = 8,
        settings: SamplingSettings | None = None,
        *,
        wave: int | None = None,
        first: int = 0,
        truncate: bool = False,
        known: Tensor | None = None,
        score_known: bool = False,
        on_token: Callable[[int, Tensor], None] | None = None,
    ) -> Iterator[Picture]:
        """Draws candidates first … first + n - 1 and yields them as their wave is finished: of several captions, each n and
        side by side, in a wave caption after caption. Arguments as in sampling.sample. Raises CaptionError for a caption
        the model can't be given, ValueError for settings out of range.
        """
        settings = settings or SamplingSettings()
        settings.check(self.config.image_vocab)
        if n < 1:
            raise ValueError(f"got n={n}, expected at least 1")
        captions = [caption] if isinstance(caption, str) else list(caption)
        if not captions:
            raise ValueError("got no caption, expected at least one")
        text = torch.cat([self.tokenizer.encode(one, truncate=truncate) for one in captions])
        waves = sampling.sample(
            self.engine,
            text,
            n,
            settings,
            wave=wave,
            first=first,
            known=known,
            score_known=score_known,
            on_token=on_token,
        )
        return self._pictures(captions, settings, waves, score_known)

    def _pictures(
        self, captions: list[str], settings: SamplingSettings, waves: Iterator[sampling.Wave], score_known: bool
    ) -> Iterator[Picture]:
        for wave in waves:
            images = self.decode(wave.tokens)
            each = len(images) // len(captions)
            for i, candidate in enumerate(wave.candidates.tolist()):
                of_known = float(wave.known_log_p[i]) if score_known else None
                drawn = float(wave.log_likelihood[i])
                yield Picture(captions[i // each], candidate, settings, wave.tokens[i], images[i], drawn, of_known)

    def stream(
        self,
        caption: str,
        n: int = 1,
        settings: SamplingSettings | None = None,
        *,
        wave: int | None = None,
        first: int = 0,
        truncate: bool = False,
        known: Tensor | None = None,
    ) -> Iterator[list[Picture]]:
        """Draws n candidates side by side and yields them after each row: as they grow, with tokens [cells so far] and the
        rest of the image grey; the last ones are finished, and those that `sample` draws. Arguments and errors as there.
        """
        settings = settings or SamplingSettings()
        settings.check(self.config.image_vocab)
        if n < 1:
            raise ValueError(f"got n={n}, expected at least 1")
        text = self.tokenizer.encode(caption, truncate=truncate)
        return self._growing(caption, text, n, settings, wave, first, known)

    def _growing(
        self,
        caption: str,
        text: Tensor,
        n: int,
        settings: SamplingSettings,
        wave: int | None,
        first: int,
        known: Tensor | None,
    ) -> Iterator[list[Picture]]:
        size = n
        if not self.engine.batch_invariant:  # as many as `sample` would decode together
            size = max(n, wave or sampling.default_wave(self.engine, n, settings))
        numbers = torch.arange(first, first + size)
        columns: list[Tensor] = []
        likelihood = torch.zeros(n, dtype=torch.float64)
        for j, drawn, log_p in sampling.draw(self.engine, text, numbers, settings, known):
            columns.append(drawn[:n].clone())
            likelihood = likelihood.to(log_p.device) + log_p[:n]
            if (j + 1) % self.config.width == 0:
                tokens = torch.stack(columns, dim=1).cpu()
                images = self.decode_partial(tokens)
                yield [
                    Picture(caption, first + i, settings, tokens[i], images[i], float(likelihood[i])) for i in range(n)
                ]

    def decode_partial(self, tokens: Tensor) -> list[Image.Image]:
        """The first rows of pictures, [n, rows * width] tokens -> n pictures whose other rows are grey."""
        width, cells = self.config.width, self.config.cells
        rest = tokens[:, -width:].repeat(1, self.config.height)  # something to decode, of which nothing is shown
        images = self.decode(torch.cat([tokens, rest], dim=1)[:, :cells])
        for image in images:
            top = image.height * tokens.shape[1] // cells
            image.paste(GREY, (0, top, image.width, image.height))
        return images

    def decode(self, tokens: Tensor) -> list[Image.Image]:
        """Tokens [n, cells] -> n pictures."""
        pixels = self.images.decode(tokens.view(-1, self.config.height, self.config.width))
        array = (pixels.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(image) for image in array]

    def encode(self, image: Image.Image) -> Tensor:
        """A picture, scaled to the model's size -> tokens [cells]."""
        scaled = image.convert("RGB").resize(self.size, Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.array(scaled)).permute(2, 0, 1)[None].float() / 255
        return self.images.encode(pixels).view(-1)

    def regenerate(
        self,
        image: Image.Image | Tensor,
        caption: str,
        boxes: Sequence[Box],
        n: int = 8,
        settings: SamplingSettings | None = None,
        **options: Any,
    ) -> Iterator[Picture]:
        """Draws the boxes of a picture (or of its tokens [cells]) anew under a caption; the rest keeps its tokens.

        Each token is drawn given the caption and every cell before it in raster order, known or drawn. That is the exact
        conditional where no known cell comes after the first drawn one: a box of the picture's full width, down to its
        end. Otherwise the known cells after it, those beside the box in later rows included, inform nothing that is drawn
        before them. With score_known=True Picture.known_log_p says how likely they are after what was drawn: the
        importance weight of the candidate, in nats, so that draws picked in proportion to its exponential tend to the
        exact conditional. Cost grows with the box: what is known before it is computed once for all candidates, later
        known runs are fed in chunks (with score_known: one by one), those after it not at all.
        Other options as in `sample`. Raises ValueError for boxes that are empty or leave the picture.
        """
        known = self.known(image, boxes)
        chunk = min(self.config.width, self.config.cells)
        if self._reload is not None and self.engine.chunk < chunk:
            del self.engine  # never two of them in memory
            self.engine = self._reload(chunk=chunk)
        return self.sample(caption, n, settings, known=known, **options)

    def known(self, image: Image.Image | Tensor, boxes: Sequence[Box]) -> Tensor:
        """The tokens [cells] of a picture (or those given) with -1 inside the boxes. Raises ValueError for a bad box, or
        tokens that are not this model's."""
        height, width = self.config.height, self.config.width
        return known_outside(self._tokens(image), boxes, height, width)

    def _tokens(self, image: Image.Image | Tensor) -> Tensor:
        tokens = image if isinstance(image, Tensor) else self.encode(image)
        sampling.check_known(tokens, self.config.cells, self.config.image_vocab)
        if int(tokens.min()) < 0:
            raise ValueError("got a picture with tokens of -1, expected a whole one")
        return tokens

    def score(self, image: Image.Image | Tensor, caption: str, *, truncate: bool = False) -> tuple[float, float]:
        """(log p(picture's tokens | caption), log p(caption)) in nats, from one full pass of the plain model, in the type and
        where it draws; for an engine of int8 or int4 in bfloat16 on the CPU, which is closer to the model than those.

        The caption's part counts its own tokens, not its padding; its first token is not predicted unless the model has a
        lead token. Raises as `sample` does for captions.
        """
        tokens = self._tokens(image)[None]
        text = self.tokenizer.encode(caption, truncate=truncate)
        model = self._plain_model()
        text, tokens = (x.to(model.image_embedding.weight.device) for x in (text, tokens))
        with torch.inference_mode():
            text_logits, image_logits = model(text, tokens)
            of_image = image_logits[0].double().log_softmax(-1).gather(1, tokens[0, :, None]).sum()
            section = model.text_section(text)[0]
            last = int((text[0] != 0).sum()) + int(model.config.lead_token is not None)
            targets = section[1 : min(last, text_logits.shape[1] + 1)]
            of_text = text_logits[0, : len(targets)].double().log_softmax(-1).gather(1, targets[:, None]).sum()
        return float(of_image), float(of_text)

    def _plain_model(self) -> DalleModel:
        """The engine's own where it holds a whole one, else one from the folder."""
        model = getattr(self.engine, "model", None)
        if isinstance(model, DalleModel) and not isinstance(model, PackedModel):  # which has no text head
            return model
        if self._model is None:
            exact = getattr(self.engine, "dtype", None) == "float32"
            self._model = DalleModel.load(self.folder, dtype=torch.float32 if exact else torch.bfloat16)
        return self._model

    def rank(
        self, pictures: Sequence[Picture], caption: str | None = None, *, by: str = "clip", keep: int | None = None
    ) -> list[Picture]:
        """The pictures, best first, the first `keep`.

        by "clip": Picture.score, computed here against the caption (their own if None); "likelihood": known_log_p where
        they have it, else log_likelihood; "both": the mean of the two ranks. Raises ValueError for another, for keep out of
        range, and as load_ranker does.
        """
        if not pictures:
            return []
        if keep is not None and not 1 <= keep <= len(pictures):
            raise ValueError(f"got keep={keep}, expected 1 to {len(pictures)}")
        if by != "likelihood":
            scores = self.ranker.scores([p.image for p in pictures], caption or pictures[0].caption).tolist()
            pictures = [replace(p, score=score) for p, score in zip(pictures, scores, strict=True)]
        fit = [p.log_likelihood if p.known_log_p is None else p.known_log_p for p in pictures]
        return [pictures[i] for i in order([p.score for p in pictures], fit, by)][:keep]

    def classify(self, image: Image.Image, captions: Sequence[str], templates: Sequence[str] = ("{}",)) -> list[float]:
        """The probability of each caption among those given, by CLIP (ranking.ClipRanker.classify). Raises ValueError for an
        empty caption or a template without {}, and as load_ranker does."""
        check_captions(captions, templates)
        return self.ranker.classify(image, captions, templates).tolist()


def check_captions(captions: Sequence[str], templates: Sequence[str]) -> None:
    """Raises ValueError for an empty caption, none at all, or a template without {}."""
    if not captions or not all(caption.strip() for caption in captions):
        raise ValueError("got an empty caption, expected some text")
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"got template {template!r}, expected {{}} where the caption goes")


def order(scores: Sequence[float | None], likelihoods: Sequence[float], by: str) -> list[int]:
    """Places of candidates, best first, by CLIP's scores, by likelihood, or by the mean of both ranks. Equal ones stay in
    turn. Raises ValueError for another `by`."""
    if by not in ("clip", "likelihood", "both"):
        raise ValueError(f"got by={by!r}, expected clip, likelihood or both")
    places = range(len(likelihoods))
    by_clip = sorted(places, key=lambda i: -(scores[i] or 0.0)) if by != "likelihood" else []
    by_likelihood = sorted(places, key=lambda i: -likelihoods[i])
    if by != "both":
        return by_clip or by_likelihood
    total = [0] * len(likelihoods)
    for ranked in (by_clip, by_likelihood):
        for place, i in enumerate(ranked):
            total[i] += place
    return sorted(places, key=lambda i: total[i])


def load_ranker(
    folder: str | Path | None = None, clip: str | Path | None = None, *, device: torch.device | str = "cpu"
) -> ClipRanker:
    """The CLIP model `clip`, or the one in a model's folder (the bundled model's if None). Raises ValueError if there is
    none or the package transformers is missing, WeightError if it can't be loaded."""
    path = DEMO if folder is None else Path(folder)
    if clip is None:
        clip = path / "clip"
        if not clip.is_dir():
            raise ValueError("got a model without a CLIP folder, expected clip=FOLDER to rank with")
    try:
        return ClipRanker(clip, device=device)
    except ImportError:
        raise ValueError("CLIP needs the package transformers: pip install 'dalle_fast[clip]'") from None


def load_image_tokenizer(folder: Path) -> ImageTokenizer:
    """The image tokenizer that a model folder holds. Raises WeightError if there is none."""
    from dalle_fast.images import load_codec

    return load_codec(folder)
