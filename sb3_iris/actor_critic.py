"""The actor-critic that lives in imagination: networks, lambda-returns and loss (Sec. 2.3 of the paper)."""

import torch as th
from torch import nn
from torch.nn import functional as F

from sb3_iris.type_aliases import ActorCriticOutput, ImaginedTrajectory, Logs, LSTMState


class ActorCritic(nn.Module):
    """
    Convolutions and an LSTM cell shared by a linear actor and a linear critic (App. A.3 of
    "Transformers are Sample-Efficient World Models", https://arxiv.org/abs/2209.00588).

    Each of the four convolutions is followed by a 2x2 max-pool as long as there are two pixels to pool. Codes are not pooled:
    there are few of them, and each stands for many pixels.

    :param input_shape: (C, H, W) of a frame, or (codebook_dim, h, w) of its codes.
    :param n_actions: Number of actions A.
    :param lstm_hidden_size: Size of the LSTM's hidden and cell state.
    :param sees_codes: Whether the inputs are codes, which are taken as they are; frames are put on the [-1, 1] scale first.
    """

    def __init__(
        self, input_shape: tuple[int, int, int], n_actions: int, lstm_hidden_size: int = 512, sees_codes: bool = False
    ) -> None:
        super().__init__()
        self.sees_codes = sees_codes
        in_channels, height, width = input_shape
        layers: list[nn.Module] = []
        for channels in (32, 32, 64, 64):
            layers.append(nn.Conv2d(in_channels, channels, 3, padding=1))
            if not sees_codes and min(height, width) >= 2:
                layers.append(nn.MaxPool2d(2))
                height, width = height // 2, width // 2
            layers.append(nn.ReLU())
            in_channels = channels
        self.cnn = nn.Sequential(*layers, nn.Flatten())
        self.lstm = nn.LSTMCell(in_channels * height * width, lstm_hidden_size)
        self.actor = nn.Linear(lstm_hidden_size, n_actions)
        self.critic = nn.Linear(lstm_hidden_size, 1)

    def initial_state(self, batch_size: int) -> LSTMState:
        """
        :param batch_size: Number of environments or trajectories.
        :return: The state at the start of an episode, zeros.
        """
        zeros = self.actor.weight.new_zeros(batch_size, self.lstm.hidden_size)
        return LSTMState(zeros, zeros)

    def forward(self, inputs: th.Tensor, state: LSTMState) -> ActorCriticOutput:
        """
        :param inputs: (B, C, H, W) float32: frames in [0, 1], decoded by the tokenizer, or codes
        :param state: LSTM state before these frames.
        :return: Action logits, values and the LSTM state after the frames.
        """
        with self._full_precision(inputs):
            hidden, cell = self.lstm(self._features(inputs), state)
            return ActorCriticOutput(self.actor(hidden), self.critic(hidden).squeeze(-1), LSTMState(hidden, cell))

    @th.no_grad()
    def burn_in(self, inputs: th.Tensor, mask: th.Tensor) -> LSTMState:
        """
        LSTM state after frames that are only watched. Padded steps leave the state as it is.

        :param inputs: (B, T, C, H, W) float32, as for ``forward``
        :param mask: (B, T) bool, False where padded
        :return: The state after the last frame.
        """
        B, T = mask.shape
        state = self.initial_state(B)
        if T == 0:
            return state
        with self._full_precision(inputs):
            features = self._features(inputs.flatten(0, 1)).unflatten(0, (B, T))
            for t in range(T):
                hidden, cell = self.lstm(features[:, t], state)
                watched = mask[:, t].unsqueeze(-1)
                state = LSTMState(th.where(watched, hidden, state.hidden), th.where(watched, cell, state.cell))
        return state

    def unroll(self, inputs: th.Tensor, state: LSTMState) -> tuple[th.Tensor, th.Tensor]:
        """
        ``forward`` for several steps, all convolutions in one call.

        :param inputs: (B, T, C, H, W) float32, as for ``forward``
        :param state: LSTM state before the first of them.
        :return: Action logits (B, T, A) and values (B, T).
        """
        B, T = inputs.shape[:2]
        with self._full_precision(inputs):
            features = self._features(inputs.flatten(0, 1)).unflatten(0, (B, T))
            hidden = []
            for t in range(T):
                state = LSTMState(*self.lstm(features[:, t], state))
                hidden.append(state.hidden)
            outputs = th.stack(hidden, dim=1)
            return self.actor(outputs), self.critic(outputs).squeeze(-1)

    @staticmethod
    def _full_precision(inputs: th.Tensor) -> th.autocast:
        """
        No autocast: the actor-critic is small, and its burn-in without gradients must not leave casts of weights behind that
        the steps with gradients would take.
        """
        return th.autocast(inputs.device.type, enabled=False)

    def _features(self, inputs: th.Tensor) -> th.Tensor:
        if not self.sees_codes:
            # Convolutions of three channels take much less time if these lie next to each other
            inputs = (2 * inputs - 1).contiguous(memory_format=th.channels_last)
        return self.cnn(inputs)


