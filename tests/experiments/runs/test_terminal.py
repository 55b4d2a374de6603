"""The command line as a person meets it: flags, quiet, colours, sweeps that fail, completion, bars."""

import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from keepdrop.experiments.commands.cli import COMMANDS
from keepdrop.experiments.runs.console import Terminal
from rich.console import Console

TINY_CNN = ["base.epochs=0.2", "base.lr=0.05"]
KEEPDROP = str(Path(sys.executable).with_name("keepdrop"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ("prune", "--drop-bound", "0.1"),
            "keepdrop prune has no option '--drop-bound'; settings are written without dashes: drop_bound=0.1.",
        ),
        (
            ("prune", "--drop-bund=0.1"),
            "keepdrop prune has no option '--drop-bund'; settings are written without dashes: ",
        ),
        (
            ("train-cnn", "--epochs=3"),
            "keepdrop train-cnn has no option '--epochs'; settings are written without dashes: base.epochs=3.",
        ),
        (("prune", "--multi"), "keepdrop prune has no option '--multi'; did you mean --multirun?"),
        (("prune", "--hepl"), "keepdrop prune has no option '--hepl'; did you mean --help?"),
        (("prune", "-x"), "keepdrop prune has no option '-x'; settings are written key=value; --help "),
        (("prune", "-m", "seeed=1,2"), "keepdrop prune has no setting 'seeed'; did you mean 'seed'?"),
        (("-sc",), "nothing came after -sc; expected install=SHELL"),
        (("-sc", "install=fisch"), "install=fisch came after -sc; expected install=SHELL"),
    ],
)
def test_unknown_options_get_one_sentence(refused, arguments, sentence):
    assert refused(*arguments).startswith(sentence)


def test_hydras_own_options_still_work(keepdrop):
    shown = keepdrop("prune", "--cfg", "job", "--resolve", "drop_bound=0.03")
    assert shown.code == 0 and "drop_bound: 0.03" in shown.out and shown.err == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ("prune", "-m", "seed=a,b"),
        ("prune", "-m", "seed=0,1", "drop_bound=5"),
        ("train-cnn", "--multirun", "seed=0,1", "run_dir=deep/er", "base.epochs=-1"),
        ("train-agent", "-m", "layer=conv22,conv23"),
    ],
)
def test_failed_sweep_leaves_nothing(refused, arguments):
    refused(*arguments)


def test_sweep_keeps_what_ran(keepdrop, tmp_path):
    result = keepdrop("train-cnn", "-m", "base.epochs=0.2,-1", "base.lr=0.05", "run_dir=sweep", "--quiet")
    assert result.code == 2 and "epochs must be 0 or more" in result.err
    assert {path.name for path in (tmp_path / "sweep").iterdir()} == {"0", "multirun.yaml"}
    before = (tmp_path / "sweep/multirun.yaml").read_bytes()
    assert keepdrop("train-cnn", "-m", "base.epochs=-1,-2", "run_dir=sweep").code == 2
    assert (tmp_path / "sweep/multirun.yaml").read_bytes() == before
    assert {path.name for path in (tmp_path / "sweep").iterdir()} == {"0", "multirun.yaml"}


def test_sweep_of_a_command_that_writes_nothing(keepdrop, tmp_path):
    (tmp_path / "my-empty-folder").mkdir()
    assert keepdrop("inspect", "-m", "seed=0,1").code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["my-empty-folder"]


def test_quiet_is_a_flag(keepdrop):
    loud = keepdrop("train-cnn", *TINY_CNN, "run_dir=a")
    quiet = keepdrop("train-cnn", *TINY_CNN, "run_dir=b", "--quiet")
    assert "Training the base network" in loud.out and "Report: a/report.html" in loud.out
    assert [line.split(":")[0] for line in quiet.out.splitlines()] == ["Accuracy", "Weights", "Run folder"]
    assert keepdrop("inspect", "--quiet").out == keepdrop("inspect").out != ""


