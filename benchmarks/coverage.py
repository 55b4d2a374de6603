"""What keepdrop finds, verifies and skips in well-known CNNs; writes docs/models.md.

    pip install torchvision timm
    python benchmarks/coverage.py            # goes on where it stopped; --fresh starts anew; --only 'resnet*' picks

Every torchvision classification CNN and a list of timm's, built with random weights (nothing is downloaded) and run
once on a random image, each in a process of its own with one thread. `found` are the groups before the check,
`prunable` those in which the masked and the cut network agree to 1e-9 in float64 on random weights (`Verifier`),
`convs` the share of convolutions, depthwise ones aside, whose filters are in one. Pure transformers are left out.
Answers do not depend on the machine; the seconds are those of the machine named at the head of the page.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "models.md"
TRANSFORMERS = ("vit_*", "swin_*")
SIDE, SIDES = 64, {"inception*": 96, "maxvit*": 224, "bat_*": 256, "xception*": 96, "nasnet*": 96, "pnasnet*": 96}
LIMIT_SECONDS = 900
# Schemas live as long as this list.
_SCHEMAS: list[torch.library.Library] = []
TIMM = [
    "bat_resnext26ts", "convmixer_768_32", "convnext_atto", "convnextv2_atto", "cspdarknet53", "cspresnet50",
    "densenet121", "dla34", "dla46_c", "dm_nfnet_f0", "dpn48b", "eca_nfnet_l0", "eca_vovnet39b", "ecaresnet26t",
    "edgenext_xx_small", "efficientnet_lite0", "ese_vovnet19b_dw", "fasternet_t0", "fbnetc_100", "gernet_s",
    "ghostnet_100", "ghostnetv2_100", "hardcorenas_a", "hgnet_tiny", "hgnetv2_b0", "hrnet_w18_small",
    "inception_next_atto", "inception_resnet_v2", "inception_v4", "lcnet_050", "mixnet_s", "mnasnet_small",
    "mobilenetv2_050", "mobilenetv3_small_050", "mobilenetv4_conv_small", "mobileone_s0", "nf_resnet50",
    "pnasnet5large", "rdnet_tiny", "regnetv_040", "regnetx_002", "regnety_002", "regnetz_b16", "repghostnet_050",
    "repvgg_a0", "repvit_m0_9", "res2net50_26w_4s", "resnest14d", "resnet18d", "resnet26t", "resnetv2_50",
    "resnetv2_50x1_bit", "rexnet_100", "selecsls42b", "semnasnet_075", "seresnet50", "seresnext26d_32x4d",
    "skresnet18", "spnasnet_100", "starnet_s1", "tf_efficientnetv2_b0", "tinynet_e", "tresnet_m", "vgg11_bn",
    "wide_resnet50_2", "xception41",
]  # fmt: skip


def main() -> None:
    """Measure what is missing, then write the page."""
    arguments = parsed()
    if arguments.model:
        print(json.dumps(examine(*arguments.model.split("/", 1))))
        return
    store = Path(arguments.store)
    known = {} if arguments.fresh or not store.exists() else json.loads(store.read_text())
    wanted = [name for name in model_names() if fnmatchcase(name.split("/")[1], arguments.only)]
    for name in wanted:
        if name not in known:
            known[name] = in_own_process(name)
            write(store, json.dumps(known, indent=1))
            print(name, {key: value for key, value in known[name].items() if key != "reasons"}, flush=True)
        if arguments.only == "*":
            done = {each: known[each] for each in wanted if each in known}
            write(PAGE, page(done, [each for each in wanted if each not in known]) + trained(PAGE))


def trained(path: Path) -> str:
    """The sections of the page that zoo.py and kinds.py wrote, which stay."""
    text = path.read_text() if path.is_file() else ""
    starts = [text.find(mark) for mark in ("<!-- trained networks -->", "<!-- kinds of networks -->") if mark in text]
    return f"\n{text[min(starts) :]}" if starts else ""


def parsed() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="shell-style pattern of model names; the page is not written then")
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier run found")
    parser.add_argument("--store", default=str(ROOT / "build" / "coverage.json"), help="where findings are kept")
    parser.add_argument("--model", help=argparse.SUPPRESS)
    return parser.parse_args()


def import_torchvision() -> Any:
    """torchvision, also where its own compiled operators do not load beside this build of torch.

    Classification models use none of them, but importing it registers shapes for two; their schemas are enough.
    """
    try:
        import torchvision
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        _SCHEMAS.append(torch.library.Library("torchvision", "DEF"))
        for name in ("nms", "qnms"):
            _SCHEMAS[-1].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision
    return torchvision


def model_names() -> list[str]:
    """`library/model` of everything on the page."""
    models = import_torchvision().models
    names = [n for n in models.list_models(module=models) if not any(fnmatchcase(n, t) for t in TRANSFORMERS)]
    return [f"torchvision/{name}" for name in names] + [f"timm/{name}" for name in TIMM]


def build(library: str, name: str) -> nn.Module:
    """The network with random weights."""
    models = import_torchvision().models
    if library == "torchvision":
        extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        return models.get_model(name, weights=None, **extra)
    import timm

    return timm.create_model(name, pretrained=False)


def side(name: str) -> int:
    """Height and width of the example image: small, where the network allows it."""
    return next((size for pattern, size in SIDES.items() if fnmatchcase(name, pattern)), SIDE)


def examine(library: str, name: str) -> dict[str, Any]:
    """One row of the page."""
    from keepdrop.envs.groups.finding import find_groups

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = build(library, name).eval()
    example = torch.randn(1, 3, side(name), side(name))
    found = find_groups(model, example, verify=False)
    started = time.perf_counter()
    plan = find_groups(model, example)
    return {
        "side": side(name),
        "found": len(found.groups),
        "prunable": len(plan.groups),
        "convs_prunable": len(convs_in(model, plan.groups)),
        "convs": len(convs_in(model, plan.groups)) + len(plan.skipped),
        "reasons": dict(Counter(item.reason for item in plan.skipped).most_common()),
        "examples": {item.reason: item.name for item in reversed(plan.skipped)},
        "seconds": round(time.perf_counter() - started, 2),
    }


def convs_in(model: nn.Module, groups: Sequence[Any]) -> set[str]:
    """Convolutions whose filters are in a group."""
    from keepdrop.envs.networks.module_kinds import is_conv

    return {cut.module for group in groups for cut in group.producers if is_conv(model.get_submodule(cut.module))}


def in_own_process(name: str) -> dict[str, Any]:
    """A row, or {"failed": why}: no network can take the others down."""
    command = [sys.executable, __file__, "--model", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"took more than {LIMIT_SECONDS} s"}
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"ended with code {done.returncode}"]
        return {"failed": last[0]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def page(rows: Mapping[str, Mapping[str, Any]], missing: Sequence[str] = ()) -> str:
    """docs/models.md; `missing` are the networks that have not been run yet."""
    done = {name: row for name, row in rows.items() if "failed" not in row}
    whole = sum(row["convs_prunable"] == row["convs"] for row in done.values())
    head = f"""# Networks seen

