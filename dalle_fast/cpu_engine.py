"""The engine for CPUs: one C++ call a step, over weights packed in the order in which they are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dalle_fast import cpu_backend, ops
from dalle_fast.config import ModelConfig
from dalle_fast.cpu_backend import pack_arguments
from dalle_fast.engine import Drawn, check_draw, check_fed
from dalle_fast.model import DalleModel, open_weights
from dalle_fast.quantize import Quantized, floats, last_rows, norm_vectors

# "auto" is int8: half the bytes of bfloat16, and an error of the logits of about 1 % of their deviation (bfloat16: 0.3 %).
DTYPES = ("auto", *cpu_backend.WEIGHT_DTYPES)


def why_not(config: ModelConfig, dtype: str = "auto") -> str | None:
    """None if a CpuEngine serves such a model in this type, else the reason."""
    if dtype not in DTYPES:
        return f"it holds weights as {', '.join(DTYPES[1:])}, got {dtype}"
    if config.head_dim % 16 or not 16 <= config.head_dim <= 256:
        return f"it needs a head dim that is a multiple of 16 up to 256, got {config.head_dim}"
    if config.divide_by_max:
        return "it has no division by the maximum before the last norm (divide_by_max)"
    return cpu_backend.kernels_why_not()


class CpuEngine:
    """Decodes prompts x candidates sequences on the CPU (engine.Engine says what each method does).

    model    a DalleModel, or a mapping from its parameter names to tensors, read one at a time and not kept: a mapping
             that makes or loads its tensors when asked keeps no float copy of the whole. Values may be quantize.Int8 or
             Int4 already
    dtype    "float32", "bfloat16", "int8" (one scale an output channel) or "int4" (groups of 128; the head is int8);
             "auto": int8. Caches are bfloat16 unless dtype is float32
    threads  None: as many as torch.get_num_threads() says at each call
    chunk    known tokens fed at a time; each costs a slot in every ring

    Raises ValueError with the reason if why_not has one.
    """

    batch_invariant = True  # every sum runs in an order that does not depend on the batch
    backend = "cpu"

    def __init__(
        self,
        model: DalleModel | Mapping[str, Tensor | Quantized],
        config: ModelConfig | None = None,
        *,
        dtype: str = "auto",
        threads: int | None = None,
        chunk: int = 1,
    ) -> None:
        if isinstance(model, DalleModel):
            config, state = model.config, dict(model.state_dict())
        else:
            state = model  # type: ignore[assignment]
        if config is None:
            raise ValueError("got weights without a config, expected a ModelConfig beside them")
        if reason := why_not(config, dtype):
            raise ValueError(f"the cpu engine cannot run this model: {reason}")
        if not 1 <= chunk <= config.cells:
            raise ValueError(f"got chunk={chunk}, expected 1 to {config.cells}")
        self.config, self.threads, self.chunk = config, threads, chunk
        self.dtype = "int8" if dtype == "auto" else dtype
        self._text = _text_side(config, state, torch.bfloat16 if self.dtype in ("bfloat16", "int4") else torch.float32)
        self._engine = self._build(state)

    @classmethod
    def load(cls, folder: str | Path, *, dtype: str = "auto", threads: int | None = None, chunk: int = 1) -> CpuEngine:
        """Reads what DalleModel.save wrote, one tensor at a time. Raises as DalleModel.load does."""
        config, file = open_weights(folder)
        with file as state:
            return cls(state, config, dtype=dtype, threads=threads, chunk=chunk)

    # Building.

    def _build(self, state: Mapping[str, Tensor | Quantized]) -> Any:
        config, module, threads = self.config, cpu_backend.kernels(), self.threads or torch.get_num_threads()
        activation = "gelu" if config.activation == "gelu" else config.activation
        rotary = floats(state["rotary"]) if config.positions == "rotary" else None
        shape = {name: getattr(config, name) for name in _SAME_NAMES} | {
            "text_len": config.layout.text_len,
            "first_place": int(config.start == "learned"),
            "rotary_dim": 0 if rotary is None else rotary.shape[1],
            "activation": getattr(module.Epilogue, activation),
            "cache": getattr(module.DType, "float32" if self.dtype == "float32" else "bfloat16"),
            "chunk": self.chunk,
        }
        angles = (0, 0) if rotary is None else (rotary.data_ptr(), rotary.numel())
        engine = module.Engine(shape, *angles)
        for i, mask in enumerate(config.masks()):
            slots = mask.tail_slots(self.chunk)
            tables = [torch.from_numpy(table.copy()) for table in mask.decode_tables(slots)]
            layer, keep = self._layer(state, f"blocks.{i}.")
            layer |= {"slots": slots, "max_neighbours": tables[1].shape[1]}
            layer |= dict(zip(("slot_of_cell", "neighbour_slots", "neighbour_count"), map(Tensor.data_ptr, tables)))  # noqa: B905
            engine.add_layer(layer, threads)
            del keep, layer
        held = self._text.image_embedding.weight
        places = [
            floats(state[f"{name}_positions"]) if config.positions == "learned" else None for name in ("row", "column")
        ]
        engine.set_embedding(
            getattr(module.DType, cpu_backend.DTYPES[held.dtype]),
            held.data_ptr(), *(0 if x is None else x.data_ptr() for x in places),
        )  # fmt: skip
        self._text.image_embedding.weight = nn.Parameter(torch.empty_like(held, device="meta"), requires_grad=False)
        norms = [norm_vectors(state, f"final_norms.{i}.") for i in range(config.final_norms)]
        head = last_rows(state["head.weight"], config.image_vocab)
        kind = "int8" if self.dtype == "int4" else self.dtype
        packed = pack_arguments(head, floats(state["head.bias"])[config.text_logits :], kind)
        engine.set_head([(w.data_ptr(), b.data_ptr()) for w, b in norms], packed, threads)
        return engine

    def _layer(self, state: Mapping[str, Tensor | Quantized], prefix: str) -> tuple[dict[str, Any], list[Any]]:
        """One layer's arguments, and the tensors that must live until they are used."""
        config = self.config
        layer: dict[str, Any] = {}
        keep: list[Any] = []
        for branch, last in (("attention", "out"), ("mlp", "down")):
            scale = floats(state[f"{prefix}{branch}_scale"]) if config.layer_scale else None
            norms: dict[str, tuple[Tensor, Tensor] | None] = {
                f"{branch}_norm": norm_vectors(state, f"{prefix}{branch}_norm."),
                f"{branch}_norm_out": None,
            }
            if config.sandwich_norm:  # LayerScale comes after the second norm: it scales that one's vectors
                pair = norm_vectors(state, f"{prefix}{branch}_norm_out.")
                norms[f"{branch}_norm_out"] = pair if scale is None else (pair[0] * scale, pair[1] * scale)
                scale = None
            for name, vectors in norms.items():
                layer[name] = None if vectors is None else (vectors[0].data_ptr(), vectors[1].data_ptr())
            keep.append(norms)
            for name in ("qkv", "out") if branch == "attention" else ("up", "down"):
                bias = floats(state[f"{prefix}{name}.bias"]) if name != "qkv" or config.qkv_bias else None
                layer[name] = pack_arguments(
                    state[f"{prefix}{name}.weight"], bias, self.dtype,
                    geglu=name == "up" and config.activation == "geglu", output_scale=scale if name == last else None,
                )  # fmt: skip
        return layer, keep

    # Decoding.

    def _threads(self) -> int:
        return self.threads or torch.get_num_threads()

    @torch.inference_mode()
    def prefill(self, text: Tensor, candidates: int) -> Tensor:
        config, text_len = self.config, self.config.layout.text_len
        section = self._text.text_section(text)
        x = self._text.embed_section(section)[:, :text_len].float().contiguous()  # [P, T, d]
        start = self._text.embed_start(section).float().contiguous() if config.start != "none" else None  # [P, 1, d]
        logits = torch.empty(text.shape[0] * max(candidates, 1), config.image_vocab)
        self._engine.prefill(
            x.data_ptr(), 0 if start is None else start.data_ptr(), text.shape[0], candidates, self._threads(),
            logits.data_ptr(),
        )  # fmt: skip
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        return self.feed(tokens[:, None])

    def feed(self, tokens: Tensor) -> Tensor:
        batch = self._engine.batch
        check_fed(tokens, batch)
        logits = torch.empty(batch, self.config.image_vocab)
        for part in torch.split(tokens, self.chunk, dim=1):
            part = part.contiguous()
            self._engine.feed(part.data_ptr(), part.shape[1], self._threads(), logits.data_ptr())
        return logits

    def sample(
        self,
        tokens: Tensor,
        candidates: Tensor,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        guidance_scale: float = 1.0,
        seed: int = 0,
        given: Tensor | None = None,
    ) -> Drawn:
        """As engine.DrawingEngine says, in one call. The results are new tensors."""
        batch, count = self._engine.batch, len(candidates)
        check_draw(tokens, candidates, given, guidance_scale, batch)
        ops.check_sampling(temperature, top_k, top_p, self.config.image_vocab)
        tokens = tokens.contiguous() if guidance_scale == 1 else torch.cat([tokens, tokens])
        candidates = candidates.contiguous()
        given = None if given is None else given.contiguous()
        logits = torch.empty(batch, self.config.image_vocab)
        drawn, log_p = torch.empty(count, dtype=torch.int64), torch.empty(count, dtype=torch.float64)
        self._engine.sample(
            tokens.data_ptr(), candidates.data_ptr(), 0 if given is None else given.data_ptr(), count, temperature,
            top_k, top_p, guidance_scale, seed, self._threads(), logits.data_ptr(), drawn.data_ptr(), log_p.data_ptr(),
        )  # fmt: skip
        return Drawn(drawn, log_p, logits)

    def fork(self, candidates: int) -> None:
        self._engine.fork(candidates)

    def nbytes(self) -> int:
        return int(self._engine.cache_bytes)

    def most_candidates(self, guided: bool = False) -> int | None:
        return None

    def weight_nbytes(self) -> int:
        """Bytes of the packed weights: what a step reads, but for the image embedding."""
        return int(self._engine.weight_bytes)


_SAME_NAMES = (
    "dim", "hidden", "heads", "head_dim", "height", "width", "image_vocab", "first_cell", "final_norms", "sandwich_norm",
    "token_shift", "reversible", "norm_eps",
)  # fmt: skip


def _text_side(config: ModelConfig, state: Mapping[str, Tensor | Quantized], dtype: torch.dtype) -> DalleModel:
    """A model of which only the embeddings exist: it turns captions into rows."""
    with torch.device("meta"):
        model = DalleModel(config)
    model.requires_grad_(False)
    for name in ("text_embedding", "image_embedding"):
        held = state[f"{name}.weight"]
        held = (held.detach() if isinstance(held, Tensor) else held.dequantize()).to(dtype).contiguous()
        setattr(getattr(model, name), "weight", nn.Parameter(held, requires_grad=False))  # noqa: B010
    names = ["text_positions", "row_positions", "column_positions"] if config.positions == "learned" else []
    for name in [*names, *(["start"] if config.start == "learned" else [])]:
        setattr(model, name, nn.Parameter(floats(state[name]), requires_grad=False))
    return model
