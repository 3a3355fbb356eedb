"""Text in, ranked pictures out: the one class that users import."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dalle_fast import sampling
from dalle_fast.config import ModelConfig
from dalle_fast.engine import Engine
from dalle_fast.loading import load_engine
from dalle_fast.model import DalleModel
from dalle_fast.ranking import ClipRanker
from dalle_fast.regions import Box, known_outside
from dalle_fast.sampling import SamplingSettings
from dalle_fast.tokenizer import CaptionTokenizer

DEMO = Path(__file__).parent / "assets" / "demo"


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
    log_likelihood: float = 0.0  # log p(drawn tokens | caption, known tokens), nats
    score: float | None = None  # CLIP, 100 x cosine, once ranked


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
        clip: Path | None = None,
    ) -> None:
        self.engine, self.tokenizer, self.images, self.folder = engine, tokenizer, images, folder
        self._clip_folder = clip
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
    ) -> Pipeline:
        """Reads a model folder (the bundled model if None): config.json, model.safetensors, tokenizer.json, an image
        tokenizer, and optionally a CLIP folder `clip`.

        device "auto", "cpu", "cuda", "cuda:1"…; dtype "auto", "float32", "bfloat16", "float16", "int8", "int4"; backend
        "auto" or one of backends.MODULES; chunk: known tokens fed at a time (regions).
        Raises WeightError for files that are missing or don't fit, ValueError for an unknown device, dtype or backend,
        BackendUnavailable for a backend that can't run here.
        """
        path = DEMO if folder is None else Path(folder)
        engine = load_engine(path, device=device, dtype=dtype, backend=backend, chunk=chunk)
        tokenizer = CaptionTokenizer(path / "tokenizer.json", engine.config.caption_len)
        if clip is None and (path / "clip").is_dir():
            clip = path / "clip"
        return cls(engine, tokenizer, load_image_tokenizer(path), path, Path(clip) if clip else None)

    @property
    def config(self) -> ModelConfig:
        return self.engine.config

    @property
    def ranker(self) -> ClipRanker:
        """The CLIP model, loaded when first needed. Raises ValueError if the folder has none."""
        if self._ranker is None:
            if self._clip_folder is None:
                raise ValueError("got a model without a CLIP folder, expected clip=FOLDER to rank with")
            self._ranker = ClipRanker(self._clip_folder)
        return self._ranker

    def sample(
        self,
        caption: str,
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
        """Draws candidates first … first + n - 1 and yields them as their wave is finished. Arguments as in
        sampling.sample. Raises CaptionError for a caption the model can't be given, ValueError for settings out of range.
        """
        settings = settings or SamplingSettings()
        settings.check(self.config.image_vocab)
        if n < 1:
            raise ValueError(f"got n={n}, expected at least 1")
        text = self.tokenizer.encode(caption, truncate=truncate)
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
        return self._pictures(caption, settings, waves)

    def _pictures(self, caption: str, settings: SamplingSettings, waves: Iterator[sampling.Wave]) -> Iterator[Picture]:
        for wave in waves:
            images = self.decode(wave.tokens)
            for i, candidate in enumerate(wave.candidates.tolist()):
                yield Picture(caption, candidate, settings, wave.tokens[i], images[i], float(wave.log_likelihood[i]))

    def decode(self, tokens: Tensor) -> list[Image.Image]:
        """Tokens [n, cells] -> n pictures."""
        pixels = self.images.decode(tokens.view(-1, self.config.height, self.config.width))
        array = (pixels.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(image) for image in array]

    def encode(self, image: Image.Image) -> Tensor:
        """A picture, scaled to the model's size -> tokens [cells]."""
        config = self.config
        probe = self.images.decode(torch.zeros(1, config.height, config.width, dtype=torch.int64))
        scaled = image.convert("RGB").resize((probe.shape[3], probe.shape[2]), Image.Resampling.LANCZOS)
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

        For a box that reaches the bottom-right corner this samples the exact conditional. Known cells after a box can't
        inform it in raster order: draw several and rank them, by CLIP or, with score_known=True, by
        Picture.log_likelihood, which then covers the known cells after the box too. Cost grows with the box: leading
        rows are computed once for all candidates, known runs are fed in chunks. Other options as in `sample`.
        """
        tokens = image if isinstance(image, Tensor) else self.encode(image)
        known = known_outside(tokens, boxes, self.config.height, self.config.width)
        return self.sample(caption, n, settings, known=known, **options)

    def score(self, image: Image.Image | Tensor, caption: str, *, truncate: bool = False) -> tuple[float, float]:
        """(log p(picture's tokens | caption), log p(caption)) in nats, from one full pass of the plain model in float32.

        The caption's part counts its own tokens, not its padding; its first token is not predicted unless the model has a
        lead token. Raises as `sample` does for captions.
        """
        tokens = (image if isinstance(image, Tensor) else self.encode(image))[None]
        text = self.tokenizer.encode(caption, truncate=truncate)
        if self._model is None:
            self._model = DalleModel.load(self.folder)
        model = self._model
        with torch.inference_mode():
            text_logits, image_logits = model(text, tokens)
            of_image = image_logits[0].double().log_softmax(-1).gather(1, tokens[0, :, None]).sum()
            section = model.text_section(text)[0]
            last = int((text[0] != 0).sum()) + int(model.config.lead_token is not None)
            targets = section[1 : min(last, text_logits.shape[1] + 1)]
            of_text = text_logits[0, : len(targets)].double().log_softmax(-1).gather(1, targets[:, None]).sum()
        return float(of_image), float(of_text)

    def rank(
        self, pictures: Sequence[Picture], caption: str | None = None, *, keep: int | None = None
    ) -> list[Picture]:
        """The pictures with their CLIP scores against the caption (their own if None), best first, the first `keep`."""
        if not pictures:
            return []
        if keep is not None and not 1 <= keep <= len(pictures):
            raise ValueError(f"got keep={keep}, expected 1 to {len(pictures)}")
        scores = self.ranker.scores([p.image for p in pictures], caption or pictures[0].caption)
        ranked = [replace(p, score=float(s)) for p, s in zip(pictures, scores, strict=True)]
        return sorted(ranked, key=lambda p: -(p.score or 0.0))[:keep]


def load_image_tokenizer(folder: Path) -> ImageTokenizer:
    """The image tokenizer that a model folder holds. Raises WeightError if there is none."""
    from dalle_fast.images import DVAE

    return DVAE.load(folder)
