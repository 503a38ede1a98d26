"""One synthesis in a process of its own, and what its journal says of it."""

import hashlib
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.journal import read_journal
from diffdfkd.engine.memory import SIGNS
from diffdfkd.engine.recipe import Recipe
from diffdfkd.engine.run_recipe import read_run_recipe

LACKING = ("fit into memory", "of memory at the very least", "have more memory", *SIGNS)
"""In what a run says where its batch is too large."""
OF_BATCHES = ("synthesis.batch_size: ", "engine.", "unexpected ")
"""How it begins then. Of prior or teacher, which no smaller batch makes fit, it begins with their own field."""


class Synthesis(NamedTuple):
    """What one run came to.

    Rates are those of whole shards after the first, which pays for what comes once; of what there is, where there is no
    second whole one.
    """

    rate: float
    """Images a second."""
    writing: float
    """Share of the shards' seconds that encoding and writing took of the processor, or had denoising wait."""
    wall: float
    """Seconds, start of the process included."""
    memory: float
    """MiB, the peak of the process, or of the GPU's allocator."""
    digest: str
    """SHA-256 of the shards."""
    recipe: Recipe
    """As the run froze it: engines, device and threads that were left to it are settled."""


class TooLarge(UserError):
    """The batch does not fit into memory."""


def synthesize(recipe: str, overrides: Sequence[str], output: Path, *, name: str) -> Synthesis:
    """Run ``diffdfkd synthesize``; raises TooLarge, or UserError with ``name`` and what the run said last."""
    command = [sys.executable, "-m", "diffdfkd.recipes.cli", "synthesize", recipe, *overrides, f"output={output}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no word"])[-1].removeprefix("error: ")
        large = said.startswith(OF_BATCHES) and any(words in said for words in LACKING)
        if done.returncode < 0:
            said = f"ended by signal {-done.returncode}"
            # By the system for want of memory, when nobody else did it.
            large = done.returncode == -signal.SIGKILL
        raise (TooLarge if large else UserError)(f"{name}: {said}")
    rows = list(read_journal(output / "metrics.jsonl"))
    shards = [row for row in rows if row["event"] == "shard"]
    samples = [row["images"] + row["dropped"] for row in shards]
    steady = [row for row, count in zip(shards[1:], samples[1:], strict=True) if count == samples[0]]
    steady = steady or shards[1:] or shards
    digest = hashlib.sha256()
    for path in sorted((output / "synthetic").rglob("*.tar")):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    seconds = sum(row["seconds"] for row in steady)
    return Synthesis(
        rate=sum(row["images"] for row in steady) / seconds,
        writing=sum(row["writing_seconds"] for row in steady) / seconds,
        wall=rows[-1]["time"] - rows[0]["time"] + rows[0].get("seconds_before", 0.0),
        memory=max(row["peak_memory_mib"] for row in rows if row.get("peak_memory_mib") is not None),
        digest=digest.hexdigest(),
        recipe=read_run_recipe(output)[0],
    )
