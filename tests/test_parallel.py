"""The same work by several workers: processes of this machine, or those of a Ray cluster."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cloudpickle
import psutil
import pytest
import torch

from tightrope.attacks import Pgd
from tightrope.bounds import Bounds, Interval
from tightrope.errors import InputError, SoundnessViolation, TightropeError
from tightrope.files import append_lines
from tightrope.graph import Graph
from tightrope.memory import free_bytes
from tightrope.parallel import RETRIES, Workers
from tightrope.region import Box
from tightrope.verify import VERIFIERS, BoundStage, Certification, certify, read_verdicts

from .verify.conftest import labelled, random_net, same


def each(function: Callable[..., Any], batches: Iterable[tuple[Any, ...]], **workers: Any) -> list[Any]:
    with Workers(**workers).pool() as pool:
        return list(pool.each(function, batches))


class TestProcesses:
    """`--jobs`"""

    def test_results_are_those_of_one_process_in_any_order(self):
        shift = 3

        def work(number: int) -> tuple[int, int, int]:
            return number + shift, os.getpid(), torch.get_num_threads()

        batches = [(i,) for i in range(5)]
        alone, shared = each(work, batches), each(work, batches, jobs=2)
        assert {pid for _, pid, _ in alone} == {os.getpid()}
        assert os.getpid() not in {pid for _, pid, _ in shared}
        assert {threads for *_, threads in shared} == {1}
        assert sorted(found for found, *_ in shared) == [found for found, *_ in alone] == [3, 4, 5, 6, 7]

    def test_every_process_takes_its_share_of_the_memory(self):
        (shared,) = each(lambda: free_bytes(torch.device("cpu")), [()], jobs=2)
        assert shared < 0.75 * free_bytes(torch.device("cpu"))

    def test_an_error_in_a_process_arrives_as_it_is(self):
        def work() -> None:
            raise InputError("no such thing")

        with pytest.raises(InputError, match="no such thing"):
            each(work, [()], jobs=2)

    def test_a_process_that_is_killed_is_reported(self):
        def work() -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        with pytest.raises(TightropeError, match="a worker process was killed"):
            each(work, [()], jobs=2)

    def test_no_process_outlives_one_that_is_killed(self, tmp_path):
        program = tmp_path / "program.py"
        program.write_text(
            "import os, time\n"
            "from pathlib import Path\n"
            "from tightrope.parallel import Workers\n"
            "def work(i):\n"
            "    Path(str(os.getpid())).touch()\n"
            "    time.sleep(0.01)\n"
            "if __name__ == '__main__':\n"
            "    with Workers(2).pool() as pool:\n"
            "        for _ in pool.each(work, ((i,) for i in range(10**6))):\n"
            "            pass\n"
        )
        with subprocess.Popen([sys.executable, program], cwd=tmp_path, stderr=subprocess.DEVNULL) as parent:
            found = wait_for(lambda: [int(p.name) for p in tmp_path.iterdir() if p.name.isdigit()], 60)
            assert found
            parent.kill()
        assert wait_for(lambda: not any(map(psutil.pid_exists, found)), 10)


def wait_for(condition: Callable[[], Any], seconds: float) -> Any:
    """What the condition yields once it is true, or when the time is over."""
    end = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.1)
    return found


class TestRequests:
    """Workers that there cannot be, each with one clear message."""

    @pytest.mark.parametrize("jobs", [0, -1])
    def test_no_jobs(self, jobs):
        with pytest.raises(InputError, match=f"must be a whole number from 1 up, got {jobs}"):
            Workers(jobs)

    def test_processes_of_this_machine_and_of_a_cluster_at_once(self):
        with pytest.raises(InputError, match="give --jobs or --ray"):
            Workers(2, "auto")

    def test_ray_that_is_not_installed(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "ray", None)
        with pytest.raises(InputError, match=r"--ray needs an extra .*pip install 'tightrope\[ray\]'"):
            each(abs, [], ray="local")

    @pytest.mark.parametrize("address", ["nonsense", "head:port", ":6379", "head:70000", ""])
    def test_an_address_that_is_none(self, fake, address):
        with pytest.raises(InputError, match=f"'{address}' is no address of a Ray cluster: give HOST:PORT"):
            each(abs, [], ray=address)

    def test_a_cluster_that_does_not_answer(self, fake):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))  # nobody listens there
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            with pytest.raises(
                TightropeError, match=f"nothing answers at '{address}' .*: is the Ray cluster"
            ):
                each(abs, [], ray=address)
        assert not fake.initialised

    def test_no_file_is_begun_where_there_are_no_workers(self, fake, tmp_path):
        fake.refuses = ConnectionError("gone")
        graph = random_net(0)
        with pytest.raises(TightropeError, match="no Ray cluster"):
            certify(
                graph, labelled(graph, 2), Box(0.1), workers=Workers(ray="auto"), out=tmp_path / "a.jsonl"
            )
        assert not (tmp_path / "a.jsonl").exists()

    @pytest.mark.parametrize("error", [ConnectionError("gone"), SystemExit(15)])
    def test_a_cluster_that_ray_cannot_use(self, fake, error):
        fake.refuses = error
        with pytest.raises(TightropeError, match=f"no Ray cluster could be used at 'auto': {error}"):
            each(abs, [], ray="auto")

    def test_a_cluster_without_processors(self, fake):
        fake.machines = [{"Alive": True, "Resources": {}}, {"Alive": False, "Resources": {"CPU": 8.0}}]
        with pytest.raises(TightropeError, match="has no processors"):
            each(abs, [], ray="auto")
        assert not fake.initialised


class FakeRay:
    """A cluster of two machines that works at once, last batches first, and remembers what it is told."""

    def __init__(self) -> None:
        self.initialised, self.refuses = False, None
        self.machines = [{"Alive": True, "Resources": {"CPU": count}} for count in (1.0, 2.0)]
        self.options: dict[str, Any] = {}
        self.asked: dict[str, Any] = {}
        self.most = 0
        self.cancelled: list[Any] = []

        class RayError(Exception):
            pass

        class RayTaskError(RayError):
            def __init__(self, cause: Exception) -> None:
                self.cause = cause

        self.exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def is_initialized(self) -> bool:
        return self.initialised

    def init(self, **options: Any) -> None:
        if self.refuses is not None:
            raise self.refuses
        self.initialised, self.options = True, options

    def shutdown(self) -> None:
        self.initialised = False

    def nodes(self) -> list[dict[str, Any]]:
        return self.machines

    def put(self, value: Any) -> Any:
        return value

    def remote(self, **asked: Any) -> Callable[[Callable[..., Any]], Any]:
        self.asked = asked
        return lambda function: SimpleNamespace(remote=lambda *given: (function, given))

    def wait(self, pending: list[Any], num_returns: int) -> tuple[list[Any], list[Any]]:
        self.most = max(self.most, len(pending))
        return pending[-1:], pending[:-1]

    def get(self, done: Any) -> Any:
        pickled, _folder, _sharing, batch = done[1]
        try:
            return cloudpickle.loads(pickled)(*batch)
        except self.exceptions.RayError:
            raise
        except Exception as error:
            raise self.exceptions.RayTaskError(error) from None

    def cancel(self, one: Any) -> None:
        self.cancelled.append(one)


@pytest.fixture
def fake(monkeypatch) -> FakeRay:
    ray = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", ray)
    return ray


class TestDealing:
    """How batches are dealt out to a cluster and taken back, by a cluster that is none."""

    def test_every_batch_comes_back_once_and_few_wait_at_a_time(self, fake):
        found = each(abs, ((-i,) for i in range(40)), ray="local")
        assert sorted(found) == list(range(40))
        assert fake.most == 2 * 3
        assert fake.asked == {"num_cpus": 1, "max_retries": RETRIES}
        assert not fake.initialised
        assert not fake.cancelled

    def test_ray_is_started_here_or_asked_for_by_address(self, fake):
        for address, wanted in (("local", {"address": "local"}), ("auto", {})):
            each(abs, [], ray=address)
            quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
            assert fake.options == quiet | wanted
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = f"127.0.0.1:{server.getsockname()[1]}"
            each(abs, [], ray=address)
            assert fake.options["address"] == address

    def test_who_is_connected_already_stays_so(self, fake):
        fake.initialised = True
        assert each(abs, [(-1,)], ray="head:6379") == [1]
        assert fake.initialised
        assert fake.options == {}

    def test_an_error_of_the_work_arrives_as_it_is_and_the_rest_is_called_off(self, fake):
        def work(number: int) -> None:
            raise InputError(f"no {number}")

        with pytest.raises(InputError, match="no 5"):
            each(work, [(i,) for i in range(9)], ray="auto")
        assert len(fake.cancelled) == 6
        assert not fake.initialised

    def test_a_batch_that_no_worker_survives_is_reported(self, fake):
        died = type("WorkerCrashedError", (fake.exceptions.RayError,), {})

        def lost(done: Any) -> None:
            raise died

        fake.get = lost
        with pytest.raises(
            TightropeError, match=r"given to workers .* 4 times.*\(WorkerCrashedError\).*--resume"
        ):
            each(abs, [(1,)], ray="auto")

    def test_code_that_another_machine_does_not_have(self, fake):
        def work() -> None:
            raise ModuleNotFoundError("No module named 'nets'")

        with pytest.raises(
            TightropeError, match=r"cannot import .*No module named 'nets'.*: install the same"
        ):
            each(work, [()], ray="auto")


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a Ray cluster of two workers on this machine; this process is connected to it."""
    ray = pytest.importorskip("ray", reason="needs the extra [ray]: pip install 'tightrope[ray]'")
    options = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    context = ray.init(address="local", num_cpus=2, **options)
    yield context.address_info["address"]
    ray.shutdown()


