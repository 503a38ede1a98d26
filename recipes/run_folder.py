"""A run's folder: one process at a time, one recipe for good, settled on first use and frozen into ``recipe.yaml``."""

import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from diffdfkd.engine.errors import CURES, UserError
from diffdfkd.engine.recipe import FULL_DECODER, Recipe, dump_recipe, load_recipe
from diffdfkd.engine.recipe_file import repeating_command
from diffdfkd.engine.run_recipe import frozen_fault
from diffdfkd.recipes.launch import rank, settle_machine
from diffdfkd.recipes.same_recipe import file_digests, refuse_other, training

log = logging.getLogger(__name__)

PACKAGES = ("torch", "diffusers", "transformers", "deepspeed", "triton", "diffdfkd")


@dataclass(frozen=True)
class RunFolder:
    """A claimed folder with the recipe as it is run: device, threads and paths settled."""

    recipe: Recipe
    path: Path
    digests: Mapping[str, str]
    """SHA-256 of the files of prior, LoRAs, teacher and student weights, as far as they are given and used."""
    images: str | None
    """Folder or tar that the student learns from in the place of the run's own shards."""
    grown: bool
    """More images per class are asked for than the folder's recipe says."""
    mended: bool
    """Training is asked for otherwise than the folder's recipe says, and has left no student there yet."""

    @property
    def snapshot(self) -> Path:
        """Snapshot of the last round."""
        return self.snapshot_of(self.recipe.rounds - 1)

    @property
    def student(self) -> Path:
        return self.path / "student" / "student.safetensors"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def journal(self) -> Path:
        return self.path / "metrics.jsonl"

    def snapshot_of(self, round: int) -> Path:
        return self.path / "student" / f"round-{round:03d}.safetensors"

    def freeze(self) -> None:
        """Write ``recipe.yaml``: every field, the versions of packages and the digests of weights.

        Called once everything that the recipe names has been loaded, so that a mistake does not bind the folder.
        """
        from diffdfkd.engine.shards import write_atomic

        if self.grown or self.mended:
            self._set_aside()
        file = self.path / "recipe.yaml"
        frozen: dict[str, Any] = {"digests": dict(self.digests), "versions": versions()}
        if self.images is not None:
            frozen["images"] = self.images
        if (before := _frozen(self.path)) is not None and not _empty(self.path):
            # Versions are those that the run began with; digests that this command does not use are kept.
            frozen["versions"] = _compared(before.get("versions", {}), versions())
            frozen["digests"] = {**before.get("digests", {}), **frozen["digests"]}
        content = {**dump_recipe(self.recipe), "frozen": frozen}
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)
        head = f"# Written by diffdfkd; `{repeating_command(self.images)} output=...` repeats it."
        write_atomic(file, f"{head}\n{text}".encode())

    def _set_aside(self) -> None:
        """What was trained on fewer images, or otherwise, is another student: it is kept, and trained again."""
        things = [path for path in (self.path / "student", self.result, self.path / "report.html") if path.exists()]
        if not things:
            return
        kept = self.path / "superseded"
        number = 1 + max((int(path.name) for path in kept.glob("[0-9][0-9][0-9]")), default=0)
        folder = kept / f"{number:03d}"
        folder.mkdir(parents=True)
        for path in things:
            path.rename(folder / path.name)
        shutil.copyfile(self.path / "recipe.yaml", folder / "recipe.yaml")
        log.warning("the student is trained anew; what there was now lies in %s", folder)


@contextmanager
def claim(recipe: Recipe, *, prior: bool = True, images: Path | None = None) -> Iterator[RunFolder]:
    """Hold the recipe's output folder, made if need be, with the recipe settled against what was frozen there.

    ``prior`` says whether the command uses the prior. Raises UserError if the folder cannot be written, is in use by
    another process, or holds a run of another recipe. Of several processes of one launch, rank 0 holds it for all.
    """
    folder = Path(recipe.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"output: {folder} cannot be written ({error.strerror}); choose another folder") from None
    try:
        if rank() == 0 and not _locked(lock):
            raise UserError(
                f"output: {folder} is in use by another diffdfkd process; wait for it, or choose another folder"
            )
        yield _settle(recipe, folder, images, file_digests(recipe, prior=prior))
    except OSError as error:
        file = Path(error.filename or folder)
        if error.errno not in CURES or not file.is_relative_to(folder):
            raise
        raise UserError(
            f"output: {file} cannot be written ({error.strerror}); {CURES[error.errno]}, and give the command again: "
            "it goes on from what is finished"
        ) from error
    finally:
        os.close(lock)


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keep other processes from a run's folder, whatever recipe it holds; UserError where one is at work there."""
    try:
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); let it be written, or copy it") from None
    try:
        if not _locked(lock):
            raise UserError(f"{folder}: in use by another diffdfkd process; wait for it, then give the command again")
        yield
    finally:
        os.close(lock)


def begun(folder: Path) -> Recipe | None:
    """The recipe of the run that the folder holds, as it is being run; None where there is none."""
    if _frozen(folder) is None or _empty(folder):
        return None
    return _as_begun(folder)


