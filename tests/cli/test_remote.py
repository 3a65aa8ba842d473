"""URLs of stores on the command line: an S3 server of moto's, and fsspec's memory."""

import json
import socket
import subprocess
import sys

import pytest

pytest.importorskip("fsspec")
import fsspec
import remote_files
import torch
from safetensors.torch import load_file, save_file

from loratools.io import staging
from tests.cli.running import invoke

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(autouse=True)
def temporary(monkeypatch, tmp_path):
    """A temporary folder of the test's own, which has to be empty again at its end."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@pytest.fixture(scope="module")
def server():
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(server, monkeypatch, request):
    """The URL of an empty bucket."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "none")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "none")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    name = f"bucket-{abs(hash(request.node.name))}"
    fsspec.filesystem("s3").mkdir(name)
    return f"s3://{name}"


@pytest.fixture
def memory():
    yield "memory://store"
    fsspec.filesystem("memory").store.clear()


@pytest.fixture(params=["memory", "bucket"])
def store(request):
    """The URL of a folder in either kind of store."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def pair(tmp_path):
    return tuple(
        remote_files.peft_folder(tmp_path / name, layers=3, seed=seed) for seed, name in enumerate("ab")
    )


def put(folder, url):
    """Have a folder's files at a URL."""
    for name, data in remote_files.bytes_of(folder).items():
        with fsspec.open(f"{url}/{name}", "wb") as file:
            file.write(data)
    return url


def found_at(url):
    """The content of all files below a URL, by path relative to it."""
    system, path = fsspec.url_to_fs(url)
    system.invalidate_cache()
    top = path.strip("/") + "/"
    return {name.lstrip("/").removeprefix(top): system.cat_file(name) for name in system.find(path)}


def run(*arguments):
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result


def test_what_lies_in_a_store_is_read_as_on_disk(store, pair):
    url = put(pair[0], f"{store}/style")
    local, found = (json.loads(run("info", path, "--json").stdout) for path in (pair[0], url))
    assert {**found, "path": ""} == {**local, "path": ""}


def test_a_merge_into_a_store_is_the_one_on_disk(store, pair, tmp_path, temporary):
    urls = [put(folder, f"{store}/in/{folder.name}") for folder in pair]
    out = f"{store}/out/merged"
    report = json.loads(run("merge", *urls, "-o", out, "--json").stdout)
    run("merge", *pair, "-o", tmp_path / "here")
    written = found_at(out)
    assert report["output"] == out
    assert {*written} == {WEIGHTS, CONFIG}
    (tmp_path / WEIGHTS).write_bytes(written[WEIGHTS])
    ours, theirs = load_file(tmp_path / WEIGHTS), load_file(tmp_path / "here" / WEIGHTS)
    assert {*ours} == {*theirs}
    assert all(ours[key].equal(theirs[key]) for key in ours)
    assert [path for path in temporary.rglob("*") if path.is_file()] == []


def test_an_output_that_is_there_is_replaced_only_when_told(store, pair):
    out = f"{store}/out"
    run("convert", pair[0], "-o", out, "--to", "peft")
    before = found_at(out)
    result = invoke("convert", pair[1], "-o", out, "--to", "peft")
    assert result.exit_code == 1
    assert f"{out}: the output exists already" in result.stderr
    assert found_at(out) == before
    run("convert", pair[1], "-o", out, "--to", "peft", "--overwrite")
    assert found_at(out)[WEIGHTS] != before[WEIGHTS]


def test_weights_that_would_stay_beside_new_ones_are_refused(memory, pair, temporary):
    out = f"{memory}/out"
    with fsspec.open(f"{out}/adapter_model.bin", "wb") as file:
        file.write(b"old")
    result = invoke("convert", pair[0], "-o", out, "--to", "peft", "--overwrite")
    assert result.exit_code == 1
    assert "adapter_model.bin" in result.stderr
    assert {*found_at(out)} == {"adapter_model.bin"}


def test_a_dry_run_writes_nothing(memory, pair):
    run("convert", pair[0], "-o", f"{memory}/out", "--to", "peft", "--dry-run")
    assert found_at(memory) == {}


def test_an_upload_that_fails_leaves_nothing_in_the_store(memory, pair, monkeypatch, temporary):
    system = fsspec.filesystem("memory")
    put_file = type(system).put_file

    def failing(self, path, place, **options):
        if place.endswith(CONFIG):  # the last of two
            raise OSError("the store is full")
        return put_file(self, path, place, **options)

    monkeypatch.setattr(type(system), "put_file", failing)
    out = f"{memory}/out"
    result = invoke("convert", pair[0], "-o", out, "--to", "peft")
    assert result.exit_code == 1
    assert "the store is full" in result.stderr
    assert found_at(memory) == {}
    kept = staging.place(out)
    assert kept in result.stderr
    assert (temporary / kept / WEIGHTS).is_file()


