"""The recipe: one typed, validated description of a run, from YAML and ``key=value`` overrides.

Nothing heavy is imported and no device is probed here, so that a mistake in a recipe costs a second.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from diffdfkd.engine.combinations import impossible
from diffdfkd.engine.distillation_recipe import DistillationRecipe
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.recipe_file import engine_section, explain, read_recipe
from diffdfkd.engine.recipe_section import Count, Fraction, Positive, Section, Weight, Window
from diffdfkd.engine.selection_recipe import SelectionRecipe

Sampler = Literal["ddim", "ddpm", "euler", "dpmsolver++", "lcm"]
FULL_DECODER = "full"


class LoraRecipe(Section):
    path: str
    """A ``.safetensors`` file, a folder with one, or a hub id."""
    revision: str | None = None
    """Commit of the hub repository; required for a hub id."""
    file: str | None = None
    """Name of the file in the folder or repository, where there are several."""
    scale: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """Factor on the update when it is fused into the weights."""
    licence: str | None = None
    """Of the update's weights, SPDX where there is one."""


class PriorRecipe(Section):
    path: str
    """Folder in diffusers' Stable Diffusion format, or a hub id."""
    revision: str | None = None
    """Commit of the hub repository; required for a hub id, so that a run can be repeated."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Arithmetic of UNet and VAE; the sampler's own arithmetic is float32."""
    loras: list[LoraRecipe] = []
    """Low-rank updates (LCM-LoRA, a style), fused into the weights in this order when the prior is loaded."""
    licence: str | None = None
    """Of the prior's weights, SPDX where there is one; by default what its model card states."""


class ClassifierRecipe(Section):
    architecture: str
    """Built in (``small_cnn``, ...), ``torchvision:<name>``, ``timm:<name>`` or ``package.module:factory``; of a
    teacher also ``exported`` (a ``torch.export`` .pt2) or ``torchscript``, whose weights file is the whole program."""
    options: dict[str, Any] = {}
    """Keyword arguments of the architecture, such as ``width``."""
    weights: str | None = None
    """State dict, ``.safetensors`` preferred; a pickle is read with ``weights_only=True``."""


class StudentRecipe(ClassifierRecipe):
    initialization: Literal["random", "teacher"] = "random"
    """What the student begins with: ``teacher`` takes a part of the teacher's weights, where the student is a narrower
    or shallower network of the teacher's family (weight selection, arXiv 2311.18823; docs/method.md)."""


class TeacherRecipe(ClassifierRecipe):
    classes: list[Annotated[str, Field(pattern=r"\S")]]
    """Class names in the order of the teacher's outputs."""
    metadata: str | None = None
    """Published weights whose metadata fills in what is not given here of classes, channels, size, mean, std,
    interpolation, crop_fraction: ``torchvision:ResNet18_Weights.IMAGENET1K_V1``, ``timm:resnet18.a1_in1k``."""
    channels: Literal[1, 3] = 3
    """Colour channels of the teacher's input."""
    size: Annotated[int, Field(ge=8)] = 32
    """Height and width of the teacher's input in pixels."""
    mean: list[float] = [0.5]
    """Per channel, of images in [0, 1]; one number serves all channels."""
    std: list[Positive] = [0.5]
    """Per channel, of images in [0, 1]; one number serves all channels."""
    interpolation: Literal["bilinear", "bicubic", "nearest"] = "bilinear"
    """Resize from the prior's image to the teacher's input, antialiased except ``nearest``."""
    channel_order: Literal["rgb", "bgr"] = "rgb"
    """Order of a colour teacher's input channels; mean and std are in this order."""
    crop_fraction: Annotated[float, Field(ge=0.1, le=1)] | None = None
    """Of real test images alone: their shorter edge becomes size / crop_fraction and the centre is cropped, as in
    torchvision's presets (224 / 256 = 0.875); by default the whole image is squeezed to the size."""
    licence: str | None = None
    """Of the teacher's weights, SPDX where there is one; the student's card hands it on."""


Engine = Literal["auto", "eager", "compiled", "onnxruntime", "openvino", "tensorrt", "tensorrt-rtx"]


