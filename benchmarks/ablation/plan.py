"""Which runs an ablation has, and which of them learn from the same synthetic images."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from diffdfkd.benchmarks.ablation.axis import Axis, Source
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.plan import shard_plan
from diffdfkd.engine.recipe import Recipe, dump_recipe, load_recipe
from diffdfkd.engine.shards import canonical_json
from diffdfkd.recipes.launch import settle_machine
from diffdfkd.recipes.same_recipe import file_digests

NOT_SYNTHESIS = ("student", "distillation", "selection", "evaluation", "about", "output")
"""Sections of a recipe on which the images of its first round do not depend."""


@dataclass(frozen=True)
class Run:
    """A student to be made; equal ones of several variants or axes are made once."""

    axis: str
    variant: str
    seed: int
    source: Source
    recipe: Recipe
    """Device, threads and kernel settled; ``output`` is of no meaning."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Digests of the files that the recipe names: what lies at a path may be another thing another day."""

    @property
    def name(self) -> str:
        steps = self.recipe.distillation.steps
        images = "fresh" if self.source == "floor" else str(self.images)
        return f"{self.axis}: {self.variant}, {images} images, {steps} steps, seed {self.seed}"

    @property
    def images(self) -> int:
        """Over all classes and rounds; of the floor as many as are drawn, so that no augmentation is seen twice."""
        if self.source == "floor":
            return self.recipe.distillation.steps * self.recipe.distillation.batch_size
        return self.recipe.synthesis.images_per_class * len(self.recipe.teacher.classes)

    @property
    def content(self) -> dict[str, Any]:
        """All that the student depends on."""
        recipe = dump_recipe(self.recipe)
        kept = {key: recipe[key] for key in recipe if key not in ("about", "output")}
        return {"source": self.source, "recipe": kept, "files": dict(self.files)}

    @property
    def digest(self) -> str:
        return digest_of(self.content)


@dataclass(frozen=True)
class Store:
    """Synthetic images of a first round, of which runs with the same choices take the first ones."""

    digest: str
    recipe: Recipe
    """That of the run that wants the most."""


def plan_runs(
    source: str, overrides: Sequence[str], axes: Sequence[Axis], seeds: int, evaluation: Sequence[str] = ()
) -> list[Run]:
    """All runs, seed after seed, every recipe loaded: a variant that the recipe refuses is named.

    ``overrides`` are of all variants, and give way to what an axis varies; ``evaluation`` names other real images.
    """
    if seeds < 1:
        raise UserError(f"--seeds: got {seeds}; one or more, and three for an interval")
    for override in overrides:
        if (key := override.partition("=")[0]) in ("seed", "output"):
            raise UserError(f"{override}: an ablation has its own; give --{key}{'s' * (key == 'seed')}")
    names = [axis.name for axis in axes]
    if len(set(names)) < len(names):
        raise UserError(f"--axis: {max(names, key=names.count)} is given twice; give each axis once")
    fields = load_recipe(source, [*overrides, *evaluation])
    if fields.evaluation.images is None:
        raise UserError("evaluation.images: an ablation judges students on real images; give --images")
    runs = []
    for seed in range(seeds):
        for axis in axes:
            runs += _axis_runs(source, overrides, axis, len(fields.teacher.classes), seed, evaluation)
    known: dict[str, Mapping[str, str]] = {}
    return [replace(run, files=_files(run.recipe, known)) for run in runs]


def _files(recipe: Recipe, known: dict[str, Mapping[str, str]]) -> Mapping[str, str]:
    """Digests of the recipe's files, each set of files read once."""
    networks = recipe.model_dump_json(include={"prior", "teacher", "student", "guidance"})
    if networks not in known:
        known[networks] = file_digests(recipe, prior=True)
    return known[networks]


def _axis_runs(
    source: str, overrides: Sequence[str], axis: Axis, classes: int, seed: int, evaluation: Sequence[str]
) -> list[Run]:
    runs = []
    for name, variant in axis.variants.items():
        # Fresh draws are as many as the steps take.
        images = (None,) if variant.images == "floor" else axis.grid.images or (None,)
        for count in images:
            for steps in axis.grid.steps or (None,):
                given = [*overrides, *axis.base, *variant.overrides, f"seed={seed}", *evaluation]
                if count is not None:
                    given.append(f"synthesis.images_per_class={_per_class(count, classes, axis)}")
                if steps is not None:
                    given.append(f"distillation.steps={steps}")
                try:
                    recipe = settle_machine(load_recipe(source, given))
                except UserError as error:
                    raise UserError(f"--axis: {axis.name}: variant {name}: {error}") from error
                runs.append(Run(axis.name, name, seed, variant.images, recipe))
    return runs


def _per_class(images: int, classes: int, axis: Axis) -> int:
    if images % classes:
        raise UserError(
            f"--axis: {axis.name}: grid.images: {images} cannot be dealt out to {classes} classes; take a multiple"
        )
    return images // classes


def plan_stores(runs: Sequence[Run]) -> dict[str, Store]:
    """The store of each run of synthetic images, by the run's digest."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.source == "synthetic":
            groups.setdefault(digest_of(_choices(run)), []).append(run)
    stores: dict[str, Store] = {}
    for digest, members in groups.items():
        largest = max(members, key=lambda run: run.images)
        stores |= {run.digest: Store(digest, largest.recipe) for run in members}
    return stores


def shared_shards(store: Recipe, recipe: Recipe) -> list[int]:
    """Shards of the first round that are the same in both; a last one that is not full is in its own number alone."""
    there = {shard.index: shard.samples for shard in shard_plan(store, 0)}
    return [shard.index for shard in shard_plan(recipe, 0) if there.get(shard.index) == shard.samples]


def _choices(run: Run) -> dict[str, Any]:
    """What the first round depends on, and where its networks lie."""
    recipe, content = run.recipe, dump_recipe(run.recipe)
    for section in NOT_SYNTHESIS:
        content.pop(section)
    if recipe.rounds == 1:
        content["synthesis"].pop("images_per_class")
    return content | {"files": {name: digest for name, digest in run.files.items() if name != "student"}}


def digest_of(content: Any) -> str:
    """Short name of JSON-ready content."""
    return hashlib.sha256(canonical_json(content)).hexdigest()[:16]
