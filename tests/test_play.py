"""Playing in a window: what it shows, which keys it takes, and the command itself on a screen that is not there."""

import re
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import imageio.v3
import numpy as np
import pytest

from sb3_iris import IRIS, play
from sb3_iris.visualization import with_text
from sb3_iris.world_model_env import WorldModelEnv, reconstruct
from tests.corridor import LENGTH, Corridor, corridor_frame, learned_model, position_in
from tests.presets import SIZE, FrameEnv, tiny

COMMAND = ("--env", "tests.corridor:Corridor", "--seed", "0", "--device", "cpu", "--temperature", "0")


@pytest.fixture
def path(tmp_path) -> str:
    learned_model().save(tmp_path / "model.zip")
    return str(tmp_path / "model.zip")


@pytest.fixture
def pygame(monkeypatch) -> Any:
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    return pytest.importorskip("pygame", reason="the window is pygame's, from the extra requirements")


@pytest.mark.parametrize("real", [False, True])
def test_window(path, real):
    window, keys = play.make_window(play.parse_args([path, *COMMAND, *(["--real"] if real else [])]))
    assert keys == {("a",): 0, ("d",): 1}
    assert isinstance(window.unwrapped, Corridor if real else WorldModelEnv)
    assert window.render_mode == "rgb_array"
    obs, _ = window.reset(seed=3)
    total = 0.0
    for action in (1, 0, 1, 1, 1, 1):
        image = window.render()
        assert image.shape == (320 + 32, 640 if real else 320, 3)
        frame = obs if real else obs.transpose(1, 2, 0)
        assert np.array_equal(image[:320:40, :320:40], frame)
        if real:
            assert np.array_equal(image[:320:40, 320::40], reconstruct(window.model, frame[None])[0].transpose(1, 2, 0))
        obs, reward, terminated, _, _ = window.step(action)
        total += reward
        lines = [f"action {action}  reward {reward:+.3g}", f"return {total:.3g}"]
        assert np.array_equal(window.render()[320:], with_text(image[:320], lines, 2)[320:])
        if terminated:
            break
    assert terminated and total == 1


def test_agent_plays(path, monkeypatch):
    window, _ = play.make_window(play.parse_args([path, *COMMAND, "--agent"]))
    states = []

    def predict(observation, state):
        states.append(state)
        return np.int64(1), (len(states),)

    monkeypatch.setattr(window.model, "predict", predict)
    window.unwrapped.vec_env.start_images = corridor_frame(0).transpose(2, 0, 1)[None]
    window.reset()
    for _ in range(4):
        _, reward, terminated, _, _ = window.step(0)  # the keys do nothing
    assert (reward, terminated) == (1, True)
    assert states == [None, (1,), (2,), (3,)]
    window.reset()
    assert window.state is None


@pytest.mark.parametrize("real", [False, True])
def test_seed(path, real):
    """The seed decides on all games, which are different ones."""

    def first_frames() -> list[bytes]:
        window, _ = play.make_window(play.parse_args([path, *COMMAND, *(["--real"] if real else [])]))
        frames = []
        for _ in range(8):
            window.reset(seed=None)  # as `gymnasium.utils.play` asks for it
            frames.append(window.render().tobytes())
        return frames

    frames = first_frames()
    assert frames == first_frames() and len(set(frames)) > 1


def test_keys(pygame):
    assert play.keys_to_action(FrameEnv()) == {("0",): 0, ("1",): 1, ("2",): 2}
    minatar_env = pytest.importorskip("benchmarks.minatar_env", reason="the package minatar is needed for MinAtar's games")
    keys = play.keys_to_action(minatar_env.make_minatar("Breakout"))
    assert keys == {(pygame.K_LEFT,): 1, (pygame.K_RIGHT,): 2}
    assert play.keys_to_action(minatar_env.make_minatar("SpaceInvaders"))[(pygame.K_SPACE,)] == 3


def test_keys_in_words(pygame):
    keys = {("0",): 0, (pygame.K_LEFT, ord(" ")): 1, "ab": 2, ord("c"): 3}
    assert play.describe(keys) == "0: 0, left+space: 1, a+b: 2, c: 3"


def test_make_env():
    seen = gym.spaces.Box(0, 255, (3, 64, 64), np.uint8)
    assert isinstance(play.make_env("tests.presets:FrameEnv", {"length": 3}, seen), FrameEnv)
    assert play.make_env("CartPole-v1", {}, seen).spec.id == "CartPole-v1"
    breakout = play.make_env("ALE/Breakout-v5", {}, seen)
    assert breakout.observation_space.shape == (64, 64, 3)
    assert play.keys_to_action(breakout) == {("e",): 0, (" ",): 1, ("d",): 2, ("a",): 3}
    with pytest.raises(gym.error.Error):
        play.make_env("NoSuchGame-v0", {}, seen)
    with pytest.raises(ValueError, match="makes a DummyVecEnv: name a function that returns a single environment"):
        play.make_env("tests.presets:frame_envs", {}, seen)


@pytest.mark.parametrize("real", [False, True])
def test_game_that_gymnasium_made(tmp_path, real):
    """``IRIS("CnnPolicy", "ALE/Pong-v5")`` sees other images than ``make_atari_env`` gives, and is played with its own."""
    tiny("ALE/Pong-v5").learn(4).save(tmp_path / "pong")
    options = ["--env", "ALE/Pong-v5", "--agent", "--device", "cpu", *(["--real"] if real else [])]
    window, _ = play.make_window(play.parse_args([str(tmp_path / "pong.zip"), *options]))
    observation, _ = window.reset(seed=0)
    assert observation.shape == ((210, 160, 3) if real else (3, SIZE, SIZE))
    assert len(play.record(window, 2)) > 1


