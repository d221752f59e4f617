"""
The world model: a Transformer that reads a game as a sequence of frame tokens and actions.

One step takes K + 1 positions, the K tokens of its frame and its action::

    position     0    1   ...  K-1   K  |  K+1  K+2 ...
    reads       z_0  z_1  ... z_K-1  a  |  z'_0 z'_1 ...
    predicts    z_1  z_2  ...   -   z'_0|  z'_1 z'_2 ...
                                    r, end

The frame's last token predicts nothing: what follows it is the agent's choice (Sec. 2.2 of the paper).
"""

import math

import torch as th
from torch import nn
from torch.nn import functional as F

from sb3_iris.transformer import KVCache, Transformer
from sb3_iris.type_aliases import Logs, WorldModelOutput

PADDED = -100  # label that cross_entropy ignores


class RelativePositionBias(nn.Module):
    """
    What attention adds to its scores, as in Swin Transformer (https://arxiv.org/abs/2103.14030): a number for each head and
    each distance, in steps, rows and columns, of the position that is looked at. What is learned of neighbours at one place in
    the frame, as that they meet, then holds at all others. An action is at no place, so only steps count to it and from it.

    :param n_steps: Steps in the context.
    :param grid: Height and width of a frame's token grid.
    :param n_layers: Transformer blocks.
    :param n_heads: Attention heads per block.
    """

    # Scores are of the order of 1, embeddings and the steps by which they are learned of a hundredth
    SCALE = 10.0

    offsets: th.Tensor  # (L, L) int64, which distance

    def __init__(self, n_steps: int, grid: tuple[int, int], n_layers: int, n_heads: int) -> None:
        super().__init__()
        self.n_layers = n_layers
        height, width = grid
        K = height * width
        steps, places = th.arange(n_steps).repeat_interleave(K + 1), th.arange(K + 1).repeat(n_steps)
        rows, columns, on_grid = places // width, places % width, places < K

        def apart(x: th.Tensor) -> th.Tensor:
            return x.unsqueeze(1) - x

        in_frame = (apart(rows) + height - 1) * (2 * width - 1) + apart(columns) + width - 1
        n_in_frame = (2 * height - 1) * (2 * width - 1)
        no_place = n_in_frame + 2 * on_grid.long().unsqueeze(1) + on_grid.long()  # by which of the two is a token
        in_frame = th.where(on_grid.unsqueeze(1) & on_grid, in_frame, no_place)
        n_offsets = n_in_frame + 3
        self.register_buffer("offsets", apart(steps).clamp(min=0) * n_offsets + in_frame, persistent=False)
        self.scores = nn.Embedding(n_steps * n_offsets, n_layers * n_heads)

    def forward(self) -> tuple[th.Tensor, ...]:
        """
        :return: Of each block, (nh, L, L): what is added to scores of a position (row) for one (column), -inf for later ones.
        """
        scores = self.SCALE * self.scores(self.offsets).permute(2, 0, 1)  # (n_layers * nh, L, L)
        later = th.ones_like(self.offsets, dtype=th.bool).triu(1)
        return scores.masked_fill(later, -math.inf).unflatten(0, (self.n_layers, -1)).unbind()


class WorldModelCache(KVCache):
    """A Transformer's cache, and what attention adds to its scores, which holds as long as what is cached."""

    attention_biases: tuple[th.Tensor, ...] | None  # of each block, (nh, L, L)

    def features(self, transformer: Transformer, x: th.Tensor) -> th.Tensor:
        """
        Pass embedded positions that follow the cached ones, and take them in.

        :param transformer: The Transformer.
        :param x: (B, n, D)
        :return: (B, D), what it makes of the last one.
        """
        return transformer(x, self, self.attention_biases)[:, -1]


