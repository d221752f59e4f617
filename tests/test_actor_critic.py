import math

import numpy as np
import pytest
import torch as th
from torch import nn
from torch.nn import functional as F

from sb3_iris.actor_critic import ActorCritic, actor_critic_loss, lambda_returns
from sb3_iris.type_aliases import ImaginedTrajectory, LSTMState


def make_actor_critic(image_shape: tuple[int, int, int] = (3, 8, 8)) -> ActorCritic:
    """A tiny one, with predictions that differ a lot from frame to frame."""
    actor_critic = ActorCritic(image_shape, n_actions=3, lstm_hidden_size=5)
    with th.no_grad():
        for parameter in actor_critic.parameters():
            parameter.mul_(3)
    return actor_critic


def random_state(batch_size: int) -> LSTMState:
    return LSTMState(th.randn(batch_size, 5), th.randn(batch_size, 5))


def random_game(B: int, T: int, p_end: float = 0.2) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    rewards = th.randint(-1, 2, (B, T)).double()
    return rewards, th.randn(B, T).double(), th.rand(B, T) < p_end


@pytest.mark.parametrize("sees_codes", [False, True])
def test_unroll_is_forward_step_by_step(sees_codes: bool) -> None:
    B, T = 3, 4
    actor_critic = ActorCritic((3, 8, 8), n_actions=3, lstm_hidden_size=5, sees_codes=sees_codes)
    inputs, state = th.rand(B, T, 3, 8, 8), random_state(B)
    logits, values = actor_critic.unroll(inputs, state)
    assert logits.shape == (B, T, 3) and values.shape == (B, T)
    for t in range(T):
        output = actor_critic(inputs[:, t], state)
        state = output.state
        th.testing.assert_close(logits[:, t], output.logits)
        th.testing.assert_close(values[:, t], output.values)
    # and the gradient goes back through all steps
    (gradient,) = th.autograd.grad(values[:, -1].sum(), actor_critic.lstm.weight_hh, retain_graph=True)
    assert gradient.any()


def test_number_of_parameters() -> None:
    actor_critic = ActorCritic((3, 64, 64), n_actions=6)
    assert sum(p.numel() for p in actor_critic.parameters()) == 3_218_983
    assert actor_critic.lstm.input_size == 1024


@pytest.mark.parametrize(
    "image_shape, n_pools, n_features",
    [
        ((3, 64, 64), 4, 64 * 4 * 4),
        ((3, 84, 84), 4, 64 * 5 * 5),
        ((3, 16, 16), 4, 64),
        ((4, 10, 10), 3, 64),
        ((1, 8, 8), 3, 64),
        ((3, 4, 20), 2, 64 * 1 * 5),
        ((2, 1, 1), 0, 64),
    ],
)
def test_image_sizes(image_shape: tuple[int, int, int], n_pools: int, n_features: int) -> None:
    actor_critic = make_actor_critic(image_shape)
    assert sum(isinstance(module, nn.MaxPool2d) for module in actor_critic.cnn) == n_pools
    assert actor_critic.lstm.input_size == n_features
    output = actor_critic(th.rand(2, *image_shape), actor_critic.initial_state(2))
    assert output.logits.shape == (2, 3)
    assert output.values.shape == (2,)
    assert output.state.hidden.shape == output.state.cell.shape == (2, 5)


@th.no_grad()
def test_forward_by_hand() -> None:
    actor_critic = make_actor_critic((3, 16, 16))
    frames, state = th.rand(2, 3, 16, 16), random_state(2)
    x = 2 * frames - 1
    channels = []
    for conv in actor_critic.cnn:
        if isinstance(conv, nn.Conv2d):
            x = F.relu(F.max_pool2d(F.conv2d(x, conv.weight, conv.bias, padding=1), 2))
            channels.append(x.shape[1])
    assert channels == [32, 32, 64, 64]
    lstm = actor_critic.lstm
    gates = F.linear(x.flatten(1), lstm.weight_ih, lstm.bias_ih) + F.linear(state.hidden, lstm.weight_hh, lstm.bias_hh)
    i, f, g, o = gates.chunk(4, dim=1)
    cell = f.sigmoid() * state.cell + i.sigmoid() * g.tanh()
    hidden = o.sigmoid() * cell.tanh()
    output = actor_critic(frames, state)
    th.testing.assert_close(output.state, LSTMState(hidden, cell))
    th.testing.assert_close(output.logits, F.linear(hidden, actor_critic.actor.weight, actor_critic.actor.bias))
    th.testing.assert_close(output.values, F.linear(hidden, actor_critic.critic.weight, actor_critic.critic.bias)[:, 0])


