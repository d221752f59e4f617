from typing import Any

import pytest
import torch as th
from torch import nn
from torch.nn import functional as F

from sb3_iris.world_model import RelativePositionBias, WorldModel

V, A, K = 7, 3, 4
OPTIONS: list[dict[str, Any]] = [{}, {"grid": (2, 2)}]


def make_world_model(tokens_per_frame: int = K, sequence_length: int = 3, **kwargs: Any) -> WorldModel:
    """A tiny world model whose predictions differ a lot from position to position."""
    world_model = WorldModel(V, A, tokens_per_frame, sequence_length, embed_dim=12, n_layers=2, n_heads=2, **kwargs).eval()
    with th.no_grad():
        for tensor in (*world_model.parameters(), *world_model.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(std=0.4)
    return world_model


def make_batch(B: int, T: int, tokens_per_frame: int = K) -> tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor]:
    tokens = th.randint(V, (B, T, tokens_per_frame))
    return tokens, th.randint(A, (B, T)), 3 * th.randn(B, T).relu() - th.rand(B, T).round(), th.rand(B, T) < 0.5


def test_number_of_parameters() -> None:
    world_model = WorldModel(codebook_size=512, n_actions=6, tokens_per_frame=16)
    assert sum(p.numel() for p in world_model.parameters()) == 8_448_005
    assert world_model.max_length == 340
    assert len(world_model.transformer.blocks) == 10
    assert world_model.transformer.n_heads == 4
    assert {module.p for module in world_model.modules() if isinstance(module, nn.Dropout)} == {0.1}


def test_initialisation() -> None:
    world_model = WorldModel(codebook_size=300, n_actions=100, tokens_per_frame=16, n_layers=2, embed_dim=128)
    parameters = dict(world_model.named_parameters())
    for name, module in world_model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            weight = parameters.pop(f"{name}.weight").detach()
            standard_error = 0.02 / weight.numel() ** 0.5
            assert abs(weight.mean()) < 5 * standard_error, name
            assert abs(weight.std() - 0.02) < 5 * standard_error, name
            if weight.numel() > 10_000:  # a normal law, not a uniform one: 4.55% are beyond two standard deviations
                assert (weight.abs() > 0.04).float().mean().item() == pytest.approx(0.0455, rel=0.2), name
        if isinstance(module, nn.LayerNorm):
            assert (parameters.pop(f"{name}.weight") == 1).all(), name
        if isinstance(module, nn.Linear | nn.LayerNorm):
            assert (parameters.pop(f"{name}.bias") == 0).all(), name
    assert not parameters


