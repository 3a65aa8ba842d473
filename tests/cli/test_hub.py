"""``hf://`` on the command line, against a hub of the tests' own whose log says what was read."""

import json
import os
import socket
import subprocess
import sys

import pytest

pytest.importorskip("huggingface_hub")
import hub_server
import remote_files
from safetensors.torch import load_file

from loratools.io import ranged
from tests.cli.running import invoke

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with hub_server.running() as found:
        hub_server.point_to(found, monkeypatch, tmp_path / "home")
        yield found


@pytest.fixture
def style(hub, tmp_path):
    folder = remote_files.peft_folder(tmp_path / "style", seed=1)
    hub.add("org/style", {**remote_files.bytes_of(folder), "optimizer.bin": bytes(5_000_000)})
    return folder


@pytest.fixture
def pair(hub, style, tmp_path):
    other = remote_files.peft_folder(tmp_path / "other", seed=2)
    hub.add("org/other", {**remote_files.bytes_of(other), "optimizer.bin": bytes(5_000_000)})
    return style, other


def _said(result):
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_info_without_norms_reads_the_header_alone(hub, style):
    local = _said(invoke("info", style, "--no-norms", "--json"))
    found = _said(invoke("info", "hf://org/style", "--no-norms", "--json"))
    assert {**found, "path": ""} == {**local, "path": ""}
    assert all(span is not None and span[1] < ranged.HEAD for span in hub.ranges(WEIGHTS))
    assert hub.sent(WEIGHTS) == ranged.HEAD < (style / WEIGHTS).stat().st_size / 2
    assert hub.sent("optimizer.bin") == 0


def test_info_asks_the_hub_a_few_times_only(hub, style):
    _said(invoke("info", "hf://org/style", "--no-norms", "--json"))
    asked = [request.path.rpartition("/")[2] for request in hub.log]
    assert asked == ["style", WEIGHTS, "adapter_config.json"]  # what there is, the header, the configuration
    assert all(request.method == "GET" for request in hub.log)


def test_merge_reads_the_ranges_of_tensors_and_writes_what_it_would_from_disk(hub, pair, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    options = ("--weights", "0.7,0.4", "--quiet")
    assert invoke("merge", *pair, "-o", here, *options).exit_code == 0
    result = invoke("merge", "hf://org/style", "hf://org/other@main", "-o", there, *options)
    assert result.exit_code == 0, result.output
    ours, theirs = load_file(there / WEIGHTS), load_file(here / WEIGHTS)
    assert set(ours) == set(theirs)
    assert all(ours[key].equal(theirs[key]) for key in ours)
    size = sum((folder / WEIGHTS).stat().st_size for folder in pair)
    assert None not in hub.ranges(WEIGHTS)
    assert hub.sent(WEIGHTS) <= size + 2 * ranged.HEAD
    assert hub.sent("optimizer.bin") == 0


@pytest.mark.parametrize("command", ["info", "merge"])
def test_a_process_of_its_own_is_pointed_to_the_hub_by_the_environment(hub, pair, tmp_path, command):
    out = tmp_path / "out"
    given = {
        "info": ["info", "hf://org/style", "--no-norms", "--json"],
        "merge": ["merge", "hf://org/style", "hf://org/other", "-o", str(out), "--quiet"],
    }[command]
    home = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "loratools", *given],
        env={**os.environ, **home},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert hub.ranges(WEIGHTS)
    assert None not in hub.ranges(WEIGHTS)
    if command == "merge":
        assert (out / WEIGHTS).is_file()


def test_one_file_of_a_repository_may_be_named(hub, style):
    found = _said(invoke("info", f"hf://org/style@main/{WEIGHTS}", "--no-norms", "--json"))
    assert found["layout"] == "peft"


def test_all_reads_are_of_the_commit_that_the_branch_was_at(hub, style, tmp_path, monkeypatch):
    commit = hub.add("org/moving", remote_files.bytes_of(style))
    answer = hub.answer

    def moving(path, token):
        found = answer(path, token)
        if path.startswith("/api/"):  # right after it was asked, somebody pushes
            hub.add("org/moving", {WEIGHTS: b"another"})
        return found

    monkeypatch.setattr(hub, "answer", moving)
    found = _said(invoke("info", "hf://org/moving", "--json"))
    assert found["layout"] == "peft"
    assert all(f"/{commit}/" in request.path for request in hub.log if "/resolve/" in request.path)


