import pytest
import torch as th
from torch import nn
from torch.nn import functional as F

from sb3_iris.transformer import CausalSelfAttention, KVCache, Transformer

LENGTH = 12
PLACES = {"dropout": "embeddings", "attention.residual_dropout": "attention output", "mlp.3": "perceptron"}


def make_transformer(dropout: float = 0.0) -> Transformer:
    return Transformer(embed_dim=12, n_layers=3, n_heads=3, dropout=dropout).eval()


def read_in_chunks(transformer: Transformer, x: th.Tensor, cache: KVCache, chunks: list[int]) -> th.Tensor:
    return th.cat([transformer(chunk, cache) for chunk in x.split(chunks, dim=1)], dim=1)


@pytest.mark.parametrize("memory_chunk", [1, 4, LENGTH, 64])
@pytest.mark.parametrize("chunks", [[1] * LENGTH, [LENGTH], [5, 1, 1, 5], [1, 11], [3, 2, 4, 3], [11, 1]])
@th.no_grad()
def test_cache_equals_one_pass(chunks: list[int], memory_chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KVCache, "CHUNK", memory_chunk)
    transformer = make_transformer()
    x = th.randn(2, LENGTH, 12)
    expected = transformer(x)
    cache = KVCache(LENGTH)
    th.testing.assert_close(read_in_chunks(transformer, x, cache, chunks), expected)
    assert cache.length == LENGTH

    # after a reset nothing is left of what was read before
    other = th.randn(2, LENGTH, 12)
    cache.reset()
    assert cache.length == 0
    th.testing.assert_close(read_in_chunks(transformer, other, cache, chunks), transformer(other))


@th.no_grad()
def test_cache_keeps_rows_apart() -> None:
    transformer = make_transformer()
    x = th.randn(3, LENGTH, 12)
    together = read_in_chunks(transformer, x, KVCache(LENGTH), [4, 4, 4])
    for row in range(3):
        alone = read_in_chunks(transformer, x[row : row + 1], KVCache(LENGTH), [4, 4, 4])
        th.testing.assert_close(together[row : row + 1], alone)


@th.no_grad()
def test_cache_overflow() -> None:
    transformer = make_transformer()
    cache = KVCache(LENGTH)
    transformer(th.randn(1, LENGTH, 12), cache)
    with pytest.raises(AssertionError, match=rf"\({LENGTH + 1}, {LENGTH}\)"):
        transformer(th.randn(1, 1, 12), cache)


@pytest.mark.parametrize("position", range(LENGTH))
@th.no_grad()
def test_future_does_not_change_past(position: int) -> None:
    transformer = make_transformer()
    x = th.randn(2, LENGTH, 12)
    changed = x.clone()
    changed[:, position:] = 10 * th.randn_like(x[:, position:])
    before, after = transformer(x), transformer(changed)
    assert th.equal(before[:, :position], after[:, :position])
    assert (before[:, position:] != after[:, position:]).any(-1).all()  # and each later position sees the change


@pytest.mark.parametrize("past, position", [(4, 5), (4, 7), (1, 1), (9, 11)])
@th.no_grad()
def test_future_does_not_change_past_behind_a_cache(past: int, position: int) -> None:
    """The same for several positions appended together to a cache that is not empty."""
    transformer = make_transformer()
    x = th.randn(2, LENGTH, 12)
    changed = x.clone()
    changed[:, position:] = 10 * th.randn_like(x[:, position:])
    before, after = (read_in_chunks(transformer, y, KVCache(LENGTH), [past, LENGTH - past]) for y in (x, changed))
    assert th.equal(before[:, :position], after[:, :position])
    assert (before[:, position:] != after[:, position:]).any(-1).all()


@pytest.mark.parametrize("with_bias", [False, True])
@th.no_grad()
def test_attention_by_hand(with_bias: bool) -> None:
    T, D, n_heads = 4, 6, 2
    bias = th.randn(n_heads, T + 1, T + 1).masked_fill(th.ones(T + 1, T + 1, dtype=th.bool).triu(1), -th.inf)
    if not with_bias:
        bias = bias.masked_fill(bias.isfinite(), 0)
    attention = CausalSelfAttention(D, n_heads, dropout=0.0, layer=0).eval()
    x = th.randn(1, T, D)
    q, k, v = attention.qkv(x)[0].split(D, dim=-1)
    y = th.zeros(T, D)
    for t in range(T):
        for i, head in enumerate((slice(0, 3), slice(3, 6))):
            scores = [q[t, head] @ k[s, head] / 3**0.5 + bias[i, t, s] for s in range(t + 1)]
            weights = F.softmax(th.stack(scores), dim=0)
            y[t, head] = sum(weight * v[s, head] for s, weight in enumerate(weights))
    th.testing.assert_close(attention.attend(attention.qkv(x), None, bias if with_bias else None)[0], y)


@th.no_grad()
def test_dropout_in_training_only() -> None:
    transformer = make_transformer(dropout=0.5)
    without = make_transformer(dropout=0.0)
    without.load_state_dict(transformer.state_dict())
    x = th.randn(2, LENGTH, 12)
    expected = without(x)
    assert th.equal(transformer(x), expected)
    assert th.equal(without.train()(x), expected)
    transformer.train()
    assert not th.allclose(transformer(x), transformer(x))


@th.no_grad()
def test_where_dropout_acts() -> None:
    """With all but one of its places switched off, dropout still changes the output."""
    x = th.randn(2, LENGTH, 12)
    for place in ("attention weights", *PLACES.values()):
        transformer = make_transformer(dropout=0.5)
        expected = transformer(x)
        transformer.train()
        for name, module in transformer.named_modules():
            if isinstance(module, CausalSelfAttention):
                module.dropout *= place == "attention weights"
            elif isinstance(module, nn.Dropout):
                module.p *= place == PLACES[name.split(".", 2)[-1]]
        assert not th.allclose(transformer(x), expected), place


@pytest.mark.parametrize("biased", [False, True])
@th.no_grad()
def test_dropout_of_attention_weights(biased: bool) -> None:
    """Its only key is taken away from a share of the queries; the others see it all the stronger."""
    attention = CausalSelfAttention(4, n_heads=1, dropout=0.25, layer=0).train()
    qkv = th.ones(10_000, 1, 12)
    y = attention.attend(qkv, None, th.zeros(1, 1, 1) if biased else None)
    dropped = (y == 0).all(dim=-1)
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.02)
    th.testing.assert_close(y[~dropped], th.full((int((~dropped).sum()), 4), 1 / 0.75))
    assert (attention.eval().attend(qkv, None, None) == 1).all()
