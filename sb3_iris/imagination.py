"""
Playing inside the world model: the only file that sees all three networks at work.

Time runs like this; the policy sees what tokens stand for, decoded frames or codes, never the env's own frames::

    burn-in frames ... | frame_0           frame_1           ...  frame_{H-1}
    LSTM state s  -----+-> logits_0, V_0    logits_1, V_1          logits_{H-1}, V_{H-1}
                       |      a_0              a_1                    a_{H-1}
                       |      r_0, end_0       r_1, end_1             r_{H-1}, end_{H-1}   (no frame after the last)
"""

from typing import NamedTuple

import numpy as np
import torch as th

from sb3_iris.actor_critic import ActorCritic, sample_categorical
from sb3_iris.type_aliases import ContextSamples, ImaginedTrajectory, LSTMState, Observe
from sb3_iris.world_model import WorldModel, WorldModelCache


class _Cohort:
    """
    Games of a batch that have equally many frames in their context, and so share a cache.

    :param rows: (n,) int64, which games of the batch; None for all of them
    :param tokens: (n, K) int64, their current frames
    :param past: Tokens (n, K) and actions (n,) of the steps to read first if the cache is empty, oldest first.
    """

    def __init__(self, rows: np.ndarray | None, tokens: th.Tensor, past: list[tuple[th.Tensor, th.Tensor]]) -> None:
        self.rows = rows
        self.tokens = tokens
        self.past = past
        self.n_frames = len(past) + 1  # in the context, the current one included
        self.cache: WorldModelCache | None = None  # None or empty if nothing has been read yet
        self.unread = tokens  # tokens of the current frame that the cache has not seen, (n, m)

    def forget(self, n_frames: int) -> None:
        """Go on from the last frames of the context alone."""
        self.past = self.past[len(self.past) - n_frames + 1 :]
        self.n_frames = n_frames
        self.unread = self.tokens
        if self.cache is not None:
            self.cache.reset()

    def select(self, indices: th.Tensor) -> None:
        """Keep some of the cohort's games only; ``rows`` is left to the caller."""
        self.tokens, self.unread = self.tokens[indices], self.unread[indices]
        self.past = [(tokens[indices], actions[indices]) for tokens, actions in self.past]
        if self.cache is not None:
            self.cache.select(indices)