Made by `python benchmarks/coverage.py`; its head says how. {len(rows)} networks ran, {len(rows) - len(done)} failed.
{sum(row["prunable"] for row in done.values())} of {sum(row["found"] for row in done.values())} groups found are
prunable: masked and cut, the network gives the same answer (relative difference at most 1e-9 in float64; 1e-4 in
float32 where it makes constants of its own). In {whole} networks every convolution's filters are in a group. What is
skipped is named with its reason and one of its layers, partners counted in; `keepdrop inspect` names all.

{platform.machine()}, one thread, torch {torch.__version__.partition("+")[0]}, {versions()}. Seconds are wall-clock time
of finding and checking all groups, for some rows beside heavy other work: upper bounds.
"""
    parts = [head]
    for library in ("torchvision", "timm"):
        parts += [f"## {library}", "", "| network | image | found | prunable | convs | seconds | skipped |"]
        parts.append("|---|---|---|---|---|---|---|")
        parts += [line(name, row) for name, row in rows.items() if name.startswith(f"{library}/")]
        parts.append("")
    parts.append(f"Left out as pure transformers: {', '.join(TRANSFORMERS)}.")
    if missing:
        parts += ["", f"Listed and not run yet: {', '.join(missing)}."]
    return "\n".join(parts) + "\n"


def line(name: str, row: Mapping[str, Any]) -> str:
    """One row of a table."""
    short = name.split("/")[1]
    if "failed" in row:
        return f"| {short} | | | | | | failed: {row['failed'].replace('|', '/')} |"
    merged: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for reason, count in row["reasons"].items():
        kind = re.sub(r"^it goes together with '[^']*': | \(RuntimeError: .*", "", reason).replace("|", "/")
        merged[kind] += count
        examples.setdefault(kind, row["examples"][reason])
    reasons = "; ".join(f"{count}: {kind} (`{examples[kind]}`)" for kind, count in merged.most_common())
    cells = (short, row["side"], row["found"], row["prunable"], f"{row['convs_prunable']} / {row['convs']}")
    return f"| {' | '.join(map(str, cells))} | {row['seconds']:.1f} | {reasons} |"


def versions() -> str:
    """Of the two libraries."""
    from importlib.metadata import version

    return ", ".join(f"{library} {version(library)}" for library in ("torchvision", "timm"))


if __name__ == "__main__":
    main()
