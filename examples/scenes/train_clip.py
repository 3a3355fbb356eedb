"""Trains the bundled CLIP on rendered scenes; resumes from its checkpoint.

`python -m examples.scenes.train_clip --help`. A CLIPModel of the transformers library learns by contrast in batches made
of hard cases: each scene comes with one that differs in one attribute, and with damaged pictures, which teach that a
damaged picture is worth less: ones that the model drew and the checker refused (`--drawn`, from draw_for_clip.py), ones with
a bent block or spoilt proportions, or ones spliced from the two scenes. While it trains, linear heads on both embeddings
also name the scene's attributes; that is much faster learnt than contrast alone, and puts both towers into one space. The
heads are thrown away. Combinations held out from the transformer are held out here too.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from dalle_fast.ranking import MEAN, STD

from . import draw_for_clip, render
from .damage import damage, shifted
from .data import seed_everything, working_type
from .draw_for_clip import Drawn
from .grammar import (
    BLOCK_SHAPES,
    CLOCK_SHAPES,
    COLOURS,
    FAMILIES,
    GARMENTS,
    Scene,
    captions,
    is_held_out,
    one_attribute_changed,
    sample_caption,
    sample_scene,
)

SIZE, CAPTION_LEN = 128, 32
SAVE_EVERY = 200
DRAWN_SHARE = 0.6  # of a batch's scenes, if there are drawn pictures
DAMAGED = 2  # pictures a scene
ARRANGEMENTS = ("group", "left_of", "on_top", "tower")
SHAPES = tuple(dict.fromkeys(BLOCK_SHAPES + CLOCK_SHAPES))
# Attributes that the heads name, and how many values each has.
HEADS = {
    "family": len(FAMILIES),
    "arrangement": len(ARRANGEMENTS),
    "count": 4,
    "small": 2,
    **{f"colour {i}": len(COLOURS) for i in range(3)},
    **{f"shape {i}": len(SHAPES) for i in range(3)},
    "hour": 12,
    **{garment: len(COLOURS) + 1 for garment in GARMENTS},
}


def attributes(scene: Scene) -> list[int]:
    """One value a head, -1 where the scene does not say."""
    value = dict.fromkeys(HEADS, -1)
    value["family"] = FAMILIES.index(scene.family)
    for i, block in enumerate(scene.blocks):
        value[f"colour {i}"], value[f"shape {i}"] = COLOURS.index(block.colour), SHAPES.index(block.shape)
    if scene.family == "blocks":
        value |= {"arrangement": ARRANGEMENTS.index(scene.arrangement), "count": scene.count - 1}
        if scene.arrangement == "group":
            value["small"] = int(scene.small)
    elif scene.family == "clocks":
        value["hour"] = scene.hour - 1
    else:
        worn = dict(scene.garments)
        value |= {name: COLOURS.index(worn[name]) + 1 if name in worn else 0 for name in GARMENTS}
    return list(value.values())


def make_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The captions' words, and an end of text that the text tower's embedding is read from. Saved in `folder`."""
    rng = np.random.default_rng(3)
    lines = [line for _ in range(4000) for line in captions(sample_scene(rng))]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = list("abcdefghijklmnopqrstuvwxyz0123456789',.-!?")
    special = ["[PAD]", "[EOS]"]
    tokenizer.train_from_iterator(
        lines,
        trainers.BpeTrainer(vocab_size=256, special_tokens=special, initial_alphabet=letters, show_progress=False),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A [EOS]", special_tokens=[("[EOS]", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[EOS]", model_max_length=CAPTION_LEN
    )
    fast.save_pretrained(str(folder))
    return fast


def make_model(width: int, layers: int, patch: int, text_layers: int) -> CLIPModel:
    shared = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 64}
    text = {
        **shared,
        "num_hidden_layers": text_layers,
        "vocab_size": 256,
        "max_position_embeddings": CAPTION_LEN,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "bos_token_id": None,
    }
    vision = {**shared, "num_hidden_layers": layers, "image_size": SIZE, "patch_size": patch}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width))


def pixels(pictures: list[np.ndarray]) -> Tensor:
    """Pictures [256, 256, 3] uint8 as the ranker prepares them: [n, 3, 128, 128] float32."""
    x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    x = F.interpolate(x, (SIZE, SIZE), mode="bicubic", antialias=True).float() / 255
    return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def fits(shown: Scene, said: Scene) -> bool:
    """Whether a caption of `said` is true of a picture of `shown`: equal, or a clock whose time is not named."""
    return shown == said or (said.family == "clocks" and not said.hour and shown.blocks == said.blocks)


