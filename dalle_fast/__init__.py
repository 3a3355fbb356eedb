"""DALL-E 1 at the speed of memory. `import dalle_fast` is light: torch comes with the first name that needs it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# public name -> the module that holds it
_PUBLIC = {
    "SequenceLayout": "layout",
    "Pattern": "masks",
    "Mask": "masks",
    "ModelConfig": "model",
    "DalleModel": "model",
    "DiscreteVAE": "images",
    "Pipeline": "pipeline",
}
__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from dalle_fast.layout import SequenceLayout as SequenceLayout
    from dalle_fast.masks import Mask as Mask
    from dalle_fast.masks import Pattern as Pattern


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
