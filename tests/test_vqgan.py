"""VQGAN image tokenizers against ruDALL-E's and taming-transformers' own code, with random weights."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import peer_packages
import pytest
import torch

from dalle_fast import checkpoints
from dalle_fast.images import load_codec
from dalle_fast.vqgan import VQGAN, VQGANConfig
from dalle_fast.weights import WeightError

SMALL = {"double_z": False, "z_channels": 32, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32, "dropout": 0.0}
F4 = SMALL | {"ch_mult": [1, 1, 2], "num_res_blocks": 2, "attn_resolutions": [8]}
F8 = SMALL | {"ch_mult": [1, 1, 2, 4], "num_res_blocks": 1, "attn_resolutions": [4, 16]}
PIXELS = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def randomised(model: torch.nn.Module) -> Any:
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval().requires_grad_(False)


def lightning(state: dict[str, torch.Tensor], path: Path, **more: Any) -> Path:
    """As taming writes it, with the weights of the critic that trained it."""
    torch.save({"epoch": 1, "state_dict": state | {"loss.discriminator.main.0.weight": torch.zeros(3)}, **more}, path)
    return path


@pytest.mark.parametrize("sizes", [F4, F8])
def test_gumbel_as_ruDALLE_has_it(tmp_path: Path, sizes: dict[str, Any]) -> None:
    with peer_packages.rudalle_vae() as peer:
        torch.manual_seed(4)  # weights of which both sizes choose many different codes
        theirs = randomised(peer.GumbelVQ(sizes, n_embed=50, embed_dim=32))
        torch.nn.init.zeros_(theirs.quantize.proj.bias)  # which would choose the same code everywhere
        source = lightning(theirs.state_dict(), tmp_path / "vqgan.ckpt")
        checkpoints.convert_images(source, tmp_path / "out")
        ours = load_codec(tmp_path / "out")
        expected = theirs.encode(2 * PIXELS - 1, disable_gumbel_softmax=True)[2][2]
        assert ours.encode(PIXELS).equal(expected) and len(expected.unique()) > 3
        drawn = theirs.decode(theirs.quantize.embed.weight[expected].permute(0, 3, 1, 2))
        torch.testing.assert_close(ours.decode(expected), (drawn.clamp(-1, 1) + 1) / 2, rtol=0, atol=1e-5)


def test_plain_as_taming_has_it(tmp_path: Path) -> None:
    with peer_packages.rudalle_vae() as peer:
        quantize = importlib.import_module("taming.modules.vqvae.quantize")
        parts = torch.nn.ModuleDict(
            {
                "encoder": peer.Encoder(**F8),
                "decoder": peer.Decoder(**F8),
                "quant_conv": torch.nn.Conv2d(32, 16, 1),
                "post_quant_conv": torch.nn.Conv2d(16, 32, 1),
                "quantize": quantize.VectorQuantizer2(50, 16, beta=0.25),
            }
        )
        theirs = randomised(parts)
        state = {f"model.{key}": x for key, x in theirs.state_dict().items()}  # as DALLE-pytorch's VQGanVAE has it
        torch.save(state, tmp_path / "vae.pt")
        checkpoints.convert_images(tmp_path / "vae.pt", tmp_path / "out")
        ours = load_codec(tmp_path / "out")
        z, _, (_, _, codes) = theirs["quantize"](theirs["quant_conv"](theirs["encoder"](2 * PIXELS - 1)))
        assert ours.encode(PIXELS).flatten().equal(codes) and len(codes.unique()) > 3
        drawn = theirs["decoder"](theirs["post_quant_conv"](z))
        torch.testing.assert_close(ours.decode(codes.view(2, 4, 4)), (drawn.clamp(-1, 1) + 1) / 2, rtol=0, atol=1e-5)


def test_the_released_sizes_are_what_their_files_would_say() -> None:
    """ruDALL-E's Gumbel f8 and the f16 of 1024 codes that DALLE-pytorch takes by default; sizes only, no memory."""
    from dalle_fast.checkpoints import image_tokenizers

    for config in (VQGANConfig(), VQGANConfig(1024, 128, (1, 1, 2, 2, 4), 2, (4,), 256, 256, gumbel=False)):
        with torch.device("meta"):
            model = VQGAN(config)
        found, part = image_tokenizers.read({"state_dict": model.state_dict()})
        assert found.config == config and part.state.keys() == part.expected.keys()
        assert found.factor == (8 if config.gumbel else 16)


class Callback:
    """What Lightning's files hold beside tensors."""


def test_lightning_files_need_trust_and_stay_inert(tmp_path: Path) -> None:
    model = VQGAN(VQGANConfig(50, 32, (1, 1), 1, (), 32, 32))
    source = lightning(dict(model.state_dict()), tmp_path / "vqgan.ckpt", callbacks={"x": Callback()})
    with pytest.raises(WeightError, match="holds objects of") as error:
        checkpoints.convert_images(source, tmp_path / "out")
    digest = str(error.value).split()[-1]
    checkpoints.convert_images(source, tmp_path / "out", trust_pickle=True, sha256=[digest])
    codes = torch.randint(50, (1, 16, 16))
    expected = model.eval().decode(codes)
    torch.testing.assert_close(load_codec(tmp_path / "out").decode(codes), expected, rtol=0, atol=0)


def test_a_folder_has_one_image_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(WeightError, match=r"no image tokenizer, expected one of dvae\.json"):
        load_codec(tmp_path)
    for name in ("dvae", "vqgan"):
        (tmp_path / f"{name}.json").write_text("{}")
    with pytest.raises(WeightError, match=r"dvae\.json and vqgan\.json"):
        load_codec(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 48}, "multiples of 32"),
        ({"blocks": 0}, "blocks=0"),
        ({"attention": (7,)}, "levels below 4"),
        ({"multipliers": (1, 0)}, r"multipliers\[1\]=0"),
    ],
)
def test_sizes_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VQGANConfig(**changes)
