"""The corpus of bad inputs, continued: light decoders, guidance intervals and reused features."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bad_input_cases import Arguments, Case, Recipe, Spoil, command, field, given

from diffdfkd.engine.guidance_decoder import GuidanceDecoder, Shape, write_guidance_decoder
from diffdfkd.engine.prior import load_prior
from diffdfkd.engine.recipe import PriorRecipe


def light(change: Callable[[Path], None] = lambda path: None, *, vae: str | None = None, **shape: Any) -> Spoil:
    """A run with a light decoder's file of this shape, changed after it was written; by default it would fit."""

    def spoil(folder: Path, recipe: Recipe) -> Arguments:
        from diffdfkd.engine.guidance_decoder import vae_digest

        digest = vae
        if digest is None:
            digest = vae_digest(load_prior(PriorRecipe(path=recipe["prior"]), "cpu"))
        fields = {"form": "linear", "latent_channels": 4, "channels": 1, "scale": 4, "width": 4, **shape}
        path = folder / "light.safetensors"
        write_guidance_decoder(GuidanceDecoder(Shape(**fields), digest), path, {})
        change(path)
        return command(folder, recipe, f"guidance.decoder={path}")

    return spoil


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def flip(path: Path) -> None:
    """One bit of the last weight."""
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def teacher_as_decoder(folder: Path, recipe: Recipe) -> Arguments:
    return command(folder, recipe, f"guidance.decoder={recipe['teacher']['weights']}")


INTERVAL = "synthesis.guidance_interval"
CASES = [
    Case(
        "no light decoder there",
        given("guidance.decoder=/nowhere.safetensors"),
        "guidance.decoder: /nowhere.safetensors: no such file",
        ("diffdfkd decoder", "'full'"),
        mended=True,
    ),
    Case("decoder of other latents", light(latent_channels=8), "guidance.decoder: {folder}/light", ("the prior 4",)),
    Case("decoder of colour images", light(channels=3), "guidance.decoder: {folder}/light", ("the prior 1",)),
    Case("decoder of another VAE", light(vae="0" * 64), "guidance.decoder: {folder}/light", ("another VAE",)),
    Case("decoder cut short", light(cut), "guidance.decoder: {folder}/light", ("cut short",)),
    Case("decoder with a changed bit", light(flip), "guidance.decoder: {folder}/light", ("not those that were",)),
    Case("teacher as decoder", teacher_as_decoder, "guidance.decoder: ", ("is no guidance decoder",)),
    field(
        "guidance.decoder_window=[0,0.5]",
        "guidance.decoder_window: got [0.0, 0.5] with guidance.decoder=full",
        "leave the window out",
    ),
    field(
        "guidance={decoder: a.safetensors, decoder_window: [0.9, 1.0]}",
        "guidance.decoder_window: [0.9, 1.0] holds none of the guided steps",
        "widen it",
    ),
    field("guidance.decoder_window=[0.5]", "guidance.decoder_window", "[0.0, 0.8]"),
    field(f"{INTERVAL}=[0.8,0.2]", f"{INTERVAL}: got [0.8, 0.2]", "start must lie before the end"),
    field(f"{INTERVAL}=[0.1,0.2]", f"{INTERVAL}: [0.1, 0.2] holds none of the 3 steps", "widen it"),
    Case(
        "interval of no guidance",
        given("synthesis.guidance_scale=1", f"{INTERVAL}=[0,0.5]"),
        f"{INTERVAL}: got [0.0, 0.5] with synthesis.guidance_scale=1",
        ("leave the interval out",),
    ),
    Case(
        "cfg outside the interval",
        given("guidance.rho_rule=cfg", f"{INTERVAL}=[0,0.5]"),
        "guidance.rho_rule: cfg needs classifier-free guidance, but 1 guided step(s) lie outside",
        ("guidance.window inside it",),
    ),
    field("synthesis.reuse_every=0", "synthesis.reuse_every: got 0", "greater than or equal to 1"),
    field("synthesis.reuse_every=4", "synthesis.reuse_every: got 4 with synthesis.steps=3", "give less"),
    Case(
        "reuse in mode exact",
        given("guidance.mode=exact", "synthesis.reuse_every=2"),
        "synthesis.reuse_every: got 2 with guidance.mode=exact",
        ("guidance.mode=clean",),
    ),
    Case(
        "reuse on an engine",
        given("engine.unet=onnxruntime", "synthesis.reuse_every=2"),
        "synthesis.reuse_every: got 2 with engine.unet=onnxruntime",
        ("engine.unet=eager",),
    ),
    Case(
        "reuse in another precision",
        given("engine.precision=bfloat16", "synthesis.reuse_every=2"),
        "synthesis.reuse_every: got 2 with engine.precision=bfloat16",
        ("leave it out",),
    ),
    Case(
        "decoder to a folder",
        lambda folder, recipe: [*command(folder, recipe, name="decoder"), "--output", str(folder)],
        "--output: {folder} does not end in .safetensors",
        (),
    ),
    Case(
        "decoder of another form",
        lambda folder, recipe: [
            *command(folder, recipe, name="decoder"),
            *("--output", str(folder / "a.safetensors"), "--form", "cubic"),
        ],
        "--form: got cubic",
        ("convolutions, linear",),
    ),
]
