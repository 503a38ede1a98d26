"""The student's model card: what it is, what it reaches, what it never saw, how to use it, and what binds it."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from diffdfkd.engine.licences import NOT_STATED, digest_name, inherited_licence
from diffdfkd.engine.recipe import Recipe

Content = Mapping[str, Any]

USE_TORCH = """\
```python
import torch
from diffdfkd.engine.student_file import read_student

student = read_student("student.safetensors")  # frozen, in eval mode{consent}
images = torch.rand(4, {channels}, {size}, {size})  # [N, C, H, W] in [0, 1]; other sizes are resized
print([student.classes[index] for index in student(images).argmax(1).tolist()])
```
"""
USE_ONNX = """\
```python
import json

import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("student.onnx", providers=["CPUExecutionProvider"])
classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
images = np.random.rand(4, {channels}, {size}, {size}).astype(np.float32)  # [N, C, H, W] in [0, 1], of this size
(logits,) = session.run(["logits"], {{"images": images}})
print([classes[index] for index in logits.argmax(1)])
```
"""


def model_card(recipe: Recipe, result: Content, digests: Mapping[str, str], images: str | None = None) -> str:
    """``README.md`` beside the student: Markdown with YAML front matter, a function of its arguments alone.

    ``result`` is the content of ``result.json``, ``digests`` are those of ``recipe.yaml``, and ``images`` is the folder
    that the student learnt from where that is not the run's own.
    """
    student = described(recipe.student.architecture, recipe.student.options)
    teacher = described(recipe.teacher.architecture, recipe.teacher.options)
    source = "images of a diffusion prior" if images is None else f"images of {Path(images).name}"
    colour = "in colour" if recipe.teacher.channels == 3 else "in grey"
    head = (
        f"A {student} that puts images of {recipe.teacher.size}x{recipe.teacher.size} pixels {colour} into "
        f"{len(recipe.teacher.classes)} classes. diffdfkd {_version(result)} trained it to answer as a {teacher} does, "
        f"on {result['images']:,} {source}."
    )
    parts = [
        _front_matter(result),
        f"# {_plain(student)}, distilled without real images" if images is None else f"# {_plain(student)}, distilled",
        _plain(head),
        _figures(recipe, result),
        _seen(recipe, result, images),
        _use(recipe, result),
        _making(recipe, result, digests, images),
        _licences(result),
        _limits(result, images),
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def described(architecture: str, options: Content) -> str:
    """The architecture with its options, for a sentence."""
    words = ", ".join(f"{key} {value}" for key, value in options.items())
    return f"{architecture} ({words})" if words else architecture


def _front_matter(result: Content) -> str:
    licence, name = inherited_licence(result["licences"])
    content: dict[str, Any] = {"license": licence}
    if name:
        content["license_name"] = name
    content |= {"pipeline_tag": "image-classification", "tags": ["knowledge-distillation", "data-free"]}
    if (result.get("onnx") or {}).get("file"):
        content["tags"].append("onnx")
    return f"---\n{yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1000)}---"


def _figures(recipe: Recipe, result: Content) -> str:
    if result.get("student_accuracy") is None:
        return "## Figures\n\nIt has not been evaluated: the run named no real test images."
    low, high = result["accuracy_interval"]
    rows = [
        ("accuracy", f"{result['student_accuracy']:.2%} (95 % interval {low:.2%} to {high:.2%}, Wilson)"),
        ("accuracy of the teacher", f"{result['teacher_accuracy']:.2%}"),
        ("same answer as the teacher", f"{result['agreement']:.2%}"),
        ("expected calibration error", f"{result['calibration_error']:.3f} (15 bins)"),
    ]
    classes = [
        (_cell(name), f"{share:.2%}", f"{result['teacher_per_class'][name]:.2%}", f"{count:,}")
        for (name, share), count in zip(result["per_class"].items(), result["per_class_images"].values(), strict=True)
    ]
    return (
        f"## Figures\n\nOn {result['test_images']:,} real test images, which this evaluation alone has read:\n\n"
        f"{_table(('measure', 'value'), rows)}\n\n"
        f"{_table(('class', 'student', 'teacher', 'test images'), classes)}"
    )


def _seen(recipe: Recipe, result: Content, images: str | None) -> str:
    if recipe.student.weights is not None:
        name = Path(recipe.student.weights).name
        start = f"Its initial weights are those of {name}, and what they have seen is theirs."
    elif recipe.student.initialization == "teacher":
        start = (
            "Its initial weights are a part of the teacher's, and what those have learned from the teacher's data has "
            f"come along. The teacher's licence: {recipe.teacher.licence or NOT_STATED}."
        )
    else:
        start = "Its initial weights are random."
    if images is None:
        seen = (
            "It was trained on images that the prior made, and the teacher's answers to them; on no image of the data "
            "that the teacher was trained on, and none of the test images. What prior and teacher themselves were "
            "trained on is for their own cards to say."
        )
    else:
        seen = (
            f"It has seen the images of {Path(images).name}, without their labels, and the teacher's answers to them; "
            "none of the test images, unless they lie there too. What those images are, diffdfkd does not know."
        )
    return f"## What it has seen\n\n{_plain(seen)} {_plain(start)}"


def _use(recipe: Recipe, result: Content) -> str:
    teacher = recipe.teacher
    source, colon, _ = recipe.student.architecture.partition(":")
    factory = bool(colon) and source not in ("torchvision", "timm")
    consent = f"; imports {recipe.student.architecture}: add allow_factory=True" if factory else ""
    filled = {"channels": teacher.channels, "size": teacher.size}
    text = f"## How to use it\n\n{USE_TORCH.format(consent=consent, **filled)}"
    onnx = result.get("onnx") or {}
    if onnx.get("file"):
        text += (
            f"\nAs ONNX, with the normalisation inside and any number of images. It differs from torch by at most "
            f"{onnx['max_abs']:.1e}, {onnx['max_rel']:.1e} of the largest logit, as {onnx['runtime']} ran it on "
            f"{onnx['images']} images:\n\n{USE_ONNX.format(**filled)}"
        )
    elif onnx.get("reason"):
        text += f"\nThere is no ONNX file: {_plain(onnx['reason'])}."
    return text


def _making(recipe: Recipe, result: Content, digests: Mapping[str, str], images: str | None) -> str:
    guidance, synthesis, distillation = recipe.guidance, recipe.synthesis, recipe.distillation
    rows = [
        ("student", described(recipe.student.architecture, recipe.student.options)),
        ("student.safetensors, SHA-256", result["student_sha256"]),
        ("initial weights", "a file" if recipe.student.weights else recipe.student.initialization),
        ("teacher", described(recipe.teacher.architecture, recipe.teacher.options)),
        ("teacher, SHA-256", digests.get("teacher", NOT_STATED)),
    ]
    if images is None:
        rows += [("prior", _name(recipe.prior.path, recipe.prior.revision))]
        rows += [("prior, SHA-256", digests.get("prior", NOT_STATED))]
        rows += [
            (f"LoRA {number}", f"{_name(lora.path, lora.revision)}, scale {lora.scale}")
            for number, lora in enumerate(recipe.prior.loras, 1)
        ]
        rows += [
            (f"{digest_name(name)}, SHA-256", value)
            for name, value in sorted(digests.items())
            if name not in ("prior", "teacher", "student")
        ]
        steered = (
            "off"
            if guidance.mode == "none"
            else f"{guidance.mode}, class {guidance.class_weight}, BatchNorm {guidance.batchnorm_weight}, adversarial "
            f"{guidance.adversarial_weight}, rho {guidance.rho} ({guidance.rho_rule})"
        )
        rows += [
            ("images", f"{synthesis.images_per_class} a class, {synthesis.sampler} in {synthesis.steps} steps"),
            ("guidance by the teacher", steered),
        ]
    rows += [
        (
            "distillation",
            f"{distillation.steps} steps of {distillation.batch_size} images, {distillation.optimizer}, temperature "
            f"{distillation.temperature}, {recipe.rounds} round{'s' if recipe.rounds > 1 else ''}",
        ),
        ("seed", str(recipe.seed)),
    ]
    table = _table(("", ""), [(_cell(name), _cell(value)) for name, value in rows])
    return f"## How it was made\n\n{table}\n\nThe run's `recipe.yaml` holds every setting, and repeats it."


def _licences(result: Content) -> str:
    rows = [(_cell(name), _cell(licence or NOT_STATED)) for name, licence in result["licences"].items()]
    return (
        f"## Licences\n\n{_table(('of', 'licence'), rows)}\n\nAn OpenRAIL licence counts models that were trained on "
        "its model's output to perform similarly as derivatives, and its use restrictions go with them. What is not "
        "stated above was stated nowhere; ask its author before you pass the student on."
    )


def _limits(result: Content, images: str | None) -> str:
    lines = [
        "It answers with one of its classes whatever it is shown, and knows no other.",
        "It has learnt from the teacher, and with the teacher's mistakes.",
    ]
    if images is None:
        lines.append("It knows a class as the prior draws it, which may be far from how real images show it.")
    if result.get("student_accuracy") is not None:
        lines.append(
            "The interval says what the number of test images leaves open, and not how another seed or other data "
            "would turn out."
        )
    else:
        lines.append("How good it is on real images, nobody has measured.")
    return "## Limitations\n\n" + "\n".join(f"- {line}" for line in lines)


def _version(result: Content) -> str:
    return str((result.get("versions") or {}).get("diffdfkd", ""))


def _name(path: str, revision: str | None) -> str:
    """A hub id with its commit, or the last part of a path, which says nothing about the machine."""
    return f"{path} at {revision}" if revision else Path(path).name


def _plain(text: str) -> str:
    """One line without Markdown's and HTML's marks."""
    text = re.sub(r"\s+", " ", text)
    text = re.sub(r"([\\`*_\[\]<>|#&])", r"\\\1", text)
    # Hubs make links of these.
    text = re.sub(r"(?i)\b(https?|ftp|mailto):", r"\1\:", text)
    return re.sub(r"(?i)\b(www)\.", r"\1\.", text)


def _cell(text: str) -> str:
    return _plain(text).strip()


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