def test_a_multipart_upload_that_fails_is_aborted(bucket, tmp_path, monkeypatch):
    import s3fs

    async def failing(self, *arguments, **options):
        raise OSError("the network is gone")

    save_file(
        {
            "lora_unet_mid.lora_down.weight": torch.zeros(8, 4096 * 800),
            "lora_unet_mid.lora_up.weight": torch.zeros(8, 8),
        },
        tmp_path / "large.safetensors",
    )
    from loratools.errors import WriteError
    from loratools.io import remote

    monkeypatch.setattr(s3fs.S3FileSystem, "_upload_file_part_concurrent", failing)
    with pytest.raises(WriteError, match="the network is gone"):
        remote.upload(str(tmp_path / "large.safetensors"), f"{bucket}/large.safetensors")
    assert found_at(bucket) == {}
    name = bucket.removeprefix("s3://")
    assert "Uploads" not in fsspec.filesystem("s3").call_s3("list_multipart_uploads", Bucket=name)


def _model(folder, seed=0):
    """A sharded model of two layers."""
    draw = torch.Generator().manual_seed(seed)
    width = remote_files.WIDTH
    folder.mkdir()
    shards = {}
    for layer in range(2):
        name = f"model-{layer + 1:05}-of-00002.safetensors"
        key = f"model.layers.{layer}.self_attn.q_proj.weight"
        norm = f"model.layers.{layer}.input_layernorm.weight"
        save_file(
            {key: torch.randn(width, width, generator=draw).half(), norm: torch.ones(width).half()},
            folder / name,
            metadata={"format": "pt"},
        )
        shards |= {key: name, norm: name}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 0}, "weight_map": shards})
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


@pytest.fixture
def model(tmp_path):
    return _model(tmp_path / "model")


@pytest.fixture
def adapter(tmp_path):
    return remote_files.peft_folder(tmp_path / "adapter", layers=2)


def test_a_bake_from_store_to_store_is_the_one_on_disk(store, model, adapter, tmp_path, temporary):
    base, change = put(model, f"{store}/model"), put(adapter, f"{store}/adapter")
    run("bake", model, adapter, "-o", tmp_path / "here", "--quiet")
    run("bake", base, change, "-o", f"{store}/there", "--quiet")
    assert found_at(f"{store}/there") == remote_files.bytes_of(tmp_path / "here")
    run("verify", base, change, f"{store}/there", "--quiet")
    assert [path for path in temporary.rglob("*") if path.is_file()] == []


