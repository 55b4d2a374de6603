"""`data.workers` of a data source: taken by its function, or else by what that returns."""

import sys

import pytest
from keepdrop.experiments.config.build import build_data
from omegaconf import OmegaConf

CODE = """
import torch
from torch.utils.data import TensorDataset

seen = []

def pair(n=6, **others):
    assert not others
    return [TensorDataset(torch.randn(n, 1, 4, 4), torch.arange(n) % 2) for _ in range(2)]

def taking(workers=None):
    seen.append(workers)
    return pair()
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "brought_workers.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "brought_workers"
    sys.modules.pop("brought_workers", None)


def test_workers_go_to_the_function_or_to_what_it_returns(module):
    for workers, wanted in ((None, 0), (2, 2)):
        data = build_data(OmegaConf.create({"_target_": f"{module}.pair", "n": 8, "workers": workers}))
        assert (data.train._workers.count, data.test._workers.count, len(data.train)) == (wanted, wanted, 8)
    build_data(OmegaConf.create({"_target_": f"{module}.taking", "workers": 3}))
    assert sys.modules[module].seen == [3]
