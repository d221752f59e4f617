import pytest
import torch as th

from sb3_iris.actor_critic import ActorCritic, actor_critic_loss, sample_categorical
from sb3_iris.imagination import ImaginedGame, imagine
from sb3_iris.tokenizer import Tokenizer
from sb3_iris.transformer import KVCache
from sb3_iris.type_aliases import ContextSamples
from sb3_iris.world_model import WorldModel

V, A, K, CONTEXT = 6, 3, 4, 4  # codes, actions, tokens per frame, steps in the world model's context


class Networks:
    """Tiny networks whose predictions differ a lot from frame to frame."""

    def __init__(self, tokens_per_frame: int = K) -> None:
        side = 4 * round(tokens_per_frame**0.5)
        image_shape = (3, side, side)
        self.tokenizer = Tokenizer(image_shape, V, 4, channels=4, channel_multipliers=(1, 1, 1), n_res_blocks=1)
        self.world_model = WorldModel(V, A, tokens_per_frame, CONTEXT, embed_dim=12, n_layers=2, n_heads=2)
        self.actor_critic = ActorCritic(image_shape, A, lstm_hidden_size=8)
        self.tokenizer.eval()
        self.world_model.eval()
        with th.no_grad():
            for parameter in self.world_model.parameters():
                parameter.normal_(std=0.4)
            for parameter in self.actor_critic.parameters():
                parameter.mul_(3)
            self.tokenizer.quantizer.codebook.normal_()

    def game(self, temperature: float = 1.0, seed: int | None = None) -> ImaginedGame:
        generator = None if seed is None else th.Generator().manual_seed(seed)
        return ImaginedGame(self.tokenizer.decode, self.world_model, temperature, generator)


@pytest.fixture
def networks() -> Networks:
    return Networks()


