"""Engines ahead of time: all that a recipe's run would build, made and kept before it, and where they may run.

diffdfkd build my-recipe.yaml engine=tensorrt-rtx engine.capabilities=[SM86,SM89]
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.recipe import Recipe

if TYPE_CHECKING:
    from diffdfkd.engine.backends.entry import Entry


def build(recipe: Recipe, *, progress: bool = True) -> str:
    """Build the engines that the recipe names, or find them in the cache; a line about each.

    Engines for named compute capabilities need no GPU and are proven where they first run. Raises UserError for a
    recipe that names none, and for an engine that cannot be had.
    """
    named = {stage: getattr(recipe.engine, stage) for stage in ("unet", "chain")}
    if set(named.values()) <= {"auto", "eager"}:
        raise UserError("engine: nothing is built ahead for auto or eager; name one, such as engine=tensorrt-rtx")
    from diffdfkd.engine.backends.serve import backend_of
    from diffdfkd.engine.classifier import build_classifier
    from diffdfkd.engine.memory import fitting
    from diffdfkd.engine.painter import SMALLER, refuse_batch
    from diffdfkd.recipes.engines import wanted
    from diffdfkd.recipes.launch import settle_machine
    from diffdfkd.recipes.run import load_prior_for, use_device

    recipe = settle_machine(recipe)
    use_device(recipe)
    teacher = build_classifier(recipe.teacher, recipe.teacher, field="teacher").to(recipe.device)
    prior = load_prior_for(recipe, teacher)
    refuse_batch(prior, recipe.synthesis.batch_size)
    lines = []
    for stage, subject in wanted(recipe, prior, teacher):
        backend = backend_of(recipe, stage)
        with fitting("synthesis.batch_size", f"a batch of {subject.images.usual:,} images", SMALLER):
            entry = _build_one(subject, stage, backend, progress)
        lines += _lines(stage, subject.student is not None, entry)
    return "\n".join(lines)


def _build_one(subject: Any, stage: str, backend: str, progress: bool) -> "Entry":
    from tqdm import tqdm

    from diffdfkd.engine.backends.build import exported, prepare
    from diffdfkd.engine.backends.serve import cannot_be_had, run_settings
    from diffdfkd.engine.runner import NoEngine

    # None: only where somebody looks on.
    hidden = None if progress else True
    with tqdm(total=100, desc=f"{backend}: {stage}", unit="%", disable=hidden, leave=False) as bar:

        def tell(phase: str, fraction: float) -> None:
            bar.set_postfix_str(phase[:40], refresh=False)
            bar.update(max(0.0, 100 * fraction - bar.n))

        settings = replace(run_settings(subject.recipe), progress=_never_falling(tell))
        try:
            made, entry = prepare(subject.make(stage), backend, subject.precision, settings)  # type: ignore[arg-type]
            if backend in ("onnxruntime", "openvino"):
                exported(made, settings)  # what a run will open, which may have come to harm since
        except NoEngine as reason:
            raise cannot_be_had(stage, backend, subject.precision, reason) from None
    return entry


def _never_falling(tell: Callable[[str, float], None]) -> Callable[[str, float], None]:
    return lambda phase, fraction: tell(phase, min(1.0, max(0.0, fraction)))


def _lines(stage: str, student: bool, entry: "Entry") -> list[str]:
    from diffdfkd.engine.backends.build import PLAN

    details = entry.details
    what = f"{stage}{' with the student' if student else ''}: {entry.kind}, {details.get('precision', '')}".rstrip(", ")
    how = f"built in {details['seconds']:.0f} s" if entry.made else "was there already"
    parity = details.get("parity")
    if parity is None:
        proof = "not compared with eager yet: that is done where it first runs"
    else:
        proof = f"differs from eager by {parity['relative']:.1e}"
        if parity.get("gradient") is not None:
            proof += f", its gradient by {parity['gradient']:.1e} (cosine {parity['cosine']:.6f})"
    where = details.get("runs_on", "this machine")
    size = sum((entry.folder / name).stat().st_size for name in entry.files)
    file = entry.folder / PLAN if PLAN in entry.files else entry.folder
    return [f"{what}: {how}, {size / 2**20:.1f} MiB; {proof}", f"  runs on {where}", f"  {_short(file)}"]


def _short(path: Path) -> str:
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)