def test_revisions_are_other_states(hub, style, tmp_path):
    small = remote_files.peft_folder(tmp_path / "small", layers=2)
    old = hub.add("org/style", remote_files.bytes_of(small), branch="v1/early")
    for revision in ("v1%2Fearly", old):
        found = _said(invoke("info", f"hf://org/style@{revision}", "--no-norms", "--json"))
        assert found["tensors"] == 4
    assert _said(invoke("info", "hf://org/style", "--no-norms", "--json"))["tensors"] == 48


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("hf://org/none", ["no repository org/none", "hf auth login"]),
        ("hf://org/style@v9", ["no revision 'v9' in org/style"]),
        ("hf://org/style/none.safetensors", ["nothing is there"]),
        ("hf://org/style/../other", ["leaves its repository"]),
        ("hf://style", ["hf://ORG/REPO"]),
        ("hf://datasets/org/style", ["hf://ORG/REPO"]),
    ],
)
def test_what_is_not_there_is_told(hub, style, url, words):
    result = invoke("info", url)
    assert result.exit_code == 1
    assert "hf://" in result.stderr
    assert all(word in result.stderr for word in words), result.stderr


def test_a_gated_repository_needs_a_token(hub, style, monkeypatch):
    hub.add("org/gated", remote_files.bytes_of(style), gated=True)
    result = invoke("info", "hf://org/gated")
    assert result.exit_code == 1
    assert "gated" in result.stderr
    assert "HF_TOKEN" in result.stderr
    assert hub.url in result.stderr
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    assert _said(invoke("info", "hf://org/gated", "--no-norms", "--json"))["layout"] == "peft"


def test_several_candidates_are_listed(hub, style):
    data = (style / WEIGHTS).read_bytes()
    hub.add("org/two", {"a.safetensors": data, "b.safetensors": data})
    result = invoke("convert", "hf://org/two", "-o", "out.safetensors", "--to", "kohya")
    assert result.exit_code == 1
    assert "a.safetensors, b.safetensors" in result.stderr


def test_a_repository_of_one_file_is_that_file(hub, style):
    hub.add("org/one", {"README.md": b"#", "pytorch_style.safetensors": (style / WEIGHTS).read_bytes()})
    assert _said(invoke("info", "hf://org/one", "--no-norms", "--json"))[0]["tensors"] == 48
    result = invoke("merge", "hf://org/one", "hf://org/style", "-o", "out", "--dry-run")
    assert result.exit_code == 0, result.output


def test_what_the_cache_has_whole_is_read_there(hub, style):
    from huggingface_hub import hf_hub_download

    hf_hub_download("org/style", WEIGHTS)
    hub.log.clear()
    _said(invoke("info", "hf://org/style", "--json"))
    assert hub.sent(WEIGHTS) == 0


def test_offline_the_cache_is_all_there_is(hub, style, monkeypatch):
    from huggingface_hub import constants, snapshot_download

    from loratools.io import hub as store

    online = _said(invoke("info", "hf://org/style", "--json"))
    snapshot_download("org/style", allow_patterns=["adapter*"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    store.hub.cache_clear()
    hub.log.clear()
    assert _said(invoke("info", "hf://org/style", "--json")) == online
    result = invoke("info", "hf://org/other")
    assert result.exit_code == 1
    assert "offline mode is on" in result.stderr
    assert "hf download org/other" in result.stderr
    assert hub.log == []


def test_a_hub_that_fails_is_told_after_the_librarys_own_retries(hub, style, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    _said(invoke("info", "hf://org/style", "--no-norms", "--json"))
    hub.failing = [503, 500]
    _said(invoke("info", "hf://org/style", "--no-norms", "--json"))
    hub.failing = [503] * 40
    result = invoke("info", "hf://org/style", "--no-norms")
    assert result.exit_code == 1
    assert "503" in result.stderr
    assert hub.url in result.stderr


def test_a_hub_that_is_not_there_is_told(hub, monkeypatch):
    from huggingface_hub import constants

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    result = invoke("info", "hf://org/style")
    assert result.exit_code == 1
    assert nowhere in result.stderr
    assert "HF_HUB_OFFLINE" in result.stderr


def test_nothing_is_written_to_the_hub(hub, style):
    result = invoke("convert", style, "-o", "hf://org/new", "--to", "peft")
    assert result.exit_code == 1
    assert "hf upload" in result.stderr
    assert hub.log == []


def test_the_missing_package_is_named(monkeypatch, style):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    result = invoke("info", "hf://org/style")
    assert result.exit_code == 1
    assert "pip install 'loratools[hub]'" in result.stderr
