"""The recipe's section on training the student, and what of DeepSpeed's own configuration it leaves free."""

import difflib
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.recipe_section import Count, Fraction, Positive, Section, Weight

StageNames = Annotated[list[str], Field(min_length=3, max_length=3)]

MAPS = ("cam_weight", "sarc_weight", "teacher_stages", "student_stages")
"""Fields of the class-activation losses."""

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
    cam_weight: Weight = 0.0
    """Of the class activation maps' mean squared difference, beside a KL averaged over the batch (docs/method.md)."""
    sarc_weight: Weight = 0.0
    """Of the Grad-CAMs' at three stages, for the class that the teacher names (mSARC)."""
    teacher_stages: StageNames | None = None
    """Modules of the teacher's network, first to last, whose outputs are the maps; those of ``cam_weight`` are read
    off the last one. By default the last module of each of the last three resolutions."""
    student_stages: StageNames | None = None
    """Of the student's network, each beside the teacher's."""
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

    @property
    def reads_maps(self) -> bool:
        """Whether a class-activation loss takes part."""
        return self.cam_weight > 0 or self.sarc_weight > 0

    def course(self) -> dict[str, Any]:
        """The fields that the course of training depends on, JSON-ready."""
        idle = set() if self.reads_maps else set(MAPS)
        return self.model_dump(mode="json", exclude={"checkpoint_every", *idle})

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
