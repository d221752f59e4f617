"""
The world model's passes of one or a few tokens on a GPU, in few kernels.

In such a pass a product takes microseconds, so what counts is how many kernels there are. PyTorch launches a dozen for a block
of the Transformer, these are five: LayerNorm with queries, keys and values; attention, which also writes the cache; projection
with the residual path; LayerNorm with the perceptron's first layer and GELU; its second layer with the residual path.

Linear layers are computed as under ``torch.autocast``: bfloat16 weights and inputs, sums in float32. What goes from block to
block is float32, as there.
"""

import functools

import torch as th
import triton
import triton.language as tl
from torch import nn

from sb3_iris.imagination import ImaginedGame
from sb3_iris.transformer import Block, KVCache
from sb3_iris.world_model import WorldModel

MAX_WEIGHTS = 2**15  # of a program, which a GPU for games still finds room for beside its inputs


def _starts_early(device: th.device) -> dict[str, bool]:
    """What tells a kernel to begin while the one before still runs ("programmatic dependent launch"), where that can be."""
    if th.version.cuda is None or not hasattr(tl.extra.cuda, "gdc_wait"):
        return {}
    return {"launch_pdl": True} if th.cuda.get_device_capability(device) >= (9, 0) else {}


if hasattr(getattr(tl.extra, "cuda", None), "gdc_wait"):  # not so before Triton 3.4

    @triton.jit
    def _wait_for_previous():
        """
        What is before this in a kernel may read only what no kernel since the one before last has written: weights, and keys
        and values of former passes. Every kernel that begins early waits, in each of its programs, else the next might begin
        too early.
        """
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()

else:

    @triton.jit
    def _wait_for_previous():
        pass


@triton.jit
def _linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    residual_ptr,
    y_ptr,
    n_rows,
    in_features,
    out_features,
    eps,
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    EARLY: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    outs = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row_exists, out_exists = (rows < n_rows)[:, None], (outs < out_features)[None, :]
    bias = tl.load(bias_ptr + outs[None, :], out_exists, other=0.0).to(tl.float32)
    where = rows[:, None] * out_features + outs[None, :]
    y = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
    for start in range(0, in_features, BLOCK_IN):  # once with NORM, which wants whole rows
        ins = start + tl.arange(0, BLOCK_IN)
        in_exists = ins < in_features
        weight = tl.load(weight_ptr + outs[None, :] * in_features + ins[:, None], in_exists[:, None] & out_exists, other=0.0)
        if NORM:
            norm_weight = tl.load(norm_weight_ptr + ins, in_exists, other=0.0)[None, :]
            norm_bias = tl.load(norm_bias_ptr + ins, in_exists, other=0.0)[None, :]
        if EARLY:
            _wait_for_previous()
        x = tl.load(x_ptr + rows[:, None] * in_features + ins[None, :], row_exists & in_exists[None, :], other=0.0)
        if NORM:
            x = tl.where(in_exists[None, :], x - (tl.sum(x, 1) / in_features)[:, None], 0.0)
            x = x * tl.rsqrt(tl.sum(x * x, 1) / in_features + eps)[:, None] * norm_weight + norm_bias
        y = tl.dot(x.to(weight.dtype), weight, y, input_precision="ieee")
    y += bias
    if ACTIVATION == "gelu":
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    if ACTIVATION == "relu":
        y = tl.maximum(y, 0.0)
    if RESIDUAL:
        y += tl.load(residual_ptr + where, row_exists & out_exists, other=0.0)
    tl.store(y_ptr + where, y.to(y_ptr.dtype.element_ty), row_exists & out_exists)


