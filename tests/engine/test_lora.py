import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.prior import load_prior, quiet
from diffdfkd.engine.recipe import LoraRecipe, PriorRecipe

Writer = Callable[..., dict[str, tuple[torch.Tensor, torch.Tensor]]]
STYLES = ("kohya", "diffusers", "peft")


def load(prior: Path, *loras: LoraRecipe | Path, **options: Any) -> Any:
    recipes = [lora if isinstance(lora, LoraRecipe) else LoraRecipe(path=str(lora)) for lora in loras]
    return load_prior(PriorRecipe(path=str(prior), loras=recipes, **options), "cpu")


def weights(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """State dict under names that always have CLIP's own level, as LoRA files do."""
    clip = type(network).__name__ == "CLIPTextModel"
    prefix = "text_model." if clip else ""
    return {prefix + name.removeprefix(prefix): tensor for name, tensor in network.state_dict().items()}


def closed_form(weight: torch.Tensor, update: tuple[torch.Tensor, torch.Tensor], factor: float) -> torch.Tensor:
    """W + factor B A in float64, a convolution's matrices contracted over the rank alone."""
    down, up = (matrix.double() for matrix in update)
    if weight.dim() == 2:
        return weight.double() + factor * up @ down
    return weight.double() + factor * torch.einsum("or,rikl->oikl", up[:, :, 0, 0], down)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("family", ["tiny_sd1", "tiny_sd2"])
def test_fused_weights_are_the_closed_form(
    family: str, style: str, lora_writer: Writer, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Linear layers and 1x1 and 3x3 convolutions; everything else, names and classes included, stays as it was."""
    folder = request.getfixturevalue(family)
    # Early diffusers files say nothing of alpha: it is the rank.
    alpha = 2.0 if style == "diffusers" else 0.5
    updates = lora_writer(tmp_path / "lora.safetensors", folder, style=style, alpha=alpha, text_encoder=True)
    before, after = load(folder), load(folder, LoraRecipe(path=str(tmp_path / "lora.safetensors"), scale=1.5))
    kernels = set()
    for component in ("unet", "text_encoder"):
        plain, fused = weights(getattr(before, component)), weights(getattr(after, component))
        assert list(plain) == list(fused)
        assert [*map(type, getattr(before, component).modules())] == [*map(type, getattr(after, component).modules())]
        for name, weight in plain.items():
            update = updates.get(f"{component}.{name.removesuffix('.weight')}") if name.endswith(".weight") else None
            if update is None:
                assert torch.equal(weight, fused[name])
                continue
            kernels.add(tuple(weight.shape[2:]))
            torch.testing.assert_close(
                fused[name].double(), closed_form(weight, update, 1.5 * alpha / 2), rtol=0, atol=1e-6
            )
            assert (fused[name] - weight).abs().max() > 1e-4
    assert kernels >= {(), (3, 3)} and ((1, 1) in kernels)
    assert not any(parameter.requires_grad for parameter in after.unet.parameters())


@pytest.mark.parametrize("style", STYLES)
def test_fused_as_by_the_stock_pipeline(style: str, tiny_sd1: Path, lora_writer: Writer, tmp_path: Path) -> None:
    """Diffusers' own loader, which converts the keys by rules of its own and fuses through PEFT."""
    pytest.importorskip("peft")
    lora_writer(tmp_path / "lora.safetensors", tiny_sd1, style=style, text_encoder=True)
    with quiet():
        pipeline: Any = diffusers.StableDiffusionPipeline.from_pretrained(tiny_sd1, safety_checker=None)
        pipeline.load_lora_weights(tmp_path, weight_name="lora.safetensors")
        pipeline.fuse_lora(lora_scale=0.7)
        pipeline.unload_lora_weights()
    ours = load(tiny_sd1, LoraRecipe(path=str(tmp_path / "lora.safetensors"), scale=0.7))
    for component in ("unet", "text_encoder"):
        theirs = weights(getattr(pipeline, component))
        for name, weight in weights(getattr(ours, component)).items():
            torch.testing.assert_close(weight, theirs[name], rtol=0, atol=1e-6)


def test_several_in_order_and_alpha_of_each_layer(tiny_sd1: Path, lora_writer: Writer, tmp_path: Path) -> None:
    first = lora_writer(tmp_path / "first.safetensors", tiny_sd1, alpha=3.0)
    second = lora_writer(tmp_path / "second.safetensors", tiny_sd1, style="peft", rank=4, seed=1)
    name = "mid_block.resnets.0.conv1"
    metadata = {"unet.lora_alpha": 8, "unet.alpha_pattern": {f"^{name}": 2}, "unet.use_rslora": True}
    save_file(
        load_file(tmp_path / "second.safetensors"),
        tmp_path / "second.safetensors",
        metadata={"lora_adapter_metadata": json.dumps(metadata)},
    )
    before = weights(load(tiny_sd1).unet)
    after = weights(load(tiny_sd1, tmp_path / "first.safetensors", tmp_path / "second.safetensors").unet)
    for layer, alpha in ((name, 2), ("mid_block.resnets.1.conv1", 8)):
        expected = closed_form(before[f"{layer}.weight"], first[f"unet.{layer}"], 3 / 2)
        expected = closed_form(expected, second[f"unet.{layer}"], alpha / 4**0.5)
        torch.testing.assert_close(after[f"{layer}.weight"].double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "patterns",
    [
        {"conv1": 2, r"mid_block\..*": 5},  # of several that match the first counts
        {r"mid_block\..*": 5, "conv1": 2},
        {r"^down_blocks\..*\.to_q": 5},
        {r".*\.attentions\.\d+\.transformer_blocks\.\d+\..*to_(q|k)": 5},
        {"mid_block": 3, "onv1": 4},  # neither is a whole name
    ],
)
def test_alpha_patterns_mean_what_peft_takes_them_for(
    patterns: dict[str, int], tiny_sd1: Path, lora_writer: Writer, tmp_path: Path
) -> None:
    utilities = pytest.importorskip("peft.utils.other")
    file = tmp_path / "lora.safetensors"
    updates = lora_writer(file, tiny_sd1, style="peft", rank=4)
    metadata = {"unet.lora_alpha": 8, "unet.alpha_pattern": patterns}
    save_file(load_file(file), file, metadata={"lora_adapter_metadata": json.dumps(metadata)})
    before, after = weights(load(tiny_sd1).unet), weights(load(tiny_sd1, file).unet)
    for key, update in updates.items():
        layer = key.removeprefix("unet.")
        alpha = patterns.get(utilities.get_pattern_key(patterns, layer), 8)
        expected = closed_form(before[f"{layer}.weight"], update, alpha / 4)
        torch.testing.assert_close(after[f"{layer}.weight"].double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_rounded_once(dtype: str, tiny_sd1: Path, tiny_lcm_lora: Path) -> None:
    full, half = load(tiny_sd1, tiny_lcm_lora).unet, load(tiny_sd1, tiny_lcm_lora, dtype=dtype).unet
    for name, weight in half.state_dict().items():
        assert weight.dtype == getattr(torch, dtype)
        assert torch.equal(weight, full.state_dict()[name].to(weight.dtype))


def test_loading_is_quiet_and_the_networks_digest_knows_the_lora(
    tiny_sd1: Path, tiny_lcm_lora: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from diffdfkd.engine.plan import weights_digest

    fused = load(tiny_sd1, tiny_lcm_lora, dtype="bfloat16")
    assert capfd.readouterr() == ("", "")
    assert weights_digest([fused.unet]) != weights_digest([load(tiny_sd1, dtype="bfloat16").unet])


def test_folder_names_its_only_file_or_the_published_one(tiny_sd1: Path, tiny_lcm_lora: Path, tmp_path: Path) -> None:
    expected = load(tiny_sd1, tiny_lcm_lora).unet.state_dict()["conv_in.weight"]
    content = tiny_lcm_lora.read_bytes()
    (tmp_path / "style.safetensors").write_bytes(content)
    assert torch.equal(load(tiny_sd1, tmp_path).unet.state_dict()["conv_in.weight"], expected)
    (tmp_path / "other.safetensors").write_bytes(b"no LoRA")
    with pytest.raises(
        UserError, match=r"prior\.loras\.0\.path: .* has 2 .*other.*style.*; name one with prior\.loras"
    ):
        load(tiny_sd1, tmp_path)
    load(tiny_sd1, LoraRecipe(path=str(tmp_path), file="style.safetensors"))
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(content)
    load(tiny_sd1, tmp_path)


def test_hub_repository_is_fetched_at_its_commit(
    tiny_sd1: Path, tiny_lcm_lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fetch(repository: str, *, revision: str, allow_patterns: list[str]) -> str:
        asked.append((repository, revision, allow_patterns))
        return str(tiny_lcm_lora.parent)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    lora = LoraRecipe(path="latent-consistency/lcm-lora-sdv1-5", revision="0" * 40)
    load(tiny_sd1, lora)
    assert asked == [(lora.path, "0" * 40, ["pytorch_lora_weights.safetensors"])]
    with pytest.raises(UserError, match=r"prior\.loras\.0\.file: .* has no x\.safetensors"):
        load(tiny_sd1, lora.model_copy(update={"file": "x.safetensors"}))


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"path": "./lora.safetensors"}, r"prior\.loras\.0\.path: lora\.safetensors: no such file"),
        ({"path": "./no/such/folder"}, r"prior\.loras\.0\.path: \./no/such/folder: no such folder or file"),
        ({"path": "someone/lora"}, r"prior\.loras\.0\.revision: someone/lora .* commit .* got none"),
        ({"path": "someone/lora", "revision": "main"}, r"prior\.loras\.0\.revision: .* got main"),
        ({"path": "someone/lora", "file": "../x"}, r"prior\.loras\.0\.file: got \.\./x; the name of a file inside"),
    ],
)
def test_paths_that_are_refused(lora: dict[str, Any], words: str, tiny_sd1: Path) -> None:
    with pytest.raises(UserError, match=words):
        load(tiny_sd1, LoraRecipe(**lora))


KEY = "lora_unet_mid_block_resnets_0_conv1"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: {"conv_in.weight": torch.zeros(2, 2)}, r"no LoRA; its tensors are conv_in\.weight, not lora_"),
        (
            lambda tensors: {f"{KEY.replace('unet', name)}.lora_up.weight": torch.zeros(2, 2) for name in "wxyz"},
            r"4 of 4 keys match nothing of this prior: (lora_[wxy]_mid\S+, ){3}\.\.\.; take a LoRA",
        ),
        (
            lambda tensors: {**tensors, f"{KEY}.dora_scale": torch.zeros(2)},
            r"1 tensors are of no plain LoRA: .*dora_sc",
        ),
        (lambda tensors: {**tensors, f"{KEY}.hada_w1_a": torch.zeros(2)}, r"no plain LoRA: .*hada_w1_a; LoHa, LoKr"),
        (lambda tensors: {**tensors, "unet.mid_block.resnets.0.conv1.alpha": torch.tensor(1.0)}, r"conv1 twice"),
        (
            lambda tensors: {**tensors, f"{KEY}.lora_up.weight": tensors[f"{KEY}.lora_up.weight"] * float("nan")},
            r"lora_up\.weight has NaN or infinite values",
        ),
        (
            lambda tensors: {**tensors, f"{KEY}.lora_up.weight": torch.zeros(2, 2).to(torch.float8_e4m3fn)},
            r"lora_up\.weight is float8_e4m3fn; convert it to float32, float16",
        ),
        (lambda tensors: {**tensors, f"{KEY}.alpha": torch.tensor(1j)}, r"alpha is complex64; convert it"),
        (lambda tensors: {**tensors, f"{KEY}.alpha": torch.tensor(float("inf"))}, r"alpha has NaN or infinite values"),
        (
            lambda tensors: {name: tensor for name, tensor in tensors.items() if name != f"{KEY}.lora_up.weight"},
            r"conv1 has only one of its two matrices",
        ),
        (
            lambda tensors: {**tensors, f"{KEY}.lora_down.weight": torch.zeros(3, 16, 3, 3)},
            r"conv1 has matrices \[3, 16, 3, 3\] and \[16, 2, 1, 1\], which do not update a weight \[16, 16, 3, 3\]",
        ),
    ],
)
def test_files_that_are_refused(
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    words: str,
    tiny_sd1: Path,
    tiny_lcm_lora: Path,
    tmp_path: Path,
) -> None:
    file = tmp_path / "lora.safetensors"
    save_file(change(load_file(tiny_lcm_lora)), file)
    with pytest.raises(UserError, match=rf"prior\.loras\.0\.path: {file}: .*{words}"):
        load(tiny_sd1, file)