class EngineRecipe(Section):
    unet: Engine = "auto"
    """What runs the UNet; ``auto`` takes the fastest that is installed, proves equal and pays (docs/engines.md). What
    was taken is frozen into the run, since results depend on it. ``engine=NAME`` sets both."""
    chain: Engine = "auto"
    """What runs the guidance chain: decoder, teacher and the gradient."""
    precision: Literal["float32", "bfloat16", "float16"] | None = None
    """Arithmetic of the networks inside the engines; that of ``prior.dtype`` by default. Never chosen by ``auto``."""
    attention: Literal["auto", "sdpa", "xformers"] = "auto"
    """Of the UNet where torch itself runs it; xformers needs CUDA."""
    cuda_graph: Literal["auto", "never"] = "auto"
    """On CUDA, steps of mode ``clean`` at a whole batch are recorded once and replayed; ``never`` launches kernel by
    kernel."""
    capabilities: list[Annotated[str, Field(pattern=r"^SM\d+$")]] = []
    """Compute capabilities, such as SM89, that ``diffdfkd build`` makes TensorRT-RTX engines for; by default that of
    the GPU at hand."""
    memory_mib: Count | None = None
    """Bound on the scratch memory of a TensorRT engine's layer."""
    freed_memory: Literal["returned", "kept"] = "returned"
    """On a CPU under glibc; ``kept`` for the next call, it spares the system clearing pages again and again, about a
    tenth of the demo's synthesis (docs/engines.md), for a process that stays as large as it ever was."""
    cache: str | None = None
    """Folder that engines are kept in, the user's own; $DIFFDFKD_CACHE or ~/.cache/diffdfkd by default."""