class Batch:
    """The batch of one step, which depends on the seed, the step and the drawn pictures alone.

    pixels [(2 + DAMAGED)g, 3, 128, 128]: g scenes, g that differ in one attribute, then DAMAGED times g damaged; texts 2g;
    fits [(2 + DAMAGED)g, 2g] bool; attributes [2g, heads] int64. Of the g scenes DRAWN_SHARE are drawn ones, shown by an
    exact picture if there is one; drawn pictures are shifted.
    """

    def __init__(self, step: int, groups: int, seed: int, drawn: list[Drawn]) -> None:
        rng = np.random.default_rng((seed, step))
        chosen = [
            drawn[int(rng.integers(len(drawn)))] if drawn and rng.random() < DRAWN_SHARE else None
            for _ in range(groups)
        ]
        scenes, changed = [d.scene if d else sample_scene(rng) for d in chosen], []
        for scene in scenes:
            others = [other for other in one_attribute_changed(scene) if not is_held_out(other)]
            changed.append(others[int(rng.integers(len(others)))])
        shown = scenes + changed
        layouts = [render.layout(scene, rng) for scene in shown]
        pictures = [render.finish(*layout, rng) for layout in layouts]
        damaged: list[list[np.ndarray]] = []
        for i, d in enumerate(chosen):
            refused = []
            if d is not None:
                good = d.pictures[d.exact]
                if len(good):
                    pictures[i] = shifted(good[int(rng.integers(len(good)))], rng)
                refused = [shifted(picture, rng) for picture in rng.permutation(d.pictures[~d.exact])[:DAMAGED]]
            other = (scenes[i], layouts[i], pictures[i], pictures[groups + i], rng)
            damaged.append(refused + [damage(*other) for _ in range(DAMAGED - len(refused))])
        flat = [pair[k] for k in range(DAMAGED) for pair in damaged]
        self.pixels = pixels(pictures + flat)
        self.texts = [sample_caption(scene, rng) for scene in shown]
        self.fits = torch.tensor([[fits(a, b) for b in shown] for a in shown])
        # A damaged picture counts against its own caption, and for no other of its two scenes.
        maybe = self.fits[:groups] | self.fits[groups:]
        maybe &= ~torch.eye(2 * groups, dtype=torch.bool)[:groups]
        self.fits = torch.cat([self.fits, *[maybe] * DAMAGED])
        self.attributes = torch.tensor([attributes(scene) for scene in shown])


