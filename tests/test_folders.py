"""Images in class folders: decoded, transformed, split, refused, resumed."""

import inspect
import os
import pickle
import tracemalloc

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import images_and_labels
from jsonargparse import ArgumentParser
from PIL import Image
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torchvision.transforms import v2

from lightning_danns import (
    DANNMLP,
    DANNVGG,
    DANNConvNet,
    DANNResNet,
    ImageFolderDataModule,
    ImageNetDataModule,
    UsageError,
)
from lightning_danns.data.batches import BatchIndex
from lightning_danns.data.file_list import CACHE, list_files, pack
from lightning_danns.data.pixels import UnreadableImageError, read_image

ASIS = {"train_transform": v2.Identity(), "eval_transform": v2.Identity()}


def write_folder(root, n, classes=3, shape=(12, 10, 3)):
    images, _ = images_and_labels(n, shape)
    for k, image in enumerate(images):
        folder = root / f"class {'zäb'[k % classes]}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{k:03d}.png")


@pytest.fixture
def root(tmp_path):
    """Folders with 30 training, 12 validation and 9 test images of 3 classes."""
    for part, n in (("train", 30), ("val", 12), ("test", 9)):
        write_folder(tmp_path / "images with ü" / part, n)
    return tmp_path / "images with ü"


def loaded(root, **kwargs):
    module = ImageFolderDataModule(str(root), **{"batch_size": 5, "image_size": 8, **kwargs})
    module.prepare_data()
    module.setup()
    return module


# Decoding


def mean_pixel(image, path, channels=3, **options):
    image.save(path, **options)
    decoded = read_image(path, channels)
    assert decoded.mode == ("RGB" if channels == 3 else "L")
    return np.asarray(decoded).reshape(-1, channels).mean(0).round().tolist()


def test_images_of_every_mode_become_rgb(tmp_path):
    def solid(mode, colour):
        return Image.new(mode, (8, 6), colour)

    assert mean_pixel(solid("RGB", (200, 100, 50)), tmp_path / "a.png") == [200, 100, 50]
    assert mean_pixel(solid("L", 77), tmp_path / "a.jpg") == [77] * 3
    assert mean_pixel(solid("1", 1), tmp_path / "a.png") == [255] * 3
    assert mean_pixel(solid("RGB", (250, 0, 0)).quantize(4), tmp_path / "a.png") == [250, 0, 0]
    assert mean_pixel(solid("RGBA", (200, 100, 50, 255)), tmp_path / "a.png") == [200, 100, 50]
    assert mean_pixel(solid("RGBA", (200, 100, 50, 51)), tmp_path / "a.png") == [40, 20, 10]  # a fifth of the light
    assert mean_pixel(solid("LA", (200, 0)), tmp_path / "a.png") == [0] * 3
    assert mean_pixel(solid("P", 3), tmp_path / "a.png", transparency=3) == [0] * 3
    assert mean_pixel(solid("CMYK", (0, 255, 255, 0)), tmp_path / "a.jpg", quality=100)[0] > 250  # red
    assert mean_pixel(solid("CMYK", (0, 255, 255, 0)), tmp_path / "a.jpg", quality=100)[1] < 5


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_16_bits_become_8_with_white_kept(tmp_path, name):
    for value, expected in ((65535, 255), (257 * 100, 100), (128, 0), (129, 1), (0, 0)):
        image = Image.fromarray(np.full((4, 4), value, np.uint16))
        assert mean_pixel(image, tmp_path / name, channels=1) == [expected]
        assert mean_pixel(image, tmp_path / name) == [expected] * 3


def test_colours_become_grey_by_luminance(tmp_path):
    image = Image.new("RGB", (4, 4), (200, 100, 50))
    assert mean_pixel(image, tmp_path / "a.png", channels=1) == [round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)]


def test_what_is_no_image_is_named(tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(np.full((4, 4), 10**6, np.int32)).save(tmp_path / "large.tif")
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.jpg")
    for suffix in ("png", "jpg", "tif", "webp", "bmp"):
        Image.fromarray(noise).save(tmp_path / f"whole.{suffix}")
        (tmp_path / f"cut.{suffix}").write_bytes((tmp_path / f"whole.{suffix}").read_bytes()[:300])
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "empty.png").touch()
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    bad = [path for path in tmp_path.iterdir() if path.stem != "whole"]
    assert len(bad) == 10
    for path in bad:
        with pytest.raises(UnreadableImageError, match=path.name):
            read_image(path)


