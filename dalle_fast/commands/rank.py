"""`dalle-fast rank`: orders the pictures of a folder by how well they fit a caption."""

from __future__ import annotations

import argparse
from pathlib import Path

from dalle_fast.commands import options as shared

HELP = "order the pictures of a folder by how well they fit a caption"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
OURS = ("sheet.png", "preview.png")


def options(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option("folder", type=Path, help="pictures of any sizes")
    option("caption")
    option("--rank", choices=shared.RANKS, default="clip", help="by what (%(default)s)")
    option("--keep", type=int, metavar="K", help="only the best K")
    option("--sheet", type=Path, metavar="FILE", help="write them as a contact sheet too, best first")
    option("--truncate", action="store_true", help="cut a caption that is too long")
    shared.add_model(parser)


def run(arguments: argparse.Namespace) -> int:
    import torch

    from dalle_fast.figures import contact_sheet
    from dalle_fast.pipeline import Picture
    from dalle_fast.records import read_image, write_png
    from dalle_fast.sampling import SamplingSettings

    files = picture_files(arguments.folder)
    if arguments.keep is not None and not 1 <= arguments.keep <= len(files):
        raise ValueError(f"got keep={arguments.keep}, expected 1 to {len(files)}")
    if not arguments.caption.strip():
        raise ValueError("got an empty caption, expected some text")
    images = [read_image(file) for file in files]
    pipeline = shared.load_pipeline(arguments)
    pictures = []
    for i, image in enumerate(images):
        tokens, likelihood = torch.empty(0), 0.0
        if arguments.rank != "clip":
            tokens = pipeline.encode(image)
            likelihood, _ = pipeline.score(tokens, arguments.caption, truncate=arguments.truncate)
        pictures.append(Picture(arguments.caption, i, SamplingSettings(), tokens, image, likelihood))
    ranked = pipeline.rank(pictures, by=arguments.rank, keep=arguments.keep)
    if arguments.sheet is not None:
        write_png(arguments.sheet, contact_sheet([picture.image for picture in ranked]))
    for picture in ranked:
        clip = "" if picture.score is None else f"{picture.score:8.3f}  "
        likelihood_ = "" if arguments.rank == "clip" else f"{picture.log_likelihood:12.3f}  "
        print(f"{clip}{likelihood_}{files[picture.candidate].name}")
    return 0


def picture_files(folder: Path) -> list[Path]:
    """The folder's pictures by name, but for sheets and previews of ours. Raises ValueError if there is none."""
    try:
        found = sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and f.name not in OURS)
    except OSError as error:
        raise ValueError(f"cannot read {folder}: {error.strerror}") from None
    if not found:
        raise ValueError(f"got no picture in {folder}, expected files such as 0000.png")
    return found
