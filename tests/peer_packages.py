"""Other projects' own code, imported without the dependencies that only their training or downloads need.

Installed without their dependencies by `pip install --no-deps -r tests/peers.txt`; what a test misses it says when it skips.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

HOW = "pip install --no-deps -r tests/peers.txt"


@contextmanager
def packages(*names: str, needs: tuple[str, ...] = (), stubs: dict[str, Any] | None = None) -> Iterator[None]:
    """Makes packages importable without running their __init__ files, which import much that the tests don't need, and
    puts modules of the given attributes in place of others. Skips, with what is missing, if one is not installed."""
    missing = [
        name for name in ({n.split(".")[0] for n in names} | set(needs)) if importlib.util.find_spec(name) is None
    ]
    if missing:
        pytest.skip(f"needs {', '.join(sorted(missing))}: {HOW}")
    specs = {name: importlib.util.find_spec(name) for name in {n.split(".")[0] for n in names}}
    before = dict(sys.modules)
    tops = {name.split(".")[0] for name in (*names, *(stubs or {}))}
    try:
        for name in names:
            spec = specs[name.split(".")[0]]
            assert spec is not None and spec.submodule_search_locations
            package, root = types.ModuleType(name), Path(spec.submodule_search_locations[0])
            package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
            sys.modules[name] = package
        for name, attributes in (stubs or {}).items():
            sys.modules[name] = types.ModuleType(name)
            vars(sys.modules[name]).update(attributes)
        yield
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] in tops]:
            del sys.modules[name]
        sys.modules.update({name: module for name, module in before.items() if name.split(".")[0] in tops})


@contextmanager
def dalle_pytorch() -> Iterator[Any]:
    """dalle_pytorch.dalle_pytorch of 1.6.6; of its image tokenizers, only its own."""
    vae = {"OpenAIDiscreteVAE": type("OpenAIDiscreteVAE", (), {}), "VQGanVAE": type("VQGanVAE", (), {})}
    needs = ("einops", "axial_positional_embedding", "rotary_embedding_torch")
    with packages("dalle_pytorch", needs=needs, stubs={"dalle_pytorch.vae": vae}):
        yield importlib.import_module("dalle_pytorch.dalle_pytorch")


@contextmanager
def rudalle() -> Iterator[Any]:
    """rudalle.dalle.model of 1.1.3."""
    with packages("rudalle", "rudalle.dalle", needs=("einops",)):
        yield importlib.import_module("rudalle.dalle.model")


@contextmanager
def rudalle_vae() -> Iterator[Any]:
    """rudalle.vae.model, with the encoder and decoder of taming-transformers."""
    taming = ("taming", "taming.modules", "taming.modules.diffusionmodules", "taming.modules.vqvae")
    stubs = {"rudalle.vae.decoder_dwt": {"DecoderDWT": None}}  # of its 512-pixel variant, which is not converted
    with packages("rudalle", "rudalle.vae", *taming, needs=("einops",), stubs=stubs):
        yield importlib.import_module("rudalle.vae.model")


@contextmanager
def dall_e() -> Iterator[Any]:
    """dall_e.encoder and dall_e.decoder of OpenAI's DALL-E 0.1."""
    with packages("dall_e", needs=("attr",)):
        yield importlib.import_module("dall_e.encoder"), importlib.import_module("dall_e.decoder")


@contextmanager
def ruclip() -> Iterator[Any]:
    """ruclip.model of 0.0.2."""
    with packages("ruclip"):
        yield importlib.import_module("ruclip.model")


@contextmanager
def dalle_pytorch_tokenizer() -> Iterator[Any]:
    """dalle_pytorch.tokenizer, but for youtokentome, which needs a compiler."""
    with packages("dalle_pytorch", needs=("ftfy", "regex", "transformers"), stubs={"youtokentome": {}}):
        yield importlib.import_module("dalle_pytorch.tokenizer")