@pytest.fixture(scope="module")
def problem() -> tuple[Graph, Any, Any]:
    graph = random_net(0)
    return graph, labelled(graph, 60), Box(0.08)


@pytest.fixture(scope="module")
def wanted(problem) -> Certification:
    return certify(*problem)


class TestRay:
    """`--ray`, with a cluster that is one; it takes ten seconds to start."""

    def test_verdicts_are_those_of_one_process(self, cluster, problem, wanted, tmp_path):
        found = certify(*problem, workers=Workers(ray=cluster), out=tmp_path / "a.jsonl")
        assert len({verdict.status for verdict in found}) > 1
        same(found, wanted)
        same(read_verdicts(tmp_path / "a.jsonl")[1], wanted)

    def test_a_stopped_run_goes_on_and_what_was_written_stays(self, cluster, problem, wanted, tmp_path):
        out, workers = tmp_path / "a.jsonl", Workers(ray=cluster)

        def stop_after_two(path: Path, records: Any, calls: list[None] = []) -> None:  # noqa: B006
            append_lines(path, records)
            calls.append(None)
            if len(calls) == 2:
                raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tightrope.verify.resumable.append_lines", stop_after_two)
            with pytest.raises(KeyboardInterrupt):
                certify(*problem, workers=workers, out=out)
        kept = read_verdicts(out)[1]
        assert 8 < len(kept) <= 16  # two batches, but for what is left to a search
        result = certify(*problem, workers=workers, out=out, resume=True)
        assert timed(kept) <= timed(result)
        same(result, wanted)

    def test_a_second_run_on_the_same_file_is_refused(self, cluster, problem, tmp_path):
        def meanwhile(path: Path, records: Any) -> None:
            certify(*problem, workers=Workers(ray=cluster), out=path, resume=True)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tightrope.verify.resumable.append_lines", meanwhile)
            with pytest.raises(InputError, match="another process is writing to"):
                certify(*problem, workers=Workers(ray=cluster), out=tmp_path / "a.jsonl")

    def test_a_batch_whose_worker_is_killed_is_done_by_another(self, cluster, tmp_path):
        def work(number: int) -> int:
            first = tmp_path / f"{number}"
            if number == 1 and not first.exists():
                first.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return number

        assert sorted(each(work, [(i,) for i in range(4)], ray=cluster)) == [0, 1, 2, 3]
        assert (tmp_path / "1").exists()

    def test_workers_have_one_thread_and_their_share_of_the_memory(self, cluster):
        work = lambda: (os.getpid(), torch.get_num_threads(), free_bytes(torch.device("cpu")))  # noqa: E731
        ((pid, threads, memory),) = each(work, [()], ray=cluster)
        assert pid != os.getpid()
        assert threads == 1
        assert memory < 0.75 * free_bytes(torch.device("cpu"))

    def test_a_contradiction_is_saved_beside_the_file_not_where_the_worker_is(
        self, cluster, problem, tmp_path, monkeypatch
    ):
        def liar(asked: Any) -> Bounds:
            honest = Interval()(asked)
            return Bounds(honest.lower + 1e3, honest.upper + 1e3, honest.boxes)

        monkeypatch.setitem(VERIFIERS, "liar", (BoundStage("liar", liar, cheap=True),))
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SoundnessViolation, match="certified by liar and attacked"):
            certify(
                *problem,
                verifier="liar",
                attack=Pgd(steps=4, step=1.0, loss="margin"),
                workers=Workers(ray=cluster),
                out=Path("run/a.jsonl"),
            )
        assert list(Path("run").glob("soundness-violation-*.safetensors"))


def timed(verdicts: Any) -> set[tuple[int, float]]:
    return {(verdict.index, verdict.seconds) for verdict in verdicts}
