"""What pyproject.toml cannot say: recipes and launch configurations, whatever folders there are, go with an installation."""

from pathlib import Path

from setuptools import setup

FILES = sorted([*Path("recipes").rglob("*.yaml"), *Path("accelerate_configs").glob("*.yaml")])

setup(data_files=[(f"share/posttrain/{file.parent.as_posix()}", [file.as_posix()]) for file in FILES])
