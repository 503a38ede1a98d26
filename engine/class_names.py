"""Which of the wanted classes a folder, or a class of a published data set, is; the words a class is drawn by."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from diffdfkd.engine.errors import UserError

log = logging.getLogger(__name__)

WNID = re.compile(r"n\d{8}")
"""WordNet's name of a noun, as in ImageNet's folders."""
SPLITS = {"train", "training", "val", "valid", "validation", "test"}


def plain(name: str) -> str:
    """A name by its letters and digits alone: ``t-shirt_top`` and ``T-shirt/top`` are the same class."""
    return re.sub(r"[\W_]+", "-", name.casefold()).strip("-")


def class_words(words: Sequence[str | list[str]] | None, classes: Sequence[str]) -> list[list[str]]:
    """The words that each class is drawn by; its name where none are given."""
    return [[own] if isinstance(own, str) else list(own) for own in words or classes]


def match_classes(
    theirs: Sequence[Sequence[str]], classes: Sequence[str] | None, where: Path, *, whole: bool = True
) -> list[int]:
    """The wanted label of each class of a data set, given the names that each is known by, the first its own.

    Their own order where `classes` is None. The two must be one to one, or with `whole` off theirs may be fewer.
    UserError that begins with `where` if they cannot be matched; nothing is guessed from the order.
    """
    if classes is None:
        return list(range(len(theirs)))
    numbers = [str(number) for number in range(len(theirs))]
    if len(classes) == len(theirs) and set(classes) == set(numbers):
        return [list(classes).index(number) for number in numbers]
    for key in (str, plain):
        known = {key(name): label for label, name in enumerate(classes)}
        found = [{known[key(name)] for name in names if key(name) in known} for names in theirs]
        labels = [label for candidates in found if len(candidates) == 1 for label in candidates]
        if len(labels) == len(theirs) == len(set(labels)) and (len(labels) == len(classes) or not whole):
            return labels
    wanted = {plain(name) for name in classes}
    offered = {plain(name) for names in theirs for name in names}
    strangers = [names[0] for names in theirs if wanted.isdisjoint(map(plain, names))]
    absent = [name for name in classes if plain(name) not in offered]
    raise UserError(
        f"{where}: its {len(theirs)} classes do not match the {len(classes)} of teacher.classes; "
        + (f"the teacher has no {', '.join(strangers[:3])}; " if strangers else "")
        + (f"the data set has no {', '.join(absent[:3])}; " if absent and whole else "")
        + f"name teacher.classes, in the teacher's order, as the data set does: {', '.join(n[0] for n in theirs[:3])}, "
        "..."
    )


def class_order(folders: list[str], classes: list[str] | None, path: Path) -> tuple[list[int], list[str] | None]:
    """(label of each folder, class names); raises UserError unless folders and classes are one to one.

    Folders are named like the classes, numbered from 0, or both (``03-name``), or have ImageNet's wnids as names.
    """
    numbers = [int(name) if name.isascii() and name.isdigit() else -1 for name in folders]
    numbered = sorted(numbers) == list(range(len(folders)))
    if classes is None:
        return (numbers, None) if numbered else (list(range(len(folders))), folders)
    for key in (str, plain):
        known = {key(name): label for label, name in enumerate(classes)}
        found = [key(name) for name in folders]
        if len(known) == len(classes) == len(found) and set(found) == set(known):
            return [known[name] for name in found], classes
    if numbered and len(folders) == len(classes):
        return numbers, classes
    if (prefixes := _prefixes(folders, classes)) is not None:
        return prefixes, classes
    if all(WNID.fullmatch(name) for name in folders) and len(folders) == len(classes):
        return _wnid_order(folders, classes, path), classes
    if SPLITS.issuperset(folders):
        raise UserError(
            f"{path}: holds {' and '.join(folders)}, not class folders; give the one with the test images, such as "
            f"{path / folders[-1]}"
        )
    if 2 * sum(number >= 0 for number in numbers) > len(folders) and not any(name.isdigit() for name in classes):
        raise _misnumbered(folders, numbers, len(classes), path)
    wanted = {plain(name) for name in classes}
    strangers = [name for name in folders if plain(name) not in wanted]
    absent = [name for name in classes if plain(name) not in {plain(folder) for folder in folders}]
    raise UserError(
        f"{path}: its {len(folders)} folders do not match the {len(classes)} classes; "
        + (f"no class is named {', '.join(strangers[:3])}; " if strangers else "")
        + (f"no folder for {', '.join(absent[:3])}; " if absent else "")
        + f"name them like teacher.classes, or 0 to {len(classes) - 1}"
    )


def read_words(file: Path) -> dict[str, list[str]]:
    """Names of each wnid in a file of lines ``wnid names``: all of them as written, then each synonym."""
    words: dict[str, list[str]] = {}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        wnid, *rest = line.split(maxsplit=1) or [""]
        if WNID.fullmatch(wnid) and rest:
            words[wnid] = [rest[0].strip(), *(word.strip() for word in rest[0].split(","))]
    return words


def _prefixes(folders: list[str], classes: list[str]) -> list[int] | None:
    """Labels of folders ``<number>-<class name>``, if all are so named, one for each class."""
    labels = []
    for folder in folders:
        number, _, name = folder.partition("-")
        if not (number.isascii() and number.isdigit() and int(number) < len(classes)):
            return None
        if plain(classes[int(number)]) != plain(name):
            return None
        labels.append(int(number))
    return labels if len(set(labels)) == len(classes) else None


def _wnid_order(folders: list[str], classes: list[str], path: Path) -> list[int]:
    """By the words beside the folders; without them in ILSVRC 2012's order, which is that of the sorted wnids."""
    places = (path, *path.absolute().parents[:4])
    files = [place / name for place in places for name in ("words.txt", "LOC_synset_mapping.txt")]
    if (file := next((file for file in files if file.is_file()), None)) is not None:
        words = read_words(file)
        try:
            return match_classes([[wnid, *words.get(wnid, [])] for wnid in folders], classes, path)
        except UserError:
            if len(classes) != 1000:
                raise
    if len(classes) != 1000:
        raise UserError(
            f"{path}: its folders are named by wnids ({folders[0]}, ...), which say nothing about teacher.classes; "
            f"name the classes by wnids too, or put a words.txt (lines `{folders[0]} name`) beside the folders"
        )
    log.warning("%s: its 1,000 wnids, sorted, are taken for the teacher's 1,000 classes, as in ILSVRC 2012", path)
    ranks = {wnid: rank for rank, wnid in enumerate(sorted(folders))}
    return [ranks[wnid] for wnid in folders]


def _misnumbered(folders: list[str], numbers: list[int], count: int, path: Path) -> UserError:
    """What keeps folders that are numbered, most of them, from being 0 to ``count`` - 1."""
    absent = [str(number) for number in range(count) if number not in numbers]
    odd = [
        name
        for place, (name, number) in enumerate(zip(folders, numbers, strict=True))
        if not 0 <= number < count or number in numbers[:place]
    ]
    problems = [f"no folder {', '.join(absent[:3])}"] if absent else []
    problems += [f"{name} is not one of 0..{count - 1}" for name in odd[:3]]
    return UserError(
        f"{path}: {'; '.join(problems)}; number the {count} folders from 0, or name them like teacher.classes"
    )
