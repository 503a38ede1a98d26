"""Train the demo's teacher on Fashion-MNIST: 55,000 training and 5,000 validation images of the official 60,000.

    python -m diffdfkd.recipes.train_teacher --output recipes/assets/fashion/teacher.safetensors --threads 1

Seven minutes on one core. The official test images are never read here: the last network is kept, and validation
images report on it.
"""

import hashlib
import json
import math
import shlex
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor, nn

from diffdfkd.engine.architectures import small_cnn
from diffdfkd.engine.classifier import Classifier, Preprocessing
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.idx import read_bytes, read_idx
from diffdfkd.engine.progress import progress_bar
from diffdfkd.engine.shards import write_atomic
from diffdfkd.engine.weights import digest, save_classifier
from diffdfkd.recipes.command import run_command

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
"""Fashion-MNIST's classes in the order of its labels."""

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
IMAGES = "train-images-idx3-ubyte.gz"
LABELS = "train-labels-idx1-ubyte.gz"
DIGESTS = {
    IMAGES: "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    LABELS: "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
}
"""SHA-256 of the official files once unpacked: copies differ in how they were compressed."""

VALIDATION_PER_CLASS = 500


def fashion_split(labels: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(training, validation) indices, ascending: of each class 500 images, drawn by `seed`, are validation.

    Of the official 60,000 labels this makes 55,000 and 5,000. The draw is numpy's PCG64, one permutation a class in
    the order of the labels.
    """
    generator = np.random.default_rng(seed)
    validation = np.concatenate(
        [generator.permutation(np.flatnonzero(labels == label))[:VALIDATION_PER_CLASS] for label in np.unique(labels)]
    )
    validation.sort()
    return np.setdiff1d(np.arange(len(labels)), validation), validation


def training_files(data: Path | None, download: Path | None = None) -> tuple[Path, Path]:
    """Official training images and labels, digests checked; raises UserError that says where to get them."""
    if download is not None:
        from torchvision.datasets import FashionMNIST

        FashionMNIST(str(download), train=True, download=True)
        data = download / "FashionMNIST" / "raw"
    folder = data or DEBIAN
    for name in (IMAGES, LABELS):
        path = folder / name
        if not path.is_file():
            raise UserError(
                f"{path}: no such file; install Debian's package dataset-fashion-mnist, or let torchvision fetch "
                f"the data with --download FOLDER, or name the folder that holds {IMAGES} and {LABELS} with --data"
            )
        found = hashlib.sha256(read_bytes(path)).hexdigest()
        if found != DIGESTS[name]:
            raise UserError(f"{path}: SHA-256 {found} unpacked, not the official {DIGESTS[name]}; fetch it again")
    return folder / IMAGES, folder / LABELS


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
    *,
    width: int,
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
    model = small_cnn(1, len(CLASSES), width=width).to(memory_format=torch.channels_last)
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
    data: Annotated[
        Path | None, typer.Option(help=f"Folder of the official IDX training files [{DEBIAN}].", show_default=False)
    ] = None,
    download: Annotated[Path | None, typer.Option(help="Let torchvision fetch the data into this folder.")] = None,
    width: Annotated[int, typer.Option(help="Of architecture small_cnn.")] = 32,
    epochs: int = 18,
    batch_size: int = 256,
    learning_rate: Annotated[float, typer.Option(help="Highest rate of the one-cycle schedule.")] = 0.2,
    weight_decay: float = 5e-4,
    seed: Annotated[int, typer.Option(help="Of weights, order and augmentation; the split is always the same.")] = 0,
    precision: Annotated[str, typer.Option(help="bfloat16 (mixed) or float32.")] = "bfloat16",
    threads: Annotated[int | None, typer.Option(help="CPU threads [torch's default].", show_default=False)] = None,
) -> None:
    """Train the demo's teacher on Fashion-MNIST's 55,000 training images; report its accuracy on the 5,000 others."""
    if threads is not None:
        torch.set_num_threads(threads)
    if precision not in ("bfloat16", "float32"):
        raise UserError(f"--precision: got {precision}; bfloat16 or float32")
    record = train_teacher(
        training_files(data, download),
        output,
        seed=seed,
        settings={
            "width": width,
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
    files: tuple[Path, Path], output: Path, *, seed: int, settings: dict[str, Any], command: str
) -> dict[str, Any]:
    """Train, measure on the validation split, write `output` and its .json; returns what the .json says."""
    pixels = read_idx(files[0], 3)
    truth = read_idx(files[1], 1)
    # Whatever the seed: settings are chosen on these validation images, so no teacher may have learnt from them.
    training, validation = fashion_split(truth)
    images = torch.from_numpy(pixels.copy()).unsqueeze(1)
    labels = torch.from_numpy(truth.astype(np.int64))
    mean = round(float(pixels[training].mean(dtype=np.float64)) / 255, 4)
    std = round(float(pixels[training].std(dtype=np.float64)) / 255, 4)

    start = time.monotonic()
    model = train(images[training], labels[training], mean=mean, std=std, seed=seed, **settings)
    seconds = time.monotonic() - start
    found = accuracy(model, (images[validation].float() / 255 - mean) / std, labels[validation])

    preprocessing = Preprocessing(channels=1, size=28, mean=(mean,), std=(std,), interpolation="bilinear")
    classifier = Classifier(model.to(memory_format=torch.contiguous_format), preprocessing, list(CLASSES))
    metadata = {"architecture": "small_cnn", "data": "Fashion-MNIST (MIT, Zalando SE)", "licence": "MIT"}
    save_classifier(classifier, output, metadata)
    record = {
        "sha256": digest(output),
        "architecture": "small_cnn",
        "options": {"width": settings["width"]},
        "classes": list(CLASSES),
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
        "training_files": DIGESTS,
        "data_licence": "Fashion-MNIST, MIT, (c) 2017 Zalando SE",
        "licence": "MIT",
    }
    write_atomic(output.with_suffix(".json"), (json.dumps(record, indent=2) + "\n").encode())
    return record


if __name__ == "__main__":
    run_command(main)