class Training(nn.Module):
    """The CLIP and the heads that help it learn."""

    def __init__(self, clip: CLIPModel, width: int) -> None:
        super().__init__()
        self.clip, self.heads = clip, nn.Linear(width, sum(HEADS.values()))

    def embed(self, pixel_values: Tensor, tokens) -> tuple[Tensor, Tensor]:
        """Unit embeddings [p, e] and [t, e]."""
        out = self.clip(
            pixel_values=pixel_values, input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        )
        return out.image_embeds.float(), out.text_embeds.float()

    def losses(self, images: Tensor, texts: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Contrast both ways, where another true pair counts neither for nor against; and what the heads miss."""
        count = len(texts)
        logits = self.clip.logit_scale.exp().clamp(max=100) * images @ texts.t()
        own = torch.eye(len(images), count, dtype=torch.bool)
        logits = logits.masked_fill(batch.fits & ~own, -1e4)
        target = torch.arange(count)
        contrast = (F.cross_entropy(logits.t(), target) + F.cross_entropy(logits[:count], target)) / 2
        named = torch.cat([self.heads(8 * images[:count]), self.heads(8 * texts)]).split(list(HEADS.values()), dim=1)
        wanted = batch.attributes.repeat(2, 1)
        missed = [
            F.cross_entropy(logit, wanted[:, i], ignore_index=-1)
            for i, logit in enumerate(named)
            if (wanted[:, i] >= 0).any()
        ]
        return contrast, torch.stack(missed).mean()


@torch.no_grad()
def mixed(model: Training, start: dict[str, Tensor], share: float) -> Training:
    """A copy with the mean of `start`, weighed `share`, and the model's own CLIP (Wortsman et al. 2022, arXiv 2109.01903)."""
    mean = copy.deepcopy(model)
    for name, tensor in mean.clip.state_dict().items():
        if tensor.is_floating_point():
            tensor.lerp_(start[name].to(tensor.dtype), share)
    return mean


@torch.inference_mode()
def quality(model: Training, tokenizer: PreTrainedTokenizerFast, scenes: int = 60, others: int = 7) -> dict[str, float]:
    """Per family, and for held-out scenes: how often a caption prefers its own picture to 7 with one attribute changed."""
    model.eval()
    result = {}
    for name in (*FAMILIES, "held out"):
        rng = np.random.default_rng(10**6)
        right = 0
        for i in range(scenes):
            held_out = name == "held out"
            scene = sample_scene(rng, FAMILIES[i % 3] if held_out else name, held_out)
            wrong = [other for other in one_attribute_changed(scene) if not fits(other, scene)]
            chosen = [wrong[int(i)] for i in rng.permutation(len(wrong))[:others]]
            pictures = pixels([render.render(s, rng) for s in (scene, *chosen)])
            tokens = tokenizer([captions(scene)[0]], return_tensors="pt")
            images, texts = model.embed(pictures, tokens)
            right += int((images @ texts[0]).argmax() == 0)
        result[name] = right / scenes
    model.train()
    return result


def save(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """The folder that ClipRanker reads; weights in float16."""
    half = CLIPModel(model.config)
    half.load_state_dict(model.state_dict())
    half.half().save_pretrained(str(folder), safe_serialization=True)
    tokenizer.save_pretrained(str(folder))
    from dalle_fast.weights import write_text

    size = f'{{"height": {SIZE}, "width": {SIZE}}}'
    write_text(
        folder / "preprocessor_config.json",
        f'{{"image_processor_type": "CLIPImageProcessor", "do_resize": true, "size": {{"shortest_edge": {SIZE}}}, '
        f'"resample": 3, "do_center_crop": true, "crop_size": {size}, "do_rescale": true, "do_normalize": true, '
        f'"do_convert_rgb": true, "image_mean": {list(MEAN)}, "image_std": {list(STD)}}}\n',
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="the CLIP folder; the checkpoint is training.pt in there"
    )
    parser.add_argument("--init", type=Path, help="a trained CLIP folder to go on from, if there is no checkpoint yet")
    parser.add_argument("--keep", type=float, default=0.0, help="weight of --init in the mean with it that is saved")
    parser.add_argument("--drawn", type=Path, help="pictures of a trained model, from draw_for_clip.py")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--groups", type=int, default=24, help="scenes a step; each gives four pictures")
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--text-layers", type=int, default=2)
    parser.add_argument("--patch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3, help="of AdamW")
    parser.add_argument("--matrix-lr", type=float, default=0.01, help="of Muon")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not 0 <= args.keep <= 1:
        parser.error(f"got --keep {args.keep}, expected 0 to 1")
    if args.keep and not args.init:
        parser.error("got --keep without --init, expected the folder to take the mean with")
    seed_everything(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(args.out)
    # Captions that the model always drew right teach nothing that rendered scenes do not.
    drawn = [d for d in draw_for_clip.read(args.drawn) if not d.exact.all()] if args.drawn else []
    clip = make_model(args.width, args.layers, args.patch, args.text_layers)
    if args.init:
        clip.load_state_dict(CLIPModel.from_pretrained(str(args.init)).state_dict())
    start = copy.deepcopy(clip.state_dict())
    model = Training(clip, args.width)
    if args.init and (args.init / "training.pt").exists():  # the heads too
        model.load_state_dict(torch.load(args.init / "training.pt", map_location="cpu", weights_only=True)["model"])
    matrices = [p for name, p in model.clip.named_parameters() if p.ndim == 2 and ".layers." in name]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    optimizers = [
        (torch.optim.Muon(matrices, lr=args.matrix_lr, momentum=0.95, weight_decay=0.0), args.matrix_lr),
        (torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0), args.lr),
    ]
    first, checkpoint = 0, args.out / "training.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        for (optimizer, _), saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first = state["step"]
    print(
        f"{sum(p.numel() for p in model.clip.parameters())} parameters, from step {first} to {args.steps}", flush=True
    )
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, desc="CLIP", mininterval=10)
    for step in bar:
        scale = min(1.0, (step + 1) / 100, 2.5 * (1 - step / args.steps))
        for optimizer, lr in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * scale
        batch = Batch(step, args.groups, args.seed, drawn)
        tokens = tokenizer(batch.texts, padding=True, return_tensors="pt")
        with torch.autocast("cpu", torch.bfloat16, working_type("cpu") == torch.bfloat16):
            images, texts = model.embed(batch.pixels, tokens)
        contrast, missed = model.losses(images, texts, batch)
        model.zero_grad()
        (contrast + missed).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, _ in optimizers:
            optimizer.step()
        with torch.no_grad():
            model.clip.logit_scale.clamp_(max=math.log(100))
        if step % 20 == 0:
            bar.set_postfix_str(f"contrast {contrast.item():.3f}, attributes {missed.item():.3f}")
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == args.steps:
            state = {
                "model": model.state_dict(),
                "optimizers": [o.state_dict() for o, _ in optimizers],
                "step": step + 1,
            }
            torch.save(state, checkpoint.with_suffix(".tmp"))
            os.replace(checkpoint.with_suffix(".tmp"), checkpoint)
            mean = mixed(model, start, args.keep)
            save(mean.clip, tokenizer, args.out)
            found = ", ".join(f"{name} {share:.0%}" for name, share in quality(mean, tokenizer).items())
            tqdm.write(
                f"step {step + 1}: contrast {contrast.item():.3f}, attributes {missed.item():.3f}; right of 8: {found}"
            )


if __name__ == "__main__":
    main()
