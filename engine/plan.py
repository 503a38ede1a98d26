"""Which shards a run has, which sample of which class lies in each, and what their content depends on.

Nothing here knows a clock, a rank or a batch split: the plan is a function of the recipe alone.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffdfkd.engine.combinations import round_samples
from diffdfkd.engine.recipe import Recipe, dump_recipe
from diffdfkd.engine.shards import canonical_json
from diffdfkd.kernels.philox import LABELS, philox_uniform

SAMPLES_PER_ROUND = 2**40
"""Distance between the first sample ids of two rounds, so that rounds may grow without renumbering."""

YOUNGER = {
    "synthesis": ("fan_out", "fork", "guidance_interval", "reuse_every"),
    "guidance": (
        *("rho_schedule", "class_window", "batchnorm_window", "adversarial_window"),
        *("layers", "layer_weights", "statistics", "micro_batch"),
    ),
    "cutmix": ("prompt", "repair", "band", "passes"),
}
"""Fields that shards may be older than: they go without saying where they have their defaults."""


@dataclass(frozen=True)
class ShardPlan:
    round: int
    index: int
    first: int
    """Index within the round of the shard's first sample."""
    samples: int


def block_size(recipe: Recipe) -> int:
    """Samples of a batch with all its children."""
    return recipe.synthesis.batch_size * recipe.synthesis.fan_out


def shard_plan(recipe: Recipe, round: int) -> list[ShardPlan]:
    """The round's shards in order; all are full but the last.

    Raising ``synthesis.images_per_class`` in a run of one round leaves every full shard as it was.
    """
    samples = round_samples(recipe, round)
    full = block_size(recipe) * recipe.synthesis.batches_per_shard
    return [
        ShardPlan(round, index, first, min(full, samples - first))
        for index, first in enumerate(range(0, samples, full))
    ]


def sample_ids(round: int, first: int, samples: int) -> Tensor:
    """Ids [samples] int64, unique in the run, of the round's samples from index ``first`` on."""
    return torch.arange(first, first + samples, dtype=torch.int64) + round * SAMPLES_PER_ROUND


