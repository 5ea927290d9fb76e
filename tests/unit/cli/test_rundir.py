"""Run folders: one holder, found while it lives."""

from __future__ import annotations

from pathlib import Path

import pytest

from tandem.cli import rundir
from tandem.cli.rundir import ClusterState, ProcessState, RunDir
from tandem.errors import ConfigError


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def state(cluster: str = "default") -> ClusterState:
    return ClusterState(
        cluster=cluster,
        supervisor_pid=4711,
        ready=True,
        models=("m",),
        http=("http://127.0.0.1:8000",),
        grpc=("127.0.0.1:9000",),
        routers=("127.0.0.1:5",),
        nats_url="nats://",
        redis_url="redis://",
        processes=(ProcessState("router", "router", 12, "ready", 0, "127.0.0.1:5"),),
    )


def test_a_cluster_is_found_as_long_as_its_folder_is_held() -> None:
    with pytest.raises(ConfigError, match="no cluster is up"):
        rundir.find_cluster()
    run_dir = RunDir("default", 8000)
    with run_dir.held():
        run_dir.write_state(state())
        assert rundir.find_cluster() == state()
        assert rundir.find_cluster("default") == rundir.find_cluster("default-8000") == state()
        with pytest.raises(ConfigError, match="no cluster 'other'; there is: default-8000"):
            rundir.find_cluster("other")
    with pytest.raises(ConfigError, match="no cluster is up"):
        rundir.find_cluster()


def test_the_same_folder_twice_is_refused() -> None:
    run_dir = RunDir("default", 8000)
    with run_dir.held():
        run_dir.write_state(state())
        with pytest.raises(ConfigError, match=r"up already \(pid 4711\): default-8000"), RunDir("default", 8000).held():
            pass
        assert rundir.find_cluster() == state()


def test_of_several_one_has_to_be_chosen() -> None:
    one, two = RunDir("a", 1), RunDir("b", 2)
    with one.held(), two.held():
        one.write_state(state("a"))
        two.write_state(state("b"))
        with pytest.raises(ConfigError, match="choose one by --cluster: a-1, b-2"):
            rundir.find_cluster()
        assert rundir.find_cluster("b").cluster == "b"


def test_what_a_killed_cluster_left_behind_is_neither_found_nor_kept() -> None:
    run_dir = RunDir("default", 8000)
    with run_dir.held():
        run_dir.write_state(state())
        left = (run_dir.path / "state.json").read_bytes()
    (run_dir.path / "state.json").write_bytes(left)
    (run_dir.path / "decode-1").mkdir()
    assert rundir.running_clusters() == {}
    with run_dir.held():
        assert [p.name for p in run_dir.path.iterdir()] == ["lock"]


def test_a_state_of_another_version_is_as_good_as_none(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text('{"cluster": 1}')
    assert rundir.read_state(tmp_path) is None
    assert rundir.read_state(tmp_path / "gone") is None
