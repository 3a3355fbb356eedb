"""DALL-E 1 at the speed of memory. `import dalle_fast` is light: torch comes with the first name that needs it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# public name -> the module that holds it
_PUBLIC = {
    "SequenceLayout": "layout",
    "Pattern": "masks",
    "Mask": "masks",
    "ModelConfig": "config",
    "DalleModel": "model",
    "SamplingSettings": "sampling",
    "DVAE": "images",
    "Picture": "pipeline",
    "Pipeline": "pipeline",
}
__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from dalle_fast.config import ModelConfig as ModelConfig
    from dalle_fast.images import DVAE as DVAE
    from dalle_fast.layout import SequenceLayout as SequenceLayout
    from dalle_fast.masks import Mask as Mask
    from dalle_fast.masks import Pattern as Pattern
    from dalle_fast.model import DalleModel as DalleModel
    from dalle_fast.pipeline import Picture as Picture
    from dalle_fast.pipeline import Pipeline as Pipeline
    from dalle_fast.sampling import SamplingSettings as SamplingSettings


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
