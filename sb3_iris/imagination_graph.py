"""
Imagination on a GPU as one CUDA graph.

An imagined trajectory is hundreds of passes of one token each, and each pass is a hundred small kernels. Launched one by one
they take ten times as long as they compute. A graph launches all of them at once: burn-in, world model, what the policy sees,
its actions and all sampling.
"""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch as th
from torch import nn

from sb3_iris.compilation import Compiled
from sb3_iris.imagination import ImaginedGame, imagine, play
from sb3_iris.policies import CnnLstmPolicy
from sb3_iris.type_aliases import ContextSamples, ImaginedTrajectory
from sb3_iris.world_model import WorldModel


class CastWorldModel:
    """
    A world model's copy whose linear layers have the weights to which autocast would cast those of the original, so that they
    are cast once a trajectory and not in every pass.

    :param original: The world model that is trained.
    :param dtype: Type that autocast casts to; None for none.
    :param compile: Whether to compile what the blocks do to positions one by one.
    """

    def __init__(self, original: WorldModel, dtype: th.dtype | None, compile: bool) -> None:
        self.world_model = copy.deepcopy(original).eval().requires_grad_(False)
        for module in self.world_model.modules():
            if dtype is not None and isinstance(module, nn.Linear):
                module.to(dtype)
        tensors = (*self.world_model.parameters(), *self.world_model.buffers())
        self._pairs = list(zip(tensors, (*original.parameters(), *original.buffers()), strict=True))
        if compile:
            for block in self.world_model.transformer.blocks:
                for name in ("before_attention", "after_attention"):
                    setattr(block, name, Compiled(getattr(block, name)))

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
        try:
            stream = th.cuda.Stream()
            stream.wait_stream(th.cuda.current_stream())
            with th.cuda.stream(stream):
                function()
                # A recording that fails leaves PyTorch's random stream unusable
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message="Synchronization debug mode", category=UserWarning)
                    th.cuda.set_sync_debug_mode("error")
                function()
                th.cuda.set_sync_debug_mode(debug_mode)
            th.cuda.current_stream().wait_stream(stream)
            graph = th.cuda.CUDAGraph()
            with th.cuda.graph(graph):
                result = function()
        finally:
            th.cuda.set_sync_debug_mode(debug_mode)
            th.cuda.set_rng_state(random_state, device)
    return graph, result


class ImaginationGraph:
    """
    Does what ``imagine`` does, on a GPU, many times as fast.

    Actions are drawn in the graph, without gradients. What the actor-critic thinks of the frames that it saw is then computed
    once more with gradients, for all steps together.

    :param policy: The networks.
    :param dtype: Type that autocast casts to; None for none.
    :param compile: Whether to compile the world model's blocks and the decoder.
    """

    def __init__(self, policy: CnnLstmPolicy, dtype: th.dtype | None, compile: bool) -> None:
        self.policy = policy
        self._dtype = dtype
        self.compile = compile
        self._fails = False
        self._recorded: tuple[Any, ...] | None = None  # sizes of the contexts, and where the weights are that the graph reads

    def __call__(self, contexts: ContextSamples, horizon: int) -> ImaginedTrajectory:
        """
        :param contexts: As for ``imagine``.
        :param horizon: Steps to imagine, at least 2.
        :return: What was imagined; all but values and logits is overwritten by the next call.
        """
        if not self._fails:
            self._record(contexts, horizon)
        if self._fails:
            game = ImaginedGame(self.policy.observe, self.policy.world_model)
            return imagine(game, self.policy.actor_critic, contexts, horizon)
        for recorded, given in zip(self._contexts, contexts, strict=True):
            recorded.copy_(given)
        self._graph.replay()
        frames, state, actions, rewards, ends = self._played
        logits, values = self.policy.actor_critic.unroll(frames, state)
        return ImaginedTrajectory(actions, rewards, ends, values, logits)

    def _record(self, contexts: ContextSamples, horizon: int) -> None:
        """Make the graph, if there is none for such contexts and where the weights are now."""
        policy = self.policy
        weights = (*policy.parameters(), *policy.buffers())
        asked = (horizon, *(part.shape for part in contexts), *(weight.data_ptr() for weight in weights))
        if asked == self._recorded:
            return
        self._contexts = ContextSamples(*(part.clone() for part in contexts))
        cast = CastWorldModel(policy.world_model, self._dtype, self.compile)
        observe = Compiled(policy.observe) if self.compile else policy.observe
        self._kept = cast, observe  # the graph reads their memory

        @th.no_grad()
        def played() -> tuple[Any, ...]:
            # Casts that autocast keeps would be gone when the graph is replayed
            with th.autocast("cuda", self._dtype, enabled=self._dtype is not None, cache_enabled=False):
                game = ImaginedGame(observe, cast.refresh())
                state = policy.actor_critic.burn_in(self._contexts.seen, self._contexts.mask)
                steps = play(game, policy.actor_critic, self._contexts.tokens, state, horizon)
                frames, actions, rewards, ends = (
                    th.stack([getattr(step, name) for step in steps], dim=1)
                    for name in ("frames", "actions", "rewards", "ends")
                )
                return frames, state, actions, rewards, ends

        try:
            self._graph, self._played = capture(played, policy.device)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            warnings.warn(f"Imagination goes on without a CUDA graph, and so more slowly, as one could not be made: {reason}")
            self._fails = True
            return
        self._recorded = asked
