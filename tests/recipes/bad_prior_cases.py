"""The corpus of bad inputs, continued: priors that are missing, half fetched, damaged or of another kind."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from bad_input_cases import Arguments, Case, Recipe, Spoil, command, given

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 3438167536\n"
UNET = "unet/diffusion_pytorch_model.safetensors"


class Hostile:
    """A pickle of it would create a file where it is loaded by a reader that trusts it."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def prior(change: Callable[[Path], object], *overrides: str) -> Spoil:
    """A run with a copy of the good prior, changed."""

    def spoil(folder: Path, recipe: Recipe) -> Arguments:
        copy = Path(shutil.copytree(recipe["prior"], folder / "prior"))
        recipe["prior"] = str(copy)
        change(copy)
        return command(folder, recipe, *overrides)

    return spoil


def lost(name: str) -> Callable[[Path], object]:
    """Without a file or folder."""
    return lambda folder: shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


def holding(name: str, content: bytes) -> Callable[[Path], object]:
    """With a file of this content."""
    return lambda folder: (folder / name).write_bytes(content)


def cut(name: str) -> Callable[[Path], object]:
    """With half of a file."""
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def edited(name: str, **changes: Any) -> Callable[[Path], object]:
    """With other entries of a JSON file; None takes one out."""

    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return edit


