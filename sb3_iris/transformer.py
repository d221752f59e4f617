"""
A causal Transformer and its key-value cache; nothing here knows about reinforcement learning.

Pre-LayerNorm GPT in the manner of GPT-2 and minGPT (https://github.com/karpathy/minGPT).
"""

import math
from collections.abc import Sequence

import torch as th
from torch import nn
from torch.nn import functional as F


class KVCache:
    """
    Keys and values of the positions seen so far, written in place.

    On a CPU the memory of each block grows by ``CHUNK`` positions at a time and is used whole: products of a part of a tensor
    would copy that part first. Elsewhere it is allocated once.

    :param max_length: Most positions that a sequence can have. All other sizes are those of the first keys.
    """

    CHUNK = 64  # small enough to read little in vain, large enough to grow seldom

    def __init__(self, max_length: int) -> None:
        self.memory: list[th.Tensor] = []  # keys and values of each block, (2, B, nh, at least length, hd)
        self.max_length = max_length
        self.length = 0

    def update(self, layer: int, keys_values: th.Tensor) -> th.Tensor:
        """
        Write the new positions of one block behind those that are there. ``length`` moves once all blocks have written.

        :param layer: Index of the block.
        :param keys_values: (2, B, nh, n, hd), keys and values of the n new positions.
        :return: Keys and values of all positions, the new ones included, (2, B, nh, at least length + n, hd); what is behind
            these is finite and means nothing.
        """
        memory = self.reserve(layer, keys_values)
        memory[:, :, :, self.length : self.length + keys_values.shape[3]] = keys_values
        return memory

    def reserve(self, layer: int, keys_values: th.Tensor) -> th.Tensor:
        """
        Make room for the new positions of one block, which whoever asks will write there.

        :param layer: Index of the block.
        :param keys_values: (2, B, nh, n, hd), of which only the sizes and the type count.
        :return: Keys and values of all positions as of ``update``, those of the new ones not yet written.
        """
        end = self.length + keys_values.shape[3]
        assert end <= self.max_length, (end, self.max_length)
        if layer == len(self.memory):
            self.memory.append(keys_values[:, :, :, :0])
        if end > self.memory[layer].shape[3]:
            self.memory[layer] = self._grown(self.memory[layer], end)
        return self.memory[layer]

    def _grown(self, old: th.Tensor, length: int) -> th.Tensor:
        """The same in memory for ``length`` positions or somewhat more; what is new is zero."""
        *sizes, n, hd = old.shape
        chunk = self.CHUNK if old.device.type == "cpu" else self.max_length
        new = old.new_empty(*sizes, min(-(-length // chunk) * chunk, self.max_length), hd)
        new[:, :, :, :n] = old
        new[:, :, :, n:] = 0
        return new

    def select(self, indices: th.Tensor) -> None:
        """
        Keep some of the sequences only.

        :param indices: (n,) int64
        """
        self.memory = [memory[:, indices] for memory in self.memory]

    def reset(self) -> None:
        """Forget all positions; the memory is kept."""
        self.length = 0


class CausalSelfAttention(nn.Module):
    """Multi-head self-attention in which a position sees itself and what came before."""

    def __init__(self, embed_dim: int, n_heads: int, dropout: float, layer: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.dropout = dropout
        self.layer = layer
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.residual_dropout = nn.Dropout(dropout)

    def attend(self, qkv: th.Tensor, cache: KVCache | None, bias: th.Tensor | None) -> th.Tensor:
        """
        :param qkv: (B, T, 3 D)
        :param cache: As in ``Transformer.forward``.
        :param bias: As there, of this block.
        :return: (B, T, D), what each position takes from those that it sees.
        """
        B, T, _ = qkv.shape
        qkv = qkv.unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, nh, T, hd)
        q, keys, values = qkv
        past = cache.length if cache is not None else 0
        if cache is not None:
            cached = cache.update(self.layer, qkv[1:])
            keys, values = cached if past > 0 else (keys, values)
        if bias is not None:
            bias = bias[:, past : past + T].to(q.dtype)  # (nh, T, L)
        dropout = self.dropout if self.training else 0.0
        return self._attend_to(q, keys, values, past, bias, dropout).transpose(1, 2).reshape(B, T, -1)

    @staticmethod
    def _attend_to(
        q: th.Tensor, keys: th.Tensor, values: th.Tensor, past: int, bias: th.Tensor | None, dropout: float
    ) -> th.Tensor:
        """Attention of T queries, (B, nh, T, hd), of which the first belongs to key ``past``."""
        T = q.shape[2]
        # On a CPU PyTorch's fused kernel works by blocks of queries; the one for a bias with gradients looks for empty rows
        if q.device.type != "cpu" or (past == 0 and bias is None):
            end = past + T
            mask = bias[None, :, :, :end] if bias is not None else None
            if mask is None and 0 < past and T > 1:
                mask = th.ones(T, end, dtype=th.bool, device=q.device).tril(past)
            is_causal = past == 0 and mask is None
            return F.scaled_dot_product_attention(q, keys[:, :, :end], values[:, :, :end], mask, dropout, is_causal)
        scores = (q * q.shape[-1] ** -0.5) @ keys.transpose(-2, -1)
        if bias is not None:
            scores += bias[:, :, : keys.shape[2]]
        else:
            for t in range(T):
                scores[:, :, t, past + t + 1 :] = -math.inf
        weights = th.softmax(scores, dim=-1)
        return (F.dropout(weights, dropout) if dropout > 0 else weights) @ values


class Block(nn.Module):
    """One Transformer layer: attention and a two-layer perceptron, each behind a LayerNorm and beside a residual path."""

    def __init__(self, embed_dim: int, n_heads: int, dropout: float, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(embed_dim)
        self.attention = CausalSelfAttention(embed_dim, n_heads, dropout, layer)
        self.ln_2 = nn.LayerNorm(embed_dim)
        self.mlp = nn.Sequential(
            nn.Linear(embed_dim, 4 * embed_dim), nn.GELU(), nn.Linear(4 * embed_dim, embed_dim), nn.Dropout(dropout)
        )

    def forward(self, x: th.Tensor, cache: KVCache | None = None, bias: th.Tensor | None = None) -> th.Tensor:
        return self.after_attention(x, self.attention.attend(self.before_attention(x), cache, bias))

    # These two work on positions one by one, so they can be compiled, unlike what reads a cache that grows

    def before_attention(self, x: th.Tensor) -> th.Tensor:
        """(B, T, D) to queries, keys and values, (B, T, 3 D)."""
        return self.attention.qkv(self.ln_1(x))

    def after_attention(self, x: th.Tensor, attended: th.Tensor) -> th.Tensor:
        """What the block makes of its input (B, T, D) and of what each position has attended to, (B, T, D)."""
        x = x + self.attention.residual_dropout(self.attention.proj(attended))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """
    Causal Transformer over embedded positions.

    :param embed_dim: Embedding size D; a multiple of ``n_heads``.
    :param n_layers: Number of blocks.
    :param n_heads: Attention heads per block.
    :param dropout: Dropout probability in [0, 1) on embeddings, attention weights and residual paths.
    """

    def __init__(self, embed_dim: int, n_layers: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.n_heads = n_heads
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(embed_dim, n_heads, dropout, layer) for layer in range(n_layers))
        self.ln_out = nn.LayerNorm(embed_dim)

    def forward(
        self, x: th.Tensor, cache: KVCache | None = None, biases: Sequence[th.Tensor | None] | None = None
    ) -> th.Tensor:
        """
        :param x: (B, T, D) embedded positions; with a cache, those that follow the cached ones.
        :param cache: Cache of the positions before ``x``; it takes in the new ones.
        :param biases: Of each block, (nh, L, L): what is added to the attention scores of a position (row) for a position
            (column), -inf for later ones. L is at least all positions that the cache has room for. None for nothing.
        :return: (B, T, D)
        """
        x = self.dropout(x)
        for block, bias in zip(self.blocks, biases or [None] * len(self.blocks), strict=True):
            x = block(x, cache, bias)
        if cache is not None:
            cache.length += x.shape[1]
        return self.ln_out(x)
