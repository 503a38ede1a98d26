"""The command line ``diffdfkd``: thin, fast to start, one line for a mistake.

Exit codes: 0 done, 1 an unexpected error, 2 bad input, 3 a check or a dry run found something to mend, 130 interrupted.
docs/errors.md says more.
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from diffdfkd.engine.errors import CURES, UserError
from diffdfkd.engine.recipe import load_recipe
from diffdfkd.recipes.command import complain

HELP = """Distil a classifier into a smaller student without a single real image.

A recipe names a diffusion prior, a teacher and a student. The prior, steered by the teacher, makes images;
the student learns from the teacher on those images alone; real images are read by evaluation only.

\b
  diffdfkd run fashion                      the demo, end to end, on a CPU
  diffdfkd run fashion output=runs/a seed=1 synthesis.steps=20
  diffdfkd check my-recipe.yaml             your own teacher and prior: do they understand each other?
  diffdfkd preview my-recipe.yaml           a few images, guided and unguided, with their numbers
  diffdfkd run my-recipe.yaml --dry-run     what would be done, and what is missing
  diffdfkd run my-recipe.yaml

A recipe is a packaged name or a YAML file. Any field of it can be overridden by key=value, where the value is
YAML: guidance.mode=none, guidance.window=[0,0.8], evaluation.images=null.

Every command can be killed and continued by typing it again.
"""

FOUND = 3
"""Exit code of a check, or a dry run, that found something to mend."""

app = typer.Typer(
    help=HELP, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=True
)

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="Name of a packaged recipe, or a YAML file.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Fields of the recipe, such as output=runs/a seed=1."),
]


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"diffdfkd {version('diffdfkd')}")
        raise typer.Exit()


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of every error, and warnings.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Options of all commands; both are acted on before this is called."""


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and what is missing; nothing is made or fetched.")
    ] = False,
) -> None:
    """Everything, from images to report.

    \b
      diffdfkd run fashion output=runs/fashion seed=0
      diffdfkd run fashion output=runs/small synthesis.images_per_class=20 distillation.steps=100
      diffdfkd run fashion output=runs/unguided guidance.mode=none

    \b
    Leaves in the output folder:
      result.json                 accuracies as fractions, times in seconds, versions
      report.html                 one page with pictures and curves; needs no network
      synthetic/round-*/*.tar     the images as WebDataset shards, manifest.jsonl beside them
      student/student.safetensors the student; a snapshot after each round beside it
      student/student.onnx        the same for other runtimes, preprocessing inside; README.md is its model card
      recipe.yaml                 every setting spelled out, with versions and digests
      metrics.jsonl, tensorboard/ what was measured on the way

    Killed at any moment, the same command continues and ends with the same student. A folder that holds a run
    of another recipe is refused; evaluation.* may differ, and with rounds=1 synthesis.images_per_class may grow
    and, until there is a student, distillation.* change (training then begins again, and what it replaces is
    kept under superseded/).
    """
    resolved = load_recipe(recipe, overrides or ())
    if dry_run:
        from diffdfkd.recipes.dry_run import dry_run as plan

        text, complete = plan(resolved)
        typer.echo(text)
        raise typer.Exit(0 if complete else FOUND)
    from diffdfkd.recipes.figures import summary
    from diffdfkd.recipes.run import run as run_recipe

    typer.echo(summary(run_recipe(resolved), Path(resolved.output)))


@app.command()
def check(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    json: Annotated[Path | None, typer.Option(help="File to write the figures to.")] = None,
) -> None:
    """Whether teacher, preprocessing, class order and prior understand each other, before anything is made.

    \b
      diffdfkd check my-recipe.yaml
      diffdfkd check my-recipe.yaml teacher.channel_order=bgr

    Draws a few unguided images of each class and shows what the teacher takes them for, and how far their
    statistics are from those that its BatchNorm layers remember, layer by layer; then the same with other channel
    orders, value ranges, normalisations and class orders, and says where one of them fits better. Exit code 3 if so.
    Nothing is written but --json.
    """
    resolved = load_recipe(recipe, overrides or ())
    from diffdfkd.recipes.check import check as check_recipe

    text, sound = check_recipe(resolved, json_file=json)
    typer.echo(text)
    raise typer.Exit(0 if sound else FOUND)


