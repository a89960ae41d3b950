"""The root on the import path, a deterministic hypothesis, slow sweeps behind --slow."""
import signal
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import vit  # noqa: E402  (found from the line above)
from plumbing.console import run_command  # noqa: E402

# The same examples on every machine and no deadline: a test must not depend on time.
settings.register_profile("glimpse", deadline=None, derandomize=True, max_examples=25,
                          suppress_health_check=[HealthCheck.function_scoped_fixture,
                                                 HealthCheck.too_slow])
settings.load_profile("glimpse")
torch.set_num_threads(1)                        # tests are small: a second thread only waits
# Tests send these. A shell's background ignores the first, nohup the second.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true",
                     help="also run the long sweeps: many kills, many ranks, every pair")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs --slow"))


def pytest_configure(config):
    config.addinivalue_line("markers", "processes: trains in processes of its own, too")
    config.addinivalue_line("markers", "slow: a long sweep, run with --slow")


def status(module, argv):
    """Run a module's command as a shell does -> its exit status."""
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: module.main(argv))
    return stop.value.code or 0


@pytest.fixture
def narrow(request, monkeypatch):
    """The tiny model made tinier, where only this process trains: laws need no width.

    Tests that compare with a process of its own say so: @pytest.mark.processes."""
    if "processes" not in request.keywords:
        small = dict(width=64, depth=3, heads=2, decoder_width=32, block="rotary")
        monkeypatch.setitem(vit.MODELS, "tiny", small)
