"""Released networks: what comes back is what was trained, from anywhere; and what is refused before it is read."""

import hashlib
import pickle
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml

from lightning_danns import DANNMLP, ConvNet, DANNConvNet, UsageError, export_pretrained, load_pretrained
from lightning_danns.modules.released import MANIFEST
from lightning_danns.testing import assert_dale

ROOT = Path(__file__).parents[1]
SHAPE = (3, 8, 8)
SMALL = {"input_shape": SHAPE, "channels": [10, 12], "hidden_sizes": [11], "num_classes": 4}
X = torch.rand(5, *SHAPE, generator=torch.Generator().manual_seed(0))
MODELS = {
    "dann": lambda: DANNConvNet(**SMALL, balanced=True, optimizer=partial(torch.optim.SGD, lr=0.25)),
    "twin": lambda: ConvNet(**SMALL, norm="batch"),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own, empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hub" / "lightning_danns"


@pytest.fixture
def release(tmp_path):
    """A folder with two release files and their manifest, and the modules that they are of."""
    torch.manual_seed(7)
    models = {name: make() for name, make in MODELS.items()}
    models["twin"](X)  # moves the running statistics
    for name, model in models.items():
        manifest = export_pretrained(model.eval(), name, tmp_path / "release", result=f"{name}: 1 %")
    return manifest, models


@pytest.fixture
def server(release):
    """The address of the release folder, served by HTTP, and the paths that were asked for."""
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(self.path)

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=release[0].parent)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def file_of(name, manifest):
    return manifest.parent / yaml.safe_load(manifest.read_text())[name]["file"]


def same(model, original):
    assert type(model) is type(original)
    assert not any(module.training for module in model.modules())
    with torch.no_grad():
        return torch.equal(model(X), original(X))


@pytest.mark.parametrize("name", MODELS)
def test_a_network_comes_back_to_the_bit_from_a_folder_a_file_address_and_a_server(release, server, name):
    manifest, models = release
    for source in (manifest.parent, str(manifest.parent), manifest.parent.as_uri(), server[0] + "/"):
        model = load_pretrained(name, source, manifest)
        assert same(model, models[name])
    assert model.hparams == models[name].hparams


def test_a_dann_comes_back_with_its_signs_and_its_learning_rate(release):
    model = load_pretrained("dann", release[0].parent, release[0])
    assert_dale(model)
    assert model.optimizer_factory.keywords == {"lr": 0.25}


def test_an_entry_says_what_the_file_is_and_what_was_measured(release):
    entry = yaml.safe_load(release[0].read_text())["dann"]
    content = file_of("dann", release[0]).read_bytes()
    assert entry["size"] == len(content)
    assert entry["file"] == f"dann-{entry['sha256'][:8]}.pt"
    assert entry["result"] == "dann: 1 %"
    assert entry["model"]["class_path"].endswith(".DANNConvNet")


def test_a_file_is_fetched_once_and_again_only_if_the_cache_is_damaged(release, server, cache):
    manifest, models = release
    address, asked = server
    load_pretrained("dann", address, manifest)
    load_pretrained("dann", address, manifest)
    assert asked == [f"/{file_of('dann', manifest).name}"]
    (cached,) = cache.iterdir()
    cached.write_bytes(cached.read_bytes()[:-1])
    assert same(load_pretrained("dann", address, manifest), models["dann"])
    assert len(asked) == 2


