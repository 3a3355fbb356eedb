"""CLIP: how well a picture fits a caption, for ranking candidates and for zero-shot classification.

Any CLIP of the transformers library, by folder or (with network) by name; the bundled one was trained on the bundled
model's scenes. The paper draws 512 candidates and keeps the 32 that CLIP likes best (arXiv 2102.12092, section 2.6).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dalle_fast.weights import WeightError

Pictures = Sequence[Image.Image]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of colours, CLIP's


class ClipRanker:
    """Scores pictures against captions by the cosine of their CLIP embeddings, times 100.

    folder: a folder that holds a transformers CLIPModel, its tokenizer and preprocessor_config.json (without one pictures
    are prepared as CLIP's authors do), or a hub name.
    Raises WeightError if it can't be loaded, ImportError if transformers is not installed.
    """

    def __init__(self, folder: str | Path, *, device: torch.device | str = "cpu") -> None:
        from transformers import CLIPModel, ImageProcessingMixin, PreTrainedTokenizerFast
        from transformers.utils import logging

        logging.disable_progress_bar()
        before = logging.get_verbosity()
        logging.set_verbosity_error()  # what is missing is said below, in one line
        local = Path(folder).exists()
        if not local and not re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)):
            raise WeightError(
                f"cannot load a CLIP model from {folder}: no such folder, and no hub name such as owner/name"
            )
        if local and not (Path(folder) / "config.json").is_file():
            raise WeightError(f"cannot load a CLIP model from {folder}: it holds no config.json")
        try:
            model, report = CLIPModel.from_pretrained(
                str(folder), local_files_only=local, output_loading_info=True, ignore_mismatched_sizes=True
            )
            self.tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=local)
            prepared: dict[str, Any] = {}
            if not local or (Path(folder) / "preprocessor_config.json").exists():
                prepared, _ = ImageProcessingMixin.get_image_processor_dict(str(folder), local_files_only=local)
            self.resample = Image.Resampling(prepared.get("resample", Image.Resampling.BICUBIC))
            self.mean, self.std = (
                np.array(prepared.get(name, ours), dtype=np.float64).reshape(3)
                for name, ours in (("image_mean", MEAN), ("image_std", STD))
            )
        except Exception as error:  # transformers and its readers raise a dozen kinds
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise WeightError(f"cannot load a CLIP model from {folder}: {reason}") from None
        finally:
            logging.set_verbosity(before)
        absent = sorted({*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])})
        if absent:
            raise WeightError(
                f"{folder} does not fit a CLIP model: {', '.join(absent[:4])} missing or of another shape"
            )
        self.model: Any = model.float().eval().to(device)  # transformers 5 keeps the file's type
        self.device = device
        self.size: int = self.model.config.vision_config.image_size

    @torch.inference_mode()
    def embed_images(self, pictures: Pictures, batch: int = 32) -> Tensor:
        """[n, e], unit length."""
        parts = []
        for start in range(0, len(pictures), batch):
            pixels = torch.stack([self._pixels(picture) for picture in pictures[start : start + batch]])
            parts.append(_features(self.model.get_image_features(pixel_values=pixels.to(self.device))))
        return torch.nn.functional.normalize(torch.cat(parts), dim=-1)

    def _pixels(self, picture: Image.Image) -> Tensor:
        """Shorter side to the model's size, centre crop, mean and deviation of the folder's preprocessor_config.json."""
        scale = self.size / min(picture.size)
        width, height = (max(self.size, round(side * scale)) for side in picture.size)
        resized = picture.convert("RGB").resize((width, height), self.resample)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        pixels = np.asarray(resized.crop((left, top, left + self.size, top + self.size)), dtype=np.float32) / 255
        return torch.from_numpy(((pixels - self.mean) / self.std).astype(np.float32)).permute(2, 0, 1)

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """[n, e], unit length."""
        limit = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, max_length=limit, return_tensors="pt").to(
            self.device
        )
        features = self.model.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return torch.nn.functional.normalize(_features(features), dim=-1)

    def embed_caption(self, caption: str, templates: Sequence[str] = ("{}",)) -> Tensor:
        """[e]: the mean over prompt templates, each with one {} for the caption, as CLIP's authors ensemble them."""
        embeddings = self.embed_texts([template.replace("{}", caption) for template in templates])
        return torch.nn.functional.normalize(embeddings.mean(0), dim=-1)

    def scores(self, pictures: Pictures, caption: str, templates: Sequence[str] = ("{}",)) -> Tensor:
        """[n] float32: 100 x cosine of each picture with the caption."""
        scores: Tensor = 100 * (self.embed_images(pictures) @ self.embed_caption(caption, templates)).float().cpu()
        return scores

    def classify(self, picture: Image.Image, captions: Sequence[str], templates: Sequence[str] = ("{}",)) -> Tensor:
        """[n] float32: the probability of each caption among the given ones (CLIP's own temperature)."""
        texts = torch.stack([self.embed_caption(caption, templates) for caption in captions])
        logits = self.model.logit_scale.exp() * (self.embed_images([picture]) @ texts.T)[0]
        probability: Tensor = logits.float().softmax(0).cpu()
        return probability


def _features(output: Any) -> Tensor:
    """transformers 5 returns an output object where 4 returned the tensor."""
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return features