def test_outside_a_terminal_tables_are_wide_and_plain(keepdrop, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    out = keepdrop("inspect", "network=resnet20", "input_shape=[3,32,32]").out
    assert "\x1b" not in out
    widths = {len(line) for line in out.splitlines() if line.startswith(("│", "┃"))}
    assert 80 < max(widths) <= 160
    assert re.search(r"layer3\.2\.conv1 +│ +64 ", out)


def in_terminal(*arguments, cwd, **environment):
    """What a command writes to a terminal of 100 columns."""
    ours, theirs = pty.openpty()
    given = os.environ | {"COLUMNS": "100", "TERM": "xterm-256color", "OMP_NUM_THREADS": "1"} | environment
    process = subprocess.Popen([KEEPDROP, *arguments], stdout=theirs, stderr=theirs, cwd=cwd, env=given)
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # how Linux says that the other end is closed
            break
        if not part:
            break
        written += part
    os.close(ours)
    assert process.wait() == 0, written
    return written.decode()


COLOUR = r"\x1b\[(?:3[0-9]|38;5;\d+)m"


@pytest.mark.slow
def test_terminal_has_bars_and_colours_unless_told_otherwise(tmp_path):
    out = in_terminal("train-cnn", "base.epochs=2", "base.lr=0.05", "run_dir=a", cwd=tmp_path)
    assert "base network" in out and "left" in out and "loss" in out and re.search(COLOUR, out)
    plain = in_terminal("train-cnn", "base.epochs=2", "base.lr=0.05", "run_dir=b", cwd=tmp_path, NO_COLOR="1")
    assert "loss" in plain and not re.search(COLOUR, plain)
    quiet = in_terminal("train-cnn", "base.epochs=2", "base.lr=0.05", "run_dir=c", "--quiet", cwd=tmp_path)
    assert "loss" not in quiet and "Accuracy" in quiet


def terminal(monkeypatch, **environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    shown = Terminal()
    shown.console = Console(file=io.StringIO(), force_terminal=True, width=120)
    return shown


def test_bars_stand_inside_one_another(monkeypatch):
    shown = terminal(monkeypatch, TERM="xterm-256color")
    with shown.progress("layers", 2) as layers:
        layers.advance(1, "1 of 2: conv1")
        with shown.progress("conv1", 40) as agent:
            agent.advance(10, "update 10 of 40")
            agent.advance_by(10)
            shown._progress.refresh()
            assert [(t.description, t.completed) for t in shown._progress.tasks] == [("layers", 1), ("conv1", 20)]
        shown.advance(2)
        assert [(t.description, t.completed) for t in shown._progress.tasks] == [("layers", 2)]
    assert shown._progress is None and "update 10 of 40" in shown.console.file.getvalue()


def test_bar_ends_with_an_error(monkeypatch):
    shown = terminal(monkeypatch, TERM="xterm-256color")
    with pytest.raises(KeyError), shown.progress("layers", 2), shown.progress("conv1", 2):
        raise KeyError
    assert shown._progress is None and shown._tasks == []


def test_no_bars_outside_a_terminal(capsys):
    shown = Terminal()
    with shown.progress("layers", 2) as bar:
        bar.advance(1, "one")
        bar.advance_by(1, "two")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script(keepdrop, shell):
    script = keepdrop("-sc", f"install={shell}")
    assert script.code == 0 and "keepdrop" in script.out.splitlines()[-2 if shell == "fish" else -1]
    assert keepdrop("-sc", f"uninstall={shell}").code == 0


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("keepdrop ", set(COMMANDS)),
        ("keepdrop tr", {"train-cnn", "train-agent"}),
        ("keepdrop prune drop_", {"drop_bound="}),
        ("keepdrop prune agent.upd", {"agent.updates="}),
        ("keepdrop train-cnn network=resnet5", {"network=resnet56"}),
        ("keepdrop nonsense dr", set()),
    ],
)
def test_completion_knows_commands_and_settings(keepdrop, monkeypatch, line, expected):
    monkeypatch.setenv("COMP_LINE", line)
    assert set(keepdrop("-sc", "query=bash").out.split()) == expected


def test_finished_run_of_an_earlier_version_is_shown(finished, keepdrop, tmp_path):
    """Settings that were added since are taken from the defaults."""
    folder = tmp_path / "old"
    folder.mkdir()
    for name in ("config.yaml", "facts.json", "metrics.json"):
        text = (finished / name).read_text()
        if name == "config.yaml":
            text = re.sub(r"^controls:\n(- .*\n)+", "", text, flags=re.MULTILINE)
            assert "controls" not in text
        (folder / name).write_text(text)
    (folder / "curves.json").write_text(json.dumps({}))
    result = keepdrop("prune", "resume=old")
    assert result.code == 0, result.err
    assert (folder / "report.html").is_file()


def test_list_of_commands_comes_without_torch(tmp_path):
    program = "import sys; sys.argv = ['keepdrop']; from keepdrop.experiments.commands.cli import usage; usage()"
    program += "; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.split() == ["False"]


def test_shares_of_more_than_all_macs_are_explained(capsys):
    rows = [
        {
            "name": name,
            "n_filters": 4,
            "macs": 90,
            "params": 5,
            "coupled_with": [],
            "consumers": [],
            "may_vanish": False,
        }
        for name in "ab"
    ]
    described = {"macs": 100, "params": 10, "skipped": [], "groups": rows}
    Terminal().inspection(described)
    assert "The shares add up to 180 %" in capsys.readouterr().out
    Terminal().inspection(described | {"groups": rows[:1]})
    assert "add up" not in capsys.readouterr().out
