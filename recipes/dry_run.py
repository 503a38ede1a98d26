"""The plan of a run and what is missing for it, before anything is made: ``diffdfkd run RECIPE --dry-run``."""

import operator
import os
import textwrap
from collections.abc import Iterator
from pathlib import Path

from diffdfkd.engine.calls import mending_rows, rows_by_step
from diffdfkd.engine.cheap_steps import light_steps, whole_steps
from diffdfkd.engine.combinations import fork_step, guided_runs, guided_steps, round_samples, step_runs
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.recipe import Recipe
from diffdfkd.recipes.inventory import Item, prior_folder, take_stock

WIDTH = 100


def dry_run(recipe: Recipe) -> tuple[str, bool]:
    """(text, whether nothing is missing): what is known of the recipe, what there is, what is missing, and the plan.

    Writes and fetches nothing; networks are built and weights loaded on the CPU only. Raises UserError for what is
    there and wrong, as the run itself would.
    """
    items = list(take_stock(recipe))
    device, problem = _machine(recipe)
    if problem:
        items.append(Item("device", None, problem, verdict="REFUSED"))
    disk, fits = _disk(recipe)
    lines = [*_about(recipe), *_stock(items), *_plan(recipe, device), _entry("disk", disk), ""]
    missing = [item for item in items if item.found is None]
    for verdict in dict.fromkeys(item.verdict for item in missing):
        names = ", ".join(item.name for item in missing if item.verdict == verdict)
        lines.append(_entry(verdict, f"{names}; nothing was made or fetched"))
    if not missing:
        doubt = "" if fits else ", but the disk may be too small"
        lines.append(_entry("ready", f"nothing is missing{doubt}; the same command without --dry-run starts the run"))
    return "\n".join(lines), not missing


def _about(recipe: Recipe) -> Iterator[str]:
    about = recipe.about.model_dump(exclude={"prior", "teacher", "images"}, exclude_none=True)
    for name, text in about.items():
        yield _entry(name, text)
    if about:
        yield ""


def _stock(items: list[Item]) -> Iterator[str]:
    for item in items:
        yield _entry(item.name, item.found if item.found is not None else f"{item.verdict}: {item.missing}")
        if item.command is not None:
            # Never wrapped, since it is there to be copied.
            yield f"{'':20}{item.command}"
    yield ""


def _machine(recipe: Recipe) -> tuple[str, str | None]:
    """The device, threads and kernels that a run would take, in words, and what keeps it from doing so."""
    from diffdfkd.recipes.launch import settle_machine
    from diffdfkd.recipes.run_folder import begun

    try:
        before = begun(Path(recipe.output))
    except UserError:
        before = None  # what is wrong with the folder stands above
    try:
        settled = settle_machine(recipe, before)
    except UserError as error:
        return recipe.device, str(error)
    note = ""
    if settled.device == "cpu" and recipe.prior.dtype == "float16":
        note = "; prior.dtype=float32 is the faster and safer arithmetic on a CPU"
    threads = f"{settled.threads} CPU thread{'s' if settled.threads != 1 else ''}"
    kernels = {"triton": "Triton kernels", "reference": "reference kernels"}[settled.kernel]
    return f"{settled.device}, {threads}, {kernels}{note}", None