class WorldModel(nn.Module):
    """
    Predicts the next frame's tokens, the reward's sign and the end of an episode (Sec. 2.2 of
    "Transformers are Sample-Efficient World Models", https://arxiv.org/abs/2209.00588).

    :param codebook_size: Number of frame tokens V.
    :param n_actions: Number of actions A.
    :param tokens_per_frame: Tokens of one frame, K.
    :param sequence_length: Steps in the context.
    :param embed_dim: Embedding size D; a multiple of ``n_heads``.
    :param n_layers: Number of Transformer blocks.
    :param n_heads: Attention heads per block.
    :param dropout: Dropout probability in [0, 1).
    :param grid: Height and width of a frame's token grid if attention also goes by how far apart positions are, see
        ``RelativePositionBias``; None as in the paper, where it does not.
    """

    def __init__(
        self,
        codebook_size: int,
        n_actions: int,
        tokens_per_frame: int,
        sequence_length: int = 20,
        embed_dim: int = 256,
        n_layers: int = 10,
        n_heads: int = 4,
        dropout: float = 0.1,
        grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        assert grid is None or grid[0] * grid[1] == tokens_per_frame, (grid, tokens_per_frame)
        self.tokens_per_frame = tokens_per_frame
        self.sequence_length = sequence_length
        self.max_length = sequence_length * (tokens_per_frame + 1)
        self.token_embedding = nn.Embedding(codebook_size, embed_dim)
        self.action_embedding = nn.Embedding(n_actions, embed_dim)
        self.position_embedding = nn.Embedding(self.max_length, embed_dim)
        self.position_bias = RelativePositionBias(sequence_length, grid, n_layers, n_heads) if grid is not None else None
        self.transformer = Transformer(embed_dim, n_layers, n_heads, dropout)
        self.token_head = self._make_head(embed_dim, codebook_size)
        self.reward_head = self._make_head(embed_dim, 3)
        self.end_head = self._make_head(embed_dim, 2)
        self.apply(self._init_weights)

    @staticmethod
    def _make_head(embed_dim: int, output_dim: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(embed_dim, embed_dim), nn.ReLU(), nn.Linear(embed_dim, output_dim))

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def make_cache(self) -> WorldModelCache:
        """
        :return: An empty cache for ``step_action`` and ``step_token``.
        """
        return WorldModelCache(self.max_length)

    def attention_biases(self) -> tuple[th.Tensor, ...] | None:
        """
        :return: Of each block, (nh, L, L), what is added to attention's scores; None for nothing.
        """
        return self.position_bias() if self.position_bias is not None else None

    def forward(self, tokens: th.Tensor, actions: th.Tensor) -> WorldModelOutput:
        """
        Whole segments in one pass.

        :param tokens: (B, T, K) int64 in [0, V)
        :param actions: (B, T) int64 in [0, A)
        :return: Predictions for every step.
        """
        B, T, K = tokens.shape
        assert K == self.tokens_per_frame and actions.shape == (B, T), (tokens.shape, actions.shape)
        x = th.cat([self.token_embedding(tokens), self.action_embedding(actions).unsqueeze(2)], dim=2)
        x = x.flatten(1, 2) + self.position_embedding.weight[: T * (K + 1)]
        x = self.transformer(x, biases=self.attention_biases()).unflatten(1, (T, K + 1))  # (B, T, K + 1, D)
        before_token = th.cat([x[:, :, : K - 1], x[:, :, K:]], dim=2).flatten(1, 2)
        at_action = x[:, :, K]  # (B, T, D)
        logits = self.token_head(before_token), self.reward_head(at_action), self.end_head(at_action)
        return WorldModelOutput(*(part.float() for part in logits))

    def step_action(
        self, tokens: th.Tensor, actions: th.Tensor, cache: WorldModelCache
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        Read the frame tokens that the cache has not seen yet and the action that follows them, in one pass.

        :param tokens: (B, n) int64, the last n tokens of the current frame
        :param actions: (B,) int64
        :param cache: Everything before ``tokens``; takes in both.
        :return: Logits of the reward class (B, 3), of the end (B, 2) and of the next frame's first token (B, V).
        """
        x = th.cat([self.token_embedding(tokens), self.action_embedding(actions).unsqueeze(1)], dim=1)
        x = self._append(x, cache)
        return self.reward_head(x).float(), self.end_head(x).float(), self.token_head(x).float()

    def step_token(self, tokens: th.Tensor, cache: WorldModelCache) -> th.Tensor:
        """
        Read one frame token.

        :param tokens: (B,) int64
        :param cache: Everything before ``tokens``; takes them in.
        :return: Logits of the token that follows, (B, V).
        """
        return self.token_head(self._append(self.token_embedding(tokens).unsqueeze(1), cache)).float()

    def _append(self, x: th.Tensor, cache: WorldModelCache) -> th.Tensor:
        """Pass n embedded positions, (B, n, D), that follow the cached ones; the last one's features, (B, D)."""
        start = cache.length
        if start == 0:
            cache.attention_biases = self.attention_biases()
        x = x + self.position_embedding.weight[start : start + x.shape[1]]
        return cache.features(self.transformer, x)

    def loss(
        self, tokens: th.Tensor, actions: th.Tensor, rewards: th.Tensor, terminations: th.Tensor, mask: th.Tensor
    ) -> tuple[th.Tensor, Logs]:
        """
        Sum of the three cross-entropies (Sec. 2.2), padding ignored in all of them.

        :param tokens: (B, T, K) int64
        :param actions: (B, T) int64
        :param rewards: (B, T) float32; only the sign is learned
        :param terminations: (B, T) bool
        :param mask: (B, T) bool, False where a segment is padded
        :return: The loss and what to log of it.
        """
        # The first token of a segment is predicted by nothing, the last action predicts no frame inside the segment
        output = self(tokens, actions)
        token_logits = output.token_logits[:, :-1]
        token_labels = tokens.masked_fill(~mask.unsqueeze(-1), PADDED).flatten(1)[:, 1:]  # (B, T * K - 1)
        reward_labels = (rewards.sign().long() + 1).masked_fill(~mask, PADDED)  # (B, T)
        end_labels = terminations.long().masked_fill(~mask, PADDED)  # (B, T)

        losses = {}
        accuracies = {}
        for name, logits, labels in (
            ("token", token_logits, token_labels),
            ("reward", output.reward_logits, reward_labels),
            ("end", output.end_logits, end_labels),
        ):
            known = labels != PADDED
            n_known = known.sum().clamp(min=1)  # none if all frames are of one token and all segments of one step
            entropies = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=PADDED, reduction="sum")
            losses[f"{name}_loss"] = entropies / n_known
            accuracies[f"{name}_accuracy"] = ((logits.argmax(-1) == labels) & known).sum() / n_known
        loss = th.stack(list(losses.values())).sum()
        return loss, {"loss": loss.detach(), **{name: value.detach() for name, value in losses.items()}, **accuracies}
