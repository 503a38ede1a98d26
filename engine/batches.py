"""Which images a training step sees, as a function of (seed, step, number of images, weights) alone; and reading them.

Nothing here has a state that a resumed run would have to restore.
"""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from diffdfkd.engine.errors import UserError
from diffdfkd.engine.images import Images

CACHE_BYTES = 256 * 2**20
CHUNK = 2**20


def derive_seed(*parts: int | str) -> int:
    """A seed of 63 bits for a generator, different for each tuple of parts."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def held_back(images: int, holdout: int, seed: int) -> np.ndarray:
    """Sorted indices [holdout] of the images that are never trained on: those whose random priority is lowest.

    The priority hangs on (seed, index) alone. So when the data set grows by appending, an image that is held back
    was held back, or absent, all the time before.
    """
    chosen = np.empty(0, dtype=np.int64)
    key = np.uint64(derive_seed(seed, "holdout"))
    for start in range(0, images, CHUNK):
        candidates = np.concatenate([chosen, np.arange(start, min(start + CHUNK, images), dtype=np.int64)])
        order = np.argsort(_mix(candidates.astype(np.uint64) ^ key), kind="stable")
        chosen = candidates[order[:holdout]]
    return np.sort(chosen)


def _mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer (Steele et al. 2014): a bijection of 64-bit integers that looks random."""
    values = (values + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class Batches:
    """Batches of one rank: its slice of the global batch of each step.

    Epoch after epoch of seeded permutations, laid end to end and cut into batches, so that every image is seen
    once an epoch and a batch may span two. Memory: 8 bytes an image, and a cache of decoded pixels with a bound.
    With weights (`weigh`) an epoch has as many places as images that are kept, and an image gets them by its weight.
    """

    def __init__(
        self,
        images: Images,
        batch_size: int,
        *,
        seed: int,
        holdout: int = 0,
        rank: int = 0,
        world_size: int = 1,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        if holdout >= len(images):
            raise UserError(
                f"distillation.holdout: got {holdout} of {len(images)} images; leave some to train on, or bring more"
            )
        if batch_size % world_size:
            raise UserError(
                f"distillation.batch_size: got {batch_size} for {world_size} processes; take a multiple of {world_size}"
            )
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.held = held_back(len(images), holdout, seed)
        self._size = len(images) - holdout
        self._kept: Tensor | None = None
        self._totals: np.ndarray | None = None
        self._images, self._cache_bytes = images, cache_bytes
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)
        self._pixels = torch.empty(0)
        self._cached = torch.zeros(0, dtype=torch.bool)

    @property
    def images(self) -> int:
        """How many there are, those held back included."""
        return len(self._images)

    def trained_on(self) -> Tensor:
        """Sorted indices of the images that are not held back."""
        return torch.from_numpy(np.setdiff1d(np.arange(self.images), self.held, assume_unique=True))

    def weigh(self, weights: Tensor) -> None:
        """Draw images by weights [images] float64 of whole numbers, 0 for one that is never drawn.

        Of an epoch's n places an image of n-th share s gets s of them, rounded up or down, and s in the mean over
        epochs. Equal weights give the permutations that there would be without them, of the images above 0. Called
        before the first step, with weights that only depend on what a resumed run has again.
        """
        kept = weights.nonzero().flatten()
        self._kept, self._size = kept, len(kept)
        own = weights[kept].numpy()
        self._totals = None if (own == own[0]).all() else np.cumsum(own)

    def indices(self, step: int) -> Tensor:
        """Images [batch_size] of the global batch, all ranks together."""
        position, end = step * self.batch_size, (step + 1) * self.batch_size
        parts = []
        while position < end:
            epoch, place = divmod(position, self._size)
            part = self._permutation(epoch)[place : place + end - position]
            parts.append(part)
            position += len(part)
        ranks = torch.cat(parts)
        if self._kept is not None:
            return self._kept[ranks]
        if len(self.held) == 0:
            return ranks
        # The r-th image that is not held back: r plus the number of held ones before it.
        before = np.searchsorted(self.held - np.arange(len(self.held)), ranks.numpy(), side="right")
        return ranks + torch.from_numpy(before)

    def share(self, step: int) -> Tensor:
        """This rank's images [batch_size / world_size] of the global batch."""
        images = self.batch_size // self.world_size
        return self.indices(step)[self.rank * images : (self.rank + 1) * images]

    def read(self, step: int) -> tuple[Tensor, Tensor]:
        """This rank's indices [n] and images uint8 [n,C,H,W], n = batch_size / world_size."""
        indices = self.share(step)
        return indices, self.read_images(indices)

    def read_images(self, indices: Tensor) -> Tensor:
        """Images at these indices, uint8 [n,C,H,W], from the cache where it holds them."""
        if len(self._cached) == 0:
            self._make_cache(int(indices[0]))
        places = indices.clamp(max=len(self._cached) - 1)
        missing = ~(self._cached[places] & (places == indices))
        pixels = self._pixels[places]
        if missing.any():
            fresh, _ = self._images.read(indices[missing].tolist())
            if fresh.shape[1:] != pixels.shape[1:]:
                raise UserError(
                    f"images: some are {tuple(pixels.shape[1:])} (channels, height, width), others "
                    f"{tuple(fresh.shape[1:])}; bring them to one size"
                )
            pixels[missing] = fresh
            kept = missing & (places == indices)
            self._pixels[indices[kept]] = pixels[kept]
            self._cached[indices[kept]] = True
        return pixels

    def stream(self, first: int, last: int) -> Iterator[tuple[Tensor, Tensor]]:
        """`read` of the steps from `first` up to `last`, which is not included, each read during the step before."""
        if first >= last:
            return
        with ThreadPoolExecutor(1) as reader:
            coming = reader.submit(self.read, first)
            for step in range(first, last):
                batch = coming.result()
                if step + 1 < last:
                    coming = reader.submit(self.read, step + 1)
                yield batch

    def _permutation(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "epoch", epoch))
            self._epoch, self._order = epoch, torch.randperm(self._size, generator=generator)
            if self._totals is not None:
                self._order = self._drawn(self._totals, generator)[self._order]
        return self._order

    def _drawn(self, totals: np.ndarray, generator: torch.Generator) -> Tensor:
        """Images [n] by systematic sampling: n ticks at equal distances, from a random place, on their summed weights.

        Every image that weighs less than a tick's distance comes at most once, one that weighs more at least once.
        """
        start = torch.rand((), dtype=torch.float64, generator=generator).item()
        ticks = (np.arange(len(totals)) + start) * (totals[-1] / len(totals))
        return torch.from_numpy(np.searchsorted(totals, ticks, side="right").clip(max=len(totals) - 1))

    def _make_cache(self, example: int) -> None:
        pixels, _ = self._images.read([example])
        images = max(1, min(len(self._images), self._cache_bytes // max(1, pixels[0].numel())))
        # Pages are touched as images come in: an empty cache costs nothing.
        self._pixels = torch.empty((images, *pixels.shape[1:]), dtype=torch.uint8)
        self._cached = torch.zeros(images, dtype=torch.bool)