class ImaginedGame:
    """
    A batch of games played in the world model (Sec. 2.2 of the paper).

    The cache never holds more than the context: before a step that would not fit, a game forgets all but its last
    ``kept_frames`` frames. The networks are used as they are: put the world model into eval mode first, lest dropout blur
    the game.

    Single games can begin anew. Positions count from the first frame in the context, so games share a cache and a pass
    only with those that have as many frames in it as they have; there are never more such cohorts than steps in the context.

    :param observe: Makes of sampled tokens what the player sees, for instance ``Tokenizer.decode``.
    :param world_model: Predicts rewards, ends and the tokens of the next frame.
    :param temperature: Temperature of all sampling from the world model; 0 takes the most likely class.
    :param generator: Random stream of the sampling, torch's global one if None.
    :param kept_frames: Frames that stay in a context that is full. The paper's one is the default; ``max_frames`` makes the
        context a sliding window.
    """

    def __init__(
        self,
        observe: Observe,
        world_model: WorldModel,
        temperature: float = 1.0,
        generator: th.Generator | None = None,
        kept_frames: int = 1,
    ) -> None:
        self.observe = observe
        self.world_model = world_model
        self.temperature = temperature
        self.generator = generator
        # With so many frames in the context, a step and the frame after it just fit
        self.max_frames = world_model.sequence_length - 1
        assert 1 <= kept_frames <= self.max_frames, (kept_frames, self.max_frames)
        self.kept_frames = kept_frames

    def _sample(self, logits: th.Tensor) -> th.Tensor:
        return sample_categorical(logits, self.temperature, self.generator)

    def _make_cache(self) -> WorldModelCache:
        return self.world_model.make_cache()

    def _sample_frame(self, token_logits: th.Tensor, cache: WorldModelCache) -> th.Tensor:
        """Tokens of a frame, (B, K), from logits of its first one; the cache takes in all but the last."""
        tokens = [self._sample(token_logits)]
        while len(tokens) < self.world_model.tokens_per_frame:
            tokens.append(self._sample(self.world_model.step_token(tokens[-1], cache)))
        return th.stack(tokens, dim=1)

    @property
    def cache(self) -> WorldModelCache:
        """The cache of games that have had no restart, which all share one."""
        (cohort,) = self._cohorts
        assert cohort.cache is not None
        return cohort.cache

    @th.no_grad()
    def reset(self, tokens: th.Tensor) -> th.Tensor:
        """
        Start from given frames.

        :param tokens: (B, K) int64, the frames as the tokenizer encodes them
        :return: (B, C, H, W) float32, the frames as the player sees them
        """
        self.tokens = tokens
        self._cohorts = [_Cohort(None, tokens, [])]
        return self.observe(tokens)

    @th.no_grad()
    def restart(self, rows: np.ndarray, tokens: th.Tensor) -> th.Tensor:
        """
        Start some of the games from given frames; the others go on as if nothing had happened.

        :param rows: (n,) int64, which games of the batch
        :param tokens: (n, K) int64, their first frames
        :return: (n, C, H, W) float32, the frames as the player sees them
        """
        self.tokens = self.tokens.clone()
        self.tokens[self._indices(rows)] = tokens
        for cohort in self._cohorts:
            cohort_rows = np.arange(len(self.tokens)) if cohort.rows is None else cohort.rows
            goes_on = ~np.isin(cohort_rows, rows)
            cohort.rows = cohort_rows[goes_on]
            if not goes_on.all():
                cohort.select(self._indices(goes_on.nonzero()[0]))
        going_on = [cohort for cohort in self._cohorts if cohort.rows is not None and len(cohort.rows) > 0]
        self._merge([*going_on, _Cohort(rows, tokens, [])])
        return self.observe(tokens)

    def _indices(self, rows: np.ndarray) -> th.Tensor:
        return th.as_tensor(rows, device=self.tokens.device)

    @th.no_grad()
    def step(self, actions: th.Tensor, predict_frame: bool = True) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        """
        Play one step.

        :param actions: (B,) int64
        :param predict_frame: Whether the next frame is wanted; the game cannot go on without it.
        :return: Rewards (B,) float32 in {-1, 0, 1}, ends (B,) bool, the next frames (B, C, H, W) float32 or None.
        """
        self._make_room(predict_frame)
        if len(self._cohorts) == 1 and self._cohorts[0].rows is None:
            rewards, ends = self._step_cohort(self._cohorts[0], actions, predict_frame)
            self.tokens = self._cohorts[0].tokens
        else:
            rewards = th.empty_like(actions, dtype=th.float32)
            ends = th.empty_like(actions, dtype=th.bool)
            self.tokens = th.empty_like(self.tokens)
            for cohort in self._cohorts:
                assert cohort.rows is not None
                rows = self._indices(cohort.rows)
                rewards[rows], ends[rows] = self._step_cohort(cohort, actions[rows], predict_frame)
                self.tokens[rows] = cohort.tokens
        return rewards, ends, self.observe(self.tokens) if predict_frame else None

    def _make_room(self, predict_frame: bool) -> None:
        """Shorten the contexts that leave no room for a step."""
        most = self.max_frames if predict_frame else self.max_frames + 1
        full = [cohort for cohort in self._cohorts if cohort.n_frames > most]
        for cohort in full:
            cohort.forget(self.kept_frames)
        if full:
            self._merge(self._cohorts)

    def _merge(self, cohorts: list[_Cohort]) -> None:
        """Let games with equally many frames in the context be one cohort; it has to read its past again."""
        by_frames: dict[int, _Cohort] = {}
        for cohort in cohorts:
            other = by_frames.get(cohort.n_frames)
            if other is not None:
                assert other.rows is not None and cohort.rows is not None
                past = [tuple(map(th.cat, zip(*pair, strict=True))) for pair in zip(other.past, cohort.past, strict=True)]
                rows = np.concatenate([other.rows, cohort.rows])
                cohort = _Cohort(rows, th.cat([other.tokens, cohort.tokens]), past)  # type: ignore[arg-type]
            by_frames[cohort.n_frames] = cohort
        self._cohorts = list(by_frames.values())

    def _step_cohort(self, cohort: _Cohort, actions: th.Tensor, predict_frame: bool) -> tuple[th.Tensor, th.Tensor]:
        """One step of a cohort, which moves on to the next frames if they are wanted; rewards and ends."""
        world_model = self.world_model
        if cohort.cache is None:
            cohort.cache = self._make_cache()
        if cohort.cache.length == 0:
            for past_tokens, past_actions in cohort.past:
                world_model.step_action(past_tokens, past_actions, cohort.cache)
        reward_logits, end_logits, token_logits = world_model.step_action(cohort.unread, actions, cohort.cache)
        rewards = self._sample(reward_logits).float() - 1
        ends = self._sample(end_logits).bool()
        if predict_frame:
            next_tokens = self._sample_frame(token_logits, cohort.cache)
            past = [*cohort.past, (cohort.tokens, actions)]
            cohort.past = past[max(len(past) - self.kept_frames + 1, 0) :]
            cohort.tokens = next_tokens
            cohort.n_frames += 1
            # The last token predicts nothing: it is read together with the next action, which saves a pass
            cohort.unread = cohort.tokens[:, -1:]
        return rewards, ends


