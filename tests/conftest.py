"""Seeds and devices.

Every run draws a fresh seed and prints it, `--seed` replays it; each test gets its own by its name. Tests marked `gpu`
are skipped where there is no GPU; those marked `interpreted`, and those of the backend `triton`, tests/interpreter runs
in a process with Triton's interpreter.
"""

import importlib
import importlib.util
import os
import signal
import zlib
from types import ModuleType

import pytest
import torch

from onepass.core import env
from onepass.testing import aot, interpreter, parametrize
from onepass.testing.background import Background


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=None, help="replay a run: the seed that its first lines print")
    parser.addoption("--aot-targets", default="", help="GPUs that kernels are compiled for, sm_90,gfx950,...; all")
    parser.addoption("--aot-share-out", action="store_true", help="a kernel's launches among those GPUs, in turn")


def pytest_configure(config: pytest.Config) -> None:
    if env.triton_interpreted() and importlib.util.find_spec("triton") is not None:
        interpreter.patch_language_once()
        interpreter.check_bounds()
    if config.option.aot_targets:
        aot.TARGETS = {name: aot.TARGETS[name] for name in config.option.aot_targets.split(",")}
    aot.SHARED_OUT = config.option.aot_share_out
    if config.option.seed is None:
        config.option.seed = int(torch.empty((), dtype=torch.int64).random_(0, 2**31, generator=_fresh()))
    if getattr(config.option, "hypothesisseed", None) is None:
        config.option.hypothesisseed = str(config.option.seed)


def _fresh() -> torch.Generator:
    generator = torch.Generator()
    generator.seed()
    return generator


def pytest_report_header(config: pytest.Config) -> str:
    return f"seed: {config.option.seed} (replay with --seed {config.option.seed})"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config) -> None:
    if exitstatus:
        terminalreporter.write_line(f"replay with --seed {config.option.seed}")


_BACKGROUND = pytest.StashKey[Background]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Calls `begin_in_background(background, items)` of the test files that have it, with their collected tests."""
    if session.config.option.collectonly:
        return
    of_module: dict[ModuleType, list[pytest.Item]] = {}
    for item in session.items:
        if hasattr(item, "module"):
            of_module.setdefault(item.module, []).append(item)
    if any(item.name == "test_compiles_with_the[installed]" for item in session.items):
        for item in session.items:
            if item.name == "test_compiles_for_every_target":
                item.add_marker(pytest.mark.skip(reason="tests/interpreter/test_compilation.py runs it"))
    background = session.config.stash[_BACKGROUND] = Background(os.environ)
    for ending in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(ending) is signal.SIG_DFL:
            signal.signal(ending, signal.default_int_handler)  # so that pytest_sessionfinish ends what runs
    for module, items in of_module.items():
        if hasattr(module, "begin_in_background"):
            module.begin_in_background(background, items)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _BACKGROUND in session.config.stash:
        session.config.stash[_BACKGROUND].end()


@pytest.fixture(scope="session")
def background(request: pytest.FixtureRequest) -> Background:
    return request.config.stash[_BACKGROUND]


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """This test's seed, printed when it fails."""
    own = zlib.crc32(request.node.nodeid.encode()) ^ request.config.option.seed
    print(f"seed {own}, from --seed {request.config.option.seed}")
    return own


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The tests in a folder of an operation's name are of that operation."""
    package = f"onepass.ops.{metafunc.definition.path.parent.name}"
    if importlib.util.find_spec(package) is not None:
        parametrize.of_operation(metafunc, importlib.import_module(f"{package}.kernels").FORWARD)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reasons = {}
    if not torch.cuda.is_available():
        reasons["gpu"] = "there is no GPU here"
    if not env.triton_interpreted():
        reasons["interpreted"] = "needs Triton's interpreter: tests/interpreter runs it there"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker) is not None:
                item.add_marker(pytest.mark.skip(reason=reason))
    items.sort(key=lambda item: "background" in getattr(item, "fixturenames", ()))  # last, those that may have to wait


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """Where this test's backends work: "cuda" for those of GPUs."""
    names = ("backend", "other", "fused")
    backends = {request.getfixturevalue(name) for name in names if name in request.fixturenames}
    if not any(parametrize.on_gpu(backend) for backend in backends):
        return "cpu"
    if "cpu" in backends:
        pytest.skip("the tensors of one call lie on one device")
    return "cuda"
