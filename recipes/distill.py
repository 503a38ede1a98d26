"""The student alone, from images that exist: a run's own shards, any WebDataset, any folder of images.

diffdfkd distill fashion --images my-images output=runs/mine
torchrun --nproc-per-node 2 -m diffdfkd.recipes.cli distill fashion output=runs/two
deepspeed --num_gpus 2 --module diffdfkd.recipes.cli distill fashion output=runs/two
"""

import hashlib
import os
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from diffdfkd.engine.errors import UserError, naming
from diffdfkd.engine.recipe import Recipe
from diffdfkd.recipes.figures import finish, finished, stage
from diffdfkd.recipes.launch import rank
from diffdfkd.recipes.run import load_classifiers, save_student, session, shard_images, shard_parts, use_device
from diffdfkd.recipes.run_folder import RunFolder, claim

if TYPE_CHECKING:
    from diffdfkd.engine.images import Images


def distill(recipe: Recipe, images: Path | None = None, *, progress: bool = True) -> dict[str, Any] | None:
    """Train and evaluate a student on the images, or on the shards in the recipe's output folder.

    Returns what ``result.json`` holds; None on every rank but the first of a launch. Raises UserError as ``run`` does.
    """
    started = time.perf_counter()
    if recipe.selection.disagreement > 0:
        raise UserError(
            f"selection.disagreement: got {recipe.selection.disagreement}, but `diffdfkd distill` trains in one go, "
            "without a student of an earlier round to disagree; set it to 0, or take `diffdfkd run` with rounds=2 or "
            "more"
        )
    from diffdfkd.engine.distillation import distill as train
    from diffdfkd.engine.journal import Journal

    if images is not None and (images / "recipe.yaml").is_file() and (images / "synthetic").is_dir():
        images = images / "synthetic"  # a run, whose previews and reports are no images to learn from
    with claim(recipe, prior=images is None, images=images) as folder:
        recipe = folder.recipe
        use_device(recipe)
        data, digest = own_shards(folder) if images is None else foreign_images(recipe, images)
        # Asked on every rank, or those behind the first would wait for it in vain.
        if (result := finished(folder)) is not None and result.get("data_digest") in (None, digest):
            return result if rank() == 0 else None
        teacher, student, test = load_classifiers(recipe)
        with ExitStack() as stack:
            if rank() == 0:
                folder.freeze()
                journal = stack.enter_context(session(folder, "distill", time.perf_counter() - started))
            else:
                # Rank 0 speaks for all; the others' lines are dropped.
                journal = stack.enter_context(
                    Journal(Path(stack.enter_context(TemporaryDirectory())) / "metrics.jsonl")
                )
            with stage(journal, "distillation", recipe):
                summary = train(
                    student,
                    teacher,
                    data,
                    recipe.distillation,
                    folder.path / "student",
                    seed=recipe.seed,
                    data_digest=digest,
                    parts=shard_parts(folder, 1) if images is None else None,
                    selection=recipe.selection,
                    journal=journal,
                    device=recipe.device,
                    kernel=recipe.kernel,
                    progress=progress,
                )
            if rank() > 0:
                return None
            journal.log("distillation", images=len(data), **asdict(summary))
            save_student(student, folder.student, recipe)
            return finish(folder, teacher, test, journal, progress, data_digest=digest)


def own_shards(folder: RunFolder) -> tuple["Images", str]:
    """Images of the output folder's shards, which must all be there, and their digest."""
    from diffdfkd.engine.plan import shard_plan
    from diffdfkd.engine.shards import DamagedShard, round_folder, shard_path, verify_shard

    recipe, root = folder.recipe, folder.path / "synthetic"
    if recipe.rounds > 1:
        raise UserError(
            f"rounds: got {recipe.rounds}, where synthesis and distillation take turns: that is `diffdfkd run`; or "
            f"give --images {root}, rounds=1 and another output folder"
        )
    for plan in shard_plan(recipe, 0):
        try:
            verify_shard(shard_path(round_folder(root, 0), plan.index))
        except DamagedShard as reason:
            raise UserError(
                f"output: {root} is not complete ({reason}); `diffdfkd synthesize` with the same recipe makes what is "
                "missing, or give --images"
            ) from None
    return shard_images(folder, 1)


def foreign_images(recipe: Recipe, path: Path) -> tuple["Images", str]:
    """Images of any folder or tar, resized to the teacher's input, their labels left aside; and a digest of the files.

    Of their names, sizes and times of change: to read the content of a large set would take as long as an epoch.
    """
    from diffdfkd.engine.images import open_images

    teacher = recipe.teacher
    sha256 = hashlib.sha256()
    with naming("--images"):
        images = open_images(
            path, channels=teacher.channels, size=teacher.size, interpolation=teacher.interpolation, labelled=False
        )
        for file in images.files:
            name = "" if file == path else file.relative_to(path).as_posix()
            try:
                status = file.stat()
            except OSError as error:
                raise UserError(f"{file}: cannot be read ({error.strerror}); put it back, or take it away") from None
            sha256.update(os.fsencode(f"{name} {status.st_size} {status.st_mtime_ns}\n"))
    return images, sha256.hexdigest()