def linear(
    x: th.Tensor,
    weight: th.Tensor,
    bias: th.Tensor,
    dtype: th.dtype,
    norm: nn.LayerNorm | None = None,
    activation: str | None = None,
    residual: th.Tensor | None = None,
) -> th.Tensor:
    """
    A linear layer with what is before and behind it. All tensors are contiguous.

    :param x: (n, in_features); float32 if there is a LayerNorm, which is then float32 itself
    :param weight: (out_features, in_features), in whose type products are taken
    :param bias: (out_features,)
    :param dtype: Type of the result.
    :param norm: LayerNorm of ``x``.
    :param activation: ``"gelu"``, ``"relu"`` or None.
    :param residual: (n, out_features) float32, added in the end; None for nothing
    :return: (n, out_features)
    """
    (n_rows, in_features), out_features = x.shape, len(weight)
    y = x.new_empty(n_rows, out_features, dtype=dtype)
    block_rows, block_out = 16, 64 if out_features > 256 else 32  # small ones keep more of a GPU's processors at work
    block_in = max(triton.next_power_of_2(in_features), 16)
    if norm is None:
        block_in = min(block_in, 1024)
    block_out = max(min(block_out, MAX_WEIGHTS // block_in), 16)
    early = _starts_early(x.device)
    _linear_kernel[triton.cdiv(n_rows, block_rows), triton.cdiv(out_features, block_out)](
        x,
        weight,
        bias,
        norm.weight if norm is not None else x,
        norm.bias if norm is not None else x,
        residual if residual is not None else x,
        y,
        n_rows,
        in_features,
        out_features,
        norm.eps if norm is not None else 0.0,
        NORM=norm is not None,
        ACTIVATION=activation,
        RESIDUAL=residual is not None,
        BLOCK_ROWS=block_rows,
        BLOCK_OUT=block_out,
        BLOCK_IN=block_in,
        EARLY=bool(early),
        **early,
        num_stages=1,  # pipelined loads would be begun before it has waited
    )
    return y


@triton.jit
def _look_at(scores, values, best, total, y):
    """Keys more in a softmax that is made step by step: the highest score so far, the sum of weights, and that of values."""
    new_best = tl.maximum(best, tl.max(scores, 0))
    weights, shrunk = tl.exp(scores - new_best), tl.exp(best - new_best)
    return new_best, total * shrunk + tl.sum(weights, 0), y * shrunk + tl.sum(weights[:, None] * values.to(tl.float32), 0)


@triton.jit
def _scores_of(q, keys, positions, past, bias_ptr, HAS_BIAS: tl.constexpr):
    scores = tl.sum(keys.to(tl.float32) * q[None, :], 1)
    if HAS_BIAS:
        scores += tl.load(bias_ptr + positions, positions < past, other=0.0).to(tl.float32)
    return tl.where(positions < past, scores, float("-inf"))


@triton.jit(do_not_specialize=["past"])
def _attention_kernel(
    qkv_ptr,
    keys_ptr,
    values_ptr,
    bias_ptr,
    y_ptr,
    past,
    max_length,
    bias_length,
    scale,
    HAS_BIAS: tl.constexpr,
    N_TOKENS: tl.constexpr,
    N_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    EARLY: tl.constexpr,
):
    sequence, head, token = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    dims = tl.arange(0, BLOCK_DIM)
    dim_exists = dims < HEAD_DIM
    embed_dim = N_HEADS * HEAD_DIM
    memory = (sequence * N_HEADS + head).to(tl.int64) * max_length * HEAD_DIM
    keys_ptr += memory
    values_ptr += memory
    qkv_ptr += sequence * N_TOKENS * 3 * embed_dim + head * HEAD_DIM + dims
    own_ptr = qkv_ptr + token * 3 * embed_dim
    bias_ptr += (head * bias_length + past + token) * bias_length

    positions = tl.arange(0, BLOCK_KEYS)
    where, exists = positions[:, None] * HEAD_DIM + dims[None, :], dim_exists[None, :]
    keys = tl.load(keys_ptr + where, (positions < past)[:, None] & exists, other=0.0)
    values = tl.load(values_ptr + where, (positions < past)[:, None] & exists, other=0.0)
    if EARLY:
        _wait_for_previous()

    q = tl.load(own_ptr, dim_exists, other=0.0).to(tl.float32) * scale
    own_key = tl.load(own_ptr + embed_dim, dim_exists, other=0.0)
    own_value = tl.load(own_ptr + 2 * embed_dim, dim_exists, other=0.0)
    tl.store(keys_ptr + (past + token) * HEAD_DIM + dims, own_key, dim_exists)
    tl.store(values_ptr + (past + token) * HEAD_DIM + dims, own_value, dim_exists)
    best = tl.sum(q * own_key.to(tl.float32), 0)
    if HAS_BIAS:
        best += tl.load(bias_ptr + past + token).to(tl.float32)
    total = tl.exp(best - best)  # 1, in the type that it has in the loops
    y = own_value.to(tl.float32)
    for other in range(0, token):  # new ones too, which others of these programs are writing into the cache just now
        other_ptr = qkv_ptr + other * 3 * embed_dim
        score = tl.sum(q * tl.load(other_ptr + embed_dim, dim_exists, other=0.0).to(tl.float32), 0)
        if HAS_BIAS:
            score += tl.load(bias_ptr + past + other).to(tl.float32)
        new_best = tl.maximum(best, score)
        weight, shrunk = tl.exp(score - new_best), tl.exp(best - new_best)
        total = total * shrunk + weight
        y = y * shrunk + weight * tl.load(other_ptr + 2 * embed_dim, dim_exists, other=0.0).to(tl.float32)
        best = new_best
    scores = _scores_of(q, keys, positions, past, bias_ptr, HAS_BIAS)
    best, total, y = _look_at(scores, values, best, total, y)
    for start in range(BLOCK_KEYS, past, BLOCK_KEYS):
        positions = start + tl.arange(0, BLOCK_KEYS)
        where = positions[:, None] * HEAD_DIM + dims[None, :]
        keys = tl.load(keys_ptr + where, (positions < past)[:, None] & exists, other=0.0)
        values = tl.load(values_ptr + where, (positions < past)[:, None] & exists, other=0.0)
        scores = _scores_of(q, keys, positions, past, bias_ptr, HAS_BIAS)
        best, total, y = _look_at(scores, values, best, total, y)
    y_ptr += (sequence * N_TOKENS + token) * embed_dim + head * HEAD_DIM + dims
    tl.store(y_ptr, (y / total).to(y_ptr.dtype.element_ty), dim_exists)


def attend(qkv: th.Tensor, layer: int, n_heads: int, cache: KVCache, bias: th.Tensor | None) -> th.Tensor:
    """
    ``CausalSelfAttention.attend`` for few positions: each has programs of its own, which look at the other new ones in turn.

    :param qkv: (B, T, 3 D), contiguous
    :param layer: Index of the block.
    :param n_heads: Attention heads.
    :param cache: As there.
    :param bias: As there, contiguous.
    :return: (B, T, D)
    """
    assert bias is None or bias.is_contiguous(), bias.stride()
    B, T, _ = qkv.shape
    keys, values = cache.reserve(layer, qkv.view(B, T, 3, n_heads, -1).permute(2, 0, 3, 1, 4)[1:])
    max_length, head_dim = keys.shape[2:]
    y = qkv.new_empty(B, T, n_heads * head_dim)
    block_keys = min(max(triton.next_power_of_2(cache.length), 16), 256)
    early = _starts_early(qkv.device)
    _attention_kernel[B, n_heads, T](
        qkv,
        keys,
        values,
        bias if bias is not None else qkv,
        y,
        cache.length,
        max_length,
        bias.shape[-1] if bias is not None else 0,
        head_dim**-0.5,
        HAS_BIAS=bias is not None,
        N_TOKENS=T,
        N_HEADS=n_heads,
        HEAD_DIM=head_dim,
        BLOCK_DIM=triton.next_power_of_2(head_dim),
        BLOCK_KEYS=block_keys,
        EARLY=bool(early),
        **early,
        num_warps=max(block_keys // 32, 2),
        num_stages=1,
    )
    return y


def block_forward(block: Block, x: th.Tensor, cache: KVCache, bias: th.Tensor | None) -> th.Tensor:
    """
    ``Block.forward`` in evaluation mode, for few positions that follow cached ones.

    :param block: The block.
    :param x: (B, T, D) float32
    :param cache: As there.
    :param bias: As there.
    :return: (B, T, D) float32
    """
    attention, first, second = block.attention, block.mlp[0], block.mlp[2]
    assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
    rows = x.flatten(0, 1).contiguous()
    qkv = linear(rows, attention.qkv.weight, attention.qkv.bias, norm=block.ln_1, dtype=attention.qkv.weight.dtype)
    attended = attend(qkv.unflatten(0, x.shape[:2]), attention.layer, attention.n_heads, cache, bias).flatten(0, 1)
    rows = linear(attended, attention.proj.weight, attention.proj.bias, residual=rows, dtype=th.float32)
    hidden = linear(rows, first.weight, first.bias, norm=block.ln_2, activation="gelu", dtype=first.weight.dtype)
    return linear(hidden, second.weight, second.bias, residual=rows, dtype=th.float32).view_as(x)


def token_head_forward(head: nn.Sequential, x: th.Tensor) -> th.Tensor:
    """
    What ``WorldModel``'s token head makes of features.

    :param head: The token head.
    :param x: (B, D) float32, features
    :return: (B, V) float32, logits of the token that follows
    """
    first, _, last = head
    assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
    hidden = linear(x.contiguous(), first.weight, first.bias, activation="relu", dtype=first.weight.dtype)
    return linear(hidden, last.weight, last.bias, dtype=th.float32)


@triton.jit
def _sample_kernel(logits_ptr, drawn_ptr, samples_ptr, n_classes, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    classes = tl.arange(0, BLOCK)
    logits = tl.load(logits_ptr + row * n_classes + classes, classes < n_classes, other=float("-inf"))
    weights = tl.exp(logits - tl.max(logits, 0))
    drawn = tl.load(drawn_ptr + row) * tl.sum(weights, 0)
    below = tl.sum((tl.cumsum(weights, 0) <= drawn).to(tl.int32), 0)
    tl.store(samples_ptr + row, tl.minimum(below, n_classes - 1).to(tl.int64))


def sample_categorical(logits: th.Tensor) -> th.Tensor:
    """
    As the actor-critic's function of that name, by the same random numbers.

    :param logits: (B, classes) float32, contiguous
    :return: (B,) int64
    """
    n_rows, n_classes = logits.shape
    samples = logits.new_empty(n_rows, dtype=th.int64)
    drawn = th.rand(n_rows, 1, device=logits.device)
    _sample_kernel[n_rows,](logits, drawn, samples, n_classes, BLOCK=triton.next_power_of_2(n_classes))
    return samples


class KernelGame(ImaginedGame):
    """One whose outcomes and tokens are sampled by a kernel."""

    def _sample(self, logits: th.Tensor) -> th.Tensor:
        assert self.temperature == 1 and self.generator is None
        return sample_categorical(logits)


def use_in(world_model: WorldModel) -> None:
    """
    Let a world model's blocks and token head be computed by these kernels from now on. They are tried out first, and what they
    raise where they cannot be used, for want of a C compiler for instance, is raised here.

    :param world_model: One in evaluation mode on a GPU, with linear layers in bfloat16.
    """
    head = world_model.token_head
    device = world_model.token_embedding.weight.device
    with th.cuda.device(device), th.random.fork_rng([device]):
        x = th.zeros(1, 1, world_model.transformer.embed_dim, device=device)
        for block in world_model.transformer.blocks[:1]:
            assert isinstance(block, Block)
            x = block_forward(block, x, KVCache(1), None)
        sample_categorical(token_head_forward(head, x[:, 0]))
        th.cuda.synchronize()

    for block in world_model.transformer.blocks:
        assert isinstance(block, Block)
        block.forward = functools.partial(block_forward, block)  # type: ignore[method-assign]
    head.forward = functools.partial(token_head_forward, head)  # type: ignore[method-assign]
