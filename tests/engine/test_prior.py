import fnmatch
import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.prior import load_prior, quiet
from diffdfkd.engine.prior_files import HUB_FILES, find_prior, read_licence
from diffdfkd.engine.recipe import PriorRecipe
from diffdfkd.engine.schedule import make_table
from diffdfkd.kernels.advance import advance
from diffdfkd.kernels.philox import INITIAL_NOISE, philox_normal
from diffdfkd.kernels.predict import predict
from diffdfkd.kernels.row import named, start_counter

PROMPTS = ["an icon of a coat", "a bag"]


def stock_pipeline(folder: Path) -> Any:
    with quiet():
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(params=["tiny_prior", "tiny_prior_v"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture
def broken(tiny_prior: Path, tmp_path: Path) -> Path:
    """A copy of the tiny prior to break."""
    return Path(shutil.copytree(tiny_prior, tmp_path / "broken"))


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_what_is_loaded(folder: Path) -> None:
    prior = load_prior(PriorRecipe(path=str(folder)), "cpu")
    third_channels = folder.name == "tiny-v"
    assert prior.channels == (3 if third_channels else 1)
    assert prior.prediction_type == ("v_prediction" if third_channels else "epsilon")
    assert prior.latent_shape == (4, 8, 8)
    assert prior.image_size == (32, 32)
    assert prior.scaling_factor == pytest.approx(0.18215)
    assert prior.licence == "cc0-1.0"
    for network in (prior.unet, prior.vae, prior.text_encoder):
        assert not network.training
        assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_our_plain_loop_is_the_stock_pipeline(folder: Path, scale: float) -> None:
    """DDIM, guidance off: latents, and the images decoded from them, of diffusers' own pipeline to 1e-4."""
    prior = load_prior(PriorRecipe(path=str(folder)), "cpu")
    pipeline = stock_pipeline(folder)
    noise = philox_normal(1, torch.arange(2), 0, INITIAL_NOISE, prior.latent_shape)
    options: dict[str, Any] = {"latents": noise.clone(), "num_inference_steps": 5, "guidance_scale": scale}
    expected = pipeline(PROMPTS, output_type="latent", height=32, width=32, **options).images
    images = pipeline(PROMPTS, output_type="pt", height=32, width=32, **options).images

    copies = 1 if scale == 1 else 2
    context = prior.embed(PROMPTS) if scale == 1 else torch.cat((prior.embed(["", ""]), prior.embed(PROMPTS)))
    table = make_table("ddim", prior.scheduler_config, 5)
    z, counter = table.initial_scale * noise, start_counter("cpu")
    with torch.no_grad():
        for row, timestep in zip(table.rows, table.timesteps, strict=True):
            sample = (named(row).input_scale * z).repeat(copies, 1, 1, 1)
            output = prior.unet(sample, timestep.expand(len(sample)), encoder_hidden_states=context).sample
            prediction = predict(z, output, table.rows, counter, float(scale))
            z = advance(z, prediction, None, table.rows, counter, torch.ones(len(z), dtype=torch.bool)).z
        torch.testing.assert_close(z, expected, rtol=1e-4, atol=1e-4)
        assert (expected - noise).abs().max() > 0.1
        torch.testing.assert_close(prior.decode(z), images, rtol=0, atol=1e-4)


def test_embeddings_are_padded_and_cut_as_in_the_stock_pipeline(tiny_prior: Path) -> None:
    prior = load_prior(PriorRecipe(path=str(tiny_prior)), "cpu")
    prompts = ["", "a very long prompt " * 9]
    expected, _ = stock_pipeline(tiny_prior).encode_prompt(prompts, "cpu", 1, False)
    embeddings = prior.embed(prompts)
    assert embeddings.shape == (2, 16, 16) and embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings, expected)


def test_decode_has_a_gradient(tiny_prior: Path) -> None:
    prior = load_prior(PriorRecipe(path=str(tiny_prior)), "cpu")
    latents = torch.randn(2, 4, 8, 8, requires_grad=True)
    images = prior.decode(latents)
    assert images.shape == (2, 1, 32, 32) and images.min() >= 0 and images.max() <= 1
    images.sum().backward()
    assert latents.grad is not None and latents.grad.abs().sum() > 0


def test_tiny_autoencoder_and_half_precision(prior_builder: Callable[..., Path], tmp_path: Path) -> None:
    folder = prior_builder(tmp_path / "tiny-vae", channels=3, tiny_vae=True)
    prior = load_prior(PriorRecipe(path=str(folder), dtype="bfloat16"), "cpu")
    assert next(prior.unet.parameters()).dtype == torch.bfloat16
    images = prior.decode(torch.randn(2, *prior.latent_shape))
    assert images.shape == (2, 3, *prior.image_size) and images.dtype == torch.float32
    assert prior.embed(["a bag"]).dtype == torch.float32


def test_old_scheduler_configurations_are_corrected_as_in_the_stock_pipeline(broken: Path) -> None:
    edit(broken / "scheduler" / "scheduler_config.json", clip_sample=True, steps_offset=0)
    with quiet():
        stock = stock_pipeline(broken).scheduler
        stock.set_timesteps(5)
    table = make_table("ddim", load_prior(PriorRecipe(path=str(broken)), "cpu").scheduler_config, 5)
    assert table.timesteps.tolist() == stock.timesteps.tolist()


def test_loading_is_quiet_and_leaves_settings_alone(tiny_prior: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_prior(PriorRecipe(path=str(tiny_prior)), "cpu").embed(["a bag"])
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


@pytest.mark.parametrize(
    ("path", "revision", "words"),
    [
        ("/no/such/folder", None, r"prior\.path: /no/such/folder: no such folder"),
        ("./missing", None, r"prior\.path: \./missing: no such folder"),
        ("someone/model", None, r"prior\.revision: someone/model .* commit .* got none"),
        ("someone/model", "main", r"prior\.revision: .* got main"),
    ],
)
def test_paths_that_are_refused(path: str, revision: str | None, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_prior(PriorRecipe(path=path, revision=revision), "cpu")


def test_hub_id_is_fetched_at_its_commit(tiny_prior: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch(repository: str, *, revision: str, allow_patterns: list[str]) -> str:
        asked.append((repository, revision, allow_patterns))
        return str(tiny_prior)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    load_prior(PriorRecipe(path="someone/model", revision="0" * 40), "cpu")
    assert asked == [("someone/model", "0" * 40, patterns) for patterns in (["model_index.json"], HUB_FILES)]


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fail(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("no connection\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(UserError, match=r"prior\.path: someone/model at 0.* \(no connection\); check id"):
        load_prior(PriorRecipe(path="someone/model", revision="0" * 40), "cpu")


Edit = Callable[[Path], Any]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "model_index.json").unlink(), r"model_index\.json: missing; a prior is a complete"),
        (lambda folder: (folder / "model_index.json").write_text("{"), r"model_index\.json: not a JSON file"),
        (lambda folder: (folder / "model_index.json").write_text("[]"), r"model_index\.json: a JSON object expected"),
        (
            lambda folder: edit(folder / "model_index.json", vae=["diffusers", "VQModel"]),
            r"vae is VQModel in this StableDiffusionPipeline; .* AutoencoderKL or AutoencoderTiny",
        ),
        (
            lambda folder: edit(folder / "model_index.json", text_encoder=[None, None]),
            r"text_encoder is missing in this StableDiffusionPipeline",
        ),
        (
            lambda folder: edit(
                folder / "model_index.json",
                _class_name="StableDiffusionXLPipeline",
                text_encoder_2=["transformers", "CLIPTextModelWithProjection"],
            ),
            r"StableDiffusionXLPipeline has a text_encoder_2 \(CLIPTextModelWithProjection\), which no Stable",
        ),
        (
            lambda folder: edit(
                folder / "model_index.json",
                _class_name="FluxPipeline",
                transformer=["diffusers", "FluxTransformer2DModel"],
            ),
            r"FluxPipeline has a transformer \(FluxTransformer2DModel\)",
        ),
        (
            lambda folder: edit(folder / "model_index.json", controlnet=["diffusers", "ControlNetModel"]),
            r"has a controlnet \(ControlNetModel\)",
        ),
        (
            lambda folder: shutil.rmtree(folder / "vae"),
            r"vae: missing, though model_index\.json names it; complete the",
        ),
        (lambda folder: (folder / "scheduler" / "scheduler_config.json").unlink(), r"scheduler_config\.json: missing"),
        (
            lambda folder: edit(folder / "scheduler" / "scheduler_config.json", prediction_type="flow"),
            r"scheduler_config\.json: prediction_type=flow; allowed: epsilon, v_prediction, sample",
        ),
        (
            lambda folder: (folder / "scheduler" / "scheduler_config.json").write_text(
                '{"_class_name": "FlowMatchEulerDiscreteScheduler"}'
            ),
            r"scheduler_config\.json: FlowMatchEulerDiscreteScheduler has no beta_schedule",
        ),
        (lambda folder: (folder / "unet" / "config.json").unlink(), r"unet/config\.json: missing"),
        (
            lambda folder: (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink(),
            r"unet: has no weights: diffusion_pytorch_model\.safetensors is missing; complete the folder",
        ),
        (
            lambda folder: rename(folder / "text_encoder", "model.safetensors", "weights.safetensors"),
            r"text_encoder: has no weights: model\.safetensors is missing \(there is weights\.safetensors\)",
        ),
        (
            lambda folder: rename(
                folder / "unet", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.incomplete"
            ),
            r"unet: has no weights: .* the download was interrupted \(\S+\.incomplete is left\): run it again",
        ),
        (
            lambda folder: pickle_weights(folder / "vae"),
            r"vae: has only pickled weights \(diffusion_pytorch_model\.bin\)",
        ),
        (
            lambda folder: cut(folder / "vae" / "diffusion_pytorch_model.safetensors"),
            r"vae/diffusion_pytorch_model\.safetensors: cut short, or no safetensors file .*download it again",
        ),
        (
            lambda folder: (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b""),
            r"vae/diffusion_pytorch_model\.safetensors: cut short",
        ),
        (
            lambda folder: (folder / "unet" / "diffusion_pytorch_model.safetensors").write_text(POINTER),
            r"unet/diffusion_pytorch_model\.safetensors: a Git LFS pointer, .* run `git lfs pull` in ",
        ),
        (lambda folder: (folder / "model_index.json").write_text(POINTER), r"model_index\.json: a Git LFS pointer"),
        (lambda folder: (folder / "vae" / "config.json").write_text(POINTER), r"vae/config\.json: a Git LFS pointer"),
        (lambda folder: (folder / "tokenizer" / "vocab.json").write_text(POINTER), r"vocab\.json: a Git LFS pointer"),
        (lambda folder: (folder / "tokenizer" / "merges.txt").unlink(), r"tokenizer/merges\.txt: missing"),
        (
            lambda folder: edit(folder / "tokenizer" / "tokenizer_config.json", model_max_length=77),
            r"model_max_length is 77, but the text encoder has 16 positions; set it to 16",
        ),
        (
            lambda folder: edit(
                folder / "tokenizer" / "vocab.json", **{f"extra{token}": 600 + token for token in range(5)}
            ),
            r"tokenizer: its tokens go up to number \d+, but .*text_encoder knows \d+",
        ),
        (
            lambda folder: edit(folder / "unet" / "config.json", sample_size=None),
            r"config\.json: sample_size is missing",
        ),
        *(
            (
                lambda folder, value=value: edit(folder / "unet" / "config.json", sample_size=value),
                rf"unet/config\.json: sample_size is {re.escape(str(value))}; set the latents' height and width",
            )
            for value in ("x", 0, [8], [8, 8, 8])
        ),
        *(
            (
                lambda folder, value=value: edit(folder / "vae" / "config.json", scaling_factor=value),
                rf"vae/config\.json: scaling_factor is {value}; a positive number is needed",
            )
            for value in (None, 0, -1.5, "x", True)
        ),
        (
            lambda folder: edit(folder / "vae" / "config.json", shift_factor="x"),
            r"vae/config\.json: shift_factor is x; a finite number or null",
        ),
        *(
            (
                lambda folder, fields=fields: edit(folder / "scheduler" / "scheduler_config.json", **fields),
                rf"scheduler/scheduler_config\.json: {next(iter(fields))} is ",
            )
            for fields in (
                {"beta_start": 2.0},
                {"beta_end": "x"},
                {"trained_betas": [0.1, -0.1]},
                {"num_train_timesteps": 0},
            )
        ),
        (
            lambda folder: edit(folder / "unet" / "config.json", class_embed_type="timestep"),
            r"unet: the weights lack .* class_embedding",
        ),
        (
            lambda folder: edit(folder / "unet" / "config.json", cross_attention_dim=32),
            r"unet: cannot be loaded as UNet2DConditionModel .*config\.json and weights must belong together",
        ),
        (lambda folder: poison(folder / "unet"), r"unet: \S+ has NaN or infinite values in float32; download"),
        (lambda folder: poison(folder / "vae"), r"vae: \S+ has NaN or infinite values"),
        (lambda folder: poison(folder / "text_encoder"), r"text_encoder: \S+ has NaN or infinite values"),
    ],
)
def test_damaged_folders_are_named(change: Edit, words: str, broken: Path) -> None:
    change(broken)
    with pytest.raises(UserError, match=words) as error:
        load_prior(PriorRecipe(path=str(broken)), "cpu")
    assert "\n" not in str(error.value)
    assert str(broken) in str(error.value)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def rename(folder: Path, old: str, new: str) -> None:
    (folder / old).rename(folder / new)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def pickle_weights(folder: Path) -> None:
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({}, folder / "diffusion_pytorch_model.bin")


def poison(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[-1] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})


def test_what_is_no_prior_folder(tiny_prior: Path, tmp_path: Path) -> None:
    def refuse(path: Path, words: str) -> None:
        with pytest.raises(UserError, match=words):
            load_prior(PriorRecipe(path=str(path)), "cpu")

    refuse(
        tiny_prior / "unet", r"the folder is one component \(UNet2DConditionModel\); prior\.path is the folder of a w"
    )
    checkpoint = tmp_path / "v1-5-pruned.safetensors"
    checkpoint.write_bytes(b"")
    refuse(checkpoint, r"prior\.path: .*a single-file checkpoint; .*from_single_file\('v1-5-pruned\.safetensors'\)")
    refuse(tmp_path, r"model_index\.json: missing; v1-5-pruned\.safetensors is a single-file checkpoint")
    (tmp_path / "notes.txt").write_text("")
    refuse(tmp_path / "notes.txt", r"prior\.path: .*notes\.txt: a file; a prior is a folder")


def test_half_downloaded_snapshot_of_the_hub(broken: Path, tmp_path: Path) -> None:
    """Its cache keeps unfinished files beside the snapshot, whose links lead to nothing yet."""
    folder = tmp_path / "models--some--model" / "snapshots" / "0"
    folder.parent.mkdir(parents=True)
    broken.rename(folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "unet" / "diffusion_pytorch_model.safetensors").symlink_to("../../../blobs/abc")
    (tmp_path / "models--some--model" / "blobs").mkdir()
    (tmp_path / "models--some--model" / "blobs" / "abc.incomplete").touch()
    with pytest.raises(UserError, match=r"unet: has no weights: .* interrupted \(abc\.incomplete is left\)"):
        load_prior(PriorRecipe(path=str(folder)), "cpu")


def test_shards_are_read_and_a_missing_one_is_named(tiny_prior: Path, broken: Path) -> None:
    with quiet():
        unet: Any = diffusers.UNet2DConditionModel.from_pretrained(tiny_prior / "unet")
        (broken / "unet" / "diffusion_pytorch_model.safetensors").unlink()
        unet.save_pretrained(broken / "unet", max_shard_size="100KB")
    shards = sorted((broken / "unet").glob("*.safetensors"))
    assert len(shards) > 2
    loaded = load_prior(PriorRecipe(path=str(broken)), "cpu").unet.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in unet.state_dict().items())
    shards[1].unlink()
    with pytest.raises(UserError, match=rf"{shards[1].name}: missing, though the index beside it names it"):
        load_prior(PriorRecipe(path=str(broken)), "cpu")
    (broken / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text('{"weight_map": {"a": "../b"}}')
    with pytest.raises(UserError, match=r"index\.json: names no shards in a weight_map"):
        load_prior(PriorRecipe(path=str(broken)), "cpu")


def test_half_precision_files_are_read_where_there_are_no_others(
    prior_builder: Callable[..., Path], tiny_prior: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = prior_builder(tmp_path / "fp16", variant="fp16")
    assert (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    with caplog.at_level("INFO", "diffdfkd"):
        loaded, plain = (load_prior(PriorRecipe(path=str(path)), "cpu") for path in (folder, tiny_prior))
    assert caplog.text.count("only fp16 weights are there") == 3
    for component in ("unet", "vae", "text_encoder"):
        tensors = getattr(loaded, component).state_dict()
        assert all(torch.equal(tensors[name], t) for name, t in getattr(plain, component).state_dict().items())


def test_half_precision_is_fetched_only_where_there_is_nothing_else(
    broken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename(broken / "unet", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")
    asked = []

    def fetch(repository: str, *, revision: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(broken)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert find_prior(PriorRecipe(path="some/model", revision="0" * 40)) == broken
    assert asked[2:] == [["unet/diffusion_pytorch_model*fp16*.safetensors", "unet/diffusion_pytorch_model*fp16*.json"]]
    assert not any(fnmatch.fnmatch("unet/diffusion_pytorch_model.fp16.safetensors", pattern) for pattern in HUB_FILES)


def test_another_kind_of_model_is_refused_before_its_weights_are_fetched(
    broken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(broken / "model_index.json", transformer=["diffusers", "SD3Transformer2DModel"])
    asked = []

    def fetch(repository: str, *, revision: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(broken)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    with pytest.raises(UserError, match="SD3Transformer2DModel"):
        find_prior(PriorRecipe(path="some/model", revision="0" * 40))
    assert asked == [["model_index.json"]]


def test_code_of_a_folder_is_never_run(broken: Path) -> None:
    """Neither what configurations name as their own modules nor Python files beside them."""
    ran = broken / "ran"
    code = f"open({str(ran)!r}, 'w')\nclass CLIPTextModel: pass\nclass UNet2DConditionModel: pass\n"
    for component in ("unet", "text_encoder", "tokenizer", "."):
        (broken / component / "evil.py").write_text(code)
    edit(broken / "text_encoder" / "config.json", auto_map={"AutoModel": "evil.CLIPTextModel"})
    edit(broken / "tokenizer" / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.CLIPTokenizer", None]})
    edit(broken / "model_index.json", unet=["evil", "UNet2DConditionModel"])
    assert type(load_prior(PriorRecipe(path=str(broken)), "cpu").unet) is diffusers.UNet2DConditionModel
    assert not ran.exists()


def test_tensors_that_nothing_uses_are_said(broken: Path, caplog: pytest.LogCaptureFixture) -> None:
    (file,) = (broken / "unet").glob("*.safetensors")
    save_file({**load_file(file), "extra.weight": torch.zeros(2)}, file, metadata={"format": "pt"})
    load_prior(PriorRecipe(path=str(broken)), "cpu")
    assert (
        "unet: 1 tensors are no part of its UNet2DConditionModel and are left aside, such as extra.weight"
        in caplog.text
    )


def test_images_of_other_channels_are_refused(prior_builder: Callable[..., Path], tmp_path: Path) -> None:
    folder = prior_builder(tmp_path / "four", channels=4)
    with pytest.raises(UserError, match=r"vae: gives images of 4 channels; grey \(1\) and colour \(3\) are converted"):
        load_prior(PriorRecipe(path=str(folder)), "cpu")


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_incomplete_weights_are_refused(broken: Path, component: str) -> None:
    (weights,) = (broken / component).glob("*.safetensors")
    tensors = load_file(weights)
    lost = sorted(tensors)[0]
    del tensors[lost]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"{component}: the weights lack 1 tensors"):
        load_prior(PriorRecipe(path=str(broken)), "cpu")


def test_parts_that_do_not_fit(prior_builder: Callable[..., Path], broken: Path) -> None:
    with quiet():
        vae: Any = diffusers.AutoencoderTiny(
            in_channels=1,
            out_channels=1,
            encoder_block_out_channels=(8,),
            decoder_block_out_channels=(8,),
            num_encoder_blocks=(1,),
            num_decoder_blocks=(1,),
            latent_channels=3,
        )
        vae.save_pretrained(broken / "vae")
    edit(broken / "model_index.json", vae=["diffusers", "AutoencoderTiny"])
    with pytest.raises(UserError, match=r"unet: takes 4 and gives 4 channels, but the latents of .*vae have 3"):
        load_prior(PriorRecipe(path=str(broken)), "cpu")


def test_embeddings_of_another_width(broken: Path) -> None:
    import transformers

    with quiet():
        transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                vocab_size=600,
                hidden_size=8,
                intermediate_size=8,
                num_hidden_layers=1,
                num_attention_heads=1,
                max_position_embeddings=16,
            )
        ).save_pretrained(broken / "text_encoder")
    with pytest.raises(UserError, match=r"unet: cross_attention_dim is 16, but the embeddings of .* are 8 wide"):
        load_prior(PriorRecipe(path=str(broken)), "cpu")


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: mit\ntags: [a]\n---\ntext", "mit"),
        ("---\nlicense: other\nlicense_name: openrail-x\n---\n", "openrail-x"),
        ("no front matter", None),
        ("---\n: [\n---\n", None),
    ],
)
def test_licence_of_the_model_card(card: str, expected: str | None, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card)
    assert read_licence(tmp_path / "README.md") == expected
    assert read_licence(tmp_path / "missing.md") is None


def test_what_is_not_followed_is_said(broken: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load_prior(PriorRecipe(path=str(broken)), "cpu")
    assert not caplog.messages
    edit(broken / "unet" / "config.json", sample_size=[8, 16])
    prior = load_prior(PriorRecipe(path=str(broken), revision="0" * 40), "cpu")
    assert prior.latent_shape == (4, 8, 16) and prior.image_size == (32, 64)
    assert [message.partition(", ")[0] for message in caplog.messages] == [
        f"prior.revision: {'0' * 40} is not looked at",
        f"{broken / 'unet' / 'config.json'}: sample_size is 8 x 16",
    ]
