"""Every test computes with one thread: the suite shares its machine, and results then repeat bit for bit."""

# The libraries read these variables when they are imported.
# ruff: noqa: E402

import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"
for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS", "RAY_DISABLE_IMPORT_WARNING"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests import boxes
from tests.left_over import Witness
from tests.tiny_models import save_tiny_model

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fails the session when a box, an edge or a daemon of it is still there, in whole or in part."""
    witness = Witness(tmp_path_factory.getbasetemp())
    yield
    left = witness.left_over()
    assert not left, "left over by the tests:\n" + "\n".join(left)


@pytest.fixture(scope="session", autouse=True)
def some_box_was_opened() -> Iterator[None]:
    """Fails the session when it had tests of boxes and no kind of box could be opened."""
    yield
    reasons = boxes.all_were_skipped()
    assert not reasons, f"every test of a box was skipped:\n{reasons}"


@pytest.fixture
def socket_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder whose socket has a short enough name."""
    short = Path("/tmp") / f"edge-{uuid.uuid4().hex[:8]}"
    short.symlink_to(tmp_path)
    yield short
    short.unlink()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny random model with its tokenizer."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def start_mini(tiny_model: str) -> Callable[..., subprocess.Popen[str]]:
    """Starts ``posttrain run`` of the mini recipe as a process that leads a session of its own."""

    def start(run_dir: Path, *arguments: str) -> subprocess.Popen[str]:
        recipe = Path(__file__).parent / "mini_recipe.py"
        command = [sys.executable, "-m", "posttrain.cli", "run", str(recipe), "--run-dir", str(run_dir)]
        return subprocess.Popen(
            [*command, "--set", f"model.path={tiny_model}", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    return start


@pytest.fixture(scope="session")
def mini_run(
    start_mini: Callable[..., subprocess.Popen[str]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """Directory and output of a whole run of the mini recipe that nothing disturbed."""
    run_dir = tmp_path_factory.mktemp("runs") / "mini"
    process = start_mini(run_dir)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    return run_dir, output
