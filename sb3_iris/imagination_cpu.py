"""
Imagination on a CPU by kernels in C++.

An imagined trajectory is hundreds of passes of one token each, and what PyTorch does around the arithmetic of each takes
several times as long as the arithmetic. ``imagination_cpu.cpp`` samples a whole frame of tokens in one call. It is compiled
when it is first needed, by a C++ compiler that knows GCC's vectors, and kept for this machine's kind of processor.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch as th
from torch import nn
from torch.nn import functional as F

from sb3_iris.imagination import ImaginedGame
from sb3_iris.transformer import Block
from sb3_iris.type_aliases import Observe
from sb3_iris.world_model import WorldModel, WorldModelCache

SOURCE = Path(__file__).with_suffix(".cpp")


class _Linear(ctypes.Structure):
    _fields_ = [("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("in_", ctypes.c_int32), ("out", ctypes.c_int32)]


class _Norm(ctypes.Structure):
    _fields_ = [("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p)]


class _Block(ctypes.Structure):
    _fields_ = [
        ("norm_1", _Norm),
        ("norm_2", _Norm),
        ("qkv", _Linear),
        ("proj", _Linear),
        ("hidden", _Linear),
        ("output", _Linear),
        ("attention_bias", ctypes.c_void_p),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        ("dim", ctypes.c_int32),
        ("n_heads", ctypes.c_int32),
        ("n_blocks", ctypes.c_int32),
        ("max_length", ctypes.c_int32),
        ("in_pairs", ctypes.c_int32),
        ("epsilon", ctypes.c_float),
        ("blocks", ctypes.POINTER(_Block)),
        ("norm_out", _Norm),
        ("head_hidden", _Linear),
        ("head_output", _Linear),
        ("tokens", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
    ]


@functools.cache
def library() -> ctypes.CDLL:
    """
    :return: The compiled kernels.
    :raises RuntimeError: If they cannot be compiled or loaded here.
    """
    # PyTorch's own threads keep the cores busy while they wait for work, so others would have to share these. The library is
    # not linked with OpenMP, lest it bring a second one, and takes PyTorch's if that is the compiler's kind.
    errors = []
    for options in (["-march=native", "-fopenmp"], ["-march=native"], []):
        try:
            loaded = ctypes.CDLL(str(_compiled(options)))
        except (OSError, RuntimeError) as error:
            errors.append(error)
            continue
        pointer, int32, int64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
        loaded.cache_size.restype = int64
        loaded.read_positions.argtypes = [pointer, pointer, int64, int32, int32, pointer, pointer, int32]
        loaded.read_positions.restype = None
        loaded.sample_frame.argtypes = [pointer, pointer, int64, int32, int32, ctypes.c_float, pointer, pointer, int32]
        loaded.sample_frame.restype = None
        return loaded
    raise RuntimeError(str(errors[-1])) from errors[0]


@functools.cache
def works() -> bool:
    """
    :return: Whether the kernels can be used here; if not, a warning says why, once.
    """
    try:
        library()
    except RuntimeError as error:
        warnings.warn(f"compile: imagination on this CPU does without the kernels of sb3_iris, and so more slowly: {error}")
        return False
    return True


def _compiled(options: list[str]) -> Path:
    """Where the library is, which is made if it is not there."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++"))), None)
    if compiler is None:
        raise RuntimeError("there is no C++ compiler: none of $CXX, c++, g++, clang++")
    command = [compiler, "-O3", "-std=c++17", "-fPIC", *options]
    # Code for one processor does not run on all others that share a home directory
    processor = [line for line in _lines("/proc/cpuinfo") if line.startswith(("flags", "Features"))][:1] or [
        platform.processor()
    ]
    key = hashlib.sha256("\0".join([*command, platform.machine(), *processor]).encode() + SOURCE.read_bytes()).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sb3_iris"
    path = folder / f"imagination_{key[:16]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Others may compile at the same time
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            objects, made = Path(temporary) / "imagination.o", Path(temporary) / "imagination.so"
            _run([*command, "-c", str(SOURCE), "-o", str(objects)])
            _run([compiler, "-shared", "-pthread", str(objects), "-o", str(made)])
            made.replace(path)
    return path


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{command[0]} failed: {(result.stderr.strip() or str(result.returncode)).splitlines()[0]}")


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


