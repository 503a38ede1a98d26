"""Digits of openly licensed fonts to glyphs, glyphs to captioned images: the domain of the digits' prior.

    python -m diffdfkd.recipes.render_fonts glyphs --packages unpacked
    python -m diffdfkd.recipes.render_fonts images --output digit-images

``assets/digits/fonts.json`` lists the fonts that were drawn, ``FONTS.md`` says how and by which licences, and
``excluded.json`` names the families that were left out by eye. `diffdfkd.recipes.digit_augmentation` makes images of
the glyphs.
"""

import gzip
import json
import random
import re
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from diffdfkd.engine.errors import UserError
from diffdfkd.recipes.command import run_command
from diffdfkd.recipes.digit_augmentation import GLYPH, augment

ASSETS = Path(__file__).parent / "assets" / "digits"
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LICENCES = ("OFL-1.1", "Apache-2.0", "MIT", "CC0-1.0")
IMAGES = 30_000
DIGITS = "0123456789"
DRAWN = 200  # pixels to the em
ALIKE = 0.03
"""Two digits of a font that differ by less, mean absolute difference of pixels in [0, 1], are no two digits."""
SAME = 0.012
"""Two fonts whose digits differ by less, by the same measure, count once."""

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, help=__doc__)


def read_list(path: Path = ASSETS / "fonts.json") -> list[dict[str, str]]:
    """The fonts in glyph order: ``family``, ``style``, ``version``, ``licence`` (SPDX), ``package``, ``file``."""
    return list(json.loads(path.read_text(encoding="utf-8")))


def load_glyphs(path: Path = ASSETS / "fonts.npz") -> Tensor:
    """Ink of all fonts' digits 0 to 9, [F, 10, 40, 40] in [0, 1]; raises `UserError` if the list beside it differs."""
    fonts = read_list(path.with_suffix(".json"))
    with np.load(path, allow_pickle=False) as file:
        ink = file["ink"]
    if len(fonts) != len(ink):
        raise UserError(
            f"{path}: holds {len(ink)} fonts, {path.with_suffix('.json').name} lists {len(fonts)}; "
            "remake it with `python -m diffdfkd.recipes.render_fonts glyphs`"
        )
    return torch.from_numpy(ink).float() / 255


def licence_of(text: str) -> str | None:
    """SPDX name of one of `LICENCES` that a font's own words name, None for any other or none."""
    text = text.lower()
    if re.search(r"\bofl\b|open font li[cs]en[cs]e", text):
        return "OFL-1.1"
    if re.search(r"gnu|\bl?gpl\b", text):
        return None
    for word, licence in (("apache", "Apache-2.0"), ("publicdomain/zero", "CC0-1.0"), ("mit-license", "MIT")):
        if word in text:
            return licence
    return None


def describe(path: Path) -> dict[str, Any] | None:
    """What a font file says of itself; None where it lacks a digit, is damaged or no text face under `LICENCES`.

    Handwriting and script faces say so in PANOSE's family kind (3) or IBM's family class (10); 5 and 12 are symbols.
    """
    from fontTools.ttLib import TTFont

    try:
        with TTFont(path, lazy=True) as font:
            names, table = font["name"], font["OS/2"]
            covered = set(font.getBestCmap() or {})
            italic = bool(table.fsSelection & 1) or font["post"].italicAngle != 0
    except Exception:  # fontTools raises whatever the damaged table led to
        return None
    said = [names.getDebugName(number) or "" for number in range(18)]
    family, licence = (said[16] or said[1]).strip(), licence_of(f"{said[13]} {said[14]}")
    kind, group = table.panose.bFamilyType, table.sFamilyClass >> 8
    if not covered >= set(map(ord, DIGITS)) or kind in (3, 5) or group in (10, 12):
        return None
    if licence is None or not family.isprintable():
        return None
    return {
        "family": family,
        "style": said[17] or said[2],
        "version": said[5].removeprefix("Version ").split(";")[0].strip(),
        "licence": licence,
        # The plainest face of a family comes first.
        "rank": (italic, abs(table.usWeightClass - 400), abs(table.usWidthClass - 5), path.name),
    }


