"""Released networks: a manifest says what a file of weights must be, and which module it fills.

A manifest is a YAML file with an entry for each network: ``file``, the state dict that torch saved; its ``size`` in
bytes and its ``sha256``; ``model``, as ``class_path`` and ``init_args``; ``result`` and other facts for readers.

A manifest names classes, and is trusted as code is. A file is not: nothing is made of it before its hash is right.
"""

import hashlib
import io
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
import yaml

from lightning_danns.atomic import read_yaml, replacing
from lightning_danns.errors import UsageError
from lightning_danns.modules.arguments import NOT_SAVED, plain, restored
from lightning_danns.modules.base import DaleLightningModule

MANIFEST = Path(__file__).parents[1] / "weights" / "released.yaml"
"""The networks that come with this package."""


def load_pretrained(
    name: str, source: str | Path | None = None, manifest: str | Path = MANIFEST
) -> DaleLightningModule:
    """The released network of that name, with its trained weights, in evaluation mode.

    Args:
        name: of a network in the manifest.
        source: the folder that holds the file; that of the manifest, if not given. Or an address (``https://...``),
            from which the file is copied once, into ``lightning_danns`` in ``torch.hub.get_dir()``.
        manifest: that of this package, if not given.

    Raises:
        UsageError: a name that is not in the manifest; a file that does not exist, cannot be fetched, or has another
            size or hash than the manifest says; a manifest that cannot be read.

    Example:
        >>> from lightning_danns import DANNMLP
        >>> folder, trained = getfixture("tmp_path"), DANNMLP(hidden_sizes=[20])
        >>> manifest = export_pretrained(trained, "digits", folder, result="none, an example")
        >>> digits = load_pretrained("digits", manifest=manifest)
        >>> torch.equal(digits.network[1].Wex, trained.network[1].Wex)
        True
    """
    released = read_yaml(Path(manifest))
    if name not in released:
        raise UsageError(f"{name!r} is no released network; these are: {', '.join(released) or 'none'}")
    entry = released[name]
    if source is None:
        source = Path(manifest).parent
    if "://" in str(source):
        path = _fetched(f"{str(source).rstrip('/')}/{entry['file']}", entry)
    else:
        path = Path(source).expanduser() / entry["file"]
    if not path.is_file():
        raise UsageError(f"{path} does not exist: source must be the folder that holds the file of {name!r}")
    content = path.read_bytes()
    if not _is_of(entry, content):
        raise UsageError(
            f"{path} is not the file of {name!r}: its {len(content)} bytes are not the {entry['size']} of SHA-256 "
            f"{entry['sha256']}. Copy the file again"
        )
    model: DaleLightningModule = restored(entry["model"])()
    model.load_state_dict(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
    return model.eval()


def export_pretrained(model: DaleLightningModule, name: str, folder: str | Path, **facts: Any) -> Path:
    """Write the weights of ``model`` into a release file, and its entry into the manifest of the same folder.

        model = DANNConvNet.load_from_checkpoint("runs/DANNConvNet/DATE_TIME/checkpoints/best.ckpt")
        export_pretrained(model, "dann_convnet", "release", result="test error 32.9 % after 5 epochs, seed 0")

    Args:
        model: whose class can be imported, and whose arguments (``hparams``) are plain values.
        name: of the network; an entry of that name is replaced.
        folder: made if it does not exist.
        facts: plain values that readers of the manifest should know.

    Returns:
        The path of the manifest, ``folder/released.yaml``.

    Raises:
        UsageError: the module could not be made again elsewhere, of its class and arguments.
    """
    made = plain(partial(type(model), **model.hparams))
    if NOT_SAVED in str(made) or made["class_path"].startswith("__main__."):
        raise UsageError(f"{name!r} could not be made of {made} elsewhere: its class and arguments must be importable")
    buffer = io.BytesIO()
    torch.save({key: value.detach().cpu().clone() for key, value in model.state_dict().items()}, buffer)
    content, sha256 = buffer.getvalue(), hashlib.sha256(buffer.getvalue()).hexdigest()
    # a hash in the name keeps the file apart from earlier ones, in caches too
    entry = {"file": f"{name}-{sha256[:8]}.pt", "size": len(content), "sha256": sha256, "model": made, **plain(facts)}
    manifest = Path(folder).expanduser() / MANIFEST.name
    manifest.parent.mkdir(parents=True, exist_ok=True)
    released = {**(read_yaml(manifest) if manifest.exists() else {}), name: entry}
    with replacing(manifest.with_name(entry["file"])) as file:
        file.write(content)
    with replacing(manifest) as file:
        file.write(yaml.safe_dump(released, sort_keys=False, default_flow_style=None, width=120, encoding="utf-8"))
    return manifest


def _is_of(entry: dict[str, Any], content: bytes) -> bool:
    return len(content) == entry["size"] and hashlib.sha256(content).hexdigest() == entry["sha256"]


def _fetched(url: str, entry: dict[str, Any]) -> Path:
    """The file of an entry in the cache, into which it is copied from ``url`` unless it is there and whole."""
    path = Path(torch.hub.get_dir()) / "lightning_danns" / entry["file"]
    if path.is_file() and _is_of(entry, path.read_bytes()):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=entry["sha256"], progress=False)
    except (OSError, HTTPException, ValueError, RuntimeError) as error:  # no network, no file, no address, another hash
        raise UsageError(f"{url} could not be fetched ({error}): give source another address, or a folder") from error
    return path