class Kernels:
    """
    A world model as the kernels want it, with the weights that it has now.

    :param world_model: One in evaluation mode on the CPU.
    :param attention_biases: Its ``attention_biases()``, of the same weights.
    :param dtype: Type of factors in products of matrices: ``th.bfloat16``, or None for float32. Sums and all else are float32,
        and so is all where a head has an odd size.
    :raises RuntimeError: If the kernels cannot be compiled or loaded here.
    """

    def __init__(
        self, world_model: WorldModel, attention_biases: tuple[th.Tensor, ...] | None, dtype: th.dtype | None
    ) -> None:
        self.library = library()
        self._kept: list[th.Tensor] = []  # what the kernels are given the addresses of
        transformer = world_model.transformer
        in_pairs = dtype == th.bfloat16 and transformer.embed_dim // transformer.n_heads % 2 == 0
        self.dtype = th.bfloat16 if in_pairs else th.float32
        with th.no_grad():
            biases = attention_biases or [None] * len(transformer.blocks)
            blocks = [self._block(block, bias) for block, bias in zip(transformer.blocks, biases, strict=True)]
            first, _, last = world_model.token_head
            assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
            self.model = _Model(
                transformer.embed_dim,
                transformer.n_heads,
                len(blocks),
                world_model.max_length,
                in_pairs,
                transformer.ln_out.eps,
                (_Block * len(blocks))(*blocks),
                self._norm(transformer.ln_out),
                self._linear(first.weight, first.bias),
                self._linear(last.weight, last.bias),
                self._address(world_model.token_embedding.weight),
                self._address(world_model.position_embedding.weight),
            )
        self.cache_size = self.library.cache_size(ctypes.byref(self.model))

    def _address(self, tensor: th.Tensor) -> int:
        assert tensor.dtype in (th.float32, self.dtype), tensor.dtype
        self._kept.append(tensor.contiguous())
        return self._kept[-1].data_ptr()

    def _norm(self, norm: nn.LayerNorm) -> _Norm:
        return _Norm(self._address(norm.weight), self._address(norm.bias))

    def _linear(self, weight: th.Tensor, bias: th.Tensor) -> _Linear:
        n_out, n_in = weight.shape
        width = self.library.panel_width()
        missing = -n_out % width
        n_terms = 2 if self.dtype == th.bfloat16 else 1  # neighbours among the inputs that are multiplied at once
        panels = F.pad(weight, (0, 0, 0, missing)).view(-1, width, n_in // n_terms, n_terms).transpose(1, 2).to(self.dtype)
        return _Linear(self._address(panels), self._address(F.pad(bias, (0, missing))), n_in, n_out)

    def _block(self, block: nn.Module, attention_bias: th.Tensor | None) -> _Block:
        assert isinstance(block, Block)
        hidden, output = block.mlp[0], block.mlp[2]
        assert isinstance(hidden, nn.Linear) and isinstance(output, nn.Linear)
        linear_layers = (block.attention.qkv, block.attention.proj, hidden, output)
        return _Block(
            self._norm(block.ln_1),
            self._norm(block.ln_2),
            *(self._linear(layer.weight, layer.bias) for layer in linear_layers),
            None if attention_bias is None else self._address(attention_bias),
        )


class CpuCache(WorldModelCache):
    """
    A cache that the kernels read and write: one memory of all blocks, (B, cache size) float32. Most weights are copied when
    the first positions are read, some are the world model's own: none may change until the cache is begun anew.

    :param world_model: As for ``Kernels``.
    :param dtype: As there.
    """

    kernels: Kernels

    def __init__(self, world_model: WorldModel, dtype: th.dtype | None) -> None:
        super().__init__(world_model.max_length)
        self.world_model = world_model
        self.dtype = dtype

    def features(self, transformer: nn.Module, x: th.Tensor) -> th.Tensor:
        B, n, D = x.shape
        if self.length == 0:
            self.kernels = Kernels(self.world_model, self.attention_biases, self.dtype)
        assert x.dtype == th.float32 and self.length + n <= self.max_length, (x.dtype, self.length, n, self.max_length)
        if not self.memory:
            self.memory = [th.empty(B, self.kernels.cache_size)]
        x, y = x.contiguous(), th.empty(B, D)
        self.kernels.library.read_positions(
            ctypes.byref(self.kernels.model),
            self.memory[0].data_ptr(),
            B,
            n,
            self.length,
            x.data_ptr(),
            y.data_ptr(),
            th.get_num_threads(),
        )
        self.length += n
        return y

    def select(self, indices: th.Tensor) -> None:
        self.memory = [memory[indices] for memory in self.memory]

    def sample_frame(self, first: th.Tensor, n_tokens: int, temperature: float, generator: th.Generator | None) -> th.Tensor:
        """
        Sample the tokens of a frame behind its first one; all but the last of them are read.

        :param first: (B,) int64, the frame's first token
        :param n_tokens: Tokens of a frame, K.
        :param temperature: As of ``ImaginedGame``.
        :param generator: As there.
        :return: (B, K) int64
        """
        assert self.length + n_tokens - 1 <= self.max_length, (self.length, n_tokens, self.max_length)
        tokens = first.new_empty(len(first), n_tokens)
        tokens[:, 0] = first
        random = th.rand(n_tokens - 1, len(first), generator=generator) if temperature != 0 else None
        self.kernels.library.sample_frame(
            ctypes.byref(self.kernels.model),
            self.memory[0].data_ptr(),
            len(first),
            n_tokens,
            self.length,
            temperature,
            None if random is None else random.data_ptr(),
            tokens.data_ptr(),
            th.get_num_threads(),
        )
        self.length += n_tokens - 1
        return tokens


class CpuGame(ImaginedGame):
    """
    One whose frames are imagined by the kernels.

    :param dtype: As for ``Kernels``.

    All other parameters are those of ``ImaginedGame``.
    """

    def __init__(self, observe: Observe, world_model: WorldModel, dtype: th.dtype | None, **kwargs: Any) -> None:
        super().__init__(observe, world_model, **kwargs)
        self.dtype = dtype

    def _make_cache(self) -> WorldModelCache:
        return CpuCache(self.world_model, self.dtype)

    def _sample_frame(self, token_logits: th.Tensor, cache: WorldModelCache) -> th.Tensor:
        assert isinstance(cache, CpuCache)
        return cache.sample_frame(
            self._sample(token_logits), self.world_model.tokens_per_frame, self.temperature, self.generator
        )
