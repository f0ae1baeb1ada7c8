"""What tests of several areas share. No test reaches a network: the only Hub is the one on loopback."""

import os

import datasets
import pytest
from hypothesis import HealthCheck, settings

from .loopback_hub import Hub, connect


os.environ["HF_HUB_OFFLINE"] = "1"

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
def hub():
    """The Hub on loopback."""
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="session")
def hub_environment(hub, tmp_path_factory):
    """The environment variables of a process that talks to the Hub on loopback, with a token that may write."""
    return os.environ | hub.environment(str(tmp_path_factory.mktemp("hf_home")))


@pytest.fixture(scope="module")
def on_hub(hub, tmp_path_factory):
    """The Hub on loopback, to which this process talks as long as the tests of a module run."""
    with pytest.MonkeyPatch.context() as patch:
        connect(patch, hub, str(tmp_path_factory.mktemp("hf_home")))
        yield hub