class ImaginedStep(NamedTuple):
    """One step of ``play``."""

    frames: th.Tensor  # (B, C, H, W) float32, as the policy saw them
    logits: th.Tensor  # (B, A) float32
    values: th.Tensor  # (B,) float32
    actions: th.Tensor  # (B,) int64
    rewards: th.Tensor  # (B,) float32 in {-1, 0, 1}
    ends: th.Tensor  # (B,) bool


def play(
    game: ImaginedGame,
    actor_critic: ActorCritic,
    tokens: th.Tensor,
    state: LSTMState,
    horizon: int,
    temperature: float = 1.0,
) -> list[ImaginedStep]:
    """
    Let the policy play imagined games. Gradients, where they are wanted, reach the actor-critic alone.

    :param game: The world model's game.
    :param actor_critic: The policy.
    :param tokens: (B, K) int64, first frames of the games.
    :param state: LSTM state before them.
    :param horizon: Steps to play.
    :param temperature: Temperature of the policy's sampling; 0 takes the most likely action.
    :return: The steps.
    """
    frames: th.Tensor | None = game.reset(tokens)
    steps = []
    for t in range(horizon):
        assert frames is not None
        logits, values, state = actor_critic(frames, state)
        actions = sample_categorical(logits.detach(), temperature)
        rewards, ends, next_frames = game.step(actions, predict_frame=t + 1 < horizon)
        steps.append(ImaginedStep(frames, logits, values, actions, rewards, ends))
        frames = next_frames
    return steps


def imagine(
    game: ImaginedGame,
    actor_critic: ActorCritic,
    contexts: ContextSamples,
    horizon: int,
    temperature: float = 1.0,
) -> ImaginedTrajectory:
    """
    Let the policy play imagined games from real frames (Sec. 2.3). Gradients reach the actor-critic alone.

    :param game: The world model's game.
    :param actor_critic: The policy to play and to be trained.
    :param contexts: First frames of the games, and those before them, which are burnt in.
    :param horizon: Steps to imagine, at least 2.
    :param temperature: Temperature of the policy's sampling; 0 takes the most likely action.
    :return: What was imagined.
    """
    state = actor_critic.burn_in(contexts.seen, contexts.mask)
    steps = play(game, actor_critic, contexts.tokens, state, horizon, temperature)
    return ImaginedTrajectory(
        *(th.stack([getattr(step, name) for step in steps], dim=1) for name in ImaginedTrajectory._fields)
    )
