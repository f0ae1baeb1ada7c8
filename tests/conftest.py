"""What tests of several areas share. No test reaches a network: the only Hub is the one on loopback."""

import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from hypothesis import HealthCheck, settings


os.environ["HF_HUB_OFFLINE"] = "1"
TESTS = Path(__file__).parent

# Property tests run the same examples in every run, so that no run fails by chance; `make fuzz` looks for new ones.
settings.register_profile(
    "fixed", derandomize=True, max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("fuzz", settings.get_profile("fixed"), derandomize=False, max_examples=1000, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory):
    """What `datasets` keeps of the tests' files lies beside them, for the tests and for the processes they start."""
    with pytest.MonkeyPatch.context() as patch:
        cache = str(tmp_path_factory.mktemp("datasets_cache"))
        patch.setenv("HF_DATASETS_CACHE", cache)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        yield


@pytest.fixture(scope="session")
def hub_environment(tmp_path_factory):
    """The environment variables of a process that talks to a Hub on loopback, with a token that may write."""
    server = subprocess.Popen(
        [sys.executable, TESTS / "loopback_hub.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    yield os.environ | {
        "HF_ENDPOINT": server.stdout.readline().strip(),
        "HF_HOME": str(tmp_path_factory.mktemp("hf_home")),
        "HF_TOKEN": "hf_loopback",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
    }
    server.stdin.close()
    server.wait(timeout=10)
    server.stdout.close()