def in_use(folder: Path) -> bool:
    """Whether a process works on the folder at this moment; nothing is made, and the lock given back."""
    try:
        lock = os.open(folder / ".lock", os.O_RDWR)
    except OSError:
        return False
    try:
        return not _locked(lock)
    finally:
        os.close(lock)


def holds_run(recipe: Recipe) -> bool:
    """Whether the recipe's output folder holds a run already, which the recipe continues; nothing is made or locked.

    Raises UserError as `claim` would, where it holds another one.
    """
    folder = Path(recipe.output)
    if _frozen(folder) is None or _empty(folder):
        return False
    try:
        digests = file_digests(recipe, prior=True)
    except UserError:
        digests = {}  # a file is missing, which is said of itself; the fields can be compared without
    _settle(recipe, folder, None, digests)
    return True


def versions() -> dict[str, str | None]:
    """Of Python and the packages that a result depends on; None for one that is not installed."""
    import platform

    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _compared(began: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The versions that the run began with, after a word about those that have changed since."""
    changed = [f"{name} {was}, now {now.get(name)}" for name, was in began.items() if was != now.get(name)]
    if changed:
        log.warning("the run began with %s: what is made now may differ in the last bit", "; ".join(changed))
    return dict(began)


def _locked(descriptor: int) -> bool:
    """Whether the lock is now this process's; no other has it then."""
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _settle(recipe: Recipe, folder: Path, images: Path | None, digests: Mapping[str, str]) -> RunFolder:
    frozen = _frozen(folder)
    if frozen is None and not _empty(folder):
        raise UserError(
            f"output: {folder} holds a run whose recipe.yaml is gone, so that no one can say which; put it back from "
            "a copy, or choose another output folder"
        )
    before: Recipe | None = None
    if frozen is not None and not _empty(folder):
        try:
            before = _as_begun(folder)
        except UserError as error:
            raise UserError(f"output: {folder / 'recipe.yaml'}: {error}; or choose another output folder") from None
    settled = _absolute(settle_machine(recipe, before))
    source = None if images is None else str(images.resolve())
    grown = mended = False
    if before is not None and frozen is not None:
        if frozen.get("images") != source:
            theirs = frozen.get("images") or "its own synthetic images"
            raise UserError(
                f"output: {folder} holds a student of {theirs}, this one is to learn from "
                f"{source or 'synthetic images of its own'}; choose another output folder"
            )
        refuse_other(before, settled, frozen.get("digests", {}), digests, folder, source)
        grown = source is None and settled.synthesis.images_per_class > before.synthesis.images_per_class
        mended = training(settled) != training(before)
    return RunFolder(settled, folder, digests, source, grown, mended)


def _frozen(folder: Path) -> dict[str, Any] | None:
    """What ``recipe.yaml`` of the folder says under ``frozen``; None where there is no run yet."""
    file = folder / "recipe.yaml"
    if not file.is_file():
        return None
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problem = " ".join(str(error).split())
        raise UserError(
            f"output: {file} is no longer YAML; put it back from a copy, or choose another output folder ({problem})"
        ) from None
    frozen = content.get("frozen") if isinstance(content, dict) else None
    if not isinstance(frozen, dict):
        raise UserError(f"output: {file} was not written by a run; choose another output folder")
    if (fault := frozen_fault(frozen)) is not None:
        raise UserError(
            f"output: {file} is damaged; put it back from a copy, or choose another output folder ({fault})"
        )
    return frozen


def _as_begun(folder: Path) -> Recipe:
    """The recipe that the folder's run began with; runs older than the field took the only forms that there were."""
    recipe = load_recipe(folder / "recipe.yaml")
    only = {stage: "eager" for stage in ("unet", "chain") if getattr(recipe.engine, stage) == "auto"}
    if recipe.engine.attention == "auto":
        only["attention"] = "sdpa"
    kernel = "reference" if recipe.kernel == "auto" else recipe.kernel
    return recipe.model_copy(update={"kernel": kernel, "engine": recipe.engine.model_copy(update=only)})


def _empty(folder: Path) -> bool:
    """Whether nothing has been made in the folder yet, so that its recipe may still be replaced."""
    made = (*folder.glob("synthetic/round-*/shard-*"), *folder.glob("student/**/*"))
    return not any(path.is_file() for path in made)


def _absolute(recipe: Recipe) -> Recipe:
    """The recipe with the paths of existing files and folders made absolute, so that any working folder will do."""

    def settled(path: str | None) -> str | None:
        return str(Path(path).resolve()) if path is not None and Path(path).exists() else path

    evaluation, guidance = recipe.evaluation, recipe.guidance
    light = guidance.decoder if guidance.decoder == FULL_DECODER else settled(guidance.decoder)
    loras = [lora.model_copy(update={"path": settled(lora.path)}) for lora in recipe.prior.loras]
    return recipe.model_copy(
        update={
            "prior": recipe.prior.model_copy(update={"path": settled(recipe.prior.path), "loras": loras}),
            "teacher": recipe.teacher.model_copy(update={"weights": settled(recipe.teacher.weights)}),
            "student": recipe.student.model_copy(update={"weights": settled(recipe.student.weights)}),
            "guidance": guidance.model_copy(update={"decoder": light}),
            "evaluation": evaluation.model_copy(
                update={"images": settled(evaluation.images), "labels": settled(evaluation.labels)}
            ),
        }
    )
