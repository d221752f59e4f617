"""What ``torch.compile`` makes faster, and what to do where it cannot."""

import contextlib
import functools
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch as th


def compiles(compile: bool | str, device: th.device) -> bool:
    """
    :param compile: ``"auto"``, True or False.
    :param device: Where the networks are.
    :return: Whether to compile.
    :raises ValueError: If ``compile`` is something else.
    """
    if compile not in ("auto", True, False):
        raise ValueError(f"compile={compile!r} must be 'auto', True or False")
    if compile == "auto":  # on a CPU compilation takes long for what it gains; for a GPU PyTorch needs Triton
        return device.type == "cuda" and _has_triton()
    return bool(compile)


@functools.cache  # it is asked for at each gradient step
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


class Compiled:
    """
    A function compiled by ``torch.compile`` when it is first called, or the function itself, with a warning, where that fails:
    for want of a C++ compiler, for instance. A copy is compiled anew.

    Tensors of other sizes than before are compiled for anew, without that safety, and only so often in a process: PyTorch's
    ``recompile_limit``, after which it warns and computes plainly.

    :param function: The function.
    :param mode: Of ``torch.compile``. With ``"reduce-overhead"`` each call overwrites on a GPU what the one before gave.
    """

    def __init__(self, function: Callable[..., Any], mode: str = "default") -> None:
        self.function = function
        self._mode = mode
        self._chosen: Callable[..., Any] | None = None  # the compiled one or the function itself

    def __call__(self, *args: Any) -> Any:
        if self._mode == "reduce-overhead":
            th.compiler.cudagraph_mark_step_begin()  # also where an interrupted step has left no backward pass
        if self._chosen is not None:
            return self._chosen(*args)
        try:
            with warnings.catch_warnings(), self._backward_pass_too():
                # Advice to whoever wrote the function
                warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\._(dynamo|inductor|functorch)")
                chosen = th.compile(self.function, dynamic=False, mode=self._mode)
                result = chosen(*args)
        except th.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            chosen = self.function
            result = chosen(*args)  # if it is the function's own error, it is raised here
            name = getattr(self.function, "__qualname__", repr(self.function))
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            warnings.warn(f"compile: torch.compile failed for {name}, which goes on without, as with compile=False: {reason}")
        self._chosen = chosen
        return result

    @staticmethod
    def _backward_pass_too() -> contextlib.AbstractContextManager:
        """Inside, backward passes are compiled with the forward ones, so that both are known to work; newer PyTorch only."""
        config = importlib.import_module("torch._functorch.config")
        name = "force_non_lazy_backward_lowering"
        return config.patch(**{name: True}) if hasattr(config, name) else contextlib.nullcontext()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_chosen": None}