@pytest.mark.parametrize("side", [8, 10])
@th.no_grad()
def test_batch_of_one_equals_itself_in_a_batch(side: int) -> None:
    actor_critic = make_actor_critic((3, side, side))
    frames, state = th.rand(4, 3, side, side), random_state(4)
    together = actor_critic(frames, state)
    for b in range(4):
        alone = actor_critic(frames[b : b + 1], LSTMState(state.hidden[b : b + 1], state.cell[b : b + 1]))
        th.testing.assert_close(alone.logits[0], together.logits[b])
        th.testing.assert_close(alone.values[0], together.values[b])
        th.testing.assert_close(alone.state.hidden[0], together.state.hidden[b])
        th.testing.assert_close(alone.state.cell[0], together.state.cell[b])


def test_initial_state() -> None:
    state = make_actor_critic().initial_state(2)
    assert state.hidden.tolist() == state.cell.tolist() == [[0.0] * 5] * 2


@pytest.mark.parametrize("mask", [[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0], [1, 0, 1, 0], []])
def test_burn_in_equals_stepping(mask: list[int]) -> None:
    actor_critic = make_actor_critic()
    frames = th.rand(2, len(mask), 3, 8, 8)
    masks = th.tensor([mask, [1] * len(mask)], dtype=th.bool).view(2, len(mask))
    burnt_in = actor_critic.burn_in(frames, masks)
    assert not burnt_in.hidden.requires_grad and not burnt_in.cell.requires_grad
    for b in range(2):
        state = actor_critic.initial_state(1)
        for t in range(len(mask)):
            if masks[b, t]:
                state = actor_critic(frames[b, t].unsqueeze(0), state).state
        th.testing.assert_close(burnt_in.hidden[b], state.hidden[0].detach())
        th.testing.assert_close(burnt_in.cell[b], state.cell[0].detach())


@pytest.mark.parametrize("gae_lambda", [0.0, 0.3, 0.95, 1.0])
@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("T", [1, 2, 7])
def test_lambda_returns_by_plain_loop(T: int, gamma: float, gae_lambda: float) -> None:
    rewards, values, ends = random_game(5, T)
    returns = lambda_returns(rewards, values, ends, gamma, gae_lambda)
    for b in range(5):
        expected = values[b, -1].item()
        assert returns[b, -1].item() == expected
        for t in range(T - 2, -1, -1):
            bootstrap = (1 - gae_lambda) * values[b, t + 1].item() + gae_lambda * expected
            expected = rewards[b, t].item() + (0.0 if ends[b, t] else gamma * bootstrap)
            assert returns[b, t].item() == pytest.approx(expected)


def test_lambda_returns_are_mixtures_of_n_step_returns() -> None:
    """The definition in textbooks, without recursion: weights (1 - lambda) lambda^(n - 1), the rest on the longest one."""
    T, gamma, gae_lambda = 6, 0.9, 0.7
    rewards, values, ends = random_game(4, T)
    going_on = (~ends).double()
    returns = lambda_returns(rewards, values, ends, gamma, gae_lambda)
    for t in range(T - 1):
        expected = th.zeros(4).double()
        for n in range(1, T - t):
            n_step = sum(gamma**k * going_on[:, t : t + k].prod(1) * rewards[:, t + k] for k in range(n))
            n_step = n_step + gamma**n * going_on[:, t : t + n].prod(1) * values[:, t + n]
            expected += (gae_lambda ** (n - 1) if n == T - t - 1 else (1 - gae_lambda) * gae_lambda ** (n - 1)) * n_step
        th.testing.assert_close(returns[:, t], expected)


def test_lambda_zero_gives_one_step_targets() -> None:
    rewards, values, ends = random_game(5, 6)
    returns = lambda_returns(rewards, values, ends, 0.9, 0.0)
    th.testing.assert_close(returns[:, :-1], rewards[:, :-1] + 0.9 * (~ends[:, :-1]) * values[:, 1:])


def test_lambda_one_gives_discounted_sums() -> None:
    rewards, values, _ = random_game(5, 6)
    returns = lambda_returns(rewards, values, th.zeros(5, 6), 0.9, 1.0)
    for t in range(6):
        discounts = 0.9 ** th.arange(6 - t)
        th.testing.assert_close(returns[:, t], (rewards[:, t:-1] * discounts[:-1]).sum(1) + discounts[-1] * values[:, -1])


def test_nothing_counts_after_an_end() -> None:
    rewards, values, _ = random_game(3, 8)
    ends = th.zeros(3, 8, dtype=th.bool)
    ends[:, 4] = True
    returns = lambda_returns(rewards, values, ends, 0.9, 0.95)
    th.testing.assert_close(returns[:, 4], rewards[:, 4])
    pairs = zip((rewards, values, ends), random_game(3, 8), strict=True)
    rewards_2, values_2, ends_2 = (th.cat([a[:, :5], b[:, 5:]], dim=1) for a, b in pairs)
    returns_2 = lambda_returns(rewards_2, values_2, ends_2, 0.9, 0.95)
    assert th.equal(returns[:, :5], returns_2[:, :5])
    assert not th.equal(returns[:, 5:], returns_2[:, 5:])


