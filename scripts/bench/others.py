"""Packages that need other versions than bigmodel, in their own environments, with the same torch."""

from __future__ import annotations

import importlib.metadata
import subprocess
import venv

from bench.common import BENCH

OTHERS = {
    "litgpt": ["litgpt==0.5.13", "lightning", "numpy"],
    "recbole": ["recbole==1.2.1", "numpy==1.26.4", "pandas==2.3.3", "scipy<1.15"],
    "rectools": ["rectools[torch]==0.19.0"],
}
LITGPT, RECBOLE, RECTOOLS = (BENCH / name / "bin/python" for name in OTHERS)


def install(name: str) -> None:
    """Make the environment of `OTHERS`, unless it is there; packages without a version have that of this environment."""
    done = BENCH / name / "installed"
    if done.exists():
        return
    print(f"installing {name} into {BENCH / name} ...", flush=True)
    venv.create(BENCH / name, with_pip=True, clear=True)
    versions = {own: importlib.metadata.version(own).partition("+")[0] for own in ("torch", "lightning", "numpy")}
    packages = [f"{package}=={versions[package]}" if package in versions else package for package in OTHERS[name]]
    packages.append(f"torch=={versions['torch']}")
    subprocess.run([BENCH / name / "bin/python", "-m", "pip", "install", "-q", *packages], check=True)
    done.touch()
