"""Teachers and students: any classifier, with the preprocessing of the teacher's domain."""

import copy
import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffdfkd.engine.architectures import ARCHITECTURES
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.memory import fitting, ran_out
from diffdfkd.engine.programs import READERS, Program, load_program
from diffdfkd.engine.recipe import ClassifierRecipe, StudentRecipe, TeacherRecipe
from diffdfkd.engine.weight_selection import select_weights
from diffdfkd.engine.weights import load_weights

FACTORY = re.compile(r"[^\s.:/\\]+(\.[^\s.:/\\]+)*:[^\s.:]+")

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in grey: ITU-R BT.601, as in PIL and torchvision."""


@dataclass(frozen=True)
class Preprocessing:
    """From images [B,c,H,W] in [0, 1] to a classifier's input [B,channels,size,size]; differentiable."""

    channels: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    channel_order: str = "rgb"
    """``bgr``: the classifier's first channel is blue; ``mean`` and ``std`` are in its order."""

    def __call__(self, images: Tensor) -> Tensor:
        images = self.fit(images)
        # Plain numbers and no tensor made from them: nothing is copied to the device, and the graph stays flat.
        if len(self.mean) == len(self.std) == 1 and self.channel_order == "rgb":
            return (images - self.mean[0]) / self.std[0]
        means = self.mean if len(self.mean) > 1 else self.mean * self.channels
        stds = self.std if len(self.std) > 1 else self.std * self.channels
        planes = zip(self._ordered(images), means, stds, strict=True)
        return torch.cat([(plane - mean) / std for plane, mean, std in planes], dim=1)

    def _ordered(self, images: Tensor) -> tuple[Tensor, ...]:
        planes = images.split(1, dim=1)
        return planes[::-1] if self.channel_order == "bgr" else planes

    def fit(self, images: Tensor) -> Tensor:
        """Channels and size only, still RGB in [0, 1] (bicubic may overshoot): resized as torchvision does."""
        images = convert_channels(images, self.channels)
        if images.shape[-2:] == (self.size, self.size):
            return images
        if self.interpolation == "nearest":
            return functional.interpolate(images, size=(self.size, self.size), mode="nearest")
        return functional.interpolate(
            images, size=(self.size, self.size), mode=self.interpolation, align_corners=False, antialias=True
        )


def convert_channels(images: Tensor, channels: int) -> Tensor:
    """Float images [B,c,H,W] with 1 or 3 channels: grey is replicated, colour becomes luma."""
    if images.shape[1] == channels:
        return images
    if images.shape[1] == 1:
        return images.expand(-1, channels, -1, -1)
    red, green, blue = images.split(1, dim=1)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


