from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent

setup(
    name="sb3_iris",
    version=(ROOT / "sb3_iris" / "version.txt").read_text().strip(),
    description="IRIS (Transformers are Sample-Efficient World Models) for Stable-Baselines3.",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="the sb3_iris authors",
    license="MIT",
    keywords="reinforcement-learning model-based world-model transformer atari gymnasium stable-baselines3 pytorch",
    project_urls={
        "Paper": "https://arxiv.org/abs/2209.00588",
        "Stable-Baselines3": "https://github.com/DLR-RM/stable-baselines3",
    },
    packages=["sb3_iris"],
    package_data={"sb3_iris": ["py.typed", "version.txt", "*.cpp"]},
    python_requires=">=3.10",
    install_requires=[
        # The base classes; 2.7 is the first release with LinearSchedule, which the kept agent and settings of benchmarks/ have
        "stable_baselines3>=2.7.0,<3.0",
        "sb3_contrib>=2.7.0,<3.0",
        # 2.4 is the first release whose generators can be copied, and with them models
        "torch>=2.4,<3.0",
        "gymnasium>=1.1,<2.0",
        "numpy>=1.20,<3.0",
        # Atari games; 0.11.1 is the first release whose keys are for the actions that a game has, and imports Gymnasium 1.1
        "ale-py>=0.11.1",
        # Resizing of observations
        "opencv-python-headless",
        # Logging and progress bar
        "tensorboard>=2.9.1",
        "tqdm",
        "rich",
    ],
    extras_require={
        # Plots, pictures and videos
        "extra": ["matplotlib", "pandas", "imageio", "moviepy", "pygame-ce"],
        # Perceptual loss of the tokenizer
        "perceptual": ["lpips"],
        # Scripts in benchmarks/; arch, which rliable needs, does not import with pandas 3; rl_zoo3 forgets to name requests
        "benchmarks": [
            "minatar>=1.0.15",
            "gymnasium[box2d]",
            "matplotlib",
            "imageio",
            "pyyaml",
            "rl_zoo3>=2.7,<3.0",
            "rliable>=1.2",
            "pandas<3",
            "requests",
        ],
        # Many machines for benchmarks/atari100k.py
        "cluster": ["ray"],
        "tests": [
            "pytest>=7",
            "pytest-xdist>=3",
            "hypothesis",
            "mypy>=1.9",
            "ruff>=0.5.6",
            # Each year's black has its own style
            "black>=26.1,<27",
            "types-PyYAML",
            "matplotlib",
            "imageio",
            "minatar>=1.0.15",
            "gymnasium[box2d]",
            "pyyaml",
            "build",
        ],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
