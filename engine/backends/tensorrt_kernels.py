"""Kernels that TensorRT-RTX has compiled for a GPU, kept in a file so that the next process need not."""

import logging
import re
from pathlib import Path
from typing import Any

import torch

from diffdfkd.engine.shards import write_atomic

log = logging.getLogger(__name__)


def kernels_file(base: Path, device: torch.device) -> Path:
    """Where kernels for the device lie: beside ``base``, which names their plan, a file for each kind of GPU."""
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    return base.with_name(f"{base.name}.{name}.kernels")


class KernelCache:
    """TensorRT-RTX's runtime cache of one execution context, in a file.

    https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/inference-library/work-with-runtime-cache.html
    """

    def __init__(self, path: Path, config: Any) -> None:
        self.path = path
        # The configuration does not hold it: let go of, it would end the process.
        self._cache = config.create_runtime_cache()
        self._saved = path.read_bytes() if path.is_file() else b""
        if self._saved and not self._cache.deserialize(self._saved):
            log.info("%s: kernels of another GPU, driver or version; compiled again", path)
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Write what has been compiled since; where the folder cannot be written to, say so and go on."""
        memory = self._cache.serialize()
        content = bytes(memoryview(memory)) if memory is not None else b""
        if not content or content == self._saved:
            return
        try:
            write_atomic(self.path, content)
            self._saved = content
        except OSError as error:
            log.warning("%s: compiled kernels are not kept, %s", self.path, error.strerror)