# Lists of files


def test_labels_follow_the_sorted_names_of_class_folders(root):
    module = loaded(root, **ASIS)
    assert module.classes == ["class b", "class z", "class ä"]
    assert (module.num_classes, module.image_shape) == (3, (3, 12, 10))
    for part, dataset in (("train", module.train_set), ("val", module.val_set), ("test", module.test_set)):
        images, labels = dataset[BatchIndex(torch.arange(len(dataset)), 0)]
        paths = sorted((root / part).glob("*/*.png"))
        assert labels.tolist() == [module.classes.index(path.parent.name) for path in paths]
        expected = np.stack([np.asarray(Image.open(path)) for path in paths]).transpose(0, 3, 1, 2) / np.float32(255)
        torch.testing.assert_close(images, torch.from_numpy(expected))


def test_one_folder_is_split_by_class_and_seed(tmp_path):
    write_folder(tmp_path / "all", 60)
    first, again, other = (loaded(tmp_path / "all", split_seed=seed, val_size=15) for seed in (0, 0, 1))
    assert torch.bincount(first.val_set.labels).tolist() == [5, 5, 5]
    held_out, rest = ({dataset.path(k) for k in range(len(dataset))} for dataset in (first.val_set, first.train_set))
    assert len(held_out) == 15
    assert held_out | rest == set((tmp_path / "all").glob("*/*.png"))
    assert not held_out & rest
    assert torch.equal(first.val_set.samples, again.val_set.samples)
    assert not torch.equal(first.val_set.samples, other.val_set.samples)
    assert len(loaded(tmp_path / "all").val_set) == 6
    assert loaded(tmp_path / "all", val_size=0).val_dataloader() == []
    with pytest.raises(UsageError, match="no test data"):
        first.test_dataloader()


def age(folder):
    """Make all folders look as if they had not changed for a while."""
    for directory, _, _ in os.walk(folder):
        os.utime(directory, (1e9, 1e9))


def test_a_list_is_kept_until_a_folder_changes(root, monkeypatch):
    folder = root / "train"
    age(folder)
    first = list_files(folder)
    assert (folder / CACHE).exists()
    with monkeypatch.context() as patch:
        patch.setattr("lightning_danns.data.file_list.image_names", None)  # so that nothing can be listed
        kept = list_files(folder)
        assert [kept.path(k) for k in range(30)] == [first.path(k) for k in range(30)]
        assert kept.labels.tolist() == first.labels.tolist()
    (folder / "class b" / "002.png").rename(folder / "class b" / "new.png")
    assert {list_files(folder).path(k).name for k in range(30)} > {"new.png"}
    (folder / "class b" / "more").mkdir()
    (folder / "class z" / "000.png").rename(folder / "class b" / "more" / "x.png")
    assert np.bincount(list_files(folder).labels).tolist() == [11, 9, 10]
    age(folder)
    list_files(folder)
    (folder / "class ä").rename(folder / "class a")
    assert list_files(folder).classes[0] == "class a"


def test_a_change_right_after_listing_is_noticed(root):
    list_files(root / "train")  # written a moment ago
    (root / "train" / "class b" / "002.png").unlink()
    assert len(list_files(root / "train")) == 29


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", None])
def test_a_list_that_cannot_be_kept_or_read_is_made_anew(root, monkeypatch, content):
    folder = root / "train"
    if content is None:
        (folder / CACHE).mkdir()  # as in a read-only folder, nothing can be written there
    else:
        (folder / CACHE).write_bytes(content)
    assert len(list_files(folder)) == 30
    assert [path.name for path in folder.iterdir() if path.is_file()] == ([] if content is None else [CACHE])