def test_arguments(capsys):
    args = play.parse_args(["m.zip", "--env", "x", "--env-kwargs", "game=Breakout", "n=3", "fast=True"])
    assert args.env_kwargs == {"game": "Breakout", "n": 3, "fast": True}
    with pytest.raises(SystemExit):
        play.parse_args(["m.zip", "--env", "x", "--env-kwargs", "game"])
    assert "NAME=VALUE" in capsys.readouterr().err


@pytest.mark.parametrize("max_steps", [1000, 1])
def test_record(path, monkeypatch, capsys, max_steps):
    """Without a screen: the real game until its end, or until there are as many steps as wanted."""
    monkeypatch.setitem(sys.modules, "pygame", None)
    monkeypatch.setattr(IRIS, "predict", lambda *args: (np.int64(1), None))
    video = Path(path).with_name("game.gif")
    play.main([path, *COMMAND, "--real", "--agent", "--record", str(video), "--max-episode-steps", str(max_steps)])
    frames = imageio.v3.imread(video)
    positions = [position_in(frame[:128:16, :128:16].transpose(2, 0, 1)) for frame in frames[:-1]]
    assert positions == list(range(positions[0], LENGTH))[:max_steps]
    assert frames.shape == (len(positions) + 1, 128 + 32, 256, 3)
    assert capsys.readouterr().out == f"Wrote {video}: return {int(max_steps >= LENGTH - positions[0])}\n"


def test_record_wants_an_agent(capsys):
    with pytest.raises(SystemExit):
        play.parse_args(["m.zip", "--env", "x", "--record", "game.gif"])
    assert "--record game.gif: without a window there are no keys, so add --agent" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, said",
    [
        (["--record", "game"], "--record game: name a file that ends in .gif or .mp4"),
        (
            ["--record", "no/such/folder/game.gif"],
            "--record no/such/folder/game.gif: name a file .* in a folder that there is",
        ),
        (["--fps", "0"], "--fps 0: it must be at least 1"),
        (["--max-episode-steps", "-3"], "--max-episode-steps -3: it must be at least 1"),
        (["--zoom", "0"], "--zoom 0.0: it must be above 0"),
        (["--device", "no_device"], "--device no_device: .*no_device"),
    ],
)
def test_arguments_that_only_the_end_would_miss(options, said, capsys):
    with pytest.raises(SystemExit):
        play.parse_args(["m.zip", "--env", "x", "--agent", *options])
    assert re.search(said, capsys.readouterr().err)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"model": "no_such_model.zip"}, "No such file"),
        ({"--env": "no_such_module:make"}, "No module named 'no_such_module'"),
        ({"--env": "NoSuchGame-v0"}, "NoSuchGame"),
        ({"--env-kwargs": "n_keys=3"}, "n_keys"),
    ],
)
def test_errors_without_a_traceback(path, change, said):
    arguments = {"model": path, "--env": COMMAND[1], **change}
    model = arguments.pop("model")
    options = [word for pair in arguments.items() for word in pair]
    with pytest.raises(SystemExit, match=r"^error: ") as error:
        play.main([model, "--agent", "--record", "game.gif", *options])
    assert said in str(error.value)


def test_model_of_other_images(path):
    with pytest.raises(ValueError, match="Observation spaces do not match"):
        play.make_window(play.parse_args([path, "--env", "ALE/Breakout-v5", "--device", "cpu"]))


def test_without_pygame(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pygame", None)
    with pytest.raises(SystemExit, match=r"pygame-ce: pip install 'sb3_iris\[extra\]'"):
        play.main([path, *COMMAND])


@pytest.mark.parametrize("options", [(), ("--real",)])
def test_command(path, pygame, monkeypatch, capsys, options):
    """Keys pressed in the window move the game; Escape closes it."""
    actions, shown = [], []
    step, render = play.Window.step, play.Window.render

    def spy_step(window, action):
        actions.append(action)
        if len(actions) == 4:
            pygame.event.post(pygame.event.Event(pygame.KEYDOWN, key=pygame.K_d))
        assert len(actions) < 100, "the window does not close"
        if len(actions) == 8:
            pygame.event.post(pygame.event.Event(pygame.KEYDOWN, key=pygame.K_ESCAPE))
        return step(window, action)

    def spy_render(window):
        shown.append(render(window))
        return shown[-1]

    monkeypatch.setattr(play.Window, "step", spy_step)
    monkeypatch.setattr(play.Window, "render", spy_render)
    play.main([path, *COMMAND, "--fps", "100", *options])
    assert "Keys and their actions: a: 0, d: 1" in capsys.readouterr().out
    assert actions[:4] == [0, 0, 0, 0] and set(actions[4:8]) == {1}
    assert len(shown) >= 8


def test_gymnasium_plays_the_learned_game(pygame):
    """Without this package's window: Gymnasium asks the environment for keys and pictures."""
    from gymnasium.utils.play import play as gymnasium_play

    actions, observations = [], []

    def callback(before, after, action, *_):
        actions.append(action)
        observations.append(after)
        assert len(actions) < 100, "the window does not close"
        if len(actions) in (2, 4):
            pygame.event.post(pygame.event.Event(pygame.KEYDOWN, key={2: pygame.K_d, 4: pygame.K_ESCAPE}[len(actions)]))

    env = WorldModelEnv(learned_model(), temperature=0, start_observations=corridor_frame(3)[None])
    gymnasium_play(env, fps=100, zoom=10, callback=callback)
    assert actions == [0, 0, 1, 1]
    assert [position_in(observation) for observation in observations] == [2, 1, 2, 3]
