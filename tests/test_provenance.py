"""How a result was made, as plain JSON."""

import json
import platform
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest
import torch

from tightrope import provenance
from tightrope.provenance import environment


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", folder, *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with a committed module from which the code seems to run."""
    module = tmp_path / "src" / "provenance.py"
    module.parent.mkdir()
    module.write_text("pass\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "src")
    git(tmp_path, "commit", "--quiet", "--message", "Begin")
    monkeypatch.setattr(provenance, "__file__", str(module))
    head = subprocess.run(
        ["git", "-C", tmp_path, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    )
    return module, head.stdout.strip()


def test_it_is_plain_json_and_says_everything():
    found = environment("cpu", seed=0)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert set(found) == {
        "tightrope", "commit", "python", "torch", "machine", "threads", "device", "seed", "date", "command",
    }  # fmt: skip
    assert found["python"] == platform.python_version()
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert (found["device"], found["seed"]) == ("cpu", 0)
    assert platform.machine() in found["machine"]


def test_a_device_is_written_as_torch_says_it():
    assert environment(torch.device("cpu"))["device"] == "cpu"
    assert environment("cpu")["seed"] is None


def test_the_date_is_now_in_utc():
    date = datetime.fromisoformat(environment("cpu")["date"])
    assert date.utcoffset() == timedelta(0)
    assert abs(datetime.now(UTC) - date) < timedelta(minutes=1)


def test_the_command_can_be_pasted_into_a_shell(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/tightrope", "train", "my recipe.toml", "--seed", "0"])
    assert environment("cpu")["command"] == "tightrope train 'my recipe.toml' --seed 0"


def test_the_commit_is_that_of_the_checkout_that_runs(checkout):
    _, head = checkout
    assert environment("cpu")["commit"] == head


def test_a_changed_checkout_is_marked(checkout):
    module, head = checkout
    module.write_text("changed\n")
    assert environment("cpu")["commit"] == head + "+"


def test_changes_outside_the_package_do_not_matter(checkout, tmp_path):
    _, head = checkout
    (tmp_path / "notes").write_text("new")
    git(tmp_path, "add", "notes")
    assert environment("cpu")["commit"] == head


def test_an_installed_copy_inside_another_repository_has_no_commit(checkout, monkeypatch):
    module, _ = checkout
    installed = module.with_name("site-packages.py")
    installed.write_text("pass\n")
    monkeypatch.setattr(provenance, "__file__", str(installed))
    assert environment("cpu")["commit"] is None


def test_outside_a_repository_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    assert environment("cpu")["commit"] is None


@pytest.mark.parametrize("error", [FileNotFoundError("git"), subprocess.TimeoutExpired("git", 10)])
def test_without_a_working_git_there_is_no_commit(monkeypatch, error):
    def run(*_arguments, **_options):
        raise error

    monkeypatch.setattr(subprocess, "run", run)
    assert environment("cpu")["commit"] is None


def test_a_package_that_was_started_is_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/lib/tightrope/__main__.py", "train", "recipe.toml"])
    assert environment("cpu")["command"] == "python -m tightrope train recipe.toml"