def test_a_list_takes_some_bytes_for_each_image_and_does_not_grow_by_use():
    classes = [f"n{k:08d}" for k in range(100)]

    def names():
        for label in classes:
            yield (f"{label}/{label}_{k:05d}.JPEG" for k in range(1000))

    tracemalloc.start()
    files = pack(None, classes, names())
    held, _ = tracemalloc.get_traced_memory()
    for k in range(0, len(files), 7):
        files.names[files.ends[k - 1] : files.ends[k]].tobytes()
    later, _ = tracemalloc.get_traced_memory()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(files) == 100_000
    assert held / 1e5 < 30 + 8 + 8 + 1  # the name, its end, the label
    assert later - held < 2000
    assert peak < 2.5 * held


# Transforms


def test_default_pixels_are_non_negative_and_of_one_shape(tmp_path):
    for k, size in enumerate([(40, 30), (9, 50), (64, 64), (8, 8)]):
        for part in ("train", "val"):
            (tmp_path / part / "c").mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng(k).integers(0, 256, (*size, 3), np.uint8)
            Image.fromarray(noise).save(tmp_path / part / "c" / f"{k}.png")
    module = loaded(tmp_path, image_size=16)
    for loader in (module.train_dataloader(), module.val_dataloader()):
        ((images, _),) = loader
        assert images.shape == (4, *module.image_shape) == (4, 3, 16, 16)
        assert images.dtype == torch.float32
        assert 0 <= images.min() < images.max() <= 1


TO_FLOAT = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([*TO_FLOAT, v2.Normalize([0.5] * 3, [0.5] * 3), nn.Identity()], r"^Normalize\(.*makes pixels negative, down"),
        ([*TO_FLOAT, v2.GaussianNoise(sigma=2, clip=False)], r"^GaussianNoise\(.*negative.*scale=True"),
        ([v2.ToImage(), v2.ToDtype(torch.float32)], r"^ToDtype\(.*greater than 1, up to 2"),
        ([*TO_FLOAT, v2.Lambda(torch.log), nn.Identity()], r"^Lambda\(.*makes pixels (negative|NaN)"),
        ([np.asarray], "gives a ndarray"),
        ([v2.ToImage(), v2.ToDtype(torch.int64)], r"gives torch\.int64"),
    ],
)
def test_transforms_that_leave_the_unit_interval_are_refused_by_name(root, steps, message):
    with pytest.raises(UsageError, match=message):
        loaded(root, **{**ASIS, "train_transform": v2.Compose(steps)})


def test_a_transform_that_is_negative_at_times_is_refused_when_it_is(root):
    rarely = v2.RandomApply([v2.Lambda(lambda x: x - 2)], p=0.2)
    torch.manual_seed(0)
    with pytest.raises(UsageError, match="RandomApply"):
        list(loaded(root, **{**ASIS, "train_transform": v2.Compose([*TO_FLOAT, rarely])}).train_dataloader())


def test_double_and_byte_tensors_are_served_as_single_floats(root):
    byte = loaded(root, **{**ASIS, "eval_transform": v2.ToImage()})
    double = loaded(
        root, **{**ASIS, "eval_transform": v2.Compose([v2.ToImage(), v2.ToDtype(torch.double, scale=True)])}
    )
    for (one, _), (other, _) in zip(byte.val_dataloader(), double.val_dataloader(), strict=True):
        assert type(one) is type(other) is torch.Tensor
        torch.testing.assert_close(one, other)


def test_images_of_unequal_size_need_a_transform(root):
    Image.new("RGB", (7, 7)).save(root / "val" / "class b" / "zzz.png")
    with pytest.raises(UsageError, match=r"\(3, 12, 10\), but .*zzz\.png \(3, 7, 7\): .*fixed height and width"):
        list(loaded(root, **ASIS, num_workers=1).val_dataloader())
    with pytest.raises(UsageError, match=r"train_transform makes .* \(3, 6, 6\), but eval_transform \(3, 12, 10\)"):
        loaded(root, train_transform=v2.CenterCrop(6), eval_transform=v2.Identity())