class SynthesisRecipe(Section):
    images_per_class: Count = 200
    """Images per class over all rounds."""
    batch_size: Count = 100
    """Images denoised together; classes are mixed within a batch."""
    batches_per_shard: Count = 1
    """With ``fan_out`` above 1 a batch here is one with all its children: a shard holds whole ones."""
    fan_out: Annotated[int, Field(ge=1, le=1000)] = 1
    """Images that a trajectory forks into at a late step, all but the first with a box of another trajectory's latent
    (``cutmix.partner``, ``cutmix.alpha``); 1: none forks."""
    fork: Fraction = 0.7
    """Of ``fan_out``: part of the trajectory that the images share, to the nearest step."""
    sampler: Sampler = "ddim"
    steps: Count = 12
    """Denoising steps."""
    guidance_scale: Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)] = 2.0
    """Classifier-free guidance; 1 turns it off and halves the cost of the UNet."""
    guidance_interval: Window = (0.0, 1.0)
    """Part of the trajectory with classifier-free guidance; elsewhere the UNet runs on the prompt alone."""
    reuse_every: Count = 1
    """Run the whole UNet in each n-th step, and in between its outermost blocks alone, with the deep features kept
    from the last whole call; 1 reuses nothing. In eager mode."""
    prompt: str | list[str] = "an image of a {}"
    """Template, or a list of which each sample draws one; ``{}`` is the class's word. Without ``{}`` the class enters
    through guidance alone."""
    words: list[str | list[str]] | None = None
    """Word of each class in the prompt, or a list of which each sample draws one; the class names by default."""
    size: Annotated[int, Field(ge=8)] | None = None
    """Saved height and width in pixels; the teacher's input by default."""
    format: Literal["png", "webp"] = "png"
    """Image files inside the shards; both lossless, unless ``quality`` is given."""
    quality: Annotated[int, Field(ge=1, le=100)] | None = None
    """Of lossy WebP; lossless by default."""

    @field_validator("prompt", mode="before")
    @classmethod
    def _templates(cls, prompt: Any) -> Any:
        return _one_or_several(prompt, "a template, or a list of them")

    @field_validator("words", mode="before")
    @classmethod
    def _several_words(cls, words: Any) -> Any:
        if not isinstance(words, list):
            return words
        return [_one_or_several(own, "each class has a word in quotes, or a list of them") for own in words]

    @property
    def templates(self) -> list[str]:
        """Of the prompts, one or more."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


def _one_or_several(texts: Any, wanted: str) -> Any:
    """A text or a list of several; a list of one is that one, so that both ways to write it are the same recipe."""
    if isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts):
        return texts[0] if len(texts) == 1 else texts
    if not isinstance(texts, str):
        raise ValueError(wanted)
    return texts


class GuidanceRecipe(Section):
    mode: Literal["none", "clean", "reuse", "exact"] = "clean"
    """Where the gradient is taken: docs/method.md."""
    class_weight: Weight = 1.0
    batchnorm_weight: Weight = 0.1
    adversarial_weight: Weight = 0.0
    """Weight of the disagreement between teacher and student; acts from the second round on."""
    rho: Weight = 0.15
    """Size of the guidance step, in the unit of ``rho_rule``."""
    rho_rule: Literal["raw", "unit", "cfg"] = "unit"
    rho_schedule: Literal["constant", "falling", "rising"] = "constant"
    """How ``rho`` runs over the guided steps, linearly and with ``rho`` as its mean: docs/method.md, 'Statistics and
    schedules'."""
    window: Window = (0.0, 1.0)
    """First and last guided part of the trajectory, as fractions of its steps; 0 is pure noise."""
    every: Count = 1
    """Guide each n-th step of the window."""
    class_window: Window = (0.0, 1.0)
    """Part of the trajectory, as ``window``, in which the class loss has its weight; elsewhere it has none."""
    batchnorm_window: Window = (0.0, 1.0)
    """The same of the BatchNorm loss."""
    adversarial_window: Window = (0.0, 1.0)
    """The same of the adversarial loss."""
    layers: Literal["all"] | list[str] = "all"
    """BatchNorm layers that L_bn is taken over: names in the teacher's network, or patterns such as ``layer4.*``."""
    layer_weights: Literal["equal", "relative"] | list[float] = "equal"
    """What each layer counts in L_bn; ``relative``: its distances divided by the norms of its own running mean and
    variance, so that no layer leads by its scale; or a number for each layer, in the order of the network."""
    statistics: Literal["batch", "class"] = "batch"
    """What L_bn compares with the running statistics: the whole batch, or each class's samples by themselves."""
    micro_batch: Count | None = None
    """Images that the networks see at once, whatever ``synthesis.batch_size``: L_bn is still that of the whole batch,
    exactly, for one more forward through decoder and teacher. Mode ``clean`` alone."""

    decoder: str = FULL_DECODER
    """What guidance decodes with: ``full`` is the prior's VAE, else a light decoder's file (``diffdfkd decoder``).
    Final images are the VAE's in any case."""
    decoder_window: Window = (0.0, 1.0)
    """Part of the trajectory in which the light decoder serves; elsewhere the full one does."""

    @field_validator("layers", mode="before")
    @classmethod
    def _named(cls, layers: Any) -> Any:
        if layers != "all" and not (
            isinstance(layers, list) and layers and all(isinstance(each, str) for each in layers)
        ):
            raise ValueError("'all', or a list of names or patterns, as in ['layer3.*', 'layer4.*']")
        return layers

    @field_validator("layer_weights", mode="before")
    @classmethod
    def _weighed(cls, weights: Any) -> Any:
        numbers = isinstance(weights, list) and all(
            type(each) in (int, float) and 0 < each < math.inf for each in weights
        )
        if weights not in ("equal", "relative") and not numbers:
            raise ValueError("'equal', 'relative', or a list with a number greater than 0 for each layer")
        return weights


class CutMixRecipe(Section):
    every: Annotated[int, Field(ge=0)] = 0
    """Mix after each n-th step; 0 turns CutMix off. The method's paper: steps // 5."""
    alpha: Positive = 1.0
    """Of Beta(alpha, alpha), whose draw is the share of the owner's area."""
    partner: Literal["within", "across", "any"] = "within"
    """Partner of the same class (keeps the label), of another class (area-weighted soft label), or either."""
    probability: Fraction = 0.5
    """Share of the samples that are mixed each time."""
    prompt: Literal["owner", "blend"] = "owner"
    """What conditions the steps after a mix: the owner's prompt, or the mean of the prompts of all that the sample's
    pixels came from, weighted by area."""
    repair: Literal["steps", "masked"] = "steps"
    """How seams are mended: by the remaining steps alone, or by denoising a band around them again (docs/method.md)."""
    band: Annotated[int, Field(ge=1, le=64)] = 1
    """Of ``repair: masked``: latent pixels on either side of a box's border."""
    passes: Annotated[int, Field(ge=1, le=100)] = 1
    """Of ``repair: masked``: how often, each for one more call of the UNet."""


