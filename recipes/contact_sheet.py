"""A page of images as one picture: a row a class, each sample without and with guidance side by side."""

import io
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont, features
from torch import Tensor

from diffdfkd.engine.painter import Painting

CELL = 84
"""Least edge of an image in the picture in pixels; smaller ones are enlarged by a whole factor."""
MOST_CELL = 256
LABEL, LINE, GAP, BETWEEN = 150, 15, 4, 16
PAPER, INK, FAINT = (255, 255, 255), (20, 20, 20), (120, 120, 120)


def contact_sheet(
    paintings: Mapping[str, Painting], labels: Tensor, probabilities: Mapping[str, Tensor], classes: Sequence[str]
) -> bytes:
    """PNG of the paintings of the same samples, by name, with labels [n] and the teacher's probabilities [n, K].

    Under each image stands the teacher's probability of its class and, where that is not the likeliest, the likeliest.
    """
    names = list(paintings)
    size = next(iter(paintings.values())).images.shape[-1]
    edge = size * max(1, -(-CELL // size)) if size <= MOST_CELL else MOST_CELL
    rows = {label: (labels == label).nonzero().flatten().tolist() for label in sorted(set(labels.tolist()))}
    group = len(names) * (edge + GAP) - GAP + BETWEEN
    longest = max(map(len, rows.values()))
    height = edge + 2 * LINE + GAP
    sheet = Image.new("RGB", (LABEL + longest * group, LINE + GAP + len(rows) * height), PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default()
    draw.text((GAP, 1), _printable(" | ".join(names)), FAINT, font)
    for place, (label, members) in enumerate(rows.items()):
        top = LINE + GAP + place * height
        for line, text in enumerate(_lines(classes[label], LABEL - 2 * GAP, font)):
            draw.text((GAP, top + line * LINE), text, INK, font)
        for column, i in enumerate(members):
            for which, name in enumerate(names):
                left = LABEL + column * group + which * (edge + GAP)
                if not paintings[name].alive[i]:
                    draw.text((left, top), "not finite", FAINT, font)
                    continue
                sheet.paste(_picture(paintings[name].images[i], edge), (left, top))
                own = probabilities[name][i]
                best = int(own.argmax())
                draw.text((left, top + edge), f"{own[label]:.2f}", INK, font)
                if best != label:
                    said = _lines(f"{own[best]:.2f} {classes[best]}", edge, font)[0]
                    draw.text((left, top + edge + LINE - 3), said, FAINT, font)
    stream = io.BytesIO()
    sheet.save(stream, "PNG")
    return stream.getvalue()


def _picture(image: Tensor, edge: int) -> Image.Image:
    """Of a uint8 image [C, H, W]; enlarged pixel by pixel, so that nothing is made smoother than it is."""
    pixels = image[0] if len(image) == 1 else image.permute(1, 2, 0)
    picture = Image.fromarray(pixels.contiguous().numpy()).convert("RGB")
    if picture.width == edge:
        return picture
    return picture.resize((edge, edge), Image.Resampling.NEAREST if picture.width < edge else Image.Resampling.BOX)


def _lines(text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> list[str]:
    """At most two lines that fit into so many pixels."""
    rest = _printable(text)
    lines: list[str] = []
    while rest and len(lines) < 2:
        count = len(rest)
        while count > 1 and font.getlength(rest[:count]) > width:
            count -= 1
        lines.append(rest[:count])
        rest = rest[count:].lstrip()
    return lines or [""]


def _printable(text: str) -> str:
    """What PIL's own font can draw: without FreeType Latin-1 alone."""
    return text if features.check("freetype2") else text.encode("latin-1", "replace").decode("latin-1")
