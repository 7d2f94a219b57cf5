"""Importing quantmill is light, silent and goes one way."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import quantmill

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "transformers", "numba", "matplotlib", "datasets", "pyarrow", "pandas", "huggingface_hub"}
OTHERS = [
    "numba",
    "matplotlib.pyplot",
    "gguf",
    "transformers.modeling_utils",
    "transformers.generation.utils",
]
MODULES = sorted(m.name for m in pkgutil.walk_packages(quantmill.__path__, "quantmill."))


def python(code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter, from the repository's root."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_importing_the_package_loads_nothing_heavy():
    run = python(f"import sys, quantmill; print(sorted({HEAVY} & set(sys.modules)))")
    assert run.stdout.strip() == "[]", run.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["quantize", "--help"]])
def test_help_loads_nothing_heavy(arguments: list[str]):
    run = python(
        f"""
import sys
from quantmill.cli import main
sys.argv = ["quantmill", *{arguments}]
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
print(sorted({HEAVY} & set(sys.modules)), file=sys.stderr)
"""
    )
    assert run.returncode == 0, run.stderr
    assert "Usage" in run.stdout
    assert run.stderr.strip() == "[]"


def test_importing_every_module_is_silent():
    """No output, no environment variable, no logging set-up, no warning switched off."""
    run = python(
        f"""
import importlib, logging, os, sys, warnings
for outside in {OTHERS}:  # what others do when they are imported is not ours
    importlib.import_module(outside)
before = dict(os.environ), list(logging.getLogger().handlers), list(warnings.filters)
for name in {MODULES}:
    importlib.import_module(name)
after = dict(os.environ), list(logging.getLogger().handlers), list(warnings.filters)
for kind, was, now in zip(("environment", "log handlers", "warning filters"), before, after):
    if was != now:
        print(kind, "changed from", was, "to", now)
"""
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_imports_point_one_way():
    """The contracts in pyproject.toml, as `make lint` checks them."""
    lint = Path(sys.executable).with_name("lint-imports")
    run = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("name", ["quantmill", *MODULES])
def test_every_module_says_its_job_and_names_what_it_has(name: str):
    module = importlib.import_module(name)
    assert (module.__doc__ or "").strip(), f"{name} has no docstring"
    public = getattr(module, "__all__", ())
    assert len(public) == len(set(public))
    assert [n for n in public if not hasattr(module, n)] == []