def test_mixup_serves_soft_labels_in_training_only(root):
    module = loaded(root, **ASIS, batch_transform=v2.MixUp(num_classes=3, alpha=1.0))
    plain = loaded(root, **ASIS)
    for loader in (module.train_dataloader(), plain.train_dataloader()):
        loader.sampler.seed = 5
    for (images, labels), (before, classes) in zip(module.train_dataloader(), plain.train_dataloader(), strict=True):
        one_hot = torch.eye(3)[classes]
        share = ((images - before.roll(1, 0)) / (before - before.roll(1, 0))).nanmedian()
        torch.testing.assert_close(labels, share * one_hot + (1 - share) * one_hot.roll(1, 0), atol=1e-4, rtol=0)
    assert next(iter(module.val_dataloader()))[1].dtype == torch.int64
    with pytest.raises(UsageError, match="labels of 4 classes, but there are 3"):
        list(loaded(root, batch_transform=v2.CutMix(num_classes=4)).train_dataloader())


def test_transforms_come_from_yaml(root):
    parser = ArgumentParser()
    parser.add_subclass_arguments(ImageFolderDataModule, "data")
    config = f"""
data:
  class_path: ImageFolderDataModule
  init_args:
    data_dir: {root}
    train_transform:
      class_path: torchvision.transforms.v2.Compose
      init_args:
        transforms:
        - class_path: torchvision.transforms.v2.RandomResizedCrop
          init_args: {{size: 6}}
        - class_path: torchvision.transforms.v2.ColorJitter
          init_args: {{brightness: 0.4}}
    eval_transform: {{class_path: torchvision.transforms.v2.CenterCrop, init_args: {{size: 6}}}}
    batch_transform: {{class_path: torchvision.transforms.v2.CutMix, init_args: {{num_classes: 3}}}}
"""
    module = parser.instantiate(parser.parse_string(config)).data
    module.setup()
    images, labels = next(iter(module.train_dataloader()))
    assert images.shape[1:] == module.image_shape == (3, 6, 6)
    assert labels.shape == (len(images), 3)


# Unreadable files


@pytest.fixture
def damaged(root):
    for name in ("train/class b/002.png", "train/class z/003.png", "val/class b/005.png"):
        (root / name).write_bytes(b"\x89PNG cut off")
    return root


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_unreadable_file_ends_the_run_and_is_named(root, num_workers):
    (root / "train" / "class z" / "003.png").write_bytes(b"\x89PNG cut off")
    with pytest.raises(UsageError, match=r"^cannot read the image .*003\.png.*on_error='skip'$"):
        list(loaded(root, num_workers=num_workers).train_dataloader())


@pytest.mark.parametrize("num_workers", [0, 1])
def test_unreadable_files_are_skipped_counted_and_named_once(damaged, num_workers):
    module = loaded(damaged, on_error="skip", num_workers=num_workers)
    train, val = module.train_dataloader(), module.val_dataloader()
    with pytest.warns(UserWarning, match=r"^2 of 30 images .*002\.png, .*003\.png$") as warned:
        assert sum(len(labels) for _ in range(2) for _, labels in train) == 56
    assert len([one for one in warned if "of 30 images" in str(one.message)]) == 1
    with pytest.warns(UserWarning, match=r"^1 of 12 images .*005\.png$"):
        assert sum(len(labels) for _, labels in val) == 11


def test_skipped_files_of_an_unfinished_pass_are_named_at_the_end_of_the_run(damaged):
    module = loaded(damaged, on_error="skip", batch_size=15, order_seed=0)
    loader = iter(module.train_dataloader())
    next(loader)
    skipped = int(module.train_set.unreadable.sum())
    assert 0 < skipped <= 2
    with pytest.warns(UserWarning, match=f"^{skipped} of 30 images"):
        module.teardown()


def test_a_batch_without_any_readable_image_is_an_error(damaged):
    with pytest.raises(UsageError, match=r"no image of a batch can be read: .*png"):
        list(loaded(damaged, on_error="skip", batch_size=1).train_dataloader())


# Exactness


