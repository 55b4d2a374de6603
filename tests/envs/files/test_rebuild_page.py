"""docs/rebuild.md keeps its word: its snippet rebuilds pruned files, and knows nothing of keepdrop."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from keepdrop.envs.files.pruned_network import save_pruned
from keepdrop.envs.groups.finding import find_groups
from keepdrop.envs.groups.verification import randomised
from keepdrop.envs.surgery.cutting import prune
from keepdrop.envs.surgery.kept_channels import KeptChannels
from zoo import IMAGES, ZOO

(SNIPPET,) = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[3] / "docs/rebuild.md").read_text(), re.DOTALL)
# What the page says it does not cover.
OWN_NUMBERS = ("Vectors", "MadeWeights", "Recurrent")
NETWORKS = {name: make for name, make in ZOO.items() if name not in ("Norms", "Decoder", *OWN_NUMBERS)}


def _saved(make, folder):
    generator = torch.Generator().manual_seed(7)
    dense = randomised(make(), generator).float()
    groups = find_groups(dense, torch.randn(IMAGES), verify=False).groups
    choices = {group: torch.arange(group.n_filters) % 3 != 1 for group in groups}
    model = prune(dense, choices)
    save_pruned(model, folder, kept=KeptChannels().after(dense, choices))
    return model


def test_the_snippet_is_short_and_free_of_keepdrop():
    assert "keepdrop" not in SNIPPET
    assert len([line for line in SNIPPET.splitlines() if line.strip()]) <= 15


@pytest.mark.parametrize("name", NETWORKS)
def test_the_snippet_rebuilds(name, tmp_path):
    model = _saved(NETWORKS[name], tmp_path)
    scope = {}
    exec(SNIPPET, scope)
    images = torch.randn(IMAGES)
    with torch.no_grad():
        assert torch.equal(scope["rebuild"](tmp_path, NETWORKS[name])(images), model(images))


def test_in_a_process_that_cannot_import_keepdrop(tmp_path):
    model = _saved(ZOO["PadShortcut"], tmp_path)
    code = (
        f"import sys, torch\nsys.modules['keepdrop'] = None\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[2] / 'support')!r})\n"
        f"import zoo\n{SNIPPET}\ntorch.set_num_threads(1)\n"
        f"out = rebuild({str(tmp_path)!r}, zoo.PadShortcut)(torch.ones(1, 3, 8, 8)).detach()\n"
        f"torch.save(out, {str(tmp_path / 'out.pt')!r})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    with torch.no_grad():
        expected = model(torch.ones(1, 3, 8, 8))
    assert torch.allclose(torch.load(tmp_path / "out.pt", weights_only=True), expected, rtol=1e-5, atol=1e-6)