def find_fonts(folder: Path, excluded: Mapping[str, str]) -> list[tuple[Path, dict[str, str]]]:
    """The plainest face of each family below a folder of unpacked Debian packages, one sub-folder a package.

    Sorted by family; each with its row of the list (`read_list`).
    """
    faces: dict[str, tuple[tuple[Any, ...], Path, dict[str, str]]] = {}
    files = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in (".otf", ".ttf")]
    for path in tqdm(files, desc="fonts", unit="file", disable=None):
        described = None if path.is_symlink() else describe(path)
        if described is None or described["family"] in excluded:
            continue
        rank = described.pop("rank")
        held = faces.get(described["family"])
        if held is None or rank < held[0]:
            package = path.relative_to(folder).parts[0]
            faces[described["family"]] = (rank, path, described | {"package": package, "file": path.name})
    return [(path, row) for _, path, row in sorted(faces.values(), key=lambda face: face[2]["family"].lower())]


def draw_digits(path: Path) -> NDArray[np.uint8] | None:
    """Ten digits cropped to their ink and fitted into a square, uint8 [10, 40, 40]; None where one lacks ink."""
    font = ImageFont.truetype(str(path), DRAWN)
    drawn = []
    for digit in DIGITS:
        page = Image.new("L", (3 * DRAWN, 3 * DRAWN))
        ImageDraw.Draw(page).text((DRAWN, DRAWN), digit, fill=255, font=font)
        box = page.getbbox()
        if box is None:
            return None
        ink = page.crop(box)
        wide, tall = (max(1, round(side * GLYPH / max(ink.size))) for side in ink.size)
        square = Image.new("L", (GLYPH, GLYPH))
        square.paste(ink.resize((wide, tall), Image.Resampling.BOX), ((GLYPH - wide) // 2, (GLYPH - tall) // 2))
        drawn.append(np.asarray(square) // 17 * 17)  # sixteen levels are plenty and halve the file
    return np.stack(drawn)


def is_new(ink: NDArray[np.uint8], held: Sequence[NDArray[np.uint8]]) -> bool:
    """Whether ten digits [10, 40, 40] differ from each other, as a missing glyph's do not, and from all fonts held."""
    digits = ink.reshape(10, -1) / 255.0
    among = np.abs(digits[:, None] - digits[None]).mean(2) + np.eye(10)
    return bool(among.min() > ALIKE) and all(np.abs(ink / 255.0 - other / 255.0).mean() > SAME for other in held)


def attribution(fonts: Sequence[Mapping[str, str]], packages: Mapping[str, str], excluded: Mapping[str, str]) -> str:
    """The text of FONTS.md: how the glyphs were made, what was left out, and each font's source and licence."""
    licences = ", ".join(f"{count} under {name}" for name, count in Counter(f["licence"] for f in fonts).most_common())
    reasons: dict[str, list[str]] = {}
    for family, reason in excluded.items():
        reasons.setdefault(reason, []).append(family)
    lines = [
        "# Fonts of the digits' prior",
        "",
        f"`fonts.json` lists {len(fonts)} font families of {len(packages)} Debian packages, {licences}, as the",
        "fonts' own name tables say. `fonts.npz` holds the digits 0 to 9 of one face of each, drawn with FreeType,",
        "cropped to the ink, fitted into 40x40 pixels, in sixteen levels. No font file and no other glyph is here.",
        "",
        "```",
        "apt-get download PACKAGES && for deb in *.deb; do dpkg-deb -x $deb unpacked/${deb%%_*}; done",
        "python -m diffdfkd.recipes.render_fonts glyphs --packages unpacked    # two minutes on one core",
        f"python -m diffdfkd.recipes.render_fonts images --output digit-images  # {IMAGES:,} images, from fonts.npz",
        "```",
        "",
        "Left out: handwriting, script and symbol faces as PANOSE and IBM's family class name them; fonts under other",
        "licences or without a word on it; fonts without ten different digits; families whose digits are another's;",
        "and, looked through by eye on contact sheets (`excluded.json`):",
        "",
        *(
            textwrap.fill(f"- {reason}: {', '.join(families)}", 118, subsequent_indent="  ")
            for reason, families in reasons.items()
        ),
        "",
        "| family | face | version | licence | Debian package |",
        "|---|---|---|---|---|",
        *(
            f"| {font['family']} | {font['style']} | {font['version'].replace('|', '/')} | {font['licence']} "
            f"| {font['package']} {packages[font['package']]} |"
            for font in fonts
        ),
    ]
    return "\n".join(lines) + "\n"


def plan_images(fonts: int, images: int, seed: int) -> list[tuple[int, int]]:
    """Font and digit of each image, shuffled: equally many of each digit, and all fonts in turn."""
    chooser = random.Random(seed)
    plan = [(number // 10 % fonts, number % 10) for number in range(images)]
    chooser.shuffle(plan)
    return plan


def write_images(glyphs: Tensor, output: Path, images: int, seed: int) -> None:
    """Write a captioned image folder (32x32 grey PNG, ``metadata.jsonl``) from ink [F, 10, 40, 40]."""
    plan = plan_images(len(glyphs), images, seed)
    generator = torch.Generator().manual_seed(seed)
    output.mkdir(parents=True, exist_ok=True)
    with (output / "metadata.jsonl").open("w", encoding="utf-8") as lines:
        for start in tqdm(range(0, len(plan), 256), desc="images", unit="batch", disable=None):
            fonts, digits = torch.tensor(plan[start : start + 256]).unbind(1)
            pixels = (augment(glyphs[fonts, digits].unsqueeze(1), generator)[:, 0] * 255).round().byte().numpy()
            for number, digit in enumerate(digits.tolist()):
                name = f"{start + number:06d}.png"
                Image.fromarray(pixels[number]).save(output / name, compress_level=1)
                row = {"file_name": name, "text": f"a digit {WORDS[digit]}", "class": DIGITS[digit]}
                lines.write(json.dumps(row) + "\n")


@app.command("glyphs")
def glyphs_command(
    packages: Annotated[Path, typer.Option(help="Folder of unpacked Debian font packages, one sub-folder a package.")],
    output: Annotated[Path, typer.Option(help="Folder of fonts.npz, fonts.json and FONTS.md.")] = ASSETS,
) -> None:
    """Draw the digits of all text fonts that may be used; write the glyph asset, its list and the attribution."""
    excluded = json.loads((ASSETS / "excluded.json").read_text(encoding="utf-8"))
    rows: list[dict[str, str]] = []
    drawn: list[NDArray[np.uint8]] = []
    for path, row in find_fonts(packages, excluded):
        ink = draw_digits(path)
        if ink is not None and is_new(ink, drawn):
            rows.append(row)
            drawn.append(ink)
    if not rows:
        raise UserError(f"--packages: no font that may be used below {packages}; give a folder of unpacked packages")
    versions = {name: package_version(packages, name) for name in sorted({row["package"] for row in rows})}
    np.savez_compressed(output / "fonts.npz", ink=np.stack(drawn))
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (output / "fonts.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    (output / "FONTS.md").write_text(attribution(rows, versions, excluded), encoding="utf-8")
    typer.echo(f"{output / 'fonts.npz'}: {len(rows)} fonts, {(output / 'fonts.npz').stat().st_size / 1e6:.2f} MB")


def package_version(packages: Path, name: str) -> str:
    """First version in the Debian changelog of an unpacked package, "" where there is none."""
    documents = packages / name / "usr" / "share" / "doc" / name
    for path in (documents / "changelog.Debian.gz", documents / "changelog.gz"):
        if path.is_file():
            found = re.match(r"\S+ \(([^)]+)\)", gzip.decompress(path.read_bytes()).decode("utf-8", "replace"))
            return found.group(1) if found else ""
    return ""


@app.command("images")
def images_command(
    output: Annotated[Path, typer.Option(help="Folder to write: PNG files and metadata.jsonl.")],
    images: Annotated[int, typer.Option(min=10, help="How many, over all digits.")] = IMAGES,
    seed: Annotated[int, typer.Option(help="Seed of order and augmentation.")] = 0,
) -> None:
    """Write the captioned image folder on which the prior is trained."""
    write_images(load_glyphs(), output, images, seed)
    typer.echo(f"{output}: {images} images")


if __name__ == "__main__":
    run_command(app)