@pytest.fixture
def positions_at_reset(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many positions caches hold whenever one is reset; fills up while games are played."""
    lengths: list[int] = []
    original = KVCache.reset

    def reset(cache: KVCache) -> None:
        lengths.append(cache.length)
        original(cache)

    monkeypatch.setattr(KVCache, "reset", reset)
    return lengths


def full_mask(B: int, T: int) -> th.Tensor:
    return th.ones(B, T, dtype=th.bool)


def contexts(networks: Networks, tokens: th.Tensor, mask: th.Tensor | None = None) -> ContextSamples:
    """From tokens (B, T, K): the last frame of each row to imagine from, those before it to burn in."""
    mask = full_mask(*tokens.shape[:2]) if mask is None else mask
    return ContextSamples(tokens[:, -1], networks.tokenizer.decode(tokens[:, :-1]), mask[:, :-1])


@pytest.mark.parametrize("B, T, horizon", [(1, 1, 2), (3, 1, 9), (2, 4, CONTEXT), (2, 6, 5)])
def test_shapes_and_domains(networks: Networks, B: int, T: int, horizon: int) -> None:
    trajectory = imagine(networks.game(), networks.actor_critic, contexts(networks, th.randint(V, (B, T, K))), horizon)
    for column in (trajectory.actions, trajectory.rewards, trajectory.ends, trajectory.values):
        assert column.shape == (B, horizon)
    assert trajectory.logits.shape == (B, horizon, A)
    assert trajectory.actions.dtype == th.int64
    assert trajectory.ends.dtype == th.bool
    assert trajectory.rewards.dtype == trajectory.values.dtype == trajectory.logits.dtype == th.float32


def test_all_rewards_and_ends_occur(networks: Networks) -> None:
    trajectory = imagine(networks.game(), networks.actor_critic, contexts(networks, th.randint(V, (64, 1, K))), 8)
    assert trajectory.rewards.unique().tolist() == [-1, 0, 1]
    assert trajectory.ends.unique().tolist() == [False, True]
    assert trajectory.actions.unique().tolist() == [0, 1, 2]


def test_gradients_reach_the_actor_critic_alone(networks: Networks) -> None:
    trajectory = imagine(networks.game(), networks.actor_critic, contexts(networks, th.randint(V, (4, 3, K))), horizon=5)
    loss, _ = actor_critic_loss(trajectory, gamma=0.9, gae_lambda=0.9, ent_coef=0.01)
    loss.backward()
    assert all(p.grad is None for p in (*networks.tokenizer.parameters(), *networks.world_model.parameters()))
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in networks.actor_critic.parameters())


@th.no_grad()
def test_game_by_full_passes(networks: Networks) -> None:
    """At temperature 0, each reward, end and token is the most likely one in an uncached pass over all that came before."""
    B = 3
    game = networks.game(temperature=0)
    tokens = th.randint(V, (B, 1, K))
    actions = th.randint(A, (B, CONTEXT))
    frames = game.reset(tokens[:, 0])
    assert th.equal(frames, networks.tokenizer.decode(tokens[:, 0]))
    for t in range(CONTEXT - 1):
        rewards, ends, next_frames = game.step(actions[:, t])
        output = networks.world_model(tokens, actions[:, : t + 1])
        assert th.equal(rewards, output.reward_logits[:, t].argmax(-1) - 1.0)
        assert th.equal(ends, output.end_logits[:, t].argmax(-1) == 1)
        tokens = th.cat([tokens, th.zeros(B, 1, K, dtype=th.int64)], dim=1)
        for k in range(K):  # tokens that are still 0 lie in the future
            logits = networks.world_model(tokens, actions[:, : t + 2]).token_logits
            tokens[:, -1, k] = logits[:, (t + 1) * K + k - 1].argmax(-1)
        assert th.equal(game.tokens, tokens[:, -1])
        assert next_frames is not None
        assert th.equal(next_frames, networks.tokenizer.decode(tokens[:, -1]))
    assert tokens.unique().numel() > 2  # the game is not a dull one


@th.no_grad()
def test_restart_past_the_context(networks: Networks, positions_at_reset: list[int]) -> None:
    """A game that outgrows the context goes on like a fresh game that begins with its current frame."""
    B = 5
    actions = th.randint(A, (B, 3 * CONTEXT))
    game = networks.game(seed=1)
    assert game.generator is not None
    game.reset(th.randint(V, (B, K)))
    for t in range(3 * CONTEXT):
        if t % (CONTEXT - 1) == 0:  # the frames in the context are the first one and those of CONTEXT - 1 steps
            fresh = networks.game(seed=2)
            assert fresh.generator is not None
            fresh.generator.set_state(game.generator.get_state())
            frames = fresh.reset(game.tokens)
            assert th.equal(frames, networks.tokenizer.decode(game.tokens))
        for ours, expected in zip(game.step(actions[:, t]), fresh.step(actions[:, t]), strict=True):
            assert ours is not None and expected is not None and th.equal(ours, expected)
        # the current frame's last token would be read with the action, and so leave no room for the next frame
        assert positions_at_reset == [CONTEXT * (K + 1) - 2] * (t // (CONTEXT - 1))


@th.no_grad()
def test_what_came_before_matters_within_the_context(networks: Networks) -> None:
    actions = th.randint(A, (5, CONTEXT))
    game, fresh = networks.game(temperature=0), networks.game(temperature=0)
    game.reset(th.randint(V, (5, K)))
    game.step(actions[:, 0])
    fresh.reset(game.tokens)
    game.step(actions[:, 1])
    fresh.step(actions[:, 1])
    assert not th.equal(game.tokens, fresh.tokens)


@pytest.mark.parametrize("tokens_per_frame", [1, K])
@pytest.mark.parametrize(
    "horizon, expected_resets", [(2, 0), (CONTEXT, 0), (CONTEXT + 1, 1), (2 * CONTEXT - 1, 1), (2 * CONTEXT, 2)]
)
def test_horizon_of_the_context_fills_the_cache(
    positions_at_reset: list[int], tokens_per_frame: int, horizon: int, expected_resets: int
) -> None:
    networks = Networks(tokens_per_frame)
    n_positions: list[int] = []
    networks.world_model.transformer.register_forward_pre_hook(lambda module, inputs: n_positions.append(inputs[0].shape[1]))
    game = networks.game()
    imagine(game, networks.actor_critic, contexts(networks, th.randint(V, (2, 1, tokens_per_frame))), horizon)
    assert len(positions_at_reset) == expected_resets
    # one pass per step with its action, one per token of the next frame but the first; the last step has no next frame
    assert len(n_positions) == horizon + (horizon - 1) * (tokens_per_frame - 1)
    # all positions are read once, and after a restart the current frame's first K - 1 tokens once more
    n_expected = horizon * (tokens_per_frame + 1) + expected_resets * (tokens_per_frame - 1)
    assert sum(n_positions) == n_expected
    if horizon == CONTEXT:
        assert game.cache.length == game.cache.max_length == CONTEXT * (tokens_per_frame + 1)


@th.no_grad()
def test_temperature_zero_of_the_policy(networks: Networks) -> None:
    tokens = th.randint(V, (16, 1, K))
    trajectory = imagine(networks.game(), networks.actor_critic, contexts(networks, tokens), horizon=6, temperature=0)
    assert th.equal(trajectory.actions, trajectory.logits.argmax(-1))
    sampled = imagine(networks.game(), networks.actor_critic, contexts(networks, tokens), horizon=6, temperature=1)
    assert not th.equal(sampled.actions, sampled.logits.argmax(-1))


@th.no_grad()
def test_policy_sees_decoded_frames_only(networks: Networks) -> None:
    """Whatever goes into the actor-critic's convolutions came out of the tokenizer, and the trajectory is made of it."""
    seen: list[th.Tensor] = []
    networks.actor_critic.cnn.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    game_tokens: list[th.Tensor] = []

    class SpyGame(ImaginedGame):
        def step(self, actions: th.Tensor, predict_frame: bool = True) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
            game_tokens.append(self.tokens)
            return super().step(actions, predict_frame)

    tokens = th.randint(V, (2, 3, K))
    game = SpyGame(networks.tokenizer.decode, networks.world_model)
    trajectory = imagine(game, networks.actor_critic, contexts(networks, tokens), horizon=5)
    decode = networks.tokenizer.decode
    burn_in, *played = seen
    assert th.equal(burn_in, 2 * decode(tokens[:, :2]).flatten(0, 1) - 1)
    assert th.equal(game_tokens[0], tokens[:, 2])
    assert len(played) == len(game_tokens) == 5
    assert len({tuple(frame_tokens.flatten().tolist()) for frame_tokens in game_tokens}) > 1
    state = networks.actor_critic.burn_in(decode(tokens[:, :2]), full_mask(2, 2))
    for t in range(5):
        assert th.equal(played[t], 2 * decode(game_tokens[t]) - 1)
        output = networks.actor_critic(decode(game_tokens[t]), state)
        th.testing.assert_close(trajectory.logits[:, t], output.logits)
        th.testing.assert_close(trajectory.values[:, t], output.values)
        state = output.state


@th.no_grad()
def test_padded_steps_are_not_burnt_in(networks: Networks) -> None:
    tokens = th.randint(V, (2, 5, K))
    mask = full_mask(2, 5)
    mask[:, :2] = False
    game = networks.game(temperature=0)
    padded = imagine(game, networks.actor_critic, contexts(networks, tokens, mask), horizon=4, temperature=0)
    short = imagine(game, networks.actor_critic, contexts(networks, tokens[:, 2:]), horizon=4, temperature=0)
    watched = imagine(game, networks.actor_critic, contexts(networks, tokens), horizon=4, temperature=0)
    for column, expected in zip(padded, short, strict=True):
        th.testing.assert_close(column, expected)
    assert not th.allclose(padded.logits, watched.logits)


def test_generator_repeats_a_game(networks: Networks) -> None:
    tokens, actions = th.randint(V, (8, K)), th.randint(A, (8,))
    played = []
    for seed in (3, 3, 4):
        th.rand(1)  # the global stream does not matter
        game = networks.game(seed=seed)
        game.reset(tokens)
        game.step(actions)
        played.append(game.tokens)
    assert th.equal(played[0], played[1])
    assert not th.equal(played[0], played[2])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampling_frequencies(temperature: float) -> None:
    """Chi-square test of 20,000 draws in each of two rows against the softmax of logits over temperature."""
    n, logits = 20_000, th.tensor([[0.0, 1.0, -1.0, 0.3, -2.5], [2.0, -1.0, 0.0, 0.0, 1.0]])
    samples = sample_categorical(logits.expand(n, 2, 5), temperature)
    assert samples.shape == (n, 2)
    assert samples.dtype == th.int64
    expected = n * (logits.double() / temperature).softmax(-1)
    counts = th.stack([samples[:, row].bincount(minlength=5) for row in range(2)])
    statistics = ((counts - expected) ** 2 / expected).sum(-1)
    assert (statistics < 18.5).all()  # the 99.9% quantile for 4 degrees of freedom


def test_sampling_at_temperature_zero() -> None:
    logits = th.randn(3, 4, 5)
    assert th.equal(sample_categorical(logits, temperature=0), logits.argmax(-1))
    generators = [th.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    draws = [sample_categorical(logits, 1.0, generator) for generator in generators]
    assert th.equal(draws[0], draws[1])
    assert not th.equal(draws[0], draws[2])
