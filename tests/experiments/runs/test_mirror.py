"""Run folders at URLs: written, read back, killed and resumed; what is half there, or somebody else's."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import keepdrop as public
import pytest
from keepdrop import prune
from keepdrop.atomic import WATCHERS, write_atomically
from keepdrop.envs.data.sources import digits
from keepdrop.envs.networks.built_in import small_cnn
from keepdrop.envs.networks.checkpoint import hash_state, load_checkpoint
from keepdrop.errors import UserError
from keepdrop.experiments.runs.folder import RunFolder
from keepdrop.experiments.runs.mirror import FILES
from quick import CALL

RUN = "memory://runs/one"


@pytest.fixture
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def memory(memory, monkeypatch, cache):
    """An empty memory:// of this process, and a cache of its own."""
    monkeypatch.setenv("KEEPDROP_CACHE", str(cache))
    return memory


@pytest.fixture
def folder(memory):
    """A run folder at a URL, opened and kept up to date."""
    opened = RunFolder.at(RUN)
    opened.write_text("config.yaml", "seed: 0\n")
    opened.keep_hashes(["config.yaml"])
    opened.publish()
    yield opened
    opened.close()


def names(memory):
    return {path.removeprefix("/runs/one/") for path in memory.find("/runs/one")}


def listed(memory):
    return set(json.loads(memory.cat_file(f"/runs/one/{FILES}"))["files"])


def test_a_stage_is_there_once_it_is_whole(folder, memory):
    with folder.stage("layers/00-a") as working:
        write_atomically(working / "one.txt", "1")
        (working / "two.txt").write_text("2")
        assert not [name for name in names(memory) if name.startswith("layers")]
    assert {"layers/00-a/one.txt", "layers/00-a/two.txt"} < listed(memory) == names(memory) - {FILES}
    folder.close()
    assert not folder.path.exists() and WATCHERS == []
    again = RunFolder.open(RUN)
    again.check_hashes()
    assert (again / "layers/00-a/two.txt").read_text() == "2"
    again.close()


def test_what_a_killed_upload_left_is_not_read(folder, memory):
    folder.close()
    memory.pipe("/runs/one/layers/00-a/one.txt", b"1")  # of a stage that files.json does not list yet
    again = RunFolder.open(RUN)
    assert not (again / "layers").exists()
    again.close()


def test_a_folder_without_its_list_is_read_as_it_is(folder, memory):
    folder.close()
    memory.rm(f"/runs/one/{FILES}")
    again = RunFolder.open(RUN)
    again.check_hashes()
    assert again.config() == {"seed": 0}
    again.close()


def test_what_is_deleted_here_goes_there_too(folder, memory):
    write_atomically(folder / "finetune-snapshot.pt", b"weights")
    assert "finetune-snapshot.pt" in listed(memory)
    (folder / "finetune-snapshot.pt").unlink()
    folder.sync()
    assert "finetune-snapshot.pt" not in names(memory) | listed(memory)


def test_snapshots_cost_little(folder, memory):
    """Putting takes a twentieth of the time: a snapshot right after another one waits, and is put in the end."""
    folder.mirror._saved, folder.mirror._cost = folder.mirror._saved + 1e6, 1.0
    write_atomically(folder / "finetune-snapshot.pt", b"weights")
    write_atomically(folder / "metrics.json", b"{}")
    assert "metrics.json" in listed(memory) and "finetune-snapshot.pt" not in names(memory)
    folder.close()
    assert "finetune-snapshot.pt" in names(memory)


def test_a_store_that_fails_for_a_while_stops_nothing(folder, memory, monkeypatch):
    def fail(*arguments, **options):
        raise ConnectionError("no route")

    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "put_file", fail)
        with pytest.warns(public.errors.Notice, match="'memory://runs/one' cannot be written .*tried again"):
            write_atomically(folder / "a.json", b"{}")
    write_atomically(folder / "b.json", b"{}")
    assert {"a.json", "b.json"} < names(memory)


def test_a_run_that_cannot_be_put_in_the_end_stays_here(folder, memory, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "put_file", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("gone")))
        (folder / "late.txt").write_text("1")
        with pytest.raises(UserError, match=r"The run itself lies in '(.*)': copy") as caught:
            folder.close()
    kept = Path(str(caught.value).split("lies in '")[1].split("'")[0])
    assert (kept / "late.txt").read_text() == "1"


def test_a_missing_file_is_named(folder, memory):
    with folder.stage("base") as working:
        (working / "model.safetensors").write_text("1")
    folder.close()
    memory.rm("/runs/one/base/model.safetensors")
    with pytest.raises(UserError, match=r"'memory://runs/one' is not whole: 'base/model.safetensors'"):
        RunFolder.open(RUN)


