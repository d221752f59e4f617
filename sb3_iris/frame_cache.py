"""Keeps what networks make of single frames, for as long as the networks stay as they are; knows neither."""

import math
from collections.abc import Callable

import numpy as np
import torch as th

TOGETHER = 256  # frames handled in one pass; bounds the memory that it takes


class FrameCache:
    """
    Results by the index of a frame, each computed when it is first asked for.

    :param n_frames: Number of frames there can be.
    :param max_bytes: Most memory to keep results in, by the device that they are on: if it does not hold those of all
        frames, it is the first ones that are kept, and the others are computed anew each time.
    """

    def __init__(self, n_frames: int, max_bytes: Callable[[th.device], float] = lambda device: math.inf) -> None:
        self.n_frames = n_frames
        self.max_bytes = max_bytes
        self._results: th.Tensor | None = None  # (kept, ...); a computer's own memory is taken as it fills
        self._known = np.zeros(0, dtype=bool)  # (kept,)

    def clear(self) -> None:
        """Forget all results."""
        self._results = None

    def forget(self, first: int, last: int) -> None:
        """
        :param first: First of the frames that have become others.
        :param last: Behind the last of them.
        """
        self._known[first:last] = False

    @th.no_grad()
    def get(self, indices: np.ndarray, compute: Callable[[np.ndarray], th.Tensor]) -> th.Tensor:
        """
        :param indices: (n,) int64, at least one, repeated ones welcome
        :param compute: Gives the results of frames, (m,) int64 indices to (m, ...), always on the same device.
        :return: (n, ...)
        """
        unique, inverse = np.unique(indices, return_inverse=True)
        if self._results is None:
            result = compute(unique[:1])
            n_kept = int(min(self.n_frames, self.max_bytes(result.device) // result.nbytes))
            self._results = result.new_empty(n_kept, *result.shape[1:])
            self._known = np.zeros(n_kept, dtype=bool)
        kept, n_kept = self._results, len(self._known)

        def on_device(indices: np.ndarray) -> th.Tensor:
            return th.as_tensor(indices, device=kept.device)

        n_inside = np.searchsorted(unique, n_kept)  # they are sorted: those that can be kept come first
        known = np.zeros(len(unique), dtype=bool)
        known[:n_inside] = self._known[unique[:n_inside]]
        if known.all():
            return kept[on_device(indices)]
        results = kept.new_empty(len(unique), *kept.shape[1:])
        results[on_device(np.nonzero(known)[0])] = kept[on_device(unique[known])]
        (missing,) = np.nonzero(~known)
        for first in range(0, len(missing), TOGETHER):
            part = missing[first : first + TOGETHER]
            results[on_device(part)] = compute(unique[part])
        new = missing[missing < n_inside]
        kept[on_device(unique[new])] = results[on_device(new)]
        self._known[unique[new]] = True
        return results[on_device(inverse)]
