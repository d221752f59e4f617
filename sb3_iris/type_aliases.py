"""
What the stages hand to each other, in the order of the data's journey, and the legend of all axes.

| axis | meaning | axis | meaning |
|---|---|---|---|
| ``B`` | batch | ``D`` | embedding size |
| ``N`` | environments | ``A`` | actions |
| ``T`` | environment steps in a segment | ``C, H, W`` | image channels, height, width |
| ``K`` | tokens per frame | ``h, w`` | height and width of the token grid, ``K = h * w`` |
| ``V`` | codebook size | ``nh, hd`` | attention heads, size of a head |

A *step* is one agent step in the environment (after frame skip), a *frame* is one observation image,
a *block* is one Transformer layer.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch as th


class SequenceSamples(NamedTuple):
    """A batch of segments from the replay buffer; ``buffers.py`` draws what belongs to which step."""

    observations: th.Tensor  # (B, T, C, H, W) uint8 in [0, 255], zeros where the mask is False
    actions: th.Tensor  # (B, T) int64, taken on observations[:, t]
    rewards: th.Tensor  # (B, T) float32, received for actions[:, t]
    terminations: th.Tensor  # (B, T) bool, the env terminated on actions[:, t]; a time limit does not count
    mask: th.Tensor  # (B, T) bool, False where the segment is padded


class TokenSamples(NamedTuple):
    """A batch of segments from the replay buffer, with tokens in place of frames."""

    tokens: th.Tensor  # (B, T, K) int64 in [0, V), zeros where the mask is False
    actions: th.Tensor  # (B, T) int64
    rewards: th.Tensor  # (B, T) float32
    terminations: th.Tensor  # (B, T) bool
    mask: th.Tensor  # (B, T) bool


class ContextSamples(NamedTuple):
    """A batch of frames to imagine from, and what came before each of them."""

    tokens: th.Tensor  # (B, K) int64 in [0, V)
    seen: (
        th.Tensor
    )  # (B, T, C, H, W) float32, what the actor-critic sees of the T frames before; zeros where the mask is False
    mask: th.Tensor  # (B, T) bool, False where there was no frame


class QuantizerOutput(NamedTuple):
    """Encoder outputs snapped to the codebook."""

    z_q: th.Tensor  # (B, codebook_dim, h, w), straight-through gradient
    tokens: th.Tensor  # (B, K) int64 in [0, V), raster order
    codebook_loss: th.Tensor  # scalar
    commitment_loss: th.Tensor  # scalar, not yet weighted


class WorldModelOutput(NamedTuple):
    """Predictions of the world model for whole segments."""

    token_logits: th.Tensor  # (B, T * K, V); entry i predicts frame token i + 1 of the segment
    reward_logits: th.Tensor  # (B, T, 3) for the reward's sign, -1, 0, 1
    end_logits: th.Tensor  # (B, T, 2) for going on, terminating


class LSTMState(NamedTuple):
    """State of the actor-critic's LSTM cell. It goes in and comes out; no network remembers it."""

    hidden: th.Tensor  # (B, lstm_hidden_size)
    cell: th.Tensor  # (B, lstm_hidden_size)


class ActorCriticOutput(NamedTuple):
    """What the actor-critic makes of one frame."""

    logits: th.Tensor  # (B, A)
    values: th.Tensor  # (B,)
    state: LSTMState


class ImaginedTrajectory(NamedTuple):
    """What one call to ``imagine`` produced; ``rewards[:, t]`` and ``ends[:, t]`` follow ``actions[:, t]``."""

    actions: th.Tensor  # (B, horizon) int64
    rewards: th.Tensor  # (B, horizon) float32 in {-1, 0, 1}
    ends: th.Tensor  # (B, horizon) bool
    values: th.Tensor  # (B, horizon) float32, with gradient
    logits: th.Tensor  # (B, horizon, A) float32, with gradient


Observe = Callable[[th.Tensor], th.Tensor]  # tokens (..., K) int64 to what is seen of their frames, (..., C, H, W) float32

# Images and their reconstructions, each (B, C, H, W) in [-1, 1], to numbers whose mean is the loss
PerceptualLoss = Callable[[th.Tensor, th.Tensor], th.Tensor]

Logs = dict[str, th.Tensor]  # detached scalars by name; they stay on their device until they are logged

NETWORKS = ("tokenizer", "world_model", "actor_critic")  # in the order of their training phases
