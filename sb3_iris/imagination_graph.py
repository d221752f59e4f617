"""
Imagination on a GPU as one CUDA graph.

An imagined trajectory is hundreds of passes of one token each, and each pass is a hundred small kernels. Launched one by one
they take ten times as long as they compute. A graph launches all of them at once: burn-in, world model, what the policy sees,
its actions and all sampling.
"""

import copy
import importlib
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch as th
from torch import nn

from sb3_iris.compilation import Compiled
from sb3_iris.imagination import ImaginedGame, imagine, play
from sb3_iris.policies import CnnLstmPolicy
from sb3_iris.type_aliases import ContextSamples, ImaginedTrajectory, LSTMState
from sb3_iris.world_model import WorldModel


class CastWorldModel:
    """
    A world model's copy whose linear layers have the weights to which autocast would cast those of the original, so that they
    are cast once a trajectory and not in every pass.

    :param original: The world model that is trained.
    :param dtype: Type that autocast casts to; None for none.
    :param compile: Whether blocks and token head are computed by this package's kernels, or, in float32 and where these do not
        work, what the blocks do to positions one by one is compiled.
    """

    def __init__(self, original: WorldModel, dtype: th.dtype | None, compile: bool) -> None:
        self.game: type[ImaginedGame] = ImaginedGame  # to be played in it
        self.world_model = copy.deepcopy(original).eval().requires_grad_(False)
        for module in self.world_model.modules():
            if dtype is not None and isinstance(module, nn.Linear):
                module.to(dtype)
        tensors = (*self.world_model.parameters(), *self.world_model.buffers())
        self._pairs = list(zip(tensors, (*original.parameters(), *original.buffers()), strict=True))
        if compile and not (dtype is not None and self._use_kernels()):
            for block in self.world_model.transformer.blocks:
                for name in ("before_attention", "after_attention"):
                    setattr(block, name, Compiled(getattr(block, name)))

    @th.no_grad()
    def _use_kernels(self) -> bool:
        """Let this package's kernels compute blocks and token head; False, with a warning, if they do not work here."""
        try:
            kernels = importlib.import_module("sb3_iris.imagination_kernels")
            kernels.use_in(self.world_model)
        except th.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            warnings.warn(f"compile: imagination does without the kernels of sb3_iris, as they do not work here: {reason}")
            return False
        self.game = kernels.KernelGame
        return True

    @th.no_grad()
    def refresh(self) -> WorldModel:
        """
        :return: The copy, with the weights that the original has now.
        """
        for ours, theirs in self._pairs:
            ours.copy_(theirs)
        return self.world_model


def capture(function: Callable[[], Any], device: th.device) -> tuple[th.cuda.CUDAGraph, Any]:
    """
    Make a CUDA graph of what a function does on the GPU. Random streams are left as they were.

    :param function: Called three times: to compile and load what it needs, to see that it never waits for the GPU, as that
        cannot be recorded, and to be recorded.
    :param device: The GPU.
    :return: The graph, and what the function returned: tensors that each replay of the graph fills anew.
    :raises RuntimeError: If the function waits for the GPU.
    """
    random_state, debug_mode = th.cuda.get_rng_state(device), th.cuda.get_sync_debug_mode()
    with th.cuda.device(device):
        current = th.cuda.current_stream()
        try:
            stream = th.cuda.Stream()
            stream.wait_stream(current)
            with th.cuda.stream(stream):
                function()
                # A recording that fails leaves PyTorch's random stream unusable
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message="Synchronization debug mode", category=UserWarning)
                    th.cuda.set_sync_debug_mode("error")
                function()
                th.cuda.set_sync_debug_mode(debug_mode)
            current.wait_stream(stream)
            graph = th.cuda.CUDAGraph()
            # Memory that cuBLAS works in must be the graph's own: other memory is freed when PyTorch records graphs itself
            th._C._cuda_clearCublasWorkspaces()
            with th.cuda.graph(graph):
                result = function()
        finally:
            th._C._cuda_clearCublasWorkspaces()
            th.cuda.set_stream(current)
            th.cuda.set_sync_debug_mode(debug_mode)
            th.cuda.set_rng_state(random_state, device)
    return graph, result