@th.no_grad()
def test_relative_positions() -> None:
    """Two pairs of positions have the same scores if, and only if, they are as far apart and of the same kind."""
    T, height, width, n_layers, n_heads = 3, 2, 3, 2, 4
    options: dict[str, Any] = {"n_layers": n_layers, "n_heads": n_heads, "grid": (height, width)}
    world_model = WorldModel(V, A, height * width, T, embed_dim=12, **options)
    assert isinstance(world_model.position_bias, RelativePositionBias)
    blocks = world_model.position_bias()
    length = T * (height * width + 1)
    assert [block.shape for block in blocks] == n_layers * [(n_heads, length, length)]
    scores = th.cat(blocks)  # (n_layers * n_heads, L, L)
    found: dict[Any, th.Tensor] = {}
    for to in range(length):
        assert (scores[:, to, to + 1 :] == -th.inf).all()
        for of in range(to + 1):
            (t, k), (s, j) = divmod(to, height * width + 1), divmod(of, height * width + 1)
            are_actions = (k == height * width, j == height * width)
            in_frame = None if any(are_actions) else (k // width - j // width, k % width - j % width)
            same = found.setdefault((t - s, are_actions, in_frame), scores[:, to, of])
            assert th.equal(scores[:, to, of], same), (to, of)
    assert len({tuple(numbers.tolist()) for numbers in found.values()}) == len(found)
    assert scores[scores.isfinite()].std() == pytest.approx(0.2, rel=0.2)  # ten times what is learned


@pytest.mark.parametrize("tokens_per_frame", [1, 2, K])
def test_loss_position_by_position(tokens_per_frame: int) -> None:
    """Two segments of two steps, the second one half padding: labels, shift and mask by an explicit walk along positions."""
    world_model = make_world_model(tokens_per_frame)
    tokens, actions, *_ = make_batch(2, 2, tokens_per_frame)
    rewards = th.tensor([[3.5, -0.2], [0.0, 9.0]])
    reward_classes = [[2, 0], [1, 2]]
    terminations = th.tensor([[False, True], [True, False]])
    mask = th.tensor([[True, True], [True, False]])

    entropies: dict[str, list[th.Tensor]] = {"token": [], "reward": [], "end": []}
    hits: dict[str, list[bool]] = {"token": [], "reward": [], "end": []}

    def predict(name: str, logits: th.Tensor, label: int) -> None:
        entropies[name].append(-F.log_softmax(logits, dim=-1)[label])
        hits[name].append(logits.argmax().item() == label)

    for b in range(2):
        embedded = []
        for t in range(2):
            embedded += [world_model.token_embedding.weight[token] for token in tokens[b, t]]
            embedded.append(world_model.action_embedding.weight[actions[b, t]])
        x = th.stack(embedded) + world_model.position_embedding.weight[: len(embedded)]
        features = world_model.transformer(x.unsqueeze(0))[0]
        for position, feature in enumerate(features):
            t, k = divmod(position, tokens_per_frame + 1)
            if k == tokens_per_frame:  # the action
                if mask[b, t]:
                    predict("reward", world_model.reward_head(feature), reward_classes[b][t])
                    predict("end", world_model.end_head(feature), int(terminations[b, t]))
                if t == 0 and mask[b, 1]:
                    predict("token", world_model.token_head(feature), int(tokens[b, 1, 0]))
            elif k < tokens_per_frame - 1 and mask[b, t]:  # all but the last token
                predict("token", world_model.token_head(feature), int(tokens[b, t, k + 1]))
    # padding hides the second step of the second segment, and no frame's first token is predicted before the first action
    assert [len(entropies[name]) for name in ("token", "reward", "end")] == [3 * tokens_per_frame - 2, 3, 3]

    loss, logs = world_model.loss(tokens, actions, rewards, terminations, mask)
    for name in entropies:
        th.testing.assert_close(logs[f"{name}_loss"], th.stack(entropies[name]).mean().detach())
        assert logs[f"{name}_accuracy"].item() == pytest.approx(sum(hits[name]) / len(hits[name]))
    expected = sum(th.stack(values).mean() for values in entropies.values())
    th.testing.assert_close(loss, expected)
    th.testing.assert_close(logs["loss"], loss.detach())
    assert not any(value.requires_grad for value in logs.values())


def test_padding_does_not_change_the_loss() -> None:
    world_model = make_world_model()
    mask = th.tensor([[True, True, False], [True, False, False], [True, True, True]])
    batch, other = make_batch(3, 3), make_batch(3, 3)
    loss, logs = world_model.loss(*batch, mask)
    loss.backward()
    gradients = [p.grad.clone() for p in world_model.parameters() if p.grad is not None]

    mixed = [th.where(mask.view(3, 3, *[1] * (a.ndim - 2)), a, b) for a, b in zip(batch, other, strict=True)]
    world_model.zero_grad()
    tokens, actions, rewards, terminations = mixed
    loss_2, logs_2 = world_model.loss(tokens, actions, rewards, terminations, mask)
    loss_2.backward()
    assert {name: value.item() for name, value in logs.items()} == {name: value.item() for name, value in logs_2.items()}
    th.testing.assert_close([p.grad for p in world_model.parameters() if p.grad is not None], gradients)

    # and what is not padding does
    mixed[0][1, 0, -1] = (mixed[0][1, 0, -1] + 1) % V
    assert world_model.loss(tokens, actions, rewards, terminations, mask)[0] != loss


def test_nothing_to_predict() -> None:
    """Frames of one token in segments of one step leave no token to be predicted; that is a loss of 0, not of 0 / 0."""
    world_model = make_world_model(tokens_per_frame=1)
    mask = th.tensor([[True, False], [True, False]])
    loss, logs = world_model.loss(*make_batch(2, 2, 1), mask)
    assert logs["token_loss"] == logs["token_accuracy"] == 0
    th.testing.assert_close(logs["loss"], logs["reward_loss"] + logs["end_loss"])
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in world_model.parameters())


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("n_unread", [0, 1, 3])
@th.no_grad()
def test_steps_equal_one_pass(n_unread: int, options: dict[str, Any]) -> None:
    """Token by token through the cache, the last ``n_unread`` ones of each frame together with its action."""
    B, T = 2, 3
    world_model = make_world_model(sequence_length=T, **options)
    tokens, actions, *_ = make_batch(B, T)
    expected = world_model(tokens, actions)
    expected_tokens = expected.token_logits.view(B, T, K, V)  # the last ones of a step are its action's
    assert expected.reward_logits.shape == (B, T, 3)
    assert expected.end_logits.shape == (B, T, 2)

    cache = world_model.make_cache()
    for t in range(T):
        for k in range(K - n_unread):
            token_logits = world_model.step_token(tokens[:, t, k], cache)
            if k < K - 1:
                th.testing.assert_close(token_logits, expected_tokens[:, t, k])
        reward_logits, end_logits, token_logits = world_model.step_action(tokens[:, t, K - n_unread :], actions[:, t], cache)
        th.testing.assert_close(reward_logits, expected.reward_logits[:, t])
        th.testing.assert_close(end_logits, expected.end_logits[:, t])
        th.testing.assert_close(token_logits, expected_tokens[:, t, K - 1])
    assert cache.length == world_model.max_length


@th.no_grad()
def test_cache_that_is_begun_anew() -> None:
    """A game that goes on after the model was trained: from its next context on it is that of the new weights."""
    world_model = make_world_model(grid=(2, 2))
    tokens, actions, *_ = make_batch(2, 1)
    cache = world_model.make_cache()
    world_model.step_action(tokens[:, 0], actions[:, 0], cache)
    for parameter in world_model.parameters():
        parameter.normal_(std=0.4)
    cache.reset()
    *_, token_logits = world_model.step_action(tokens[:, 0], actions[:, 0], cache)
    th.testing.assert_close(token_logits, world_model(tokens, actions).token_logits[:, -1])


def test_shapes_must_fit() -> None:
    world_model = make_world_model()
    tokens, actions, *_ = make_batch(2, 3)
    for wrong_tokens, wrong_actions in ((tokens[:, :, 1:], actions), (tokens, actions[:, 1:])):
        with pytest.raises(AssertionError, match="Size"):
            world_model(wrong_tokens, wrong_actions)
