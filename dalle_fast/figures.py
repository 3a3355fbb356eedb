"""Pictures about the model and of its output: attention patterns after the paper's Figure 11, and contact sheets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from dalle_fast.masks import Mask, Pattern

Colour = tuple[int, int, int]

BACKGROUND: Colour = (255, 255, 255)
INK: Colour = (40, 44, 52)
FUTURE: Colour = (255, 255, 255)
NOT_READ: Colour = (236, 238, 241)
TEXT_TO_TEXT: Colour = (246, 190, 92)
IMAGE_TO_TEXT: Colour = (150, 198, 234)
IMAGE_TO_IMAGE: Colour = (38, 103, 178)
QUERY: Colour = (214, 69, 65)
LEGEND = (
    ("text reads text", TEXT_TO_TEXT),
    ("image reads text", IMAGE_TO_TEXT),
    ("image reads image", IMAGE_TO_IMAGE),
    ("not read", NOT_READ),
    ("one cell", QUERY),
)
PATTERNS = (
    *("full", "row", "row(window=in_row)", "column"),
    *("conv", "conv(boundary=clip)", "conv(boundary=torus)", "conv(kernel=5,boundary=quadrant)"),
)
TILE = 64  # rows and columns of the tiles that mask_table counts
PANEL = 264  # pixels a side of a panel's matrix, at least
GAP = 28


def contact_sheet(images: Sequence[Image.Image], columns: int = 0, gap: int = 4) -> Image.Image:
    """All pictures on one sheet, row by row, as near to a square as `columns` = 0 can make it.

    Raises ValueError without pictures. The first picture's size is every cell's size; others are scaled into it.
    """
    if not images:
        raise ValueError("got no pictures, expected at least one")
    columns = columns or int(np.ceil(np.sqrt(len(images))))
    rows = -(-len(images) // columns)
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), BACKGROUND)
    for index, image in enumerate(images):
        if image.size != (width, height):
            image = ImageOps.pad(image, (width, height), color=BACKGROUND)
        sheet.paste(image, (index % columns * (width + gap), index // columns * (height + gap)))
    return sheet


def draw_masks(masks: Sequence[Mask], cells: Sequence[int | None] = (), columns: int = 4) -> Image.Image:
    """For each mask its matrix (a row a query, a column a key), and below it what one cell reads, on the image grid.

    cells: the cell shown below each matrix; by default one at the right edge, where the patterns' boundaries differ.
    """
    panels = [_panel(mask, cell) for mask, cell in zip(masks, [*cells, *[None] * len(masks)], strict=False)]
    columns = min(columns, len(panels))
    width, height = (max(panel.size[axis] for panel in panels) for axis in (0, 1))
    rows = -(-len(panels) // columns)
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + GAP) + GAP + 30), BACKGROUND)
    for index, panel in enumerate(panels):
        sheet.paste(panel, (GAP + index % columns * (width + GAP), GAP + index // columns * (height + GAP)))
    draw, x, y = ImageDraw.Draw(sheet), GAP, rows * (height + GAP) + GAP - 4
    for text, colour in LEGEND:
        draw.rectangle((x, y, x + 13, y + 13), fill=colour, outline=INK)
        draw.text((x + 20, y - 1), text, fill=INK, font=_font(13))
        x += 38 + int(draw.textlength(text, font=_font(13)))
    return sheet


def mask_table(masks: Sequence[Mask]) -> str:
    """What each mask costs, a line each: the cells that one cell reads, how far back, the slots of a candidate's tail,
    and the tiles that a pass over the whole sequence computes, next to dense causal attention."""
    titles = ("pattern", "neighbours", "mean", "reach", "ring", "tail slots", f"{TILE}x{TILE} tiles", "of causal")
    rows: list[tuple[str, ...]] = [titles]
    for mask in masks:
        counts = mask.neighbours()[1]
        tiles = mask.block_plan(TILE, TILE).tiles(mask.layout.text_len)
        causal = Mask(Pattern(), mask.layout).block_plan(TILE, TILE).tiles(mask.layout.text_len)
        numbers = (counts.max(), f"{counts.mean():.1f}", mask.reach, mask.ring(), mask.tail_slots(), tiles)
        rows.append((str(mask.pattern), *map(str, numbers), f"{tiles / causal:.0%}"))
    width = max(len(row[0]) for row in rows)
    return "\n".join(row[0].ljust(width) + "".join(text.rjust(12) for text in row[1:]) for row in rows)


def fit_kernel(pattern: Pattern, side: int) -> Pattern:
    """The pattern with its convolution small enough to be seen on a grid of this side (the paper: 3 on 4 x 4)."""
    largest = max(1, side - 1 - side % 2)
    return replace(pattern, kernel=min(pattern.kernel, largest)) if pattern.kind == "conv" else pattern


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _panel(mask: Mask, cell: int | None) -> Image.Image:
    layout = mask.layout
    matrix = _squares(_matrix_colours(mask), max(1, -(-PANEL // layout.total)))
    cell = (layout.height // 2 + 1) * layout.width - 1 if cell is None else cell
    grid = _squares(_grid_colours(mask, cell), max(1, matrix.width // 2 // layout.width))
    panel = Image.new("RGB", (matrix.width + 18, matrix.height + grid.height + 94), BACKGROUND)
    draw = ImageDraw.Draw(panel)
    name, _, options = str(mask.pattern).rstrip(")").partition("(")
    draw.text((18, 0), name, fill=INK, font=_font(16))
    draw.text((18, 21), options.replace(",", ", "), fill=INK, font=_font(12))
    left, top = 18, 60
    panel.paste(matrix, (left, top))
    split = matrix.width * layout.text_len // layout.total
    for start, stop, word in ((0, split, "text"), (split, matrix.width, "image")):
        length = int(draw.textlength(word, font=_font(12)))
        if length + 4 < stop - start:
            draw.text((left + (start + stop - length) // 2, top - 17), word, fill=INK, font=_font(12))
            label = Image.new("RGB", (length + 2, 16), BACKGROUND)
            ImageDraw.Draw(label).text((1, 0), word, fill=INK, font=_font(12))
            panel.paste(label.rotate(90, expand=True), (0, top + (start + stop - length) // 2))
    below = top + matrix.height + 28
    row, column = divmod(cell, layout.width)
    draw.text((left, below - 20), f"what cell ({row}, {column}) reads", fill=INK, font=_font(12))
    panel.paste(grid, (left, below))
    return panel


def _matrix_colours(mask: Mask) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """[total, total, 3]"""
    text, total, dense = mask.layout.text_len, mask.layout.total, mask.dense()
    colours = np.empty((total, total, 3), np.uint8)
    colours[:] = FUTURE
    colours[np.tril(np.ones((total, total), bool))] = NOT_READ
    for rows, columns, colour in (
        (slice(text), slice(text), TEXT_TO_TEXT),
        (slice(text, None), slice(text), IMAGE_TO_TEXT),
        (slice(text, None), slice(text, None), IMAGE_TO_IMAGE),
    ):
        colours[rows, columns][dense[rows, columns]] = colour
    return colours


def _grid_colours(mask: Mask, cell: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """[height, width, 3]"""
    cells = np.arange(mask.layout.cells)
    colours = np.empty((len(cells), 3), np.uint8)
    colours[:] = FUTURE
    colours[cells <= cell] = NOT_READ
    colours[mask.allowed(cell, cells)] = IMAGE_TO_IMAGE
    colours[cell] = QUERY
    return colours.reshape(mask.layout.height, mask.layout.width, 3)


def _squares(colours: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], side: int) -> Image.Image:
    """A picture of `side` pixels an entry, with lines between the entries where there is room, and a frame."""
    picture = np.repeat(np.repeat(colours, side, axis=0), side, axis=1)
    if side >= 5:
        picture[::side] = picture[:, ::side] = (205, 209, 214)
    image = Image.new("RGB", (picture.shape[1] + 2, picture.shape[0] + 2), INK)
    image.paste(Image.fromarray(picture), (1, 1))
    return image