def tensors(name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    """With other tensors in a safetensors file."""

    def edit(folder: Path) -> None:
        state = safetensors.torch.load((folder / name).read_bytes())
        change(state)
        (folder / name).write_bytes(safetensors.torch.save(state, metadata={"format": "pt"}))

    return edit


def without_weights(folder: Path) -> None:
    """A pickle in the place of safetensors."""
    (folder / UNET).unlink()
    torch.save({"weight": Hostile(folder.parent / "executed")}, folder / "unet" / "diffusion_pytorch_model.bin")


def without_shard(folder: Path) -> None:
    """The weights in several files, of which one was not fetched."""
    (folder / UNET).rename(folder / "unet" / "diffusion_pytorch_model-00001-of-00002.safetensors")
    names = [f"diffusion_pytorch_model-0000{part}-of-00002.safetensors" for part in (1, 2)]
    index = {"metadata": {"total_size": 1}, "weight_map": {"conv_in.weight": names[0], "conv_in.bias": names[1]}}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def of_other_latents(folder: Path) -> None:
    """A UNet for latents of 8 channels beside a decoder of 4."""
    edited("unet/config.json", in_channels=8, out_channels=8)(folder)

    def widen(state: dict[str, torch.Tensor]) -> None:
        state["conv_in.weight"] = state["conv_in.weight"].repeat(1, 2, 1, 1)
        state["conv_out.weight"] = state["conv_out.weight"].repeat(2, 1, 1, 1)
        state["conv_out.bias"] = state["conv_out.bias"].repeat(2)

    tensors(UNET, widen)(folder)


def of_two_colours(folder: Path) -> None:
    """A decoder to images of 2 channels, for which there is no rule."""
    edited("vae/config.json", in_channels=2, out_channels=2)(folder)

    def widen(state: dict[str, torch.Tensor]) -> None:
        state["encoder.conv_in.weight"] = state["encoder.conv_in.weight"].repeat(1, 2, 1, 1)
        state["decoder.conv_out.weight"] = state["decoder.conv_out.weight"].repeat(2, 1, 1, 1)
        state["decoder.conv_out.bias"] = state["decoder.conv_out.bias"].repeat(2)

    tensors("vae/diffusion_pytorch_model.safetensors", widen)(folder)


def with_larger_vocabulary(folder: Path) -> None:
    """A tokenizer with tokens that the text encoder does not know."""
    file = folder / "tokenizer" / "vocab.json"
    vocabulary = json.loads(file.read_text())
    file.write_text(json.dumps({token: index + 900 for token, index in vocabulary.items()}))


CASES = [
    Case("no prior there", given("prior=/nowhere"), "prior.path: /nowhere: no such folder", ("hub id",)),
    Case("file as prior", given("prior={folder}/recipe.yaml"), "prior.path: {folder}/recipe.yaml: ", ("folder",)),
    Case("hub id without commit", given("prior=someone/model"), "prior.revision: someone/model", ("40 hexadecimal",)),
    Case(
        "hub id at a branch",
        given("prior={path: someone/model, revision: main}"),
        "prior.revision: ",
        ("got main", "40 hexadecimal"),
    ),
    Case(
        "prior without index",
        prior(lost("model_index.json")),
        "{folder}/prior/model_index.json: missing",
        ("complete",),
    ),
    Case("prior's index cut", prior(cut("model_index.json")), "{folder}/prior/model_index.json: not a JSON file", ()),
    Case("no VAE", prior(lost("vae")), "{folder}/prior/vae: missing", ("complete the folder",), True),
    Case(
        "no UNet in the index",
        prior(edited("model_index.json", unet=None)),
        "{folder}/prior/model_index.json: unet is missing",
        ("UNet2DConditionModel",),
    ),
    Case(
        "VAE of another class",
        prior(edited("model_index.json", vae=["diffusers", "VQModel"])),
        "{folder}/prior/model_index.json: vae is VQModel",
        ("AutoencoderKL",),
    ),
    Case(
        "text encoder of another class",
        prior(edited("model_index.json", text_encoder=["transformers", "T5EncoderModel"])),
        "{folder}/prior/model_index.json: text_encoder is T5EncoderModel",
        ("CLIPTextModel",),
    ),
    Case(
        "noise levels of fewer steps",
        prior(edited("scheduler/scheduler_config.json", trained_betas=[0.1, 0.2])),
        "{folder}/prior/scheduler/scheduler_config.json: trained_betas is 2 numbers",
        ("num_train_timesteps=1000",),
    ),
    Case(
        "tokenizer without room for a word",
        prior(edited("tokenizer/tokenizer_config.json", model_max_length=1)),
        "{folder}/prior/tokenizer/tokenizer_config.json: model_max_length is 1",
        ("77",),
    ),
    Case("UNet without weights", prior(lost(UNET)), "{folder}/prior/unet: ", ("safetensors",)),
    Case("UNet half fetched", prior(cut(UNET)), "{folder}/prior/unet", ("safetensors", "again")),
    Case(
        "UNet as git-lfs pointer",
        prior(holding(UNET, LFS_POINTER)),
        "{folder}/prior/unet",
        ("not the file itself", "git lfs pull"),
    ),
    Case(
        "UNet without its second shard", prior(without_shard), "{folder}/prior/unet", ("-00002-of-00002.safetensors",)
    ),
    Case("UNet as pickle", prior(without_weights), "{folder}/prior/unet: ", ("safetensors",)),
    Case("UNet without a config", prior(lost("unet/config.json")), "{folder}/prior/unet", ("config.json",)),
    Case("UNet's config cut", prior(cut("unet/config.json")), "{folder}/prior/unet", ("JSON",)),
    Case(
        "UNet without a tensor",
        prior(tensors(UNET, lambda state: state.pop("conv_in.bias"))),
        "{folder}/prior/unet: ",
        ("conv_in.bias",),
    ),
    Case(
        "UNet's tensor of another shape",
        prior(edited("unet/config.json", block_out_channels=[32, 32])),
        "{folder}/prior/unet: ",
        ("shape",),
    ),
    Case(
        "UNet not finite",
        prior(tensors(UNET, lambda state: state["conv_in.bias"].fill_(float("nan")))),
        "{folder}/prior/unet: ",
        ("finite", "conv_in.bias", "again"),
    ),
    Case(
        "latents that do not fit",
        prior(of_other_latents),
        "{folder}/prior/unet: takes 8 and gives 8 channels",
        ("have 4", "belong together"),
    ),
    Case(
        "prior of two colours", prior(of_two_colours), "{folder}/prior/vae", ("2 channels", "grey (1) and colour (3)")
    ),
    Case(
        "tokenizer of another encoder",
        prior(with_larger_vocabulary),
        "{folder}/prior/tokenizer",
        ("text_encoder", "belong together"),
    ),
    Case("no tokenizer", prior(lost("tokenizer/vocab.json")), "{folder}/prior/tokenizer", ()),
    Case(
        "no schedule",
        prior(lost("scheduler")),
        "{folder}/prior/scheduler/scheduler_config.json: missing",
        ("complete",),
    ),
    Case(
        "schedule's prediction of another kind",
        prior(edited("scheduler/scheduler_config.json", prediction_type="flow")),
        "{folder}/prior/scheduler/scheduler_config.json: prediction_type=flow",
        ("epsilon, v_prediction",),
    ),
    Case(
        "schedule's betas of another kind",
        prior(edited("scheduler/scheduler_config.json", beta_schedule="square")),
        "prior.path: no ddim schedule",
        ("square", "another prior"),
    ),
]
