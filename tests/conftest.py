import importlib.util
import sys
import tempfile
from pathlib import Path

import pytest
import torch

MISSING = ("not installed", "could not import")  # in the reason of a skip

# tests/support holds what several test files share: networks, images, the command line.
sys.path.insert(0, str(Path(__file__).parent / "support"))
# Small networks: a second thread costs more than it brings, above all beside other test processes.
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--skipped-to", metavar="FILE", help="write the ids of skipped tests to FILE, one per line")
    parser.addoption("--extras", action="store_true", help="fail where a test is skipped because a package is missing")


def pytest_sessionfinish(session):
    """Of all processes of pytest-xdist the first one alone: the others report to it."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or hasattr(session.config, "workerinput"):
        return
    skipped = {report.nodeid: str(report.longrepr) for report in reporter.stats.get("skipped", [])}
    if target := session.config.getoption("--skipped-to"):
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        Path(target).write_text("".join(f"{name}\n" for name in sorted(skipped)))
    missing = [name for name, reason in skipped.items() if any(each in reason for each in MISSING)]
    if session.config.getoption("--extras") and missing:
        reporter.write_line(f"\nskipped in spite of all extras: {', '.join(missing)}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path_factory, request):
    """What keepdrop keeps between commands stays within a test."""
    monkeypatch.setenv(
        "KEEPDROP_CACHE", str(tmp_path_factory.getbasetemp() / f"cache-{abs(hash(request.node.nodeid))}")
    )


@pytest.fixture
def memory():
    """An empty memory:// of this process."""
    import fsspec

    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


@pytest.fixture(scope="session")
def s3_address():
    """Address of an S3 server of moto's on this machine, which this process started."""
    pytest.importorskip("s3fs", reason="s3fs is not installed (extra 's3')")
    server = pytest.importorskip("moto.server", reason="moto is not installed (extra 's3-tests')")
    running = server.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture
def s3(s3_address, monkeypatch, tmp_path):
    """URL of an empty bucket; the environment, of child processes too, says where it is."""
    import fsspec

    given = {"ENDPOINT_URL": s3_address, "ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret", "REGION": "us-east-1"}
    for name, value in given.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("KEEPDROP_CACHE", str(tmp_path / "cache"))
    system = fsspec.filesystem("s3", skip_instance_cache=True)
    bucket = f"keepdrop-{abs(hash(tmp_path)):x}"
    system.mkdir(bucket)
    return f"s3://{bucket}"


@pytest.fixture(scope="module")
def ray_folder():
    """Where Ray keeps its sessions, of child processes too; short, as sockets lie in it, and gone afterwards."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        patch.setenv("RAY_TMPDIR", folder)
        yield folder


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