def test_a_changed_file_is_named(folder, memory):
    folder.close()
    memory.pipe("/runs/one/config.yaml", b"seed: 1\n")
    again = RunFolder.open(RUN)
    with pytest.raises(UserError, match=r"'memory://runs/one/config.yaml' is not as the run wrote it"), again.naming():
        again.check_hashes()
    again.close()


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"files": ["../../x"]}', b'{"files": [1]}', b'{"files": 3}'])
def test_a_list_that_is_none(folder, memory, content):
    folder.close()
    memory.pipe(f"/runs/one/{FILES}", content)
    with pytest.raises(UserError, match=r"files.json' is damaged; delete it"):
        RunFolder.open(RUN)


def test_two_processes_never_mix_their_files(folder, memory):
    with pytest.raises(UserError, match="Another process is working in 'memory://runs/one'"):
        RunFolder.at(RUN)  # on this machine
    memory.pipe(f"/runs/one/{FILES}", b'{"writer": "of another machine", "files": []}')
    with pytest.raises(UserError, match="Another process has begun to write the run 'memory://runs/one'"):
        write_atomically(folder / "a.json", b"{}")
    assert "a.json" not in names(memory)
    folder.mirror._claimed = False


def test_commands(keepdrop, memory, cache, tmp_path, finished):
    """Report, agents, a checkpoint and a pruned network of a finished run, and a run of its own, all at URLs."""
    memory.put(f"{finished}/", "/runs/done/", recursive=True)
    shown = keepdrop("report", "memory://runs/done")
    assert shown.code == 0 and "Report: memory://runs/done/report.html" in shown.out, shown.err
    ask = ["agents=memory://runs/done", "checkpoint=memory://runs/done/base/model.safetensors", "controls=[]"]
    done = keepdrop("apply", *ask, "finetune.epochs=0", f"run_dir={RUN}")
    assert done.code == 0 and f"Run folder: {RUN}" in done.out, done.err
    assert {"metrics.json", "report.html", "pruned/model.safetensors"} < listed(memory)
    pruned = public.load_pruned(f"{RUN}/pruned")
    assert hash_state(pruned) == hash_state(public.load_pruned(finished / "pruned/cut"))
    again = keepdrop("apply", f"resume={RUN}")
    assert again.code == 0 and f"Run folder: {RUN}" in again.out, again.err
    taken = keepdrop("apply", *ask, f"run_dir={RUN}")
    assert taken.code == 2 and f"The run folder '{RUN}' exists and is not empty" in taken.err
    assert str(cache) not in done.out + done.err + again.out + again.err + taken.err
    assert [each for each in tmp_path.rglob("*") if each.is_file()] == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("agents=memory://no", "There is nothing at 'memory://no'"),
        ("resume=memory://no", "'memory://no' is not a keepdrop run folder"),
        ("checkpoint=nosuch://a", "'nosuch://a' cannot be opened"),
    ],
)
def test_bad_urls(refused, memory, given, said):
    beside = [] if given.startswith("resume") else ["target.removed=0.4"] if given.startswith("agents") else []
    assert said in refused("prune", given, *beside)


SCRIPT = """
import os, signal, sys
from keepdrop import prune
from keepdrop.envs.data.sources import digits
from keepdrop.envs.networks.built_in import small_cnn
from keepdrop.envs.networks.checkpoint import load_checkpoint
sys.path.insert(0, sys.argv[3])
from quick import CALL

def kill(progress):
    if progress.name == "conv2":
        os.kill(os.getpid(), signal.SIGKILL)

model = small_cnn()
load_checkpoint(model, sys.argv[1])
data = digits()
prune(model, data.train, data.test, **CALL, folder=sys.argv[2], progress=kill)
"""


def test_a_killed_run_on_s3_is_resumed_elsewhere(s3, checkpoint, tmp_path, monkeypatch):
    """kill -9 in the second layer's search; a machine with another cache goes on, and decides the same."""
    url, support = f"{s3}/runs/one", Path(__file__).parents[2] / "support"
    killed = subprocess.run([sys.executable, "-c", SCRIPT, str(checkpoint), url, str(support)], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    monkeypatch.setenv("KEEPDROP_CACHE", str(tmp_path / "other"))
    model, data, told = small_cnn(), digits(), []
    load_checkpoint(model, checkpoint)
    done = prune(model, data.train, data.test, **CALL, folder=url, progress=told.append)
    assert {each.name for each in told if each.stage == "search"} == {"conv2"}
    whole = prune(model, data.train, data.test, **CALL)
    assert hash_state(done.model) == hash_state(whole.model)
    done.save(f"{url}/small")
    assert hash_state(public.load_pruned(f"{url}/small", small_cnn)) == hash_state(done.model)
    with pytest.raises(UserError, match="'s3://nosuchbucket/run' cannot be written"):
        prune(model, data.train, data.test, **CALL, folder="s3://nosuchbucket/run")
    assert list((tmp_path / "other/runs").iterdir()) == []
