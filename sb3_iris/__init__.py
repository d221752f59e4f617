"""IRIS, a world model of discrete tokens, for Stable-Baselines3."""

from pathlib import Path

from sb3_iris.checkpoint_callback import RunCheckpointCallback
from sb3_iris.iris import IRIS
from sb3_iris.policies import CnnLstmPolicy

__version__ = (Path(__file__).parent / "version.txt").read_text().strip()

__all__ = ["IRIS", "CnnLstmPolicy", "RunCheckpointCallback", "__version__"]