class EvaluationRecipe(Section):
    images: str | None = None
    """Real test images: a folder with one sub-folder a class, an IDX file, or a data set as it is unpacked (CIFAR-10,
    CIFAR-100, Tiny ImageNet, DomainNet); none skips the evaluation."""
    labels: str | None = None
    """IDX labels file that belongs to an IDX images file, or a list of lines ``file label`` for a folder."""
    batch_size: Count = 500
    licence: str | None = None
    """Of the test images, SPDX where there is one; stated in the report."""


class AboutRecipe(Section):
    """What a person should know before a run; no result depends on it."""

    summary: str | None = None
    hardware: str | None = None
    time: str | None = None
    """Estimate, and how it was arrived at."""
    memory: str | None = None
    disk: str | None = None
    prior: str | None = None
    """Where to get the prior, by which licence."""
    teacher: str | None = None
    """Where to get the teacher's weights."""
    images: str | None = None
    """Where to get the test images."""
    published: str | None = None
    """Accuracies to compare with, and their source."""


class Recipe(Section):
    prior: PriorRecipe
    teacher: TeacherRecipe
    student: StudentRecipe
    engine: EngineRecipe = EngineRecipe()
    synthesis: SynthesisRecipe = SynthesisRecipe()
    guidance: GuidanceRecipe = GuidanceRecipe()
    cutmix: CutMixRecipe = CutMixRecipe()
    rounds: Count = 1
    """Rounds of synthesis and distillation; from the second on, guidance knows the student."""
    selection: SelectionRecipe = SelectionRecipe()
    distillation: DistillationRecipe = DistillationRecipe()
    evaluation: EvaluationRecipe = EvaluationRecipe()
    about: AboutRecipe = AboutRecipe()
    output: str = "runs/run"
    """Folder of the run."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    kernel: Literal["auto", "triton", "reference"] = "auto"
    """Form of the operations between the networks: fused Triton kernels, or the plain torch that they are tested
    against; ``auto`` takes Triton on CUDA and the reference elsewhere. Frozen into the run, since results depend on it
    (docs/kernels.md)."""
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads; all cores by default. Frozen into the run, since results depend on it."""

    @field_validator("prior", mode="before")
    @classmethod
    def _prior_from_path(cls, prior: Any) -> Any:
        return {"path": prior} if isinstance(prior, str) else prior

    @field_validator("engine", mode="before")
    @classmethod
    def _engine_from_name(cls, engine: Any) -> Any:
        return engine_section(engine) if isinstance(engine, str) else engine

    @model_validator(mode="after")
    def _possible(self) -> "Recipe":
        for field, problem in impossible(self):
            raise UserError(f"{field}: {problem}")
        return self


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Recipe from a packaged name (``fashion``), a YAML file or a mapping, with ``key.path=value`` overrides.

    Paths in a YAML file that begin with ``./`` or ``../`` are relative to that file, all others to the working
    folder. Override values are YAML, so ``guidance.window=[0,0.8]`` and ``teacher.weights=null`` work.
    Raises UserError with the field's path, what was given and what is allowed.
    """
    content = read_recipe(source, overrides)
    teacher = content.get("teacher")
    if isinstance(teacher, dict) and isinstance(teacher.get("metadata"), str):
        from diffdfkd.engine.metadata import fill_teacher

        content["teacher"] = fill_teacher(teacher)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise UserError(explain(error, Recipe)) from None


def dump_recipe(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain YAML- and JSON-ready data, every default spelled out."""
    return recipe.model_dump(mode="json")
