"""Distillation in several processes, as torchrun and the DeepSpeed launcher start it from the command line."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from diffdfkd.engine.recipe import load_recipe
from diffdfkd.recipes.launch import machine_threads
from diffdfkd.recipes.run import use_device

LAUNCHERS = {
    "torchrun": ("-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"),
    "deepspeed": ("-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--module"),
}


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def launch(launcher: str, recipe: Path, images: Path, output: Path) -> Path:
    """A student of two processes; returns its folder."""
    *options, module = LAUNCHERS[launcher]
    port = ("--master_addr", "127.0.0.1", "--master_port", str(free_port()))
    distill = ("diffdfkd.recipes.cli", "distill", str(recipe), "--images", str(images), f"output={output}")
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, *options, *port, module, *distill, "distillation.steps=6"],
        capture_output=True,
        text=True,
        timeout=240,
        env={**environment, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # Rank 0 alone speaks.
    assert [line.split()[0] for line in done.stdout.splitlines() if line[0] != "["].count("student") == 1
    return output


@pytest.mark.slow
def test_torchrun_and_deepspeed_launch_the_same_distillation(tiny_recipe: Path, tmp_path: Path) -> None:
    images = tmp_path / "images" / "any name"
    images.mkdir(parents=True)
    for i in range(16):
        Image.effect_noise((28, 28), 80).save(images / f"{i}.png")
    students = []
    for launcher in LAUNCHERS:
        folder = launch(launcher, tiny_recipe, images.parent, tmp_path / launcher)
        assert json.loads((folder / "result.json").read_text())["images"] == 16
        events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [event["processes"] for event in events if event["event"] == "distill_start"] == [2]
        students.append((folder / "student" / "student.safetensors").read_bytes())
    assert students[0] == students[1]


@pytest.mark.parametrize(
    ("variables", "threads"),
    [({}, 12), ({"LOCAL_WORLD_SIZE": "4"}, 3), ({"LOCAL_SIZE": "2"}, 6), ({"LOCAL_SIZE": "99"}, 1)],
)
def test_processes_of_a_launch_share_the_cores(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], threads: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(12))
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert machine_threads() == threads


def test_launched_processes_take_their_share_of_a_runs_threads(
    monkeypatch: pytest.MonkeyPatch, tiny_recipe: Path
) -> None:
    recipe = load_recipe(tiny_recipe, ["threads=8"])
    taken: list[int] = []
    monkeypatch.setattr("torch.set_num_threads", taken.append)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(12))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    use_device(recipe)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    use_device(recipe)
    assert taken == [8, 3]
