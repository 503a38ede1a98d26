"""The modules of recipes that are commands of their own: a mistake is one line and exit code 2."""

import runpy
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("module", "arguments", "problem"),
    [
        ("pretrain_prior", ["--images", "{none}", "--output", "{none}/prior"], "metadata.jsonl: not found"),
        ("render_icons", ["glyphs", "--iconify", "{none}"], "--iconify: "),
        ("train_teacher", ["--data", "{none}", "--output", "{none}/teacher.safetensors"], "no such file"),
        ("render_fonts", ["glyphs", "--packages", "{none}"], "--packages: no font that may be used below"),
        ("train_teacher", ["digits", "--data", "{none}", "--output", "{none}/t.safetensors"], "cannot be read"),
        ("train_teacher", ["cifar", "--output", "{none}/t.safetensors"], "DATA_SET: got cifar; one of fashion, digits"),
        (
            "train_teacher",
            ["--architecture", "resnet99", "--output", "{none}/t.safetensors"],
            "--architecture: no architecture resnet99",
        ),
        (
            "train_teacher",
            ["--architecture", "wrn_16_1", "--width", "3", "--output", "{none}/t.safetensors"],
            "--width: unknown option",
        ),
        ("train_teacher", ["--precision", "float8", "--output", "{none}/t.safetensors"], "--precision: got float8"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules.*:RuntimeWarning")
def test_mistake_is_one_line_and_exit_code_2(
    module: str,
    arguments: list[str],
    problem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    name = f"diffdfkd.recipes.{module}"
    given = [argument.format(none=tmp_path / "none") for argument in arguments]
    monkeypatch.setattr(sys, "argv", [name, *given])
    with pytest.raises(SystemExit) as leaving:
        runpy.run_module(name, run_name="__main__")
    assert leaving.value.code == 2
    last = capfd.readouterr().err.splitlines()[-1]  # a progress bar may come first
    assert last.startswith("error: ") and problem in last


@pytest.mark.parametrize("module", ["pretrain_prior", "render_fonts", "render_icons", "train_teacher"])
@pytest.mark.filterwarnings("ignore:.*found in sys.modules.*:RuntimeWarning")
def test_help_is_printed(module: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    name = f"diffdfkd.recipes.{module}"
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as leaving:
        runpy.run_module(name, run_name="__main__")
    assert leaving.value.code == 0 and "Usage" in capfd.readouterr().out