class Trap:
    """Unpickling it leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("remote", [False, True])
def test_another_file_is_refused_unread(release, server, remote, tmp_path, monkeypatch):
    path = file_of("dann", release[0])
    content, read = path.read_bytes(), []
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: read.append(args))
    flipped = content[:1000] + bytes([content[1000] ^ 1]) + content[1001:]
    for other in (flipped, content + b"0", b"", pickle.dumps(Trap(tmp_path / "sprung"))):
        path.write_bytes(other)
        with pytest.raises(UsageError, match="invalid hash value" if remote else f"its {len(other)} bytes are not the"):
            load_pretrained("dann", server[0] if remote else path.parent, release[0])
    assert not read
    assert not (tmp_path / "sprung").exists()


def test_a_file_of_the_right_hash_is_still_read_as_weights_alone(release, tmp_path):
    path = file_of("dann", release[0])
    torch.save({"network.0.Wex": Trap(tmp_path / "sprung")}, path)
    released = yaml.safe_load(release[0].read_text())
    released["dann"] |= {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    release[0].write_text(yaml.safe_dump(released))
    with pytest.raises(pickle.UnpicklingError):
        load_pretrained("dann", path.parent, release[0])
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("danm", "", "'danm' is no released network; these are: dann, twin"),
        ("dann", "nowhere", r"nowhere/dann-\w{8}\.pt does not exist: source must be the folder"),
        ("dann", "file:///nowhere", r"file:///nowhere/dann-\w{8}\.pt could not be fetched"),
        ("dann", "{server}/nowhere", "could not be fetched .*404"),
        ("dann", "http://127.0.0.1:9", "could not be fetched .*refused"),
        ("dann", "no-such-scheme://a", "could not be fetched .*unknown url type"),
    ],
)
def test_what_is_not_there_is_refused_by_name(release, server, cache, name, source, message):
    with pytest.raises(UsageError, match=message):
        load_pretrained(name, source.format(server=server[0]), release[0])
    assert not cache.exists() or not list(cache.iterdir())


def test_a_manifest_that_cannot_be_read_is_refused_by_name(tmp_path):
    with pytest.raises(UsageError, match=r"nowhere\.yaml cannot be read"):
        load_pretrained("dann", tmp_path, tmp_path / "nowhere.yaml")


def test_a_name_that_is_exported_again_gets_a_new_file_and_keeps_its_neighbours(release):
    before = file_of("dann", release[0])
    again = MODELS["dann"]().eval()
    assert export_pretrained(again, "dann", release[0].parent) == release[0]
    assert file_of("dann", release[0]) != before
    assert same(load_pretrained("dann", release[0].parent, release[0]), again)
    assert same(load_pretrained("twin", release[0].parent, release[0]), release[1]["twin"])


def test_a_checkpoint_becomes_a_release_in_two_lines(tmp_path, data_dir, make_trainer):
    from lightning_danns import MNISTDataModule

    trainer = make_trainer()
    trainer.fit(DANNMLP(hidden_sizes=[12], ni=2), datamodule=MNISTDataModule(str(data_dir), val_size=20))
    trainer.save_checkpoint(tmp_path / "best.ckpt")
    manifest = export_pretrained(DANNMLP.load_from_checkpoint(tmp_path / "best.ckpt"), "mine", tmp_path)
    trained, loaded = trainer.model.state_dict(), load_pretrained("mine", tmp_path, manifest).state_dict()
    assert trained.keys() == loaded.keys()
    assert all(torch.equal(value, loaded[key]) for key, value in trained.items())


def test_what_nobody_else_could_make_is_not_exported(tmp_path):
    class Local(DANNMLP):
        pass

    for model in (Local(hidden_sizes=[3]), DANNMLP(hidden_sizes=[3], loss=lambda logits, labels: logits.sum())):
        with pytest.raises(UsageError, match="'mine' could not be made of"):
            export_pretrained(model, "mine", tmp_path)
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.parametrize("name", yaml.safe_load(MANIFEST.read_text()))
def test_a_network_of_the_package_comes_with_it(name):
    entry = yaml.safe_load(MANIFEST.read_text())[name]
    model = load_pretrained(name)
    if "dann" in name:
        assert_dale(model)
    assert model.network(torch.rand(2, *entry["model"]["init_args"]["input_shape"])).shape == (2, 10)
    assert entry["file"] == f"{name}-{entry['sha256'][:8]}.pt"
    assert entry["result"].startswith("test error")
    assert entry["config"] in map(str, (p.relative_to(ROOT) for p in ROOT.glob("configs/*/*.yaml")))


def test_no_file_lies_in_the_package_that_no_entry_is_of():
    entries = yaml.safe_load(MANIFEST.read_text()).values()
    assert entries
    assert {path.name for path in MANIFEST.parent.glob("*.pt")} == {entry["file"] for entry in entries}
    assert sum(entry["size"] for entry in entries) < 3_000_000  # the wheel stays small