def test_a_bake_into_a_store_is_gone_on_with(store, model, adapter, tmp_path, temporary):
    from loratools.io import work_folder
    from loratools.ops.bake import bake

    base, change, out = put(model, f"{store}/model"), put(adapter, f"{store}/adapter"), f"{store}/there"
    run("bake", model, adapter, "-o", tmp_path / "here", "--quiet")

    def interrupted(_name, done, total):
        if done >= total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bake(base, [change], out, resume=True, progress=interrupted)
    assert found_at(out) == {}
    assert (work_folder.place_of(out) / "journal").is_file()
    other = invoke("bake", base, change, "-o", out, "--resume", "--rounding", "stochastic")
    assert other.exit_code == 1
    assert f"{out}: the interrupted run is another than this one" in other.stderr
    report = json.loads(run("bake", base, change, "-o", out, "--resume", "--json").stdout)
    assert report["resumed"] > 0
    assert found_at(out) == remote_files.bytes_of(tmp_path / "here")
    assert [path for path in temporary.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("command", ["bake", "extract"])
@pytest.mark.parametrize("inside", ["baked", "a/b", ""])
def test_an_output_inside_a_model_in_a_store_is_refused(memory, model, adapter, command, inside):
    base = put(model, f"{memory}/model")
    before = found_at(base)
    tuned = put(adapter, f"{memory}/adapter") if command == "bake" else put(model, f"{memory}/model-2")
    out = f"{base}/{inside}".rstrip("/")
    result = invoke(command, base, tuned, "-o", out, "--overwrite")
    if command == "bake" and not inside:  # as on disk: in the place of the base
        assert result.exit_code == 0, result.stderr
        return
    assert result.exit_code == 1
    assert f"{out}: the output would " in result.stderr
    assert found_at(base) == before
    run(command, base, tuned, "-o", f"{base}-3", "--dry-run")


def test_an_extraction_from_a_store_is_the_one_on_disk(memory, model, adapter, tmp_path):
    run("bake", model, adapter, "-o", tmp_path / "tuned", "--quiet")
    base, tuned = put(model, f"{memory}/base"), put(tmp_path / "tuned", f"{memory}/tuned")
    run("extract", model, tmp_path / "tuned", "--rank", 4, "-o", tmp_path / "here", "--quiet")
    run("extract", base, tuned, "--rank", 4, "-o", f"{memory}/there", "--quiet")
    ours = found_at(f"{memory}/there")
    (tmp_path / WEIGHTS).write_bytes(ours[WEIGHTS])
    one, other = load_file(tmp_path / WEIGHTS), load_file(tmp_path / "here" / WEIGHTS)
    assert {*one} == {*other}
    assert all(one[key].equal(other[key]) for key in one)


@pytest.mark.parametrize("command", ["doctor", "compare", "resize", "pack"])
def test_other_commands_read_urls_too(memory, pair, tmp_path, command):
    one, two = (put(folder, f"{memory}/lib/{folder.name}") for folder in pair)
    out = tmp_path / "out"
    run(
        *{
            "doctor": ("doctor", one),
            "compare": ("compare", one, two),
            "resize": ("resize", one, "--rank", 4, "-o", out),
            "pack": ("pack", f"{memory}/lib", "-o", out),
        }[command]
    )
    assert out.exists() == (command in ("resize", "pack"))


def test_a_pickle_is_fetched_whole_and_baked_by_its_parts(memory, model, adapter, tmp_path):
    tensors = load_file(model / "model-00001-of-00002.safetensors")
    torch.save(tensors, tmp_path / "base.bin")
    with fsspec.open(f"{memory}/base.bin", "wb") as file:
        file.write((tmp_path / "base.bin").read_bytes())
    options = ("--skip-missing", "--quiet")
    run("bake", tmp_path / "base.bin", adapter, "-o", tmp_path / "here.bin", *options)
    run("bake", f"{memory}/base.bin", adapter, "-o", tmp_path / "there.bin", *options)
    assert (tmp_path / "here.bin").read_bytes() == (tmp_path / "there.bin").read_bytes()


def test_an_index_cannot_name_files_elsewhere(memory, model):
    url = put(model, f"{memory}/model")
    index = json.loads((model / "model.safetensors.index.json").read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../secret.safetensors")
    with fsspec.open(f"{url}/model.safetensors.index.json", "wb") as file:
        file.write(json.dumps(index).encode())
    result = invoke("bake", url, url, "-o", "out")
    assert result.exit_code == 1
    assert "do not lie in its own folder" in result.stderr


def test_what_an_interrupted_run_has_left_is_cleaned_where_it_is(memory, temporary):
    from loratools.io import work_folder

    url = f"{memory}/out"
    left = work_folder.place_of(url)
    assert left.is_relative_to(temporary)
    left.mkdir(parents=True)
    (left / "journal").write_text("half")
    assert work_folder.clean(url).paths == (str(left),)
    assert not left.exists()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("memory://store/none", ["nothing is there"]),
        ("nosuch://store/none", ["nosuch", "hf://ORG/REPO"]),
        ("https://example.invalid/", ["example.invalid"]),
    ],
)
def test_what_cannot_be_read_is_told(url, words):
    result = invoke("info", url)
    assert result.exit_code == 1
    assert all(word in result.stderr for word in words), result.stderr


def test_a_refused_bucket_is_told(bucket, monkeypatch):
    from loratools.io import remote

    class Refusing:
        def info(self, path):
            raise PermissionError("Forbidden")

    monkeypatch.setattr(remote, "_system", lambda url: (Refusing(), url))
    result = invoke("info", f"{bucket}/style")
    assert result.exit_code == 1
    assert "no permission" in result.stderr
    assert "AWS_ACCESS_KEY_ID" in result.stderr


def test_nothing_is_written_to_a_web_server(pair):
    result = invoke("convert", pair[0], "-o", "https://example.invalid/out", "--to", "peft")
    assert result.exit_code == 1
    assert "nothing is written to a web server" in result.stderr


@pytest.mark.parametrize(
    ("package", "url", "words"),
    [
        ("fsspec", "memory://x", "pip install 'loratools[remote]'"),
        ("s3fs", "s3://bucket/x", "pip install s3fs"),
    ],
)
def test_the_missing_package_is_named(monkeypatch, package, url, words):
    names = [name for name in sys.modules if name == package or name.startswith(f"{package}.")]
    for name in (*names, package, f"{package}.core"):
        monkeypatch.setitem(sys.modules, name, None)
    if package == "s3fs":
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    result = invoke("info", url)
    assert result.exit_code == 1
    assert words in result.stderr


def test_without_a_url_no_package_for_urls_is_imported(pair):
    code = (
        "import sys\nfrom loratools.cli import cli\n"
        "try:\n    cli(sys.argv[1:])\nfinally:\n    print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "info", str(pair[0])], capture_output=True, text=True, check=True
    )
    assert not {"fsspec", "huggingface_hub", "socket", "loratools.io.remote"} & set(done.stderr.split())


