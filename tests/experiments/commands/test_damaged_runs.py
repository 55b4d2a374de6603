"""A run folder whose files are damaged or changed, one at a time: a sentence that names the file, never a traceback."""

import json
import shutil
import signal
import time
from contextlib import suppress

import pytest
from keepdrop.agent.saved_agent import check_agent
from keepdrop.envs.files.pruned_network import load_pruned
from keepdrop.errors import UserError
from keepdrop.experiments.commands.report import rendered
from keepdrop.experiments.pruning.trained_agents import load_agents
from keepdrop.experiments.reporting.run_data import read_run
from keepdrop.experiments.reporting.run_page import run_page
from keepdrop.experiments.runs.folder import RunFolder, file_name
from omegaconf import OmegaConf

READ = (".json", ".yaml", ".safetensors", ".txt")  # what a command reads again; the rest is for people
NUMBERS = "[1e999, NaN, -1, 1" + "0" * 400 + "]"


def flipped(content):
    """One bit of the last third, where weights lie."""
    place = len(content) * 5 // 6
    return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]


DAMAGE = {
    "empty": lambda content: b"",
    "halved": lambda content: content[: len(content) // 2],
    "noise": lambda content: bytes(range(256)) * 3,
    "a list": lambda content: b"[1, [2], {}]\n",
    "an empty object": lambda content: b"{}\n",
    "nested": lambda content: b"[" * 100_000,
    "numbers": lambda content: NUMBERS.encode(),
    "nulls": lambda content: json.dumps(dict.fromkeys(json.loads(content))).encode(),
    "1e999": lambda content: json.dumps(json.loads(content), indent=1).replace("0.", "1e999, 0.", 1).encode(),
    "other types": lambda content: json.dumps({key: [key] for key in json.loads(content)}).encode(),
    "a bit": flipped,
}


def damaged(content, kind):
    """The content after damage of a kind; None where it makes no sense for it, or changes nothing."""
    try:
        found = DAMAGE[kind](content)
    except (ValueError, TypeError, AttributeError):
        return None
    return None if found == content else found


def files(run):
    return sorted(path.relative_to(run).as_posix() for path in run.rglob("*") if path.suffix in READ)


@pytest.fixture
def run(tmp_path, finished):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def reopen(run, finished):
    """The copy as it was; only what differs is written."""
    for path in finished.rglob("*"):
        copy = run / path.relative_to(finished)
        if path.is_file() and (not copy.is_file() or copy.read_bytes() != path.read_bytes()):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


@pytest.mark.parametrize("kind", DAMAGE)
def test_hashes_name_the_file_that_changed(run, finished, kind):
    RunFolder(run).check_hashes()
    tried = 0
    for name in files(run):
        if name == "hashes.json" or (content := damaged((run / name).read_bytes(), kind)) is None:
            continue
        (run / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"/{name}' is not as the run wrote it"):
            RunFolder(run).check_hashes()
        reopen(run, finished)
        tried += 1
    assert tried >= (2 if kind in ("nulls", "1e999", "other types") else 10)


@pytest.mark.parametrize("kind", ["empty", "halved", "noise", "a list", "nested", "numbers", "nulls"])
def test_damaged_hashes(run, kind):
    (run / "hashes.json").write_bytes(damaged((run / "hashes.json").read_bytes(), kind))
    with pytest.raises(UserError, match=r"hashes\.json' is damaged"):
        RunFolder(run).check_hashes()


def test_resume_looks_at_the_hashes(keepdrop, run):
    name = "layers/01-conv2/network.safetensors"
    (run / name).write_bytes(flipped((run / name).read_bytes()))
    result = keepdrop("prune", "resume=run")
    assert result.code == 2 and f"'run/{name}' is not as the run wrote it" in result.err


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_reads_a_folder_without_hashes(run, finished, kind):
    """As in runs of version 0.1.0: reports, pruned networks and agents are read, or refused in a sentence."""
    for name in files(run):
        if name == "hashes.json" or (content := damaged((run / name).read_bytes(), kind)) is None:
            continue
        (run / name).write_bytes(content)
        for read in (lambda: rendered(run_page, read_run(run)), lambda: load_pruned(run / "pruned")):
            with suppress(UserError):
                read()
        with suppress(UserError):
            for agent in load_agents(run).values():
                check_agent(agent, group="conv1")
        reopen(run, finished)


def one_sentence(result, name):
    """Whether a command did its work, or said in one line what is wrong."""
    assert result.code in (0, 2), (name, result)
    assert "Traceback" not in result.err and (result.code == 0 or result.err.count("\n") == 1), (name, result.err)


@pytest.mark.slow
@pytest.mark.parametrize("kind", DAMAGE)
def test_without_hashes_it_is_still_a_sentence(keepdrop, run, finished, kind):
    """As in runs of version 0.1.0, finished and not; only resumed where the damaged file is met at once."""
    (run / "hashes.json").unlink()
    for name in files(run):
        if (content := damaged((run / name).read_bytes(), kind)) is None:
            continue
        (run / name).write_bytes(content)
        one_sentence(keepdrop("report", "run"), name)
        one_sentence(keepdrop("prune", "resume=run"), name)
        try:
            load_pruned(run / "pruned")
        except UserError as error:
            assert name.startswith("pruned/"), (name, error)
        if "agent/" in name or name == "config.yaml":
            one_sentence(keepdrop("apply", "agents=run", "checkpoint=no.pt"), name)
        reopen(run, finished)
        (run / "hashes.json").unlink()


STAGED = ("facts.json", "base/model.safetensors", "layers/00-conv1/decision.json", "finetune/seconds.txt")


@pytest.mark.parametrize("name", STAGED)
@pytest.mark.parametrize("kind", ["noise", "an empty object"])
def test_an_unfinished_run_without_hashes(keepdrop, run, name, kind):
    for gone in ("hashes.json", "metrics.json"):
        (run / gone).unlink()
    (run / name).write_bytes(damaged((run / name).read_bytes(), kind))
    result = keepdrop("prune", "resume=run", "quiet=true")
    one_sentence(result, name)
    assert result.code == 2 and name.rpartition("/")[2] in result.err, result.err


def test_settings_of_a_run_are_typed_not_edited(keepdrop, run):
    config = OmegaConf.load(run / "config.yaml")
    config.finetune.epochs = 7
    OmegaConf.save(config, run / "config.yaml")
    result = keepdrop("prune", "resume=run")
    assert result.code == 2 and "'run/config.yaml' is not as the run wrote it" in result.err
    assert result.err.endswith("or begin a new run with other settings typed.\n")


def test_a_yaml_bomb_is_not_unfolded(keepdrop, run):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    (run / "config.yaml").write_text("\n".join(lines))
    result = keepdrop("report", "run")
    assert result.code == 2 and "it holds an alias" in result.err
    (run / "config.yaml").write_text("[" * 1000)
    result = keepdrop("report", "run")
    assert result.code == 2 and "nested more than 100 deep" in result.err


def test_two_runs_in_one_folder(keepdrop, run):
    holder = RunFolder(run)
    holder.lock()
    result = keepdrop("prune", "resume=run")
    assert result.code == 2 and "Another process is working in 'run'" in result.err
    assert keepdrop("report", "run").code == 0
    holder.close()
    assert keepdrop("prune", "resume=run").code == 0


def wait_for(process, condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


def test_sigterm_ends_like_ctrl_c_and_a_killed_run_leaves_no_lock(spawn, keepdrop, tiny_base, tmp_path):
    process = spawn("prune", *tiny_base, "agent.updates=1000", "agent.patience=null", "run_dir=run", cwd=tmp_path)
    wait_for(process, (tmp_path / "run/layers/00-conv1.partial").is_dir)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in err
    assert err.strip().endswith("keepdrop: stopped. Continue with: keepdrop prune resume=run")
    process = spawn("prune", "resume=run", cwd=tmp_path)
    wait_for(process, lambda: list((tmp_path / "run/tensorboard").glob("*")) and _locked(tmp_path / "run"))
    assert "Another process is working" in keepdrop("prune", "resume=run").err
    process.kill()
    process.communicate()
    RunFolder(tmp_path / "run").lock()


def _locked(path):
    folder = RunFolder(path)
    try:
        folder.lock()
    except UserError:
        return True
    folder.close()
    return False


def test_default_folders_never_collide(keepdrop, checkpoint, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("keepdrop.experiments.commands.prune.prune_network", lambda inputs, context: 1 / 0)
    taken = tmp_path / "runs"
    default = ["prune", *tiny, f"checkpoint={checkpoint}"]
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            keepdrop(*default, "hydra.run.dir=.")
    assert len(list(taken.glob("prune/*/config.yaml"))) == 2


def test_a_taken_name_gets_a_number(tmp_path):
    config = OmegaConf.create({"run_dir": str(tmp_path / "a")})
    made = []
    for _ in range(3):
        folder = RunFolder.create(tmp_path / "a", config, numbered=True)
        folder.close()
        made.append((folder.path.name, OmegaConf.load(folder / "config.yaml").run_dir))
    assert made == [(name, str(tmp_path / name)) for name in ("a", "a-2", "a-3")]


def test_names_of_layers_are_safe_and_unique_as_files():
    names = ["a/b", "a_b", "a.b", "../a", "..", "a b", "a:b", "x" * 300, "x" * 301, "a\\b", "ä", ""]
    made = [file_name(name) for name in names]
    assert len(set(made)) == len(names) and all(len(each) < 100 and not set("/\\ :") & set(each) for each in made)
    assert [file_name(name) for name in ("conv1", "layer2.0.conv1", "level2_0")] == [
        "conv1",
        "layer2.0.conv1",
        "level2_0",
    ]
    assert file_name("..") != ".."


def test_agents_are_not_searched_for_on_the_whole_disk(tmp_path, finished):
    shutil.copytree(finished / "layers", tmp_path / "sweep/0/layers")
    assert list(load_agents(tmp_path / "sweep")) == list(load_agents(tmp_path / "sweep/0")) == ["conv1", "conv2"]
    with pytest.raises(UserError, match="No trained agent in"):
        load_agents(tmp_path)  # two folders above a run


def test_a_folder_that_cannot_be_made(keepdrop, checkpoint, tiny, tmp_path):
    (tmp_path / "file").write_text("")
    result = keepdrop("prune", *tiny, f"checkpoint={checkpoint}", "run_dir=file/run")
    assert result.code == 2 and "file/run" in result.err and result.err.count("\n") == 1, result.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