@app.command()
def preview(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    to: Annotated[Path | None, typer.Option(help="Folder to write to; <output>-preview by default.")] = None,
) -> None:
    """One small batch, guided and unguided, as a picture and in numbers; a minute for the demo.

    \b
      diffdfkd preview fashion
      diffdfkd preview my-recipe.yaml guidance.rho=0.4 --to previews/rho-0.4

    Writes preview.png and preview.json and prints the numbers: the BatchNorm loss by layer and the teacher's
    confidence by class, without and with guidance, and the alarms that a run would give.
    """
    resolved = load_recipe(recipe, overrides or ())
    from diffdfkd.recipes.preview import preview as preview_recipe

    typer.echo(preview_recipe(resolved, to))


@app.command()
def synthesize(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Only the images of the first round.

    \b
      diffdfkd synthesize fashion output=runs/images synthesis.images_per_class=50

    Writes output/synthetic/round-000/shard-*.tar (images with .json records: class, seed, losses, CutMix
    parents) and output/synthetic/manifest.jsonl. With rounds=1 these are all the images. With more, the later
    rounds need a student: `diffdfkd run` makes them, and continues from these.
    """
    resolved = load_recipe(recipe, overrides or ())
    from diffdfkd.recipes.synthesize import synthesize as synthesize_recipe

    typer.echo(synthesize_recipe(resolved))


@app.command()
def distill(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    images: Annotated[
        Path | None,
        typer.Option(help="A folder of images, sub-folders included, or of WebDataset .tar shards; one .tar; a run."),
    ] = None,
) -> None:
    """Only the student, from images that exist.

    \b
      diffdfkd distill fashion output=runs/fashion
      diffdfkd distill fashion --images ~/my-images output=runs/mine distillation.steps=3000
      torchrun --nproc-per-node 2 -m diffdfkd.recipes.cli distill fashion output=runs/two
      deepspeed --num_gpus 2 --module diffdfkd.recipes.cli distill fashion output=runs/two

    Without --images the shards in output/synthetic are taken: give the same key=value as synthesize. Labels are
    not used, of whatever form: the teacher's soft labels are. On a CPU --num_gpus is the number of processes.
    Writes output/student/student.safetensors, result.json and report.html; continues from its checkpoints.
    """
    resolved = load_recipe(recipe, overrides or ())
    from diffdfkd.recipes.distill import distill as distill_recipe
    from diffdfkd.recipes.figures import summary

    result = distill_recipe(resolved, images)
    if result is not None:
        typer.echo(summary(result, Path(resolved.output)))


@app.command()
def evaluate(
    recipe: RecipeArgument,
    student: Annotated[Path, typer.Option(help="Weights of the student, .safetensors.", show_default=False)],
    overrides: Overrides = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Folder with one sub-folder a class, or an IDX file; the recipe's test images by default."),
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="IDX labels, if not beside the images.")] = None,
    json: Annotated[Path | None, typer.Option(help="File to write the figures to.")] = None,
) -> None:
    """Only the figures: accuracy of a student file on real images.

    \b
      diffdfkd evaluate fashion --student runs/fashion/student/student.safetensors --json figures.json
      diffdfkd evaluate fashion --student s.safetensors --images my-test-images/ --json figures.json
      diffdfkd evaluate fashion --student s.safetensors --images t10k-images-idx3-ubyte.gz --json figures.json

    Sub-folders are named like the teacher's classes, or numbered from 0 in their order; what lies deeper belongs
    to the class folder above it. CIFAR, MNIST and its kin, Tiny ImageNet, DomainNet (with its list as --labels) and
    ImageNet's val are read as they are unpacked. Writes accuracy, accuracy_interval (95 %), per_class, images,
    calibration_error and, where the recipe names teacher weights, teacher_accuracy and agreement; all but the counts
    are fractions.
    """
    resolved = load_recipe(recipe, overrides or ())
    from diffdfkd.recipes.evaluate import evaluate as evaluate_recipe
    from diffdfkd.recipes.evaluate import summary

    typer.echo(summary(evaluate_recipe(resolved, student, images=images, labels=labels, json_file=json)))


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a run.", show_default=False)],
) -> None:
    """Write DIR/report.html again from what lies in a run's folder.

    \b
      diffdfkd report runs/fashion

    Works on a run that is still going on, too: sections without data yet are left out.
    """
    from diffdfkd.engine.report import write_report

    typer.echo(f"wrote {write_report(folder)}")


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(metavar="SOURCE", help="A run, a folder of shards, or a tar.", show_default=False),
    ],
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder to make, one sub-folder a class.", show_default=False)
    ],
    format: Annotated[str, typer.Option(help="png, webp or jpeg.")] = "png",
    size: Annotated[int | None, typer.Option(help="Height and width in pixels; as they are by default.")] = None,
) -> None:
    """Shards to a plain folder of images, one sub-folder a class, as torchvision's ImageFolder reads it.

    \b
      diffdfkd convert runs/fashion my-images/
      diffdfkd convert runs/fashion my-images/ --format webp --size 64
    """
    from diffdfkd.recipes.convert import convert as convert_shards

    typer.echo(convert_shards(source, folder, format=format, size=size))


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a run.", show_default=False)],
) -> None:
    """Write DIR/student/student.onnx, checked against the network, and the model card again.

    \b
      diffdfkd export runs/fashion
    """
    from diffdfkd.recipes.export import export as export_student

    typer.echo(export_student(folder))


@app.command()
def build(
    recipe: RecipeArgument,
    overrides: Overrides = None,
) -> None:
    """Make the recipe's engines before its run, and say where they may run.

    \b
      diffdfkd build throughput_cifar10 engine=tensorrt-rtx engine.capabilities=[SM86,SM89]
      diffdfkd build throughput_fashion

    TensorRT-RTX engines for named compute capabilities are built without a GPU. All engines go to the user's own
    cache (engine.cache), where a run with the same recipe finds them.
    """
    resolved = load_recipe(recipe, overrides or ())
    from diffdfkd.recipes.build import build as build_engines

    typer.echo(build_engines(resolved))


@app.command()
def engines(
    source: Annotated[
        str, typer.Argument(metavar="PRIOR", help="Folder of a prior, or a recipe's name or file.", show_default=False)
    ],
    overrides: Overrides = None,
    json: Annotated[Path | None, typer.Option(help="File to write the rows to.")] = None,
) -> None:
    """Every engine that this machine can run: built or found, compared with eager, timed side by side.

    \b
      diffdfkd engines fashion --json engines.json
      diffdfkd engines ~/priors/my-prior synthesis.batch_size=16 --json engines.json

    One row each: stage (unet, chain, vjp), engine, precision, usable, reason, parity_max_abs, parity_relative,
    cosine, calls_per_second with quantiles, build_seconds, peak_memory_mib. A prior's folder alone gets a small
    untrained teacher, so that its chain has something to compute.
    """
    from diffdfkd.benchmarks.engines import examine

    typer.echo(examine(source, overrides or [], json))


@app.command()
def decoder(
    recipe: RecipeArgument,
    output: Annotated[Path, typer.Option(help="File to write, .safetensors.", show_default=False)],
    overrides: Overrides = None,
    form: Annotated[str, typer.Option(help="convolutions, or linear: one 3x3 map from latents to pixels.")] = (
        "convolutions"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Training steps of 64 latents.")] = 3000,
    width: Annotated[int, typer.Option(min=1, max=1024, help="Channels at the latents' resolution.")] = 32,
    images: Annotated[int, typer.Option(min=1, help="Unguided trajectories to learn from.")] = 500,
    learning_rate: Annotated[float, typer.Option(min=0, help="Highest rate of the schedule.")] = 3e-3,
) -> None:
    """A light decoder for guidance, distilled from the prior's own decoder on the prior's own samples.

    \b
      diffdfkd decoder fashion --output decoder.safetensors
      diffdfkd run fashion output=runs/light guidance.decoder=decoder.safetensors

    Prints how far its images are from the full decoder's, and the cosine of the guidance gradients, early, in the
    middle and late in a trajectory. Killed, the same command continues.
    """
    resolved = load_recipe(recipe, overrides or ())
    from diffdfkd.recipes.distill_decoder import distill_decoder

    typer.echo(
        distill_decoder(
            resolved, output, form=form, steps=steps, width=width, images=images, learning_rate=learning_rate
        )
    )


@app.command()
def ablate(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    axis: Annotated[
        list[str] | None, typer.Option(help="A packaged axis, such as terms, or a YAML file; may be given again.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds, from 0 on.")] = 3,
    output: Annotated[Path, typer.Option(help="Folder of the ablation.")] = Path("runs/ablate"),
    csv: Annotated[
        Path | None, typer.Option(help="File of the table of runs, others beside it; ablation.csv in the output.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Runs at a time; with more than one each has threads=1 by default.")] = 1,
    images: Annotated[
        Path | None, typer.Option(help="Real images to judge on, such as a validation split; the recipe's by default.")
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="IDX labels, if not beside the images.")] = None,
    skip: Annotated[list[str] | None, typer.Option(help="A variant to leave out; may be given again.")] = None,
) -> None:
    """What each choice brings: variants of a recipe over seeds, with intervals.

    \b
      diffdfkd ablate fashion --axis terms --seeds 3 --jobs 2
      diffdfkd ablate fashion --axis budget --axis modes --output runs/budget --csv budget.csv
      diffdfkd ablate my-recipe.yaml --axis my-axis.yaml --images validation/

    An axis names variants by key=value, and the one that all are compared with. Variants that differ in training
    alone learn from the same images, made once. Writes a row for each run (--csv), differences paired by seed and
    test image (...-paired.csv), for axes with several budgets what an image is worth (...-worth.csv) and comparisons
    at equal cost (...-equal.csv), and ablation.html. A finished run is never repeated: docs/ablations.md.
    """
    from diffdfkd.recipes.ablate import ablate as ablate_recipe

    typer.echo(
        ablate_recipe(
            recipe,
            overrides or [],
            axis or [],
            seeds=seeds,
            output=output,
            csv=csv,
            jobs=jobs,
            images=images,
            labels=labels,
            skip=skip or (),
        )
    )


@app.command()
def doctor(
    json: Annotated[Path | None, typer.Option(help="File to write the findings to.")] = None,
) -> None:
    """What this machine offers: processor, memory, GPU, launchers, and each optional package.

    For each package: whether it is installed and usable here, why not, what it would bring, how to install it.
    """
    from diffdfkd.recipes.doctor import doctor as examine

    typer.echo(examine(json_file=json))


def main(arguments: list[str] | None = None) -> None:
    """Entry point; leaves the process with the exit code."""
    arguments = _own(sys.argv[1:] if arguments is None else arguments)
    # Taken from any place, since one types it after a command has failed.
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"] or ["--help"]
    if not debug:
        _hush()
    try:
        code = app(arguments, prog_name="diffdfkd", standalone_mode=False)
    except UserError as error:
        if debug:
            raise
        code = complain(str(error))
    except typer.TyperException as error:
        if debug or not hasattr(error, "format_message"):
            raise
        code = complain(f"{error.format_message()} (diffdfkd --help explains)")
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        if debug:
            raise
        code = _unforeseen(error)
    if code == 130:
        print("interrupted; the same command resumes", file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)


def _unforeseen(error: Exception) -> int:
    """One line for an error that nobody made ready for a user; its exit code: 1 where no input is known to be bad."""
    if isinstance(error, OSError) and error.filename is not None and error.errno in CURES:
        return complain(f"{error.filename}: {error.strerror}; {CURES[error.errno]}")
    complain(f"unexpected {type(error).__name__}: {error}"[:500] + "; run again with --debug for the traceback")
    return 1


def _own(arguments: list[str]) -> list[str]:
    """Without the ``--local_rank=N`` that the DeepSpeed launcher puts in; LOCAL_RANK in the environment says it too."""
    if "RANK" not in os.environ:
        return arguments
    own = []
    rest = iter(arguments)
    for argument in rest:
        if argument in ("--local_rank", "--local-rank"):
            next(rest, None)
        elif not argument.startswith(("--local_rank=", "--local-rank=")):
            own.append(argument)
    return own


def _hush() -> None:
    """Other packages' start-up warnings are none of the user's business; --debug shows them."""
    import logging
    import warnings

    warnings.simplefilter("ignore")
    for package in ("diffusers", "transformers", "huggingface_hub", "torch", "DeepSpeed", "deepspeed", "xformers"):
        logging.getLogger(package).setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