def sample_categorical(logits: th.Tensor, temperature: float = 1.0, generator: th.Generator | None = None) -> th.Tensor:
    """
    Sample classes from the softmax of logits over temperature.

    It inverts the cumulative distribution: one random number a row is cheaper than the one a class of ``th.multinomial``,
    and no values are checked, which would make a GPU wait.

    :param logits: (..., classes)
    :param temperature: 1 samples from the softmax itself, 0 takes the most likely class.
    :param generator: Random stream; torch's global one if None.
    :return: (...,) int64
    """
    if temperature == 0:
        return logits.argmax(-1)
    if temperature != 1:
        logits = logits / temperature
    cumulative = F.softmax(logits, dim=-1).cumsum(-1)
    total = cumulative[..., -1:]
    drawn = total * th.rand(total.shape, generator=generator, device=total.device)
    below = th.searchsorted(cumulative, drawn, right=True).squeeze(-1)
    return below.clamp(max=logits.shape[-1] - 1)  # rounding may have drawn the total itself


def lambda_returns(rewards: th.Tensor, values: th.Tensor, ends: th.Tensor, gamma: float, gae_lambda: float) -> th.Tensor:
    """
    Lambda-returns (Sec. 2.3)::

        G_t = r_t + gamma (1 - d_t) [(1 - lambda) V_{t+1} + lambda G_{t+1}],    G at the last step = V

    :param rewards: (B, T)
    :param values: (B, T)
    :param ends: (B, T) bool or in {0, 1}
    :param gamma: Discount in [0, 1].
    :param gae_lambda: lambda in [0, 1]; 0 gives one-step targets, 1 discounted sums.
    :return: (B, T)
    """
    assert rewards.shape == values.shape == ends.shape, (rewards.shape, values.shape, ends.shape)
    discounts = gamma * (1 - ends.to(values.dtype))
    returns = [values[:, -1]]
    for t in reversed(range(rewards.shape[1] - 1)):
        bootstrap = (1 - gae_lambda) * values[:, t + 1] + gae_lambda * returns[-1]
        returns.append(rewards[:, t] + discounts[:, t] * bootstrap)
    return th.stack(returns[::-1], dim=1)


def actor_critic_loss(
    trajectory: ImaginedTrajectory, gamma: float, gae_lambda: float, ent_coef: float
) -> tuple[th.Tensor, Logs]:
    """
    REINFORCE with a baseline, value regression and an entropy bonus, means over all steps but the last (Sec. 2.3).

    :param trajectory: Imagined steps, with gradients in ``values`` and ``logits``.
    :param gamma: Discount in [0, 1].
    :param gae_lambda: The lambda of the lambda-returns, in [0, 1].
    :param ent_coef: Weight of the entropy bonus.
    :return: The loss and what to log of it.
    """
    with th.no_grad():
        returns = lambda_returns(trajectory.rewards, trajectory.values, trajectory.ends, gamma, gae_lambda)[:, :-1]
        going_on = th.ones_like(trajectory.rewards)
        going_on[:, 1:] = (~trajectory.ends[:, :-1]).cumprod(1)
    values = trajectory.values[:, :-1]
    log_probs = F.log_softmax(trajectory.logits[:, :-1], dim=-1)  # (B, T - 1, A)
    chosen = log_probs.gather(-1, trajectory.actions[:, :-1].unsqueeze(-1)).squeeze(-1)

    policy_gradient_loss = -(chosen * (returns - values.detach())).mean()
    value_loss = F.mse_loss(values, returns)
    entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
    loss = policy_gradient_loss + value_loss - ent_coef * entropy
    logs = {
        "loss": loss,
        "policy_gradient_loss": policy_gradient_loss,
        "value_loss": value_loss,
        "entropy": entropy,
        "imagined_return": returns[:, 0].mean(),
        "imagined_reward": (trajectory.rewards * going_on).sum(1).mean(),  # up to the end, as in ``real_reward``
        "imagined_ends": trajectory.ends.any(1).float().mean(),
        "value": values.mean(),
    }
    return loss, {name: value.detach() for name, value in logs.items()}