class Classifier(nn.Module):
    """A network with its preprocessing and class names; images [B,c,H,W] in [0, 1] to logits [B,K]."""

    def __init__(self, model: nn.Module, preprocessing: Preprocessing, classes: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.preprocessing = preprocessing
        self.classes = list(classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(self.preprocessing(images))


def build_classifier(
    recipe: ClassifierRecipe,
    teacher: TeacherRecipe,
    *,
    field: Literal["teacher", "student"],
    seed: int | None = None,
    trained: Classifier | None = None,
) -> Classifier:
    """The recipe's teacher (weights required, frozen, eval mode) or student (trainable, train mode) on the CPU.

    The student has the teacher's classes and preprocessing; its initial weights depend on `seed` alone, or are
    those of `recipe.weights`, or those selected from the teacher's (`initialization`; only with a seed, since a student
    without one exists already), which is `trained` or is built for it. The global random state is left as it was.
    """
    if field == "teacher" and recipe.weights is None:
        raise UserError("teacher.weights: missing; name the file with the trained teacher's state dict")
    preprocessing = Preprocessing(
        teacher.channels,
        teacher.size,
        tuple(teacher.mean),
        tuple(teacher.std),
        teacher.interpolation,
        teacher.channel_order,
    )
    smaller = fitting(f"{field}.architecture", f"the {field}", f"take a smaller one, or smaller {field}.options")
    with torch.random.fork_rng(devices=[]), smaller:
        if seed is not None:
            torch.manual_seed(seed)
        if recipe.architecture in READERS and field == "teacher" and recipe.weights is not None:
            if recipe.options:
                raise UserError(f"teacher.options: {recipe.architecture} takes none; the file is the whole program")
            model: nn.Module = load_program(
                recipe.architecture, recipe.weights, teacher.channels, teacher.size, field=field
            )
        else:
            model = build_model(
                recipe.architecture, recipe.options, teacher.channels, len(teacher.classes), field=field
            )
            if recipe.weights is not None:
                load_weights(model, recipe.weights, field=field)
        # A student without a seed is one that exists and is not trained.
        modes = (False, True) if field == "student" and seed is not None else (False,)
        for training in modes:
            check_model(model, teacher.channels, teacher.size, len(teacher.classes), field=field, training=training)
        if isinstance(recipe, StudentRecipe) and recipe.initialization == "teacher" and seed is not None:
            trained = trained or build_classifier(teacher, teacher, field="teacher")
            select_weights(model, trained.model, (teacher.channels, teacher.size, teacher.size))
    classifier = Classifier(model, preprocessing, teacher.classes)
    if isinstance(model, Program):
        return classifier.requires_grad_(False).eval()
    if field == "teacher":
        # The layout in which CPU and GPU convolutions are fastest; nothing flattens a frozen network's parameters.
        return classifier.requires_grad_(False).eval().to(memory_format=torch.channels_last)
    return classifier.requires_grad_(True).train()


def build_model(architecture: str, options: dict[str, Any], channels: int, classes: int, *, field: str) -> nn.Module:
    """Network of an architecture's name: built in, ``torchvision:``, ``timm:`` or ``package.module:factory``.

    A factory is called with the options, and with `channels` and `classes` where it takes arguments of these names.
    """
    where = f"{field}.architecture"
    source, colon, name = architecture.partition(":")
    if architecture in READERS:
        raise UserError(
            f"{where}: {architecture} is a whole program, which can teach but not be trained; name a network: built in "
            f"are {', '.join(sorted(ARCHITECTURES))}; or torchvision:<name>, timm:<name>, package.module:factory"
        )
    if not colon:
        factory = ARCHITECTURES.get(architecture)
        if factory is None:
            known = ", ".join(sorted(ARCHITECTURES))
            raise UserError(
                f"{where}: no architecture {architecture}{_near(architecture, list(ARCHITECTURES))}; built in are "
                f"{known}; or give torchvision:<name>, timm:<name> or package.module:factory"
            )
        return _call(factory, {"channels": channels, "classes": classes}, options, field)
    if source == "torchvision":
        from torchvision import models

        if name not in (names := models.list_models(module=models)):
            raise UserError(f"{where}: torchvision has no classifier {name}{_near(name, names)}")
        return _call(models.get_model_builder(name), {"weights": None, "num_classes": classes}, options, field)
    if source == "timm":
        try:
            timm: Any = importlib.import_module("timm")
        except ImportError:
            raise UserError(f"{where}: {architecture} needs timm; pip install 'diffdfkd[timm]'") from None
        if name not in (names := timm.list_models()):
            raise UserError(f"{where}: timm has no model {name}{_near(name, names)}")
        given = {"pretrained": False, "num_classes": classes, "in_chans": channels}
        return _call(lambda **settings: timm.create_model(name, **settings), given, options, field)
    return _call(_import_factory(source, name, where), {"channels": channels, "classes": classes}, options, field)


def _near(name: str, names: list[str], cutoff: float = 0.5) -> str:
    near = difflib.get_close_matches(name, names, n=3, cutoff=cutoff)
    return f" (did you mean {', '.join(near)}?)" if near else ""


def _import_factory(module: str, name: str, where: str) -> Callable[..., Any]:
    """Function of an importable module; the working folder counts as importable, as with ``python -m``."""
    if not FACTORY.fullmatch(f"{module}:{name}"):
        raise UserError(f"{where}: {module}:{name} names no function; package.module:factory is wanted")
    folder = str(Path.cwd())
    added = folder not in sys.path
    if added:
        sys.path.insert(0, folder)
    try:
        factory = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        # Not where a module of the user's own lacks something.
        itself = isinstance(error, ModuleNotFoundError) and error.name == module
        near = _near(module, ["torchvision", "timm"], cutoff=0.8) if itself else ""
        raise UserError(f"{where}: cannot import {module}{near} ({error}); install it, or run where it lies") from None
    finally:
        if added:
            sys.path.remove(folder)
    if not callable(factory):
        raise UserError(f"{where}: {module} has no function {name}")
    return factory


def _call(factory: Callable[..., Any], given: dict[str, Any], options: dict[str, Any], field: str) -> nn.Module:
    """What the factory makes of the options and of those of our arguments that it takes."""
    parameters = inspect.signature(factory).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        given = {name: value for name, value in given.items() if name in parameters}
        for name in options:
            if name not in parameters or name in given:
                allowed = ", ".join(known for known in parameters if known not in given) or "none"
                raise UserError(f"{field}.options.{name}: unknown option; allowed: {allowed}")
    for name in options:
        # Such as weights=DEFAULT, which would fetch them behind the recipe's back.
        if name in given:
            raise UserError(
                f"{field}.options.{name}: teacher.channels, teacher.classes and {field}.weights decide it; leave it out"
            )
    try:
        model = factory(**{**given, **options})
    except UserError as error:
        raise UserError(f"{field}.{error}") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{field}.options: the architecture refuses {options}: {error}") from error
    except Exception as error:  # a factory is the user's own code, and may raise anything
        if ran_out(error):
            raise
        raise UserError(
            f"{field}.architecture: {factory.__module__}:{factory.__name__} raised {type(error).__name__}: {error}; "
            "--debug shows where"
        ) from error
    if not isinstance(model, nn.Module):
        raise UserError(f"{field}.architecture: the factory returned {type(model).__name__}, not a torch.nn.Module")
    return uncompiled(model)


def uncompiled(model: nn.Module) -> nn.Module:
    """The module without torch.compile, at any depth: compiled code has no place for BatchNorm taps."""
    # By its attribute, since the class lives in a package that takes a second to import.
    inner = model.__dict__.get("_modules", {}).get("_orig_mod")
    if inner is not None:
        return uncompiled(inner)
    if not isinstance(model, torch.jit.ScriptModule):
        for name, child in model.named_children():
            if (plain := uncompiled(child)) is not child:
                setattr(model, name, plain)
        if model._compiled_call_impl is not None:  # by module.compile()
            model._compiled_call_impl = None
    return model


def check_model(
    model: nn.Module, channels: int, size: int, classes: int, *, field: str, training: bool = False
) -> None:
    """One forward of two black images; raises UserError unless the result is logits [2,classes].

    In eval mode, or in train mode where some networks answer otherwise. The model is left as it was.
    """
    first = next((layer for layer in model.modules() if isinstance(layer, nn.Conv2d)), None)
    if first is not None and first.in_channels != channels:
        raise UserError(
            f"{field}.architecture: takes {first.in_channels} channel(s), but teacher.channels is {channels}; "
            f"set teacher.channels={first.in_channels} (grey images are replicated, colour becomes luma)"
        )
    before, mode = model.training, " in train mode" if training else ""
    try:
        # A forward in train mode moves BatchNorm's statistics.
        probe = copy.deepcopy(model).train() if training else model.eval()
        with torch.no_grad():
            logits = probe(torch.zeros(2, channels, size, size))
    except (RuntimeError, ValueError) as error:
        if ran_out(error):
            raise
        problem = str(error).splitlines()[0]
        raise UserError(
            f"{field}.architecture: fails on a {channels}x{size}x{size} image{mode}: {problem}; take another "
            "architecture or teacher.size"
        ) from error
    finally:
        model.train(before)
    if not isinstance(logits, Tensor):
        raise UserError(
            f"{field}.architecture: gives {type(logits).__name__}{mode}, not logits; build it without auxiliary "
            f"heads, as by {field}.options={{aux_logits: false}}, or wrap it in a factory that returns logits"
        )
    if logits.shape != (2, classes):
        raise UserError(
            f"{field}.architecture: gives {list(logits.shape)} for 2 images{mode}, but teacher.classes names "
            f"{classes} classes; logits [2, {classes}] are wanted"
        )
