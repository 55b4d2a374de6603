"""Model card of an agent, README.md beside its weights: what it was trained on, how to use it, its licence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...atomic import write_atomically
from ...envs.one_shot import GROUP_NAME

CARD = "README.md"
ANY_NETWORK = "any network"
"""What an agent that reads networks says it was trained for, as its `group`."""
HEADER = """---
library_name: keepdrop
license: apache-2.0
tags:
- keepdrop
- pruning
- structured-pruning
---
"""
USE_ANY = """```sh
keepdrop prune agents=hf://OWNER/NAME target.removed=0.5 checkpoint=mine.pt
```

```python
keepdrop.prune(model, train, test, agents="hf://OWNER/NAME", macs_removed=0.5)
```
"""
USE_OWN = """```python
keepdrop.apply_agents("hf://OWNER/NAME", model, train, test)
```
"""
LICENCE = """## Licence

Apache 2.0, as keepdrop itself, unless whoever trained it says otherwise here.
"""


def write_card(folder: Path, facts: Mapping[str, Any]) -> None:
    """Put the card beside an agent's weights."""
    write_atomically(folder / CARD, agent_card(facts).encode())


def agent_card(facts: Mapping[str, Any]) -> str:
    """The card in Markdown, from the facts saved with an agent; what they do not say is left out."""
    reads_any = facts.get("group") == ANY_NETWORK
    made_with = (facts.get("libraries") or {}).get("keepdrop", "unknown")
    title = "An agent that prunes networks it has never seen" if reads_any else f"An agent for {_layers(facts)}"
    what = (
        "It reads one row of numbers per filter group of a CNN and decides, at a target, which filters stay: without a "
        "search and without training."
        if reads_any
        else "It decides which filters of that architecture stay, on any checkpoint of it, without training."
    )
    trained = _of_many(facts) if reads_any else _of_one(facts)
    return "\n".join(
        [
            f"{HEADER}\n# {title}\n\n{what} Weights are in `policy.safetensors`, everything known of its training in",
            f"`facts.json`; no code comes with it. Made with keepdrop {made_with}.\n",
            f"## Use\n\n{USE_ANY if reads_any else USE_OWN}",
            f"## Training\n\n{trained}",
            LICENCE,
        ]
    )


def _of_many(facts: Mapping[str, Any]) -> str:
    families: dict[str, list[str]] = {}
    for name, family in dict(facts.get("networks") or {}).items():
        families.setdefault(str(family), []).append(str(name))
    targets = [f"{100 * removed:g} %" for removed in (facts.get("settings") or {}).get("targets", [])]
    rows = ["| family | networks |", "|---|---|"]
    rows += [f"| {family} | {', '.join(names)} |" for family, names in sorted(families.items())]
    said = [
        f"- {facts.get('rounds', '?')} rounds of policy gradient over {facts.get('worlds', '?')} pairs of a network "
        f"and a target, {facts.get('mask_evaluations', '?')} masks in the last round.",
        f"- Targets: {', '.join(targets)} of the MACs removed.",
    ]
    gains = facts.get("gain_over_uniform") or {}
    if "policy" in gains and "plan" in gains:
        said.append(
            f"- On these networks, at no step of training and before its last update, it kept "
            f"{100 * gains['policy']:+.1f} points of the base's accuracy over the same fraction of every layer (l2); "
            f"the plan that it corrects {100 * gains['plan']:+.1f}."
        )
    return "\n".join([*rows, "", *said, ""])


def _of_one(facts: Mapping[str, Any]) -> str:
    said = []
    if "groups" in facts:
        said.append(f"- Layers: {', '.join(map(str, facts['groups']))}.")
    if "target" in facts:
        said.append(f"- Target: {', '.join(f'{key} {value}' for key, value in dict(facts['target']).items())}.")
    if "base_accuracy" in facts:
        said.append(f"- Trained on a network of {100 * float(facts['base_accuracy']):.2f} % accuracy.")
    return "\n".join([*said, ""])


def _layers(facts: Mapping[str, Any]) -> str:
    group = facts.get("group", "a layer")
    return "all layers of a network" if group == GROUP_NAME else f"the layer {group}"
