"""The Ray engine on two nodes of this machine: the same decisions, and what dies is replaced."""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("ray", reason="ray is not installed (extra 'ray')")
import ray
from digits_task import make_task, trained
from keepdrop import RayEngine, Settings, TrainSettings, prune
from keepdrop.agent.learning.natural_evolution import NetworkAgentSettings
from keepdrop.agent.saved_agent import load_agent
from keepdrop.envs.data.sources import digits
from keepdrop.envs.one_shot import OneShotTask
from keepdrop.envs.repair.reconstruction import ReconstructionSettings
from keepdrop.envs.surgery.targets import Target
from keepdrop.errors import UserError
from keepdrop.experiments.engines import ray_cluster
from keepdrop.experiments.engines.spread_task import spread_over
from keepdrop.experiments.pruning.network_search import NetworkAgent, NetworkSearchSettings
from ray.cluster_utils import Cluster
from tiny_zoo import SMALL, write_zoo

pytestmark = [
    pytest.mark.xdist_group("ray"),  # one cluster at a time: its processes are counted, and its ports are fixed
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are found in /proc"),
    # Ray's own, as it ends a cluster.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
START_SECONDS = "RAY_raylet_start_wait_time_s"
NODE = {"num_cpus": 1, "object_store_memory": 100_000_000}
SEARCH = NetworkSearchSettings(masks=4, images=60, agent=NetworkAgentSettings(updates=3))


@pytest.fixture(scope="module")
def cluster(ray_folder):
    """A head node, with a server for clients, and another one that tests may kill; each has one CPU."""
    os.environ[START_SECONDS] = "120"  # a busy machine
    ray_cluster.import_ray()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = Cluster(True, head_node_args=NODE | {"include_dashboard": False, "ray_client_server_port": port})
    found.client = f"ray://{found.address.rpartition(':')[0]}:{port}"
    found.add_node(**NODE)
    yield found
    ray.shutdown()
    with contextlib.suppress(Exception):  # the last test has killed it
        found.shutdown()
    os.environ.pop(START_SECONDS)


@pytest.fixture
def engine(cluster):
    return RayEngine(address=cluster.address)


@pytest.fixture(scope="module")
def one_shot():
    return OneShotTask(make_task(), ReconstructionSettings(images=100, places=8))


def decided(one_shot, report=None):
    agent = NetworkAgent(SEARCH, one_shot, report)
    return {name: keep.tolist() for name, keep in agent.choose(Target(0.5, "network"), 0).items()}, agent.facts


@pytest.fixture(scope="module")
def here(one_shot):
    """What a search in this process decides."""
    return decided(one_shot)


def actors(cluster):
    """Ids of the processes that run our actors; another process may have a cluster of its own."""
    nodes = [each for each in (cluster.head_node, *cluster.worker_nodes) if each is not None]
    raylets = {each.process.pid for node in nodes for each in node.all_processes.get("raylet", [])}
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            parent = int((entry.parent / "stat").read_text().rpartition(")")[2].split()[1])
            if "ray::_Holder" in entry.read_text() and parent in raylets:
                found.append(int(entry.parent.name))
        except OSError:  # ended meanwhile
            continue
    return found


def test_nodes_and_folders_are_looked_at(engine, tmp_path):
    engine.check(tmp_path / "new" / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_decides_the_same(cluster, engine, one_shot, here, workers):
    with spread_over(RayEngine(address=engine.address, workers=workers), one_shot) as spread:
        assert decided(spread) == here
        assert 1 <= len(actors(cluster)) <= spread.spread.count == workers
    assert not ray.is_initialized()


@pytest.fixture(scope="module")
def pruned_here():
    return pruned(None)


def pruned(engine):
    """The network that `keepdrop.prune` leaves."""
    settings = Settings(reward_size=100, network=SEARCH)
    model, finetune = trained()[0], TrainSettings(epochs=0)
    found = prune(
        model, digits().train, digits().test, macs_removed=0.5, settings=settings, finetune=finetune, engine=engine
    )
    return {name: value.tolist() for name, value in found.model.state_dict().items()}


def test_pruning_from_python(cluster, pruned_here):
    """`auto` is the cluster that `ray start`, and Ray's own Cluster, name in a file."""
    assert pruned(RayEngine(address="auto", workers=2)) == pruned_here
    assert not ray.is_initialized()


def test_from_outside_the_cluster(cluster, pruned_here):
    """Through Ray's client."""
    assert pruned(RayEngine(address=cluster.client)) == pruned_here
    assert not ray.is_initialized()


def both_at_work(cluster, spread):
    """Judge masks until two actors have come up, which a busy machine takes its time for."""
    masks, deadline = torch.ones(2, spread.n_filters, dtype=torch.bool), time.monotonic() + 120
    masks[:, 0] = False
    while len(actors(cluster)) < 2:
        assert time.monotonic() < deadline
        spread.outcomes(masks, torch.arange(4))


def kill_worker(cluster):
    os.kill(actors(cluster)[0], signal.SIGKILL)


def kill_node(cluster):
    cluster.remove_node(cluster.worker_nodes.copy().pop(), allow_graceful=False)


@pytest.mark.parametrize("kill", [kill_worker, kill_node])
def test_what_dies_in_mid_search_is_replaced(cluster, engine, one_shot, here, kill):
    def report(trainer, metrics):
        if len(trainer.history) == 1:
            kill(cluster)

    with spread_over(engine, one_shot) as spread:
        both_at_work(cluster, spread)
        assert decided(spread, report) == here
    if kill is kill_node:
        cluster.add_node(**NODE)


def test_what_dies_again_and_again_is_given_up(engine):
    """Functions of this function travel by value: workers cannot import a test."""

    def die(state, item):
        os.kill(os.getpid(), signal.SIGKILL)

    def fail(state, item):
        raise ValueError(f"{state} {item}")

    chosen = RayEngine(address=engine.address, workers=1, retries=1)
    with chosen.open(str, 5, lost="All of them died.") as spread:
        with pytest.raises(UserError, match=r"^All of them died\.$"):
            spread.in_order(die, [0])
        with pytest.raises(ValueError, match=r"^5 3$"):  # an exception of the work itself is no death
            spread.in_order(fail, [3])


def test_what_hangs_is_replaced(engine, tmp_path):
    seen = str(tmp_path / "seen")

    def hang_once(state, item):
        if not os.path.exists(seen):  # noqa: PTH110
            open(seen, "w").close()  # noqa: PTH123
            time.sleep(600)
        return state + item

    def hang(state, item):
        time.sleep(600)

    chosen = RayEngine(address=engine.address, workers=1, retries=1, limit=2)
    with chosen.open(int, 5, lost="They died.") as spread:
        assert spread.in_order(hang_once, [1, 2]) == [6, 7]
        with pytest.raises(UserError, match=r"longer over an item than engine\.limit=2 s"):
            spread.in_order(hang, [0])


def test_what_cannot_travel_is_refused(engine):
    with pytest.raises(UserError, match="cannot be sent to workers"), engine.open(str, threading.Lock(), lost=""):
        pass


def test_a_run_whose_driver_died_is_resumed(cluster, spawn, tmp_path, checkpoint, keepdrop):
    """On the cluster, killed, resumed there; and beside it without a cluster."""
    search = ["network_search.masks=4", "network_search.images=60", "network_search.agent.updates=4"]
    asked = [f"checkpoint={checkpoint}", "target.removed=0.5", "repair.images=60", "finetune.epochs=0", *search]
    asked += ["recovery.train.epochs=0", "latency.repeats=1", "latency.warmup=0", "controls=[]", "quiet=true"]
    begun = spawn("prune", *asked, "engine=ray", f"engine.address={cluster.address}", "run_dir=run", cwd=tmp_path)
    deadline = time.monotonic() + 240
    while not (tmp_path / "run/network-state.pt").exists():
        assert begun.poll() is None and time.monotonic() < deadline, begun.communicate()
        time.sleep(0.01)
    begun.kill()
    begun.communicate()
    assert not (tmp_path / "run/network").exists()
    again = ["resume=run", "quiet=true", "engine=ray", f"engine.address={cluster.address}"]
    assert keepdrop("prune", *again).code == 0
    assert keepdrop("prune", *asked, "run_dir=alone").code == 0
    assert kept(tmp_path / "run") == kept(tmp_path / "alone")


def refusal(engine, folder=None, **how):
    with pytest.raises(UserError) as caught:
        engine.check(folder, **how)
    return str(caught.value)


def test_ray_is_not_installed(monkeypatch):
    monkeypatch.setattr(ray_cluster.importlib.util, "find_spec", lambda name: None)
    assert refusal(RayEngine()) == ("engine=ray needs Ray, which is not installed; run pip install 'keepdrop[ray]'.")


def test_nobody_answers_there(monkeypatch):
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
        started = time.monotonic()
        here = f"{ray.util.get_node_ip_address()}:{port}"
        for place in (here, f"ray://127.0.0.1:{port}"):
            assert refusal(RayEngine(address=place)).startswith(f"Nobody answers at engine.address={place} (")
        free.listen()  # takes connections, and says nothing
        assert "is no Ray cluster" in refusal(RayEngine(address=here))
        assert "is no Ray cluster" in refusal(RayEngine(address=f"localhost:{port}"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        free.listen()
        place = f"127.0.0.1:{free.getsockname()[1]}"
        monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.2")
        said = refusal(RayEngine(address=place))
        assert said.startswith(f"Nobody answers at engine.address={place} as {place.replace('.1:', '.2:')}, which Ray")
    assert time.monotonic() - started < 20
    assert refusal(RayEngine(address="head")).startswith("engine.address is 'head'; expected auto, HOST:PORT")


def test_more_than_the_cluster_has(engine):
    assert refusal(RayEngine(address=engine.address, gpus=1)) == (
        "engine.gpus is 1 for a worker, but the largest node of the cluster has 0; ask for fewer."
    )
    assert "engine.cpus is 3 for a worker" in refusal(RayEngine(address=engine.address, cpus=3))
    assert "gives workers no GPU" in refusal(engine, device="cuda")


def test_a_folder_that_workers_do_not_see(engine, tmp_path):
    """What /proc/self names is another folder in every process."""
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        said = refusal(engine, f"/proc/self/fd/{folder}/run")
    finally:
        os.close(folder)
    assert "does not see '/proc/self/fd/" in said and "on a disk that all nodes share" in said
    assert list(tmp_path.iterdir()) == []


def test_a_node_with_another_torch(cluster, engine, tmp_path):
    (tmp_path / "torch-9.9.9.dist-info").mkdir()
    (tmp_path / "torch-9.9.9.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.9.9\n")
    node = cluster.add_node(**NODE, env_vars={"PYTHONPATH": str(tmp_path)})
    try:
        said = refusal(engine)
    finally:
        cluster.remove_node(node, allow_graceful=False)
    assert "has torch 9.9.9, this machine " in said and "install the same version" in said


def test_a_node_with_another_keepdrop(engine, monkeypatch):
    real = ray_cluster._versions
    monkeypatch.setattr(ray_cluster, "_versions", lambda packages: real(packages) | {"keepdrop": "9.9.9"})
    assert f"has keepdrop {real(('keepdrop',))['keepdrop']}, this machine 9.9.9; install" in refusal(engine)


def kept(run):
    return [each["keep"] for each in json.loads((run / "network/decisions.json").read_text())]


def test_a_comparison_on_the_cluster_finds_the_same(cluster, keepdrop, tmp_path, checkpoint):
    quick = ["layers=[conv2]", "targets.removed=[0.1]", "seeds=[0]", "compensate=[false]", "stages=[zero]"]
    quick += ["methods=[l1-uniform,fpgm-uniform]", "quiet=true", f"checkpoint={checkpoint}"]
    there = keepdrop("compare", *quick, "engine=ray", f"engine.address={cluster.address}", "run_dir=there")
    assert there.code == 0, there.err
    assert keepdrop("compare", *quick, "workers=1", "run_dir=alone").code == 0
    found = [json.loads((tmp_path / name / "metrics.json").read_text())["rows"] for name in ("there", "alone")]
    for row in (*found[0], *found[1]):
        row.pop("choice_seconds")
    assert found[0] == found[1] and len(found[0]) == 2


def test_a_pretraining_on_the_cluster_learns_the_same(cluster, keepdrop, tmp_path):
    small = [f"zoo={write_zoo(tmp_path)}", *(each for each in SMALL if not each.startswith("workers")), "quiet=true"]
    there = keepdrop("pretrain", *small, "engine=ray", f"engine.address={cluster.address}", "run_dir=there")
    assert there.code == 0, there.err
    assert keepdrop("pretrain", *small, "workers=1", "run_dir=alone").code == 0
    policies = [load_agent(tmp_path / name / "agent").policy.state_dict() for name in ("there", "alone")]
    assert all(torch.equal(policies[0][name], policies[1][name]) for name in policies[1])


def test_a_sweep_on_the_cluster(cluster, spawn, tmp_path, monkeypatch):
    """The launcher's preset for a cluster that is there already."""
    pytest.importorskip(
        "hydra_plugins.hydra_ray_launcher", reason="hydra-ray-launcher is not installed (extra 'ray-sweeps')"
    )
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    line = ["train-cnn", "-m", "hydra/launcher=ray_cluster", "seed=0,1", "base.epochs=0.1", "run_dir=sweep"]
    sweep = spawn(*line, "quiet=true", cwd=tmp_path)
    out, err = sweep.communicate(timeout=300)
    assert sweep.returncode == 0, (out, err)
    for seed in (0, 1):
        assert f"seed: {seed}" in (tmp_path / f"sweep/{seed}/config.yaml").read_text()
        assert (tmp_path / f"sweep/{seed}/model.safetensors").is_file()
    assert not Path("sweep").exists()  # where the cluster was started, and its workers begin


def test_a_lost_cluster_is_one_sentence(cluster, spawn, tmp_path, checkpoint):
    """The last test of all here; in a process of its own, for Ray ends processes whose cluster is gone."""
    asked = ["network_search.masks=4", "network_search.images=60", "network_search.agent.updates=10000"]
    asked += [f"checkpoint={checkpoint}", "target.removed=0.5", "repair.images=60", "quiet=true", "run_dir=run"]
    begun = spawn("prune", *asked, "engine=ray", f"engine.address={cluster.address}", cwd=tmp_path)
    state = tmp_path / "run/network-state.pt"
    deadline = time.monotonic() + 240
    while not state.exists():
        assert begun.poll() is None and time.monotonic() < deadline, begun.communicate()
        time.sleep(0.01)
    for node in (cluster.head_node, *cluster.worker_nodes):
        node.kill_all_processes(check_alive=False, allow_graceful=False)
    _, said = begun.communicate(timeout=240)
    assert begun.returncode == 2 and "The Ray cluster is gone: nothing answers there any more;" in said, said
    assert state.exists()