def test_loss_by_hand() -> None:
    B, T, gamma, gae_lambda, ent_coef = 3, 5, 0.9, 0.8, 0.1
    rewards, values, ends = random_game(B, T)
    values.requires_grad_()
    logits = th.randn(B, T, 4, dtype=th.float64, requires_grad=True)
    actions = th.randint(4, (B, T))
    returns = lambda_returns(rewards, values.detach(), ends, gamma, gae_lambda)
    loss, logs = actor_critic_loss(ImaginedTrajectory(actions, rewards, ends, values, logits), gamma, gae_lambda, ent_coef)

    policy_terms, value_terms, entropies, reward_sums = [], [], [], []
    for b in range(B):
        n_played = ends[b].tolist().index(True) + 1 if ends[b].any() else T
        reward_sums.append(rewards[b, :n_played].sum().item())
        for t in range(T - 1):  # all steps but the last
            weights = [math.exp(logit) for logit in logits[b, t].tolist()]
            probabilities = [weight / sum(weights) for weight in weights]
            advantage = (returns[b, t] - values[b, t]).item()
            policy_terms.append(-math.log(probabilities[actions[b, t]]) * advantage)
            value_terms.append(advantage**2)
            entropies.append(-sum(p * math.log(p) for p in probabilities))
    assert logs["policy_gradient_loss"].item() == pytest.approx(np.mean(policy_terms))
    assert logs["value_loss"].item() == pytest.approx(np.mean(value_terms))
    assert logs["entropy"].item() == pytest.approx(np.mean(entropies))
    expected = np.mean(policy_terms) + np.mean(value_terms) - ent_coef * np.mean(entropies)
    assert loss.item() == logs["loss"].item() == pytest.approx(expected)
    assert logs["imagined_return"].item() == pytest.approx(returns[:, 0].mean().item())
    assert logs["imagined_reward"].item() == pytest.approx(np.mean(reward_sums))
    assert logs["imagined_ends"].item() == pytest.approx(sum(any(row) for row in ends.tolist()) / B)
    assert logs["value"].item() == pytest.approx(values[:, :-1].mean().item())
    assert not any(value.requires_grad for value in logs.values())

    # neither the advantage nor the return is differentiated: values learn from the squared error alone
    loss.backward()
    n = B * (T - 1)
    assert values.grad is not None and logits.grad is not None
    th.testing.assert_close(values.grad[:, :-1], 2 * (values - returns).detach()[:, :-1] / n)
    assert (values.grad[:, -1] == 0).all() and (logits.grad[:, -1] == 0).all()
    probabilities_ = logits.detach().softmax(-1)
    log_probabilities = logits.detach().log_softmax(-1)
    entropy = -(probabilities_ * log_probabilities).sum(-1, keepdim=True)
    to_policy = (returns - values.detach()).unsqueeze(-1) * (probabilities_ - F.one_hot(actions, 4))
    to_entropy = ent_coef * probabilities_ * (log_probabilities + entropy)
    th.testing.assert_close(logits.grad[:, :-1], (to_policy + to_entropy)[:, :-1] / n)


def test_imagined_reward_ends_with_the_game() -> None:
    """The reward of the end itself counts, in the last step as well."""
    ends = th.tensor([[0, 0, 1, 0], [0, 0, 0, 1], [1, 0, 1, 0], [0, 0, 0, 0]], dtype=th.bool)
    rewards = th.tensor([[1.0, 0, 1, -1], [0, 0, 0, -1], [1, -1, -1, -1], [1, 1, 1, 1]])
    trajectory = ImaginedTrajectory(th.zeros(4, 4, dtype=th.int64), rewards, ends, th.zeros(4, 4), th.zeros(4, 4, 2))
    _, logs = actor_critic_loss(trajectory, 0.9, 0.95, 0.01)
    assert logs["imagined_reward"].item() == (2 - 1 + 1 + 4) / 4


def test_codes_are_not_pooled() -> None:
    """Features handed to the LSTM: 64 channels at each position. Codes are seen as they are, frames on the [-1, 1] scale."""
    frames, codes = ActorCritic((8, 5, 5), 2, 8), ActorCritic((8, 5, 5), 2, 8, sees_codes=True)
    assert (frames.lstm.input_size, codes.lstm.input_size) == (64, 64 * 5 * 5)
    inputs = th.rand(2, 8, 5, 5)
    for actor_critic, expected in ((frames, 2 * inputs - 1), (codes, inputs)):
        seen: list[th.Tensor] = []
        actor_critic.cnn.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        actor_critic(inputs, actor_critic.initial_state(2))
        assert th.equal(seen[0], expected)