class Plain(pl.LightningModule):
    """A linear layer; dies in step ``dies``."""

    def __init__(self, dies=None):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.dies = nn.Linear(3 * 8 * 8, 3), dies

    def training_step(self, batch, batch_idx):
        if self.global_step == self.dies:
            raise InterruptedError
        return nn.functional.cross_entropy(self.layer(batch[0].flatten(1)), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self.layer(batch[0].flatten(1)), batch[1]))

    def predict_step(self, batch, batch_idx):
        return batch[1]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_killed_run_resumes_to_the_bit(root, make_trainer, tmp_path, num_workers):
    def fit(model, seed, workers=0, **kwargs):
        pl.seed_everything(seed)
        data = ImageFolderDataModule(
            str(root), 8, batch_size=5, num_workers=workers, batch_transform=v2.MixUp(num_classes=3)
        )
        saving = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=2)
        trainer = make_trainer(max_epochs=2, callbacks=saving, enable_checkpointing=True)
        trainer.fit(model, datamodule=data, **kwargs)
        return model.layer.weight

    with pytest.raises(InterruptedError):
        fit(Plain(dies=9), 0, num_workers)
    (saved,) = (tmp_path / "saved").iterdir()
    assert torch.equal(fit(Plain(), 1, num_workers, ckpt_path=saved, weights_only=True), fit(Plain(), 0))


def test_processes_share_the_images(root, make_trainer, monkeypatch):
    shares = []
    for rank in range(2):
        module = loaded(root)
        module.trainer = make_trainer()
        monkeypatch.setattr(pl.Trainer, "world_size", 2)
        monkeypatch.setattr(pl.Trainer, "global_rank", rank)
        monkeypatch.setattr(module.trainer.strategy, "broadcast", lambda seed: 0)
        shares += [k for index in module.train_dataloader().sampler for k in index.samples.tolist()]
    assert sorted(shares) == list(range(30))


def test_predictions_come_in_the_order_of_the_files(root, make_trainer):
    labels = make_trainer().predict(Plain(), datamodule=ImageFolderDataModule(str(root), 8, batch_size=4))
    assert torch.cat(labels).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_evaluation_of_the_test_images_in_each_epoch_is_named(root):
    loaders = loaded(root, test_each_epoch=True).val_dataloader()
    assert {name: len(loader.dataset) for name, loader in loaders.items()} == {"val": 12, "test": 9}


# Wrong use


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"image_channels": 4}, "image_channels=4"),
        ({"image_size": 0}, "image_size=0"),
        ({"on_error": "ignore"}, "on_error='ignore'"),
        ({"val_size": -1}, "val_size=-1"),
        ({"val_size": 3}, "val_size=3, but .*val exists"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"on_error": "skip", "order_seed": [1, 2]}, "list of order seeds"),
    ],
)
def test_wrong_arguments_are_refused(root, kwargs, message):
    with pytest.raises(UsageError, match=message):
        loaded(root, **kwargs)


def test_a_logger_can_merge_the_arguments_of_data_and_models():
    ours = set(inspect.signature(ImageFolderDataModule).parameters)
    for model in (DANNConvNet, DANNMLP, DANNResNet, DANNVGG):
        assert not ours & set(inspect.signature(model).parameters)


def test_a_module_is_sent_to_other_processes_before_and_after_its_setup(root):
    module = ImageFolderDataModule(str(root), 8)
    assert pickle.loads(pickle.dumps(module)).classes == module.classes
    module.setup()
    assert len(pickle.loads(pickle.dumps(module)).train_set) == 30


def test_wrong_folders_are_refused_by_name(root, tmp_path):
    with pytest.raises(UsageError, match=r"cannot read the folder .*nowhere"):
        _ = ImageFolderDataModule(str(tmp_path / "nowhere")).num_classes
    with pytest.raises(UsageError, match="has 3 class folders, ImageNet-1k has 1000"):
        ImageNetDataModule(str(root)).setup()
    (root / "val" / "class q").mkdir()
    with pytest.raises(UsageError, match="class q has no images"):
        loaded(root)
    Image.new("RGB", (9, 9)).save(root / "val" / "class q" / "a.png")
    with pytest.raises(UsageError, match=r"val has classes that .*train lacks: class q"):
        loaded(root)
    (tmp_path / "flat").mkdir()
    with pytest.raises(UsageError, match=r"flat has no class folders: .*flat/CLASS/"):
        loaded(tmp_path / "flat")


def test_a_folder_is_found_from_home_and_after_a_change_of_directory(root, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(root.parent))
    monkeypatch.chdir(root.parent)
    modules = [ImageFolderDataModule(name) for name in (f"~/{root.name}", root.name, root)]
    monkeypatch.chdir("/")
    assert [module.num_classes for module in modules] == [3, 3, 3]
    assert {type(module.hparams["data_dir"]) for module in modules} == {str}
