"""What runs where: which network in which runtime is fastest on this device, and the line of code that runs it so."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .export import FILES, INT8, RUNTIME
from .latency import speed_change
from .runtimes import CUDA_GRAPHS

NETWORKS = {"base": "dense", "pruned": "pruned", "int8": "pruned int8"}
EAGER = "eager"
GRAPHED = "model = torch.cuda.make_graphed_callables({}, (images,))  # under torch.no_grad(), for images of this shape"
DENSE = {
    CUDA_GRAPHS: GRAPHED.format("dense.eval()").split("  #")[0] + "  # pruning made nothing faster here",
    "compile": "model = torch.compile(dense, dynamic=False)  # pruning made nothing faster here",
    RUNTIME: 'keepdrop.export_onnx(dense, images, "dense.onnx")  # pruning made nothing faster here',
}


def way_of(record: Mapping[str, Any]) -> str:
    """A network and its runtime in words: "pruned, onnxruntime"."""
    return f"{NETWORKS.get(record['model'], record['model'])}, {runtime_of(record)}"


def runtime_of(record: Mapping[str, Any]) -> str:
    """The runtime of a `Latency` as a mapping; a run of an earlier version knew one."""
    return str(record.get("runtime", EAGER))


def fastest(latency: Sequence[Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    """The record with the smallest median of each batch size; not the dense network's where pruned is as fast.

    As fast is a pruned network in the same runtime whose quartiles overlap.
    """
    found: dict[int, Mapping[str, Any]] = {}
    for batch in dict.fromkeys(record["batch_size"] for record in latency):
        at_batch = [record for record in latency if record["batch_size"] == batch]
        best = min(at_batch, key=lambda record: record["median_seconds"])
        rivals = [each for each in at_batch if each["model"] == "pruned" and runtime_of(each) == runtime_of(best)]
        if best["model"] == "base" and rivals and speed_change(best, rivals[0]).startswith(("about", "no change")):
            best = rivals[0]
        found[batch] = best
    return found


def fastest_ways(latency: Sequence[Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    """What is fastest, with the dense network in eager mode as what it is compared with: a sentence and its record.

    Batch sizes whose fastest network and runtime are the same share a sentence.
    """
    dense = {each["batch_size"]: each for each in latency if each["model"] == "base" and runtime_of(each) == EAGER}
    by_way: dict[str, list[Mapping[str, Any]]] = {}
    for record in fastest(latency).values():
        by_way.setdefault(way_of(record), []).append(record)
    return [(_sentence(way, records, dense), records[0]) for way, records in by_way.items()]


def _sentence(way: str, records: Sequence[Mapping[str, Any]], dense: Mapping[int, Mapping[str, Any]]) -> str:
    batches = " and ".join(str(record["batch_size"]) for record in records)
    times = [_compared(record, dense.get(record["batch_size"])) for record in records]
    device, threads = records[0].get("device", "this device"), records[0].get("n_threads")
    where = f"{device}, {threads} thread{'s' * (threads != 1)}," if threads else device
    return f"Fastest on {where} at batch {batches}: {way} ({'; '.join(times)})."


def _compared(record: Mapping[str, Any], dense: Mapping[str, Any] | None) -> str:
    time = _ms(record)
    if dense is None or dense is record:
        return time
    return f"{time}, {speed_change(dense, record)} than dense, eager".replace("no change than", "no change from")


def int8_times(latency: Sequence[Mapping[str, Any]]) -> str:
    """How long int8 takes beside float32 in the same runtime, by batch size; "" where it was not timed."""
    of = {(each["model"], each["batch_size"]): each for each in latency if runtime_of(each) == RUNTIME}
    pairs = [(each, of.get(("pruned", batch))) for (model, batch), each in of.items() if model == "int8"]
    said = [
        f"{_ms(ours)} at batch {ours['batch_size']} (float32 {_ms(other)}: {speed_change(other, ours)})"
        for ours, other in pairs
        if other is not None
    ]
    return f" In onnxruntime {', '.join(said)}." if said else ""


def code_of(record: Mapping[str, Any], run: str | Path, own_network: bool, exported: Sequence[str] = ()) -> str:
    """The line that runs a network of a run folder as `record` was timed.

    Args:
        record: `Latency` as a mapping.
        run: the run folder.
        own_network: whether the network is the user's own, whose constructor has to be given.
        exported: kinds of export that lie in the folder.
    """
    folder, runtime = Path(run) / "pruned", runtime_of(record)
    if record["model"] == "base":
        return DENSE.get(runtime, "model = dense  # pruning made nothing faster here")
    if runtime == RUNTIME:
        kind = INT8 if record["model"] == "int8" else "onnx"
        line = f"session = onnxruntime.InferenceSession({_quoted(folder / FILES[kind])})"
        return line if kind in exported else f"{line}  # export=[{kind}] writes the file"
    model = f"keepdrop.load_pruned({_quoted(folder)}{', network' * own_network})"
    if runtime == CUDA_GRAPHS:
        return GRAPHED.format(f"{model}.cuda()")
    return f"model = torch.compile({model}, dynamic=False)" if runtime == "compile" else f"model = {model}"


def not_timed_sentence(reasons: Mapping[str, str]) -> str | None:
    """Runtimes that were not timed, each with what it takes; None where all were."""
    return f"Not timed: {' '.join(f'{name} {why}' for name, why in reasons.items())}" if reasons else None


def _ms(record: Mapping[str, Any]) -> str:
    return f"{1e3 * record['median_seconds']:.2f} ms"


def _quoted(path: Path) -> str:
    return json.dumps(str(path), ensure_ascii=False)
