import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffdfkd.engine.errors import UserError
from diffdfkd.recipes import pretraining
from diffdfkd.recipes.captioned_folder import read_captioned_folder
from diffdfkd.recipes.pretrain_prior import PriorTraining, pretrain_prior
from diffdfkd.recipes.tokenizer import build_tokenizer

WEIGHTS = ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model")


def write_folder(folder: Path, modes: str = "L", side: int = 16) -> Path:
    folder.mkdir()
    random = np.random.default_rng(0)
    lines = []
    for index in range(8):
        pixels = random.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(modes).save(folder / f"{index}.png")
        lines.append(
            json.dumps({"file_name": f"{index}.png", "text": f"an icon of a {'bag' if index % 2 else 'shoe'}"})
        )
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def tiny(images: Path, output: Path) -> PriorTraining:
    return PriorTraining(
        images=images,
        output=output,
        checkpoints=output.with_name(output.name + "-checkpoints"),
        steps=4,
        vae_steps=4,
        batch_size=4,
        vae_batch_size=4,
        checkpoint_every=2,
        vae_channels=(8, 8, 16),
        unet_channels=(16, 32),
        text_width=16,
    )


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
def test_the_stock_pipeline_loads_and_generates(tmp_path: Path, mode: str, channels: int) -> None:
    from diffusers import StableDiffusionPipeline

    folder = pretrain_prior(tiny(write_folder(tmp_path / "icons", mode), tmp_path / "prior"))
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("an icon of a bag", num_inference_steps=2, guidance_scale=2.0).images[0]
    assert image.size == (16, 16)
    assert image.mode == mode
    assert pipeline.vae.config.in_channels == channels
    assert pipeline.vae.config.scaling_factor != 0.18215, "the scaling factor is measured, not Stable Diffusion's"
    stored = load_file(folder / f"{WEIGHTS[0]}.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    assert "last losses" in (folder / "README.md").read_text()


@pytest.mark.parametrize("written_before_the_kill", [1, 3])
def test_resume_equals_an_uninterrupted_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written_before_the_kill: int
) -> None:
    icons = write_folder(tmp_path / "icons")
    whole = pretrain_prior(tiny(icons, tmp_path / "whole"))

    save, calls = pretraining.save_checkpoint, []

    def killed_after(*arguments: object) -> None:
        save(*arguments)  # type: ignore[arg-type]
        calls.append(arguments)
        if len(calls) == written_before_the_kill:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pretraining, "save_checkpoint", killed_after)
        with pytest.raises(KeyboardInterrupt):
            pretrain_prior(tiny(icons, tmp_path / "cut"))
    assert not (tmp_path / "cut" / "unet").exists()
    cut = pretrain_prior(tiny(icons, tmp_path / "cut"))
    for name in WEIGHTS:
        expected, found = load_file(whole / f"{name}.safetensors"), load_file(cut / f"{name}.safetensors")
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected), name


def test_checkpoints_of_another_seed_are_refused(tmp_path: Path) -> None:
    icons = write_folder(tmp_path / "icons")
    first = tiny(icons, tmp_path / "prior")
    pretrain_prior(first)
    with pytest.raises(UserError, match=r"vae\.pt: was made with seed 0, this run has 1"):
        pretrain_prior(PriorTraining(**{**first.__dict__, "seed": 1}))


def test_an_autoencoder_is_taken_from_another_prior(tmp_path: Path) -> None:
    icons = write_folder(tmp_path / "icons")
    given = pretrain_prior(tiny(icons, tmp_path / "given"))
    training = replace(tiny(icons, tmp_path / "prior"), vae=given, seed=1)
    folder = pretrain_prior(training)
    expected, found = (load_file(path / f"{WEIGHTS[1]}.safetensors") for path in (given, folder))
    assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)
    assert not (training.checkpoints / "vae.pt").exists()
    scales = [json.loads((path / "vae" / "config.json").read_text())["scaling_factor"] for path in (given, folder)]
    assert scales[1] == pytest.approx(scales[0], rel=0.02), "measured anew, with weights rounded to fp16"
    assert f"| autoencoder | that of `{given}` |" in (folder / "README.md").read_text()


def test_an_autoencoder_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    given = pretrain_prior(tiny(write_folder(tmp_path / "grey"), tmp_path / "given"))
    colour = tiny(write_folder(tmp_path / "colour", "RGB"), tmp_path / "prior")
    with pytest.raises(UserError, match=r"--vae: .* takes 1 channel\(s\) to 4 over 3 levels, the images need 3 to 4"):
        pretrain_prior(replace(colour, vae=given))
    with pytest.raises(UserError, match=r"--vae: .* holds no autoencoder"):
        pretrain_prior(replace(colour, vae=tmp_path / "nowhere"))


def break_metadata(folder: Path) -> str:
    (folder / "metadata.jsonl").unlink()
    return r"metadata\.jsonl: not found"


def break_line(folder: Path) -> str:
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png"}\n')
    return r"metadata\.jsonl: line 1 needs the strings file_name and text"


def break_json(folder: Path) -> str:
    (folder / "metadata.jsonl").write_text("0.png,an icon\n")
    return r"metadata\.jsonl: line 1 is not JSON"


def break_file(folder: Path) -> str:
    (folder / "3.png").unlink()
    return r"3\.png: listed in metadata\.jsonl but not found"


def break_image(folder: Path) -> str:
    (folder / "3.png").write_bytes(b"not a picture")
    return r"3\.png: cannot be read as an image"


def break_square(folder: Path) -> str:
    Image.new("L", (16, 24)).save(folder / "3.png")
    return r"3\.png: is 16x24; images must be square"


def break_multiple(folder: Path) -> str:
    Image.new("L", (12, 12)).save(folder / "0.png")
    return r"0\.png: is 12x12; .* multiple of 8"


def break_size(folder: Path) -> str:
    Image.new("L", (24, 24)).save(folder / "3.png")
    return r"3\.png: is 24x24 with 1 channel\(s\), the first image is 16x16"


def break_mode(folder: Path) -> str:
    Image.new("RGB", (16, 16)).save(folder / "3.png")
    return r"3\.png: is 16x16 with 3 channel\(s\), the first image is 16x16 with 1"


@pytest.mark.parametrize(
    "damage",
    [
        break_metadata,
        break_line,
        break_json,
        break_file,
        break_image,
        break_square,
        break_multiple,
        break_size,
        break_mode,
    ],
)
def test_a_bad_folder_is_refused_by_the_name_of_the_file(tmp_path: Path, damage) -> None:  # type: ignore[no-untyped-def]
    folder = write_folder(tmp_path / "icons")
    message = damage(folder)
    with pytest.raises(UserError, match=message):
        read_captioned_folder(folder)


def test_the_tokenizer_knows_words_and_spells_the_rest(tmp_path: Path) -> None:
    captions = ["an icon of an ankle boot", "an icon of a T-shirt", "an icon of a boot"] * 2
    tokenizer = build_tokenizer(captions, tmp_path / "tokenizer")
    assert tokenizer.tokenize("An icon of an ankle boot") == [
        f"{word}</w>" for word in ["an", "icon", "of", "an", "ankle", "boot"]
    ]
    ids = tokenizer("Zébra 7 boot", padding="max_length", truncation=True).input_ids
    assert len(ids) == 16
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id == tokenizer.pad_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == "zébra 7 boot"
