"""What every test runs under: the CPU unless GPU tests are asked for, shapes and types checked."""

import os
import re
from collections.abc import Iterator

import hypothesis
import jaxtyping
import pytest

hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000)
hypothesis.settings.register_profile(
    "fuzz",
    deadline=None,
    max_examples=12_500,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# Before the first import of either package, so that every function in them is checked.
jaxtyping.install_import_hook(["recflow_jax", "pallas_kernels"], "typecheck.checked")


@pytest.fixture
def unchecked() -> Iterator[None]:
    """For what is done so often that checks of shapes and types would be most of it."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def interpreted() -> Iterator[None]:
    """Runs Mosaic kernels on the CPU and watches for races, which print or raise."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield


def pytest_configure(config: pytest.Config) -> None:
    """Sets JAX up before any test module imports it."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        _share_the_machine()
    if not _asks_for_gpu(config):
        os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XDG_CACHE_HOME"] = str(config.rootpath / ".pytest_cache" / "caches")
    os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "standard"
    os.environ["JAX_LEGACY_PRNG_KEY"] = "error"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips GPU tests that cannot run, and says why."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    reason = _why_no_gpu(config) if gpu_items else None
    if reason:
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A run for the GPU that had none must not look like a success."""
    if exitstatus == pytest.ExitCode.OK and _asks_for_gpu(session.config):
        if _why_no_gpu(session.config):
            session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED


def pytest_unconfigure(config: pytest.Config) -> None:
    """Tells whoever asked for GPU tests that none ran, as the last thing said."""
    reason = _why_no_gpu(config) if _asks_for_gpu(config) else None
    if reason:
        config.get_terminal_writer().line(f"no GPU test ran: {reason}", red=True)


def _share_the_machine() -> None:
    """Workers share the cores and the GPU's memory; thread pools of full size in each would fight
    for the ones, the first worker would take most of the other.

    XLA's CPU pool (NPROC) needs a thread for every warpgroup of an interpreted kernel: they wait
    for one another inside the pool.
    """
    os.environ["NPROC"] = "8"
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"


def _asks_for_gpu(config: pytest.Config) -> bool:
    """Whether the -m expression selects the tests marked gpu."""
    return re.search(r"(?<!not )\bgpu\b", config.option.markexpr) is not None


def _why_no_gpu(config: pytest.Config) -> str | None:
    if not _asks_for_gpu(config):
        return "GPU tests run with -m gpu (make test-gpu)"
    from recflow_jax.backend import choose_backend

    try:
        backend = choose_backend()
    except RuntimeError as error:
        return f"JAX finds no device: {error}"
    return None if backend.name == "mosaic" else f"the kernels do not run here: {backend.reason}"
