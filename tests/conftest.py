import os
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"  # for processes that tests start
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import datasets
import huggingface_hub
import pytest
import torch

# For this process, where a pytest plug-in may have imported them before the line above.
huggingface_hub.constants.HF_HUB_OFFLINE = True
datasets.config.HF_HUB_OFFLINE = True


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """Leave no process group to the next test: a Trainer of one process under DDP keeps its own."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put whole programs first: they take minutes, in which another process goes through many short tests."""
    items.sort(key=lambda item: "integration" not in item.path.parts)
