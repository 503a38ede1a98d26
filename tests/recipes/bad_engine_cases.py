"""The corpus of bad inputs, continued: engines that cannot be had, and caches that cannot be used."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from bad_input_cases import Arguments, Case, Recipe, Spoil, command, given

ONNX = "engine=onnxruntime"


def cached(make: Callable[[Path], object], *overrides: str, field: bool = True) -> Spoil:
    """A run on engines whose cache, ``{folder}/cache``, was spoilt before."""

    def spoil(folder: Path, recipe: Recipe) -> Arguments:
        make(folder / "cache")
        named = [f"engine.cache={folder / 'cache'}"] if field else []
        return command(folder, recipe, *named, *overrides)

    return spoil


def file(path: Path) -> None:
    path.write_text("a file")


def open_to_all(path: Path) -> None:
    path.mkdir()
    path.chmod(0o777)


def open_within(path: Path) -> None:
    (path / "onnxruntime").mkdir(parents=True)
    path.chmod(0o700)
    (path / "onnxruntime").chmod(0o775)


def link_within(path: Path) -> None:
    path.mkdir()
    path.chmod(0o700)
    (path / "onnxruntime").symlink_to("/tmp")


MICRO = [
    Case(
        "micro-batches and reused features",
        given("guidance.micro_batch=2", "synthesis.reuse_every=2"),
        "guidance.micro_batch: got 2, but synthesis.reuse_every is 2",
        ("leave one of them out",),
    ),
    Case(
        "micro-batches on an engine",
        given("guidance.micro_batch=2", "engine.chain=onnxruntime"),
        "guidance.micro_batch: got 2, but engine.chain is onnxruntime",
        ("give engine.chain=eager",),
    ),
    Case(
        "micro-batches in another precision",
        given("guidance.micro_batch=2", "engine.precision=bfloat16"),
        "guidance.micro_batch: got 2, but engine.precision is bfloat16",
        ("give prior.dtype",),
    ),
]

CACHES = [
    Case(
        "file as cache", cached(file, ONNX), "engine.cache: {folder}/cache", ("Not a directory", "engine.cache=FOLDER")
    ),
    Case(
        "file as cache, by its variable",
        cached(file, ONNX, field=False),
        "DIFFDFKD_CACHE: {folder}/cache",
        ("Not a directory", "engine.cache=FOLDER"),
        environment=(("DIFFDFKD_CACHE", "cache"),),
    ),
    Case(
        "cache that all may write to",
        cached(open_to_all, ONNX),
        "engine.cache: {folder}/cache may be written by others (mode 777)",
        ("an engine is code that runs", "chmod go-w"),
    ),
    Case(
        "folder in the cache that a group may write to",
        cached(open_within, ONNX),
        "engine.cache: {folder}/cache/onnxruntime may be written by others (mode 775)",
        ("an engine is code that runs", "chmod go-w"),
    ),
    Case(
        "link in the cache",
        cached(link_within, ONNX),
        "engine.cache: {folder}/cache/onnxruntime is a symbolic link",
        ("delete the link",),
    ),
    Case(
        "cache without a home",
        given(ONNX, "engine.cache=~nobody-of-this-name/cache"),
        "engine.cache: no home folder is known here",
        ("without ~",),
    ),
]
ENGINES = [
    Case(
        "engine without its precision",
        given(ONNX, "engine.precision=bfloat16"),
        "engine.unet: onnxruntime cannot be had: ONNX Runtime has no bfloat16 on a CPU",
        ("give engine.precision=float32", "engine.unet=eager"),
    ),
    Case(
        "engine without its precision, for the chain alone",
        given("engine.chain=onnxruntime", "engine.unet=eager", "engine.precision=bfloat16", name="build"),
        "engine.chain: onnxruntime cannot be had: ",
        ("give engine.precision=float32", "engine.chain=eager"),
    ),
    Case(
        "nothing to build", given("engine=auto", name="build"), "engine: nothing is built ahead", ("engine=tensorrt",)
    ),
    Case("engine of no name", given("engine=tensorflow"), "engine.unet: ", ("tensorrt", "eager")),
]
if not torch.cuda.is_available():
    ENGINES += [
        Case(
            f"engine that needs a GPU, {name}",
            given(f"engine={name}"),
            f"engine.unet: {name} cannot be had: {name} ",
            ("engine.unet=eager",),
        )
        for name in ("tensorrt", "tensorrt-rtx")
    ]
if importlib.util.find_spec("tensorrt_rtx"):
    ENGINES += [
        Case(
            "capability that the engine lacks",
            given("engine=tensorrt-rtx", "engine.capabilities=[SM90]", name="build"),
            "engine.unet: tensorrt-rtx cannot be had: tensorrt-rtx cannot build for SM90",
            ("SM86", "SM89"),
        )
    ]

CASES = [*MICRO, *CACHES, *ENGINES]
