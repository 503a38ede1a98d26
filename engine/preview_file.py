"""The preview that lies in a run's folder: ``preview.json`` and the images it names, read only if all is whole."""

import json
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from diffdfkd.engine.alarms import Signs
from diffdfkd.engine.errors import UserError

PREVIEW = Path("preview") / "preview.json"
"""In a run's folder; what alarms compare with comes from there."""


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)


class Pair(_Row):
    class_name: str
    unguided: str | None
    guided: str | None


class Mix(_Row):
    owner: str | None
    partner: str | None
    child: str | None
    box: tuple[int, int, int, int]
    area: float
    owner_class: str
    partner_class: str


class Moments(_Row):
    mean: float | None
    variance: float | None


class Layer(_Row):
    name: str
    channels: int
    unguided: Moments | None
    guided: Moments | None


class Answers(_Row):
    confidence: float
    agreement: float


class ClassAnswers(_Row):
    label: int = Field(alias="class")
    class_name: str
    unguided: Answers | None
    guided: Answers | None


class Losses(_Row):
    unguided: float | None
    guided: float | None


class Preview(_Row):
    """What the report and the alarms read of ``preview.json``."""

    digest: str
    size: PositiveInt
    pairs: list[Pair]
    mixes: list[Mix]
    batchnorm: Losses = Losses(unguided=None, guided=None)
    layers: list[Layer] = []
    by_class: list[ClassAnswers] = []
    signs: dict[str, Signs | None] = {}

    @property
    def files(self) -> set[str]:
        """Names of the images."""
        named = [name for pair in self.pairs for name in (pair.unguided, pair.guided)]
        named += [name for mix in self.mixes for name in (mix.owner, mix.partner, mix.child)]
        return {Path(name).name for name in named if name is not None}


def read_preview(run: Path) -> dict[str, Any] | None:
    """Content of the preview in a run's folder, None where there is none.

    Raises UserError that names the file where ``preview.json``, or an image that it names, is damaged or gone.
    """
    file = run / PREVIEW
    if not file.is_file():
        return None
    content = file.read_bytes()
    try:
        preview = Preview.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise _damaged(file, f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}") from None
    for name in sorted(preview.files):
        try:
            with Image.open(file.with_name(name)) as image:
                image.load()
        # A broken PNG is a SyntaxError to PIL.
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise _damaged(file.with_name(name), str(error)) from None
    read: dict[str, Any] = json.loads(content)
    return read


def _damaged(file: Path, problem: str) -> UserError:
    return UserError(
        f"{file}: damaged; give the command of the run again, which makes the preview anew, or delete {file.parent} "
        f"({problem})"
    )
