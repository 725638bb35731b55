"""Sheets of small images with captions, as PNG files."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ssl_vit import files

SIDE = 160  # least width of an image in pixels: large enough to look at, and to hold a caption
GAP, LINES, TEXT = 6, 4, 13  # pixels between images; caption lines of every column; height of the font in pixels


@dataclass
class Sheet:
    """Images side by side. panels: (rows, columns, C, H, W) in [0, 1]; columns: what each column shows."""

    panels: Tensor
    columns: list[str]


def spread(count: int, labels: Tensor | None, most: int) -> Tensor:
    """Which of `count` images to show, int64 (at most `most`,): evenly over the classes, or over their order."""
    order = torch.arange(count) if labels is None else labels.cpu().argsort(stable=True)
    most = min(most, count)
    return order[((torch.arange(most) + 0.5) * count / most).long()]


def save(sheet: Sheet, file: Path, title: str) -> None:
    """Write the sheet, enlarged if it is small, with a caption above each column and the title below.

    Images that are neither grey nor RGB are shown by their first channel.
    """
    rows, columns, channels, height, width = sheet.panels.shape
    scale = math.ceil(SIDE / width)
    tall, wide = height * scale + GAP, width * scale + GAP
    font = ImageFont.load_default(TEXT)
    line = math.ceil(1.4 * TEXT)
    top, beneath = LINES * line + GAP, _wrapped(title, font, columns * wide)
    bottom = top + rows * tall
    page = Image.new("RGB", (columns * wide + GAP, bottom + len(beneath) * line + GAP), "white")
    draw = ImageDraw.Draw(page)
    for column, words in enumerate(sheet.columns):
        wrapped = _wrapped(words, font, wide - GAP)[:LINES]
        for i, text in enumerate(wrapped, LINES - len(wrapped)):  # the last line just above the images
            draw.text((GAP + column * wide, i * line), text, "black", font)
    for i, text in enumerate(beneath):
        draw.text((GAP, bottom + i * line), text, "black", font)
    panels = sheet.panels if channels in (1, 3) else sheet.panels[:, :, :1]
    levels = (panels.float().cpu().clamp(0, 1) * 255).round().byte().expand(-1, -1, 3, -1, -1)
    pixels = levels.permute(0, 1, 3, 4, 2).numpy().repeat(scale, 2).repeat(scale, 3)
    for (row, column), _ in np.ndenumerate(pixels[:, :, 0, 0, 0]):
        page.paste(Image.fromarray(pixels[row, column]), (GAP + column * wide, top + row * tall))
    with files.writing(file) as partial:
        page.save(partial, "PNG")


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """The text in lines of at most `width` pixels, or of one word."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