class _Recording(NamedTuple):
    """A graph and all whose memory it reads and writes."""

    graph: th.cuda.CUDAGraph
    contexts: ContextSamples  # to be filled before a replay
    state: LSTMState  # before the first frames
    frames: th.Tensor
    actions: th.Tensor
    rewards: th.Tensor
    ends: th.Tensor
    unroll: Callable[..., tuple[th.Tensor, th.Tensor]]  # the actor-critic's
    kept: tuple[Any, ...]


class ImaginationGraph:
    """
    Does what ``imagine`` does, on a GPU, many times as fast.

    Actions are drawn in the graph, without gradients. What the actor-critic thinks of the frames that it saw is then computed
    once more with gradients, for all steps together. The graph is recorded when it is first needed, and again for contexts of
    other sizes, another horizon, or weights that lie elsewhere; a policy's ``observe`` is only called then. Copies have none.
    """

    def __init__(self) -> None:
        self._recording: _Recording | None = None
        self._recorded: tuple[Any, ...] | None = None  # what for
        self._failed: tuple[Any, ...] | None = None

    def __call__(
        self, policy: CnnLstmPolicy, contexts: ContextSamples, horizon: int, dtype: th.dtype | None, compile: bool
    ) -> ImaginedTrajectory:
        """
        :param policy: The networks.
        :param contexts: As for ``imagine``.
        :param horizon: Steps to imagine, at least 2.
        :param dtype: Type that autocast casts to; None for none.
        :param compile: Whether to compile the decoder and the actor-critic's pass with gradients, and to use kernels of this
            package.
        :return: What was imagined. The next call overwrites it, values and logits only if they are compiled.
        """
        weights = (*policy.parameters(), *policy.buffers())
        asked = (horizon, dtype, compile, *(part.shape for part in contexts), *(weight.data_ptr() for weight in weights))
        if asked not in (self._recorded, self._failed):
            self._recorded = self._recording = None  # frees its memory first
            try:
                self._recording = self._record(policy, contexts, horizon, dtype, compile)
                self._recorded = asked
            except Exception as error:  # what Triton raises is of many kinds
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                warnings.warn(
                    f"Imagination goes on without a CUDA graph, and so more slowly, as one could not be made: {reason}"
                )
                self._failed = asked
        recording = self._recording
        if recording is None or asked != self._recorded:
            return imagine(ImaginedGame(policy.observe, policy.world_model), policy.actor_critic, contexts, horizon)
        for recorded, given in zip(recording.contexts, contexts, strict=True):
            recorded.copy_(given)
        recording.graph.replay()
        logits, values = recording.unroll(recording.frames, recording.state)
        return ImaginedTrajectory(recording.actions, recording.rewards, recording.ends, values, logits)

    @staticmethod
    def _record(
        policy: CnnLstmPolicy, given: ContextSamples, horizon: int, dtype: th.dtype | None, compile: bool
    ) -> _Recording:
        contexts = ContextSamples(*(part.clone() for part in given))
        cast = CastWorldModel(policy.world_model, dtype, compile)
        observe = Compiled(policy.observe) if compile else policy.observe

        @th.no_grad()
        def played() -> tuple[th.Tensor, ...]:
            # Casts that autocast keeps would be gone when the graph is replayed
            with th.autocast("cuda", dtype, enabled=dtype is not None, cache_enabled=False):
                game = cast.game(observe, cast.refresh())
                state = policy.actor_critic.burn_in(contexts.seen, contexts.mask)
                steps = play(game, policy.actor_critic, contexts.tokens, state, horizon)
                names = ("frames", "actions", "rewards", "ends")
                return *state, *(th.stack([getattr(step, name) for step in steps], dim=1) for name in names)

        graph, (hidden, cell, frames, actions, rewards, ends) = capture(played, policy.device)
        unroll: Callable[..., tuple[th.Tensor, th.Tensor]] = policy.actor_critic.unroll
        if compile:
            unroll = Compiled(unroll, "reduce-overhead")
        return _Recording(graph, contexts, LSTMState(hidden, cell), frames, actions, rewards, ends, unroll, (cast, observe))

    def __getstate__(self) -> dict[str, Any]:
        return dict.fromkeys(self.__dict__)
