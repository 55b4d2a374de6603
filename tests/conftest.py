import importlib.util
import sys
from pathlib import Path

import pytest
import torch

# tests/support holds what several test files share: networks, images, the command line.
sys.path.insert(0, str(Path(__file__).parent / "support"))
# Small networks: a second thread costs more than it brings, above all beside other test processes.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def coverage_script():
    """benchmarks/coverage.py as a module; it knows how to build well-known networks."""
    path = Path(__file__).parents[1] / "benchmarks" / "coverage.py"
    spec = importlib.util.spec_from_file_location("coverage_script", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def torchvision(coverage_script):
    """torchvision, with the schemas of its compiled operators defined where those do not load."""
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed (extra 'vision')")
    return coverage_script.import_torchvision()