def test_urls_in_a_recipe_are_read_only_when_that_is_said(memory, pair, tmp_path):
    urls = [put(folder, f"{memory}/in/{folder.name}") for folder in pair]
    recipe = tmp_path / "mix.json"
    run("merge", *urls, "-o", tmp_path / "first", "--save-recipe", recipe)
    result = invoke("merge", "--recipe", recipe, "-o", tmp_path / "again")
    assert result.exit_code == 1
    assert f"{recipe}: the recipe has 2 URLs for inputs ({urls[0]}, {urls[1]})" in result.stderr
    assert "--allow-urls" in result.stderr
    assert not (tmp_path / "again").exists()
    run("merge", "--recipe", recipe, "-o", tmp_path / "again", "--allow-urls")
    assert remote_files.bytes_of(tmp_path / "again") == remote_files.bytes_of(tmp_path / "first")
    assert invoke("merge", *pair, "--allow-urls", "-o", tmp_path / "x").exit_code == 2


@pytest.mark.parametrize("field", ["inputs", "protect", "base"])
def test_every_place_of_a_recipe_for_a_url_is_looked_at(pair, tmp_path, field, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", _no_socket)
    said = {"inputs": [{"path": str(folder)} for folder in pair]}
    said[field] = "hf://org/base" if field == "base" else [{"path": "https://example.invalid/x.safetensors"}]
    recipe = tmp_path / "mix.json"
    recipe.write_text(json.dumps(said))
    result = invoke("merge", "--recipe", recipe, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "the recipe has 1 URLs for inputs" in result.stderr


def test_a_recipe_in_a_store_names_inputs_from_where_it_lies(memory, pair, tmp_path):
    for folder in pair:
        put(folder, f"{memory}/in/{folder.name}")
    with fsspec.open(f"{memory}/in/mix.json", "w") as file:
        json.dump({"inputs": [{"path": folder.name} for folder in pair]}, file)
    given = ("merge", "--recipe", f"{memory}/in/mix.json", "-o", tmp_path / "out")
    assert "the recipe has 2 URLs for inputs" in invoke(*given).stderr
    run(*given, "--allow-urls")


@pytest.mark.parametrize(
    "name", ["hf://org/base", "https://example.invalid/base", "s3://bucket/base", "org/base"]
)
def test_the_base_that_a_configuration_names_is_never_fetched(name, pair, tmp_path, monkeypatch, model):
    for folder in pair:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": name}))
    for entry in ("socket", "create_connection", "getaddrinfo", "gethostbyname"):
        monkeypatch.setattr(socket, entry, _no_socket)
    for kind in ("hub", "remote"):
        monkeypatch.setitem(sys.modules, f"loratools.io.{kind}", None)
    for number, arguments in enumerate(
        (
            ("info", *pair),
            ("doctor", pair[0], "--for", "vllm"),
            ("convert", pair[0], "-o", tmp_path / "converted", "--to", "vllm"),
            ("convert", pair[0], "-o", tmp_path / "mlx", "--to", "mlx"),
            ("merge", *pair, "-o", tmp_path / "merged"),
            ("resize", pair[0], "--rank", 4, "-o", tmp_path / "resized"),
            ("pack", *pair, "-o", tmp_path / "packed", "--for", "vllm"),
            ("unpack", tmp_path / "packed", "-o", tmp_path / "unpacked"),
        )
    ):
        assert run(*arguments).exit_code == 0, number


def _no_socket(*_arguments, **_options):
    raise AssertionError("a socket")


def test_without_a_url_no_socket_is_opened(monkeypatch, model, adapter, pair, tmp_path):
    def refused(*arguments, **options):
        raise AssertionError("a socket")

    for name in ("socket", "create_connection", "getaddrinfo", "gethostbyname"):
        monkeypatch.setattr(socket, name, refused)
    for number, arguments in enumerate(
        (
            ("info", *pair),
            ("doctor", pair[0]),
            ("compare", *pair),
            ("convert", pair[0], "-o", tmp_path / "converted", "--to", "peft"),
            ("merge", *pair, "-o", tmp_path / "merged"),
            ("resize", pair[0], "--rank", 4, "-o", tmp_path / "resized"),
            ("pack", *pair, "-o", tmp_path / "packed"),
            ("unpack", tmp_path / "packed", "-o", tmp_path / "unpacked"),
            ("bake", model, adapter, "-o", tmp_path / "baked"),
            ("verify", model, adapter, tmp_path / "baked"),
            ("extract", model, tmp_path / "baked", "--rank", 4, "-o", tmp_path / "extracted"),
        )
    ):
        assert run(*arguments).exit_code == 0, number