def _plan(recipe: Recipe, device: str) -> Iterator[str]:
    from diffdfkd.engine.logits import uses_cache
    from diffdfkd.engine.plan import block_size, shard_plan
    from diffdfkd.engine.reference import reference_count

    synthesis, distillation = recipe.synthesis, recipe.distillation
    images = sum(round_samples(recipe, round) for round in range(recipe.rounds))
    shards = [plan for round in range(recipe.rounds) for plan in shard_plan(recipe, round)]
    batches = sum(-(-plan.samples // block_size(recipe)) for plan in shards)
    forks = f" trajectories, {synthesis.fan_out} images each" if synthesis.fan_out > 1 else ""
    yield _entry("device", device)
    yield _entry(
        "images",
        f"{images:,} of {len(recipe.teacher.classes)} classes, {synthesis.images_per_class:,} each, in "
        f"{_many(recipe.rounds, 'round')}, {_many(len(shards), 'shard')}, {_many(batches, 'batch')} of at most "
        f"{synthesis.batch_size}{forks}",
    )
    if beside := reference_count(recipe):
        yield _entry("comparison", f"{beside:,} unguided images more, which diversity is judged beside; none is stored")
    yield _entry("prompts", _prompts(recipe))
    yield _entry("UNet", _unet(recipe, images))
    yield _entry("guidance", _guidance(recipe, images))
    epochs = distillation.steps * distillation.batch_size / images
    cached, reason = uses_cache(distillation, images)
    maps = {"class activation maps": distillation.cam_weight, "Grad-CAMs": distillation.sarc_weight}
    losses = "".join(f" and {name} by {weight:g}" for name, weight in maps.items() if weight > 0)
    yield _entry(
        "distillation",
        f"{distillation.steps:,} steps of {distillation.batch_size}, {epochs:,.1f} times through all images; "
        f"{distillation.optimizer}, learning rate {distillation.learning_rate:g}, temperature "
        f"{distillation.temperature:g}{losses}; the teacher's answers are {'kept' if cached else 'computed'}: {reason}",
    )
    if recipe.selection.acts(recipe.rounds > 1):
        given = recipe.selection.model_dump(mode="json", exclude_defaults=True)
        fields = ", ".join(f"{name} {value}" for name, value in given.items())
        yield _entry("selection", f"of these images by {fields}; how many are left is known once they are made")


def _prompts(recipe: Recipe) -> str:
    """Of the first class and how many there are: whether words and prompt read well is seen at a glance."""
    from diffdfkd.engine.prompts import prompts_by_class

    prompts = prompts_by_class(recipe)
    first, more = prompts[0][0], len(prompts[0]) - 1
    or_more = f" or {_others(more)}, drawn for each sample," if more else ""
    others = len({prompt for own in prompts for prompt in own}) - len(prompts[0])
    if not others:
        apart = "guidance alone tells" if recipe.guidance.mode != "none" else "nothing tells"
        return f'"{first}"{or_more} for all {len(prompts):,} classes, which {apart} apart'
    return f'"{first}"{or_more} for {recipe.teacher.classes[0]}, and {_others(others)}'


def _others(count: int) -> str:
    return f"{count:,} other{'s' if count > 1 else ''}"


def _unet(recipe: Recipe, images: int) -> str:
    """Evaluations of the UNet, counted per image: a batch of classifier-free guidance is two for each.

    With fan-out per trajectory, which is several images.
    """
    from diffdfkd.engine.cutmix import mixed_steps

    synthesis, guidance = recipe.synthesis, recipe.guidance
    fan_out, fork = synthesis.fan_out, fork_step(synthesis)
    guided, runs = guided_steps(guidance, synthesis.steps), step_runs(synthesis)
    rows = rows_by_step(recipe, doubled=not _knows_scale(recipe))
    calls = [run * count for run, count in zip(runs, rows, strict=True)]
    again = [run for run, steers in zip(runs, guided, strict=True) if steers and guidance.mode == "exact"]
    mixed = set(mixed_steps(recipe.cutmix, synthesis.steps)) | ({fork - 1} if fan_out > 1 else set())
    whole = whole_steps(
        synthesis.reuse_every,
        [count == 2 for count in rows],
        [step in mixed for step in range(synthesis.steps)],
    )
    backwards = sum(count for count, steers in zip(calls, guided, strict=True) if steers)
    mending, seconds = mending_rows(recipe, rows), backwards if again else 0
    count = sum(count for count, all_of_it in zip(calls, whole, strict=True) if all_of_it) + seconds + mending
    terms = [f"{synthesis.steps} steps of {synthesis.sampler}"]
    if fan_out > 1:
        terms[0] += f" ({fork} for all {fan_out} images of a trajectory, {synthesis.steps - fork} for each of them)"
    if mending:
        terms.append(f"up to {mending} to mend seams (cutmix.repair=masked)")
    if again:
        terms.append(f"{sum(again)} second calls (guidance.mode=exact)")
    twice = rows.count(2)
    where = "each" if twice == len(rows) else f"{twice} of them"
    halves = f", {where} twice for classifier-free guidance {synthesis.guidance_scale:g}" if twice else ""
    shallow = f", {whole.count(False)} steps with the outermost blocks alone" if not all(whole) else ""
    backward = ""
    if guidance.mode in ("exact", "reuse"):
        whose = "an image" if fan_out == 1 else "a trajectory"
        backward = f"; {backwards} of {whose}'s calls with a backward pass"
    each = "an image" if fan_out == 1 else f"for {fan_out} images"
    return (
        f"{' and '.join(terms)}{halves}{shallow}: {count} calls {each}, {count * images // fan_out:,} in all{backward}"
    )


def _knows_scale(recipe: Recipe) -> bool:
    """Whether the UNet is told the guidance scale, and so needs no second half."""
    from diffdfkd.engine.prior_files import read_json

    folder = prior_folder(recipe)
    try:
        return folder is not None and bool(read_json(folder / "unet" / "config.json").get("time_cond_proj_dim"))
    except UserError:
        return False  # what is wrong with the file stands above


def _guidance(recipe: Recipe, images: int) -> str:
    guidance, steps = recipe.guidance, recipe.synthesis.steps
    if guidance.mode == "none":
        return "none"
    gradients = guided_runs(recipe) * images // recipe.synthesis.fan_out
    guided = sum(guided_steps(guidance, steps))
    weights = {
        "class": guidance.class_weight,
        "BatchNorm": guidance.batchnorm_weight,
        "adversarial": guidance.adversarial_weight,
    }
    terms = ", ".join(f"{name} {weight:g}" for name, weight in weights.items() if weight > 0)
    mix = recipe.cutmix
    mixed = f"; latent CutMix every {_many(mix.every, 'step')} ({mix.partner})" if mix.every else ""
    if guidance.micro_batch is not None:
        mixed += f"; in micro-batches of {guidance.micro_batch}, with one more forward each for L_bn of the whole batch"
    return (
        f"{guidance.mode}, {guided} of {steps} steps, each a gradient through {_decoders(recipe)} and teacher: "
        f"{gradients:,} in all; {terms}; rho {guidance.rho:g} {guidance.rho_rule}{mixed}"
    )


def _decoders(recipe: Recipe) -> str:
    """What guidance decodes with."""
    guidance, steps = recipe.guidance, recipe.synthesis.steps
    light = sum(map(operator.and_, guided_steps(guidance, steps), light_steps(guidance, steps)))
    if not light:
        return "decoder"
    others = sum(guided_steps(guidance, steps)) - light
    return "the light decoder" if not others else f"decoder ({light} times the light one)"


def _disk(recipe: Recipe) -> tuple[str, bool]:
    """(Files and, from above, bytes, in words; whether they fit).

    An image counts as its raw pixels, two tar headers and its record.
    """
    from diffdfkd.engine.classifier import build_model
    from diffdfkd.engine.logits import uses_cache
    from diffdfkd.engine.painter import saved_size
    from diffdfkd.engine.plan import shard_plan

    images = sum(round_samples(recipe, round) for round in range(recipe.rounds))
    shards = sum(len(shard_plan(recipe, round)) for round in range(recipe.rounds))
    pixels = saved_size(recipe) ** 2 * recipe.teacher.channels
    kept = uses_cache(recipe.distillation, images)[0] or recipe.selection.acts(recipe.rounds > 1)
    answers = images * len(recipe.teacher.classes) * 4 if kept else 0
    synthetic = images * (pixels + 3072) + shards * 16_384 + answers
    chosen, classes = recipe.student, len(recipe.teacher.classes)
    student = build_model(chosen.architecture, chosen.options, recipe.teacher.channels, classes, field="student")
    weights = 4 * sum(tensor.numel() for tensor in student.state_dict().values())
    moments = 2 if recipe.distillation.optimizer == "adamw" else 1
    # Snapshots, student and ONNX file; two checkpoints and the one that replaces the older; then what has no weights.
    training = weights * (recipe.rounds + 2) + 3 * weights * (2 + moments) + 250_000
    total = synthetic + training
    folder = Path(recipe.output).absolute()
    there = next(place for place in (folder, *folder.parents) if place.exists())
    status = os.statvfs(there)
    free = status.f_bavail * status.f_frsize
    short = "" if free > total else ", which may be TOO LITTLE"
    text = (
        f"at most about {_size(synthetic)} of images in {shards:,} .tar and {shards:,} .json, {_size(training)} of "
        f"students and checkpoints, and a few MB of report and curves; {_size(free)} free{short}"
    )
    return text, free > total


def _many(count: int, word: str) -> str:
    plural = f"{word}es" if word.endswith("ch") else f"{word}s"
    return f"{count:,} {word if count == 1 else plural}"


def _size(size: float) -> str:
    scale, unit = next(((10**n, unit) for n, unit in ((9, "GB"), (6, "MB")) if size >= 10**n), (1000, "kB"))
    return f"{size / scale:,.1f} {unit}"


def _entry(name: str, text: str) -> str:
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=f"{name:<19} ",
        subsequent_indent=" " * 20,
        break_on_hyphens=False,
        break_long_words=False,
    )
