"""Trains the bundled transformer; the same command on a GPU or a CPU, resumes from its checkpoint.

`python -m examples.scenes.train_transformer --help`. The learning rate is constant until the last `--decay` steps,
which take it to zero: a run may be prolonged by resuming its checkpoint with more `--steps`. Until the last
`--long-text` steps the text section has 32 positions, which every caption of the grammar fits into and which saves a
third of the work; then the model gets its 256. Matrices learn by Muon, everything else by AdamW. Weights are float32,
arithmetic is bfloat16 where the device has it. Under `torchrun --nproc-per-node N` each of N processes takes its part of
every batch.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from dalle_fast.config import ModelConfig
from dalle_fast.model import DalleModel
from dalle_fast.passes import FullPass, Pass

from .data import TEXT_VOCAB, Batches, seed_everything, train_tokenizer, working_type
from .grammar import COLOURS
from .render import SHADES
from .steady_codes import Codebook
from .tiled_attention import TiledPass

SHORT_TEXT, TEXT = 32, 256
PAD_STEPS = 60  # in which the pads that join at the end are learnt, alone
REPEAT_WEIGHT = 0.2  # of a code equal to both its left and its upper neighbour: most of a picture, and soon certain
SHARING = 0.02  # of what sets a colour's shades apart, taken away at every step at the full rate


def config_of(dim: int, layers: int, caption_len: int) -> ModelConfig:
    patterns = ("row", "column", "row", "row") * (layers // 4 + 1)
    return ModelConfig(
        dim=dim,
        layers=layers,
        heads=dim // 64,
        patterns=(*patterns[: layers - 1], "conv(kernel=5,boundary=flat)"),
        caption_len=caption_len,
        text_vocab=TEXT_VOCAB,
        image_vocab=512,
    )


def start_positions(model: DalleModel) -> None:
    """Sinusoids for rows and columns, so that "one to the left, one above" is linear in them from the first step on."""
    half = model.config.dim // 2
    for table, place in ((model.row_positions, slice(0, half)), (model.column_positions, slice(half, None))):
        angle = torch.arange(len(table))[:, None] * torch.exp(-math.log(64.0) * torch.arange(half // 2) / (half // 2))
        table.data.zero_()
        table.data[:, place] = 0.03 * torch.cat([angle.sin(), angle.cos()], -1)


def with_text(model: DalleModel, caption_len: int) -> DalleModel:
    """The same model with more text positions; new pads start as the last one did, with noise."""
    old = model.config
    longer = DalleModel(old.replace(caption_len=caption_len))
    state = dict(model.state_dict())
    for name, cut in grown(old).items():
        pads = state[name][cut - 1 : cut].expand(caption_len - old.caption_len, *state[name].shape[1:])
        state[name] = torch.cat([state[name][:cut], pads + 0.002 * torch.randn_like(pads), state[name][cut:]])
    longer.load_state_dict(state)
    return longer


def with_short_text(model: DalleModel) -> DalleModel:
    """The same model without the pads past the first SHORT_TEXT positions, to be trained on."""
    old = model.config
    short = DalleModel(old.replace(caption_len=SHORT_TEXT))
    state = dict(model.state_dict())
    for name, cut in grown(short.config).items():
        state[name] = torch.cat([state[name][:cut], state[name][cut + old.caption_len - SHORT_TEXT :]])
    short.load_state_dict(state)
    return short


def grown(config: ModelConfig) -> dict[str, int]:
    """The parameters that have a row for each text position, and the row after those of `config`."""
    cut = config.text_logits
    return {
        "text_embedding.weight": cut,
        "head.weight": cut,
        "head.bias": cut,
        "text_positions": config.caption_len,
    }


def settle_pads(model: DalleModel, data: Batches, run: Pass, known: int, device: str) -> None:
    """Moves the pads from position `known` on by one vector, learnt while all else is frozen, so that nothing attends to them.

    224 copies of a pad take most of the attention: at step 800 the image loss rose from 0.026 to 0.5 nats a token or more
    with them, and fell to 0.037 with the vector learnt in 60 steps. Then the decay has nothing to repair.
    """
    fast = copy.deepcopy(model).to(device, working_type(device)).requires_grad_(False)
    positions = fast.text_positions.requires_grad_(True)
    start = positions.detach().float()[known:]
    shift = torch.zeros(model.config.dim, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([shift], betas=(0.9, 0.95))
    for i in tqdm(range(len(data)), desc="pads", mininterval=5):
        text, image = data[i]
        with torch.no_grad():
            positions[known:] = (start + shift).to(positions.dtype)
        positions.grad = None
        losses(fast, text.to(device), image.to(device), run)[0].backward()
        shift.grad = positions.grad[known:].float().sum(0)
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * min(1.0, 2 * (1 - i / len(data)))
        optimizer.step()
    with torch.no_grad():
        model.text_positions[known:] += shift.to(model.text_positions.device)


@torch.no_grad()
def share_shades(model: DalleModel, rate: float) -> None:
    """Moves what the model knows of each plain colour, [colours, shades, dim], towards a sum: one vector a colour, one a shade.

    A cube's side is its front in a darker shade. Seven colours of cubes taught each dark code of its own, and the side of
    the eighth, which no cube of the training has, came out in the seven others' codes; a sum of what it has in common with
    them and of its colour is the right one.
    """
    codes = len(COLOURS) * len(SHADES)
    for name, weight in model.named_parameters():
        if name in ("image_embedding.weight", "head.weight"):
            first = model.config.text_logits if name == "head.weight" else 0
            rows = weight[first : first + codes]
            table = rows.view(len(COLOURS), len(SHADES), -1)
            summed = table.mean(0, keepdim=True) + table.mean(1, keepdim=True) - table.mean((0, 1), keepdim=True)
            rows.lerp_(summed.reshape(rows.shape), rate)


def losses(model: DalleModel, text: Tensor, image: Tensor, run: Pass) -> tuple[Tensor, Tensor, Tensor]:
    """The weighted loss (1/8 text, 7/8 image), and the plain means of both in nats a token.

    Pads past the short text section are not predicted: nothing needs them, and they would drown what is.
    """
    section, width = model.text_section(text), model.config.width
    x = torch.cat([model.embed_section(section), model.embed_start(section), model.embed_image(image[:, :-1])], dim=1)
    x = model.run_blocks(x, run)
    count = section.shape[1]
    near = min(count, SHORT_TEXT)
    text_logits = model.text_logits(x[:, : near - 1]).flatten(0, 1).float()
    text_loss = F.cross_entropy(text_logits, section[:, 1:near].flatten())
    each = F.cross_entropy(model.image_logits(x[:, count:]).flatten(0, 1).float(), image.flatten(), reduction="none")
    grid = image.view(-1, model.config.height, width)
    repeat = torch.zeros_like(grid, dtype=torch.bool)
    repeat[:, 1:, 1:] = (grid[:, 1:, 1:] == grid[:, :-1, 1:]) & (grid[:, 1:, 1:] == grid[:, 1:, :-1])
    weight = torch.where(repeat.flatten(), REPEAT_WEIGHT, 1.0)
    image_loss = (each * weight).sum() / weight.sum()
    return text_loss / 8 + image_loss * 7 / 8, text_loss.detach(), each.mean().detach()


class Training:
    """Float32 weights, their working copy (bfloat16, see working_type), and the two optimizers."""

    def __init__(self, model: DalleModel, device: str, lr: float, matrix_lr: float, weight_decay: float) -> None:
        self.rates = (lr, matrix_lr, weight_decay)
        self.model, self.device = model.to(device), device
        dtype = working_type(device)
        self.fast = copy.deepcopy(self.model).to(dtype)
        self.run: Pass = TiledPass(model.masks, dtype) if device == "cpu" else FullPass(model.masks, None)
        matrices = [p for p in self.model.blocks.parameters() if p.ndim == 2]
        chosen = {id(p) for p in matrices}
        rest = [p for p in self.model.parameters() if id(p) not in chosen]
        self.optimizers = [
            (torch.optim.Muon(matrices, lr=matrix_lr, momentum=0.95, weight_decay=weight_decay), matrix_lr),
            (torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0), lr),
        ]

    def step(self, text: Tensor, image: Tensor, scale: float) -> tuple[float, float]:
        """One update at `scale` times the learning rates; returns the mean text and image losses."""
        pairs = list(zip(self.fast.parameters(), self.model.parameters(), strict=True))
        with torch.no_grad():
            for fast, p in pairs:
                fast.copy_(p)
                fast.grad = None
        loss, text_loss, image_loss = losses(self.fast, text.to(self.device), image.to(self.device), self.run)
        loss.backward()
        for fast, p in pairs:
            p.grad = fast.grad.float()
            if dist.is_initialized():
                dist.all_reduce(p.grad)
                p.grad /= dist.get_world_size()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, lr in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * scale
            optimizer.step()
        share_shades(self.model, SHARING * scale)
        return float(text_loss), float(image_loss)

    def longer(self, data: Batches) -> Training:
        """The same training with the whole text section; the optimizers remember what they knew."""
        short = self.model.config
        model = with_text(self.model.cpu(), TEXT)
        longer = Training(model, self.device, *self.rates)
        for (new, _), (old, _) in zip(longer.optimizers, self.optimizers, strict=True):
            names = {id(p): name for name, p in model.named_parameters()}
            state = old.state_dict()
            for i, p in enumerate(new.param_groups[0]["params"]):
                for key, value in state["state"].get(i, {}).items():
                    if (cut := grown(short).get(names[id(p)])) and value.ndim:
                        rows = value.new_zeros(len(p) - len(value), *value.shape[1:])
                        state["state"][i][key] = torch.cat([value[:cut], rows, value[cut:]])
            new.load_state_dict(state)
        settle_pads(model, data, longer.run, short.caption_len, self.device)
        return longer

    def state(self) -> dict:
        return {"model": self.model.state_dict(), "optimizers": [o.state_dict() for o, _ in self.optimizers]}


def join_processes(device: str) -> tuple[int, int]:
    """This process's rank and how many torchrun started; 0 and 1 without it."""
    if "RANK" not in os.environ:
        return 0, 1
    dist.init_process_group("gloo" if device == "cpu" else "nccl")
    return dist.get_rank(), dist.get_world_size()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="the model folder; its checkpoint is training.pt in there"
    )
    parser.add_argument("--init", type=Path, help="a trained model folder to go on from, if there is no checkpoint yet")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument(
        "--decay", type=int, default=1000, help="the last steps, in which the learning rate falls to zero"
    )
    parser.add_argument("--long-text", type=int, default=200, help="the last steps, with the whole text section")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dim", type=int, default=192)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--lr", type=float, default=2e-3, help="of AdamW")
    parser.add_argument("--matrix-lr", type=float, default=0.01, help="of Muon")
    parser.add_argument("--weight-decay", type=float, default=0.0, help="of Muon, times the learning rate, a step")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw scenes")
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    rank, world = join_processes(args.device)
    seed_everything(args.seed)
    tokenizer = train_tokenizer(args.out / "tokenizer.json")
    checkpoint = args.out / "training.pt"
    state = torch.load(checkpoint, map_location="cpu", weights_only=True) if checkpoint.exists() else None
    step = state["step"] if state else 0
    if args.init and not state:
        model = with_short_text(DalleModel.load(args.init).float())
    else:
        model = DalleModel(config_of(args.dim, args.layers, state["text"] if state else SHORT_TEXT))
        start_positions(model)
    if state:
        model.load_state_dict(state["model"])
    training = Training(model, args.device, args.lr, args.matrix_lr, args.weight_decay)
    if state:
        for (optimizer, _), saved in zip(training.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    codebook = Codebook.load()
    if rank == 0:
        count = sum(p.numel() for p in model.parameters())
        print(f"{count} parameters, from step {step} to {args.steps}, {world} processes", flush=True)
    mean, started, first = None, time.time(), step
    bar = tqdm(total=args.steps, initial=step, desc="transformer", mininterval=10, disable=rank > 0)
    while step < args.steps:
        long = step >= args.steps - args.long_text
        if long and training.model.config.caption_len < TEXT:
            torch.manual_seed(args.seed + 1)
            training = training.longer(Batches(tokenizer, codebook, 2, TEXT, args.seed + 1, PAD_STEPS))
        end = args.steps if long else args.steps - args.long_text
        data = Batches(tokenizer, codebook, args.batch, training.model.config.caption_len, args.seed, args.steps)
        loader = torch.utils.data.DataLoader(data, batch_size=None, sampler=range(step, end), num_workers=args.workers)
        for text, image in loader:
            scale = min(1.0, (step + 1) / 100, (args.steps - step) / args.decay)
            loss = training.step(text[rank::world], image[rank::world], scale)
            mean = loss if mean is None else tuple(0.98 * m + 0.02 * x for m, x in zip(mean, loss, strict=True))
            step += 1
            bar.update()
            if step % 20 == 0:
                rate = args.batch * (step - first) / (time.time() - started)
                bar.set_postfix_str(f"text {mean[0]:.4f} image {mean[1]:.5f} nats/token, {rate:.2f} sequences/s")
            if rank == 0 and (step % args.save_every == 0 or step == args.steps):
                saved = {**training.state(), "step": step, "text": training.model.config.caption_len}
                torch.save(saved, checkpoint.with_suffix(".tmp"))
                os.replace(checkpoint.with_suffix(".tmp"), checkpoint)
                tqdm.write(
                    f"step {step} ({step * args.batch} sequences): text {mean[0]:.4f}, image {mean[1]:.5f}", nolock=True
                )
    if rank == 0:
        copy.deepcopy(training.model).cpu().half().save(args.out)
        print(f"wrote {args.out}: {args.steps * args.batch} sequences seen", flush=True)


if __name__ == "__main__":
    main()
