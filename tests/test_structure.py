"""What the project promises as a whole: who imports whom, what is exported, what is shipped."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import recflow_jax
import scheduling
from recflow_jax.config import DLRMConfig, shipped_models

ROOT = Path(__file__).parents[1]
COMMANDS = ROOT / "recflow_jax" / "commands"
MODELS = ("dlrm-kaggle", "dlrm-v2", "recflex-a", "recflex-b", "recflex-d", "rm1", "rm2", "w3")
PUBLIC = [
    "BagConfig",
    "Collecting",
    "DLRMConfig",
    "DeadlineExceeded",
    "Engine",
    "EngineClosed",
    "EngineError",
    "EngineOptions",
    "FeatureConfig",
    "InputError",
    "JaggedBatch",
    "QueueFull",
    "StepFailed",
    "TableConfig",
    "calibrate",
    "init_params",
    "load_params",
    "save_params",
    "shipped_models",
]


def modules_after(statement: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after `statement`."""
    program = f"import sys; {statement}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement", ["import scheduling", "import recflow_jax", "import recflow_jax.cli"]
)
def test_import_loads_nothing_heavy(statement: str) -> None:
    heavy = {"jax", "jaxlib", "flax", "optax", "matplotlib", "torch"}
    assert modules_after(statement) & heavy == set()


def test_scheduling_loads_neither_jax_nor_the_other_rooms() -> None:
    assert modules_after("import scheduling") & {"jax", "recflow_jax", "pallas_kernels"} == set()


def test_the_public_names_are_these() -> None:
    assert recflow_jax.__all__ == PUBLIC
    assert dir(recflow_jax) == PUBLIC


@pytest.mark.parametrize("module", [recflow_jax, scheduling])
def test_what_is_exported_is_there_and_sorted(module: ModuleType) -> None:
    exported = list(module.__all__)
    assert exported == sorted(exported)
    assert all(getattr(module, name) is not None for name in exported)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'recflow_jax' has no attribute 'Motor'"):
        _ = recflow_jax.Motor


def test_imports_follow_the_arrows() -> None:
    program = "from importlinter.cli import lint_imports_command as lint; lint()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


def test_a_front_end_loads_no_jax() -> None:
    """There are several to an engine: JAX would be most of their memory, and of their start."""
    program = (
        "import sys, recflow_jax.measure.caller_process; print({'jax', 'flax'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "set()\n", done.stderr


def test_a_wheel_holds_the_packages_and_their_data(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, capture_output=True, check=True, cwd=ROOT)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    rooms = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    assert rooms == {"recflow_jax", "pallas_kernels", "scheduling"}
    assert {f"recflow_jax/models/{model}.toml" for model in MODELS} <= set(names)
    assert "recflow_jax/ceilings.toml" in names


def test_every_model_is_shipped_and_reads() -> None:
    assert shipped_models() == MODELS
    for name in MODELS:
        assert DLRMConfig.shipped(name).name == name


def test_the_lock_file_names_the_public_registry_alone() -> None:
    hosts = set(re.findall(r"https://([^/\"]+)", (ROOT / "uv.lock").read_text()))
    assert hosts == {"pypi.org", "files.pythonhosted.org"}


def test_no_file_of_tests_is_a_package() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []


@pytest.mark.parametrize("command", ["make demo", "make test", "make test-gpu", "recflow profile"])
def test_the_readme_names_the_command(command: str) -> None:
    assert command in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("target", ["demo", "test", "test-gpu", "lock", "clean"])
def test_make_help_lists_the_target(target: str) -> None:
    done = subprocess.run(["make", "help"], capture_output=True, text=True, check=True, cwd=ROOT)
    assert re.search(rf"^{target} +\S", done.stdout, re.MULTILINE)


def test_the_readmes_example_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), names)
    assert capsys.readouterr().out == "xla 2\n"
    assert names["scores"].shape == (2, 1)
    np.testing.assert_allclose(names["later"], names["scores"], rtol=1e-5)


@pytest.mark.parametrize("room", ["recflow_jax", "pallas_kernels", "scheduling", "tools"])
def test_the_map_has_every_module(room: str) -> None:
    named = set(re.findall(r"`([\w/.]+)`", (ROOT / "docs" / "structure.md").read_text()))
    modules = {path.stem for path in (ROOT / room).rglob("*.py") if path.stem[0] != "_"}
    assert modules - named - {path.stem for path in COMMANDS.glob("*.py")} == set()
