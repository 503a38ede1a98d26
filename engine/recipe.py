"""The recipe: one typed, validated description of a run, from YAML and ``key=value`` overrides.

Nothing heavy is imported and no device is probed here, so that a mistake in a recipe costs a second.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from diffdfkd.engine.combinations import impossible
from diffdfkd.engine.errors import UserError
from diffdfkd.engine.recipe_file import engine_section, explain, read_recipe

Sampler = Literal["ddim", "ddpm", "euler", "dpmsolver++", "lcm"]
Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


FULL_DECODER = "full"


def _two(window: Any) -> Any:
    if isinstance(window, Sequence) and len(window) != 2:
        raise ValueError("a window is its start and its end, as in [0.0, 0.8]")
    return window


def _ordered(window: tuple[float, float]) -> tuple[float, float]:
    if window[0] >= window[1]:
        raise ValueError("the start must lie before the end, as in [0.0, 0.8]")
    return window


Window = Annotated[tuple[Fraction, Fraction], Field(strict=False), BeforeValidator(_two), AfterValidator(_ordered)]
"""Part of a trajectory, as fractions of its steps; 0 is pure noise."""


class Section(BaseModel):
    # Strict: "20" is no number.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch(cls, value: Any) -> Any:
        # No field is a switch, and true equals the 1 of a Literal.
        if isinstance(value, bool):
            raise ValueError("this field is not a switch; give its value")
        return value


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
    prompt: str = "an image of a {}"
    """Template; ``{}`` is the class's word. Without ``{}`` the class enters through guidance alone."""
    words: list[str] | None = None
    """Word of each class in the prompt; the class names by default."""
    size: Annotated[int, Field(ge=8)] | None = None
    """Saved height and width in pixels; the teacher's input by default."""
    format: Literal["png", "webp"] = "png"
    """Image files inside the shards; both lossless, unless ``quality`` is given."""
    quality: Annotated[int, Field(ge=1, le=100)] | None = None
    """Of lossy WebP; lossless by default."""


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
    window: Window = (0.0, 1.0)
    """First and last guided part of the trajectory, as fractions of its steps; 0 is pure noise."""
    every: Count = 1
    """Guide each n-th step of the window."""
    decoder: str = FULL_DECODER
    """What guidance decodes with: ``full`` is the prior's VAE, else a light decoder's file (``diffdfkd decoder``).
    Final images are the VAE's in any case."""
    decoder_window: Window = (0.0, 1.0)
    """Part of the trajectory in which the light decoder serves; elsewhere the full one does."""


class CutMixRecipe(Section):
    every: Annotated[int, Field(ge=0)] = 0
    """Mix after each n-th step; 0 turns CutMix off. The method's paper: steps // 5."""
    alpha: Positive = 1.0
    """Of Beta(alpha, alpha), whose draw is the share of the owner's area."""
    partner: Literal["within", "across", "any"] = "within"
    """Partner of the same class (keeps the label), of another class (area-weighted soft label), or either."""
    probability: Fraction = 0.5
    """Share of the samples that are mixed each time."""


OWNED = {
    "train_batch_size": "distillation.batch_size",
    "train_micro_batch_size_per_gpu": "distillation.batch_size",
    "gradient_accumulation_steps": "distillation.batch_size",
    "managed_gradient_accumulation": "distillation.batch_size",
    "optimizer": "distillation.optimizer",
    "scheduler": "distillation.schedule",
    "fp16": "distillation.dtype",
    "bf16": "distillation.dtype",
    "amp": "distillation.dtype",
    "torch_autocast": "distillation.dtype",
    "zero_optimization.stage": "distillation.zero_stage",
    "checkpoint": "distillation.checkpoint_every",
}
"""DeepSpeed keys that a field of the recipe decides."""

DEEPSPEED_KEYS = (
    *("activation_checkpointing", "aio", "autotuning", "comet", "comms_logger", "communication_data_type", "compile"),
    *("csv_monitor", "data_efficiency", "data_types", "dataloader_drop_last", "disable_allgather", "disable_python_gc"),
    *("dump_state", "expert_parallel", "flops_profiler", "gradient_allreduce_op", "gradient_clipping"),
    *("gradient_predivide_factor", "hybrid_engine", "log_level", "memory_breakdown", "pipeline", "prescale_gradients"),
    *("seq_parallel_communication_data_type", "steps_per_print", "tensor_parallel", "tensorboard", "timers"),
    *("use_data_before_expert_parallelism", "wall_clock_breakdown", "wandb", "weight_quantization"),
    *("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "zero_optimization"),
)
"""Other top-level keys that DeepSpeed 0.19 reads: it passes over those that it does not know in silence."""


class DistillationRecipe(Section):
    steps: Count = 1500
    """Optimizer steps over all rounds."""
    batch_size: Annotated[int, Field(ge=1, le=2**20)] = 128
    """Global batch, over all processes."""
    optimizer: Literal["sgd", "adamw"] = "adamw"
    learning_rate: Positive = 2e-3
    momentum: Fraction = 0.9
    """Of SGD."""
    weight_decay: Weight = 5e-4
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    milestones: list[Fraction] = [0.6, 0.75, 0.9]
    """Of ``schedule: step``: fractions of ``steps`` after which the rate is divided by ten."""
    temperature: Positive = 4.0
    """tau of tau^2 KL(teacher || student)."""
    augmentation: list[Literal["flip", "crop", "affine", "erase", "cutmix", "mixup"]] = ["flip", "crop"]
    """Applied to each batch before teacher and student see it, in this order."""
    teacher_logits: Literal["auto", "cached", "computed"] = "auto"
    """Cached: the teacher answers once for each image, and its answers are kept beside the shards. ``auto`` does so
    without augmentation, where it is exact; with augmentation the teacher has to see what the student sees."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 runs under DeepSpeed's torch_autocast."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    deepspeed: dict[str, Any] = {}
    """Any further DeepSpeed configuration, merged over ours."""
    checkpoint_every: Count = 250
    """Steps between checkpoints."""
    holdout: Annotated[int, Field(ge=0)] = 0
    """Synthetic images held back from training to report agreement with the teacher on."""

    @model_validator(mode="after")
    def _deepspeed_is_free(self) -> "DistillationRecipe":
        # Here and not where DeepSpeed begins, since all images would have been made by then.
        if not isinstance(self.deepspeed.get("zero_optimization", {}), dict):
            raise UserError("distillation.deepspeed.zero_optimization: a mapping of DeepSpeed's keys; see its manual")
        known = [*DEEPSPEED_KEYS, *OWNED]
        for key in self.deepspeed:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {near[0]}?" if near else "; its manual lists them"
                raise UserError(f"distillation.deepspeed.{key}: DeepSpeed has no such key{hint}")
        ours = {
            "train_batch_size": self.batch_size,
            "gradient_accumulation_steps": 1,
            "zero_optimization.stage": self.zero_stage,
        }
        for key, field in OWNED.items():
            given: Any = self.deepspeed
            for part in key.split("."):
                given = given.get(part) if isinstance(given, dict) else None
            if given is not None and given != ours.get(key):
                raise UserError(
                    f"distillation.deepspeed.{key}: got {given!r}, but {field} decides this; set that instead"
                )
        return self


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
    student: ClassifierRecipe
    engine: EngineRecipe = EngineRecipe()
    synthesis: SynthesisRecipe = SynthesisRecipe()
    guidance: GuidanceRecipe = GuidanceRecipe()
    cutmix: CutMixRecipe = CutMixRecipe()
    rounds: Count = 1
    """Rounds of synthesis and distillation; from the second on, guidance knows the student."""
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
