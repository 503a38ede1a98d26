"""A student as one file: weights, and in the header of the safetensors format all that it takes to use them again."""

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from diffdfkd.engine.checkpoint import state_digest
from diffdfkd.engine.classifier import Classifier, build_classifier
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.recipe import ClassifierRecipe, Recipe, TeacherRecipe
from diffdfkd.engine.weights import save_classifier

NETWORK = ("architecture", "options")
INPUT = ("classes", "channels", "size", "mean", "std", "interpolation", "channel_order")
PACKAGED = ("torchvision", "timm")
WEIGHTS = "weights_sha256"
"""Entry of the header: digest of the tensors, by which a changed bit is found."""
FETCHING = ("pretrained", "checkpoint", "weights", "cache")
"""Beginnings of the options with which a packaged architecture opens other files or the network."""


def write_student(student: Classifier, path: Path, recipe: Recipe) -> None:
    """Weights, architecture, classes and preprocessing; equal students of one environment give equal bytes."""
    header = {
        **{name: getattr(recipe.student, name) for name in NETWORK},
        **{name: getattr(recipe.teacher, name) for name in INPUT},
        "versions": {package: _version(package) for package in ("torch", *_packages(recipe.student.architecture))},
        WEIGHTS: state_digest(student.model.state_dict()),
    }
    save_classifier(
        student, path, {key: value if isinstance(value, str) else json.dumps(value) for key, value in header.items()}
    )


def damage(path: Path) -> str | None:
    """What is wrong with a safetensors file that `write_student` may have written; None where it is whole.

    Only a file that says so in its header is asked whether its tensors are those that were written.
    """
    try:
        with safe_open(path, "pt") as file:
            written = (file.metadata() or {}).get(WEIGHTS)
        same = written is None or written == state_digest(load_file(path))
    except SafetensorError as error:
        return f"not a safetensors file, or cut short ({error})"
    return None if same else "its weights are not those that were written"


def read_student(path: str | Path, *, allow_factory: bool = False) -> Classifier:
    """The student of a file that a run has written, from this file alone: frozen, in eval mode, on the CPU.

    It takes images [B,C,H,W] in [0, 1] of any size to logits [B,K]. An architecture ``package.module:factory`` is code
    that the file's author names: it is imported with `allow_factory` alone. Raises UserError that names the file.
    """
    path = Path(path)
    header = read_header(path)
    architecture = header["architecture"]
    source, colon, _ = architecture.partition(":")
    if colon and source not in PACKAGED and not allow_factory:
        raise UserError(
            f"{path}: its architecture is the function {architecture}, and to build it is to run that code; if you "
            "trust it, read_student(path, allow_factory=True)"
        )
    if colon and not allow_factory:
        for name in header["options"]:
            if name.startswith(FETCHING):
                raise UserError(
                    f"{path}: its option {name} lets {source} open other files or the network; if you trust it, "
                    "read_student(path, allow_factory=True)"
                )
    try:
        student = ClassifierRecipe(**{name: header[name] for name in NETWORK}, weights=str(path))
        # The preprocessing is part of the teacher's section; no teacher is built.
        domain = TeacherRecipe(architecture=architecture, **{name: header[name] for name in INPUT if name in header})
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(map(str, problem["loc"]))
        raise UserError(f"{path}: its header is damaged: {field}: {problem['msg']}") from None
    try:
        classifier = build_classifier(student, domain, field="student")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if (fault := damage(path)) is not None:
        raise UserError(f"{path}: {fault}; take another copy of the file")
    return classifier.requires_grad_(False).eval()


def read_header(path: Path) -> dict[str, Any]:
    """What the file says of its student, values decoded; raises UserError unless a run has written it."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; a run leaves its student in student/student.safetensors")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file, or cut short ({error})") from None
    if missing := [name for name in (*NETWORK, "classes") if name not in metadata]:
        raise UserError(
            f"{path}: holds weights, but its header lacks {', '.join(missing)}; give the student.safetensors of a run"
        )
    texts = ("architecture", "interpolation", "channel_order", WEIGHTS)
    try:
        header = {key: value if key in texts else json.loads(value) for key, value in metadata.items()}
    except ValueError:
        raise UserError(f"{path}: its header is damaged; write the student again") from None
    if not isinstance(header["options"], dict):
        raise UserError(f"{path}: its header is damaged: options: a mapping is wanted")
    return header


def _packages(architecture: str) -> tuple[str, ...]:
    source, colon, _ = architecture.partition(":")
    return (source,) if colon and source in PACKAGED else ()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