def class_labels(seed: int, round: int, first: int, samples: int, classes: int) -> Tensor:
    """Classes [samples] int64 of the round's samples from index ``first`` on.

    Each block of K = ``classes`` samples holds every class once, in an order drawn from (seed, round, block): classes
    are balanced over the round and mixed within any batch, and a label does not depend on the batch it is asked in.
    """
    blocks = torch.arange(first // classes, (first + samples - 1) // classes + 1, dtype=torch.int64)
    keys = philox_uniform(seed, blocks + round * SAMPLES_PER_ROUND, 0, LABELS, classes)
    labels = torch.argsort(keys, dim=1, stable=True).flatten()
    offset = first % classes
    return labels[offset : offset + samples]


def trajectories(recipe: Recipe, round: int, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Ids and classes [count] int64 of the round's trajectories from the ``first`` on; its samples without fan-out.

    Their ids are those of their first children: block by block of m B samples, the trajectories come first.
    """
    index = torch.arange(first, first + count, dtype=torch.int64)
    batch, classes = recipe.synthesis.batch_size, len(recipe.teacher.classes)
    ids = index // batch * block_size(recipe) + index % batch + round * SAMPLES_PER_ROUND
    return ids, class_labels(recipe.seed, round, first, count, classes)


def round_labels(recipe: Recipe, round: int, first: int, samples: int) -> Tensor:
    """Classes [samples] int64 of the round's samples from index ``first`` on: with fan-out those of their parents.

    Child j of trajectory b of a block of m B samples is its sample j B + b; the round's last block may have a smaller
    B.
    """
    fan_out, block = recipe.synthesis.fan_out, block_size(recipe)
    index = torch.arange(first, first + samples, dtype=torch.int64)
    start = index // block * block
    own = ((round_samples(recipe, round) - start) // fan_out).clamp(max=recipe.synthesis.batch_size)
    parents = start // fan_out + (index - start) % own
    lowest, highest = int(parents.min()), int(parents.max())
    classes = class_labels(recipe.seed, round, lowest, highest - lowest + 1, len(recipe.teacher.classes))
    return classes[parents - lowest]


def synthesis_choices(
    recipe: Recipe,
    prior_digest: str,
    teacher_digest: str,
    snapshot_digest: str | None = None,
    decoder_digest: str | None = None,
) -> dict[str, Any]:
    """All that a shard depends on besides its round and index, flat, by the names of the recipe's fields.

    Not among them: where files lie, how many images there are, how the student is trained and evaluated.
    """
    content = dump_recipe(recipe)
    content["synthesis"].pop("images_per_class")
    for field in ("weights", "metadata", "crop_fraction", "licence"):
        content["teacher"].pop(field)
    light = {field: content["guidance"].pop(field) for field in ("decoder", "decoder_window")}
    for name, fields in YOUNGER.items():
        section = getattr(recipe, name)
        for field in fields:
            if getattr(section, field) == type(section).model_fields[field].default:
                content[name].pop(field)
    choices = {
        f"{section}.{field}": value
        for section in ("teacher", "synthesis", "guidance", "cutmix")
        for field, value in content[section].items()
    }
    choices |= {field: content[field] for field in ("seed", "device", "threads")}
    choices |= {"prior.dtype": recipe.prior.dtype, "prior": prior_digest, "teacher": teacher_digest}
    if recipe.kernel == "triton":
        # The plain formulation goes without saying, as in shards that are older than the kernels.
        choices["kernel"] = recipe.kernel
    # So do torch's own operators in the prior's precision.
    precision = recipe.engine.precision or recipe.prior.dtype
    for stage in ("unet", "chain"):
        if (engine := getattr(recipe.engine, stage)) not in ("auto", "eager"):
            choices[f"engine.{stage}"] = engine
    if precision != recipe.prior.dtype:
        choices["engine.precision"] = precision
    if recipe.engine.attention == "xformers":
        choices["engine.attention"] = "xformers"
    if decoder_digest is not None:
        # The full one goes without saying.
        choices |= {"guidance.decoder": decoder_digest, "guidance.decoder_window": light["decoder_window"]}
    if snapshot_digest is not None:
        choices["student"] = snapshot_digest
    return choices


def choices_digest(choices: Mapping[str, Any]) -> str:
    """SHA-256, hexadecimal, of the choices' canonical JSON."""
    return hashlib.sha256(canonical_json(dict(choices))).hexdigest()


def differing_choices(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """The fields that differ, in words: ``synthesis.steps was 12 and is 20``."""
    words = {"prior": "the prior's weights", "teacher": "the teacher's weights", "student": "the student's snapshot"}
    changes = []
    for field in sorted({*theirs, *ours}):
        if theirs.get(field) == ours.get(field):
            continue
        if field in words:
            changes.append(f"{words[field]} differ" if field != "student" else f"{words[field]} differs")
        else:
            changes.append(f"{field} was {theirs.get(field)} and is {ours.get(field)}")
    return ", ".join(changes)


def weights_digest(networks: Iterable[nn.Module], *settings: Any) -> str:
    """SHA-256, hexadecimal, of all parameters and buffers by name, and of JSON-ready settings.

    Taken from what was loaded, so that the same weights have one digest in whatever file or folder they lie.
    """
    sha256 = hashlib.sha256(canonical_json([str(setting) for setting in settings]))
    for network in networks:
        for name, tensor in sorted(network.state_dict().items()):
            sha256.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            sha256.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha256.hexdigest()


def lasting(config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """A diffusers or transformers configuration without where it was read from and by which version."""
    return sorted((key, config[key]) for key in config if not key.startswith("_") and key != "transformers_version")
