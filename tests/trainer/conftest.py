"""Small models that several packages' tests load."""

import pytest

from .llm2clip_models import save_clip, save_image_processor, save_llama


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> str:
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def llm2clip(tmp_path_factory) -> str:
    return save_clip(tmp_path_factory.mktemp("llm2clip"))


@pytest.fixture(scope="session")
def image_processor(tmp_path_factory) -> str:
    return save_image_processor(tmp_path_factory.mktemp("image_processor"))


@pytest.fixture
def modules_cache(tmp_path, monkeypatch):
    """Code of repositories is copied before it is imported; not into the user's cache."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