def test_lora_of_another_family(tiny_sd1: Path, tiny_sd2: Path, lora_writer: Writer, tmp_path: Path) -> None:
    """An SD-2 LoRA on SD 1: the layers' names are the same, their widths are not."""
    lora_writer(tmp_path / "lora.safetensors", tiny_sd2)
    with pytest.raises(
        UserError, match=r"which do not update a weight .*; take a LoRA of the prior's own model family"
    ):
        load(tiny_sd1, tmp_path / "lora.safetensors")


def test_other_files(tiny_sd1: Path, tiny_lcm_lora: Path, tmp_path: Path) -> None:
    def refuse(words: str, name: str = "lora.safetensors") -> None:
        with pytest.raises(UserError, match=words):
            load(tiny_sd1, tmp_path / name)

    (tmp_path / "lora.safetensors").write_bytes(tiny_lcm_lora.read_bytes()[:-10])
    refuse("lora.safetensors: cut short")
    (tmp_path / "lora.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refuse("a Git LFS pointer")
    save_file(load_file(tiny_lcm_lora), tmp_path / "lora.safetensors", metadata={"lora_adapter_metadata": "[]"})
    refuse("its lora_adapter_metadata is no JSON object")
    torch.save(load_file(tiny_lcm_lora), tmp_path / "lora.bin")
    refuse(r"read from \.safetensors alone", "lora.bin")


def test_patterns_that_are_none_are_refused(tiny_sd1: Path, lora_writer: Writer, tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    lora_writer(file, tiny_sd1, style="peft")
    save_file(load_file(file), file, metadata={"lora_adapter_metadata": json.dumps({"unet.alpha_pattern": 5})})
    with pytest.raises(UserError, match=rf"prior\.loras\.0\.path: {file}: alpha_pattern in its .* is 5; an object of"):
        load(tiny_sd1, file)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("(", "which is no regular expression"),
        ("(a+)+b", "which could take for ever"),
        (".*.*.*.*b", "which could take for ever"),
        (".?" * 40 + "Z", "which could take for ever"),
        ("(.|.)" * 20 + "Z", "which could take for ever"),
        ("a" * 301, "which could take for ever"),
    ],
)
def test_expressions_of_a_stranger_are_simple_or_refused(
    pattern: str, words: str, tiny_sd1: Path, lora_writer: Writer, tmp_path: Path
) -> None:
    file = tmp_path / "lora.safetensors"
    lora_writer(file, tiny_sd1, style="peft")
    save_file(
        load_file(file), file, metadata={"lora_adapter_metadata": json.dumps({"unet.alpha_pattern": {pattern: 5}})}
    )
    with pytest.raises(UserError, match=rf"prior\.loras\.0\.path: {file}: alpha_pattern .* {words}"):
        load(tiny_sd1, file)


def test_a_commit_of_a_file_on_this_machine_is_said_to_be_ignored(
    tiny_sd1: Path, tiny_lcm_lora: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        load(tiny_sd1, tiny_lcm_lora)
        assert not caplog.messages
        load(tiny_sd1, LoraRecipe(path=str(tiny_lcm_lora), revision="0" * 40))
    assert caplog.messages == [
        f"prior.loras.0.revision: {'0' * 40} is not looked at, since {tiny_lcm_lora} is on this machine"
    ]
