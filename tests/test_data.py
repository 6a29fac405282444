"""Data modules: splits, batches, files made and files refused."""

import numpy as np
import pytest
import torch
from conftest import images_and_labels, write_data
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from lightning_danns import (
    CIFAR10DataModule,
    FashionMNISTDataModule,
    ImageDataModule,
    KMNISTDataModule,
    MNIST5kDataModule,
    MNISTDataModule,
    UsageError,
)
from lightning_danns.data.batches import BatchIndex
from lightning_danns.data.files import read_arrays, write_arrays
from lightning_danns.data.modules import ImageDataset, crop_and_flip, stratified_split


def loaded(data_dir, **kwargs):
    module = MNISTDataModule(str(data_dir), **{"val_size": 50, **kwargs})
    module.prepare_data()
    module.setup()
    return module


@settings(deadline=None, max_examples=50)
@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=60), part=st.floats(0, 1), seed=st.integers(0, 99))
def test_split_is_a_partition_with_each_class_its_share(labels, part, seed):
    labels = torch.tensor(labels)
    size = int(part * len(labels))
    rest, held_out = stratified_split(labels, size, seed)
    assert len(held_out) == size
    assert sorted([*rest.tolist(), *held_out.tolist()]) == list(range(len(labels)))
    for label in labels.unique():
        share = (labels == label).sum().item() * size / len(labels)
        assert abs((labels[held_out] == label).sum().item() - share) <= 1


def test_split_depends_on_its_own_seed_alone(data_dir):
    torch.manual_seed(1)
    first = loaded(data_dir).val_set.images
    torch.manual_seed(2)
    assert torch.equal(loaded(data_dir).val_set.images, first)
    assert not torch.equal(loaded(data_dir, split_seed=1).val_set.images, first)


def test_images_are_kept_as_bytes_and_served_as_unit_floats(data_dir):
    module = loaded(data_dir)
    assert module.train_set.images.dtype == torch.uint8
    images, labels = next(iter(module.test_dataloader()))
    assert images.shape == (30, 1, 28, 28)  # half of 60, of at most 32
    assert images.dtype == torch.float32
    assert 0 <= images.min() <= images.max() <= 1
    with np.load(data_dir / "mnist.npz") as file:
        torch.testing.assert_close(images[:, 0], torch.from_numpy(file["x_test"][:30] / np.float32(255)))
        assert labels.tolist() == file["y_test"][:30].tolist()


def test_an_order_seed_sets_the_order_of_every_epoch_alone(data_dir):
    def epochs(**kwargs):
        loader = loaded(data_dir, **kwargs).train_dataloader()
        return [torch.cat([labels for _, labels in loader], -1) for _ in range(2)]

    torch.manual_seed(1)
    first, second = epochs(order_seed=5)
    torch.manual_seed(2)
    assert torch.equal(torch.stack(epochs(order_seed=5)), torch.stack([first, second]))
    loader = loaded(data_dir, order_seed=5).train_dataloader()
    loader.sampler.set_epoch(1)  # a resumed run starts here
    assert torch.equal(torch.cat([labels for _, labels in loader]), second)
    assert not torch.equal(first, second)
    assert not torch.equal(second, epochs(order_seed=6)[0])
    loader.sampler.set_epoch(2)
    assert sorted(torch.cat([index.samples for index in loader.sampler]).tolist()) == list(range(150))


def test_a_list_of_order_seeds_serves_each_its_own_batches(data_dir):
    together = loaded(data_dir, order_seed=[5, 9]).train_dataloader()
    alone = [loaded(data_dir, order_seed=seed).train_dataloader() for seed in (5, 9)]
    assert len(together) == len(alone[0]) == 5
    for (images, labels), *singles in zip(together, *alone, strict=True):
        assert torch.equal(images, torch.stack([single[0] for single in singles]))
        assert torch.equal(labels, torch.stack([single[1] for single in singles]))
    for wrong in ([], -1, [3, -1]):
        with pytest.raises(UsageError, match="order_seed"):
            MNISTDataModule(str(data_dir), order_seed=wrong)


def test_an_epoch_serves_every_training_image_once_in_a_seeded_order(data_dir):
    module = loaded(data_dir, batch_size=7)

    def epoch(seed):
        torch.manual_seed(seed)
        return torch.cat([images for images, _ in module.train_dataloader()]).mul(255).round().byte()

    assert torch.equal(epoch(0), epoch(0))
    assert not torch.equal(epoch(0), epoch(1))
    order = torch.cat([epoch(0).flatten(1), module.train_set.images.flatten(1)]).unique(dim=0)
    assert len(order) == len(module.train_set.images.flatten(1).unique(dim=0)) == 150


def test_batched_indexing_equals_one_image_at_a_time():
    images, labels = (torch.from_numpy(array) for array in images_and_labels(20))
    dataset = ImageDataset(images[:, None], labels.long())
    batch = dataset[BatchIndex(torch.tensor([3, 1, 19]), seed=0)]
    for position, index in enumerate([3, 1, 19]):
        image, label = dataset[index]
        assert torch.equal(batch[0][position], image)
        assert torch.equal(image[0], images[index].float() / 255)
        assert batch[1][position] == label


def test_worker_processes_serve_the_same_batches(data_dir):
    alone, helped = loaded(data_dir), loaded(data_dir, num_workers=1)
    for one, other in zip(alone.test_dataloader(), helped.test_dataloader(), strict=True):
        assert torch.equal(one[0], other[0])


def test_no_validation_set_means_training_on_everything(data_dir):
    module = loaded(data_dir, val_size=0)
    assert len(module.train_set) == 200
    assert module.val_dataloader() == []


def test_colour_images_come_channels_first(tmp_path):
    class Colour(ImageDataModule):
        dataset, image_shape, num_classes = "colour", (3, 8, 6), 10

    write_data(tmp_path, "colour", shape=(8, 6, 3))
    module = Colour(str(tmp_path), val_size=10)
    module.setup()
    with np.load(tmp_path / "colour.npz") as file:
        assert torch.equal(module.test_set.images[4], torch.from_numpy(file["x_test"][4].transpose(2, 0, 1)))
    assert isinstance(module.train_dataloader(), DataLoader)


def test_mnist5k_is_real_balanced_and_needs_no_download(tmp_path):
    module = MNIST5kDataModule(str(tmp_path))
    module.prepare_data()
    module.setup()
    assert (tmp_path / "mnist5k.npz").exists()
    for dataset, count in ((module.train_set, 350), (module.val_set, 50), (module.test_set, 100)):
        assert torch.bincount(dataset.labels).tolist() == [count] * 10
        assert 0.12 < dataset[:][0].mean() < 0.14  # MNIST's mean pixel is 0.1307
    everything = torch.cat([s.images.flatten(1) for s in (module.train_set, module.val_set, module.test_set)])
    assert len(everything.unique(dim=0)) == 5000


class FakeTorchvision:
    """Stands for torchvision.datasets.MNIST: the same attributes, no network."""

    def __init__(self, root, train, download):
        images, labels = images_and_labels(30 if train else 20)
        self.data, self.targets = torch.from_numpy(images), torch.from_numpy(labels)


def test_the_file_is_made_once_from_torchvision(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.MNIST", FakeTorchvision)
    folder = tmp_path / "new"
    module = loaded(folder, val_size=10)
    assert len(module.train_set) == 20
    assert [path.name for path in folder.iterdir()] == ["mnist.npz"]
    monkeypatch.setattr("torchvision.datasets.MNIST", None)  # not needed again
    loaded(folder, val_size=10)


def test_no_network_says_what_to_do(tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr("torchvision.datasets.MNIST", unreachable)
    with pytest.raises(UsageError, match=r"could not be downloaded.*mnist\.npz.*x_train, y_train"):
        loaded(tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupted(file, **arrays):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez", interrupted)
    with pytest.raises(UsageError, match="No space left"):
        write_arrays(tmp_path / "mnist.npz", {})
    assert not list(tmp_path.iterdir())


def test_crop_and_flip_equals_a_loop_over_images():
    images = torch.randint(256, (40, 3, 8, 6), dtype=torch.uint8)
    torch.manual_seed(3)
    ours = crop_and_flip(images, padding=2)
    torch.manual_seed(3)
    top, left = torch.randint(5, (2, 40, 1)).tolist()
    mirrored = (torch.rand(40, 1) < 0.5).flatten().tolist()
    assert 5 < sum(mirrored) < 35
    for k in range(40):
        expected = torch.zeros(3, 8, 6, dtype=torch.uint8)
        for row in range(8):
            for column in range(6):
                y, x = row + top[k][0] - 2, (5 - column if mirrored[k] else column) + left[k][0] - 2
                if 0 <= y < 8 and 0 <= x < 6:
                    expected[:, row, column] = images[k, :, y, x]
        assert torch.equal(ours[k], expected)


def test_cifar_is_augmented_only_on_request_and_only_for_training(tmp_path):
    write_data(tmp_path, "cifar10", shape=(32, 32, 3))

    def batches(**kwargs):
        module = CIFAR10DataModule(str(tmp_path), val_size=50, batch_size=150, **kwargs)
        module.setup()
        torch.manual_seed(0)
        return next(iter(module.train_dataloader()))[0], next(iter(module.val_dataloader()))[0]

    (plain, val), (augmented, val_too) = batches(), batches(augment=True)
    assert not torch.equal(plain, augmented)
    assert 0 <= augmented.min() <= augmented.max() <= 1
    assert torch.equal(val, val_too)


@pytest.mark.parametrize(
    ("module_class", "name", "source"),
    [
        (FashionMNISTDataModule, "fashion_mnist", "FashionMNIST"),
        (KMNISTDataModule, "kmnist", "KMNIST"),
        (CIFAR10DataModule, "cifar10", "CIFAR10"),
    ],
)
def test_each_data_set_comes_from_its_own_source(tmp_path, monkeypatch, module_class, name, source):
    class Fake:
        def __init__(self, root, train, download):
            shape = (32, 32, 3) if source == "CIFAR10" else (28, 28)
            images, labels = images_and_labels(30 if train else 20, shape)
            self.data = images if source == "CIFAR10" else torch.from_numpy(images)
            self.targets = labels.tolist() if source == "CIFAR10" else torch.from_numpy(labels)

    monkeypatch.setattr(f"torchvision.datasets.{source}", Fake)
    module = module_class(str(tmp_path), val_size=10)
    module.prepare_data()
    module.setup()
    assert (tmp_path / f"{name}.npz").exists()
    assert module.train_set.images.shape == (20, *module.image_shape)


def test_each_data_set_has_its_own_default_of_held_out_images():
    defaults = {MNISTDataModule: 10_000, KMNISTDataModule: 10_000, CIFAR10DataModule: 5_000, MNIST5kDataModule: 500}
    assert {module: module().val_size for module in defaults} == defaults
    assert CIFAR10DataModule(val_size=7).hparams.val_size == 7


def test_mean_pixel_is_that_of_the_training_images(data_dir):
    module = MNISTDataModule(str(data_dir), val_size=50)
    with pytest.raises(UsageError, match="not loaded"):
        _ = module.pixel_mean
    module.setup()
    assert module.pixel_mean == pytest.approx(module.train_set[:][0].double().mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x_train": np.zeros((20, 28, 28))}, "x_train .*holds float64: images must be uint8"),
        ({"y_train": 1 + np.arange(20) % 10}, "y_train .*labels from 1 to 10; they must lie from 0 to 9: subtract 1"),
        (
            {"y_train": np.eye(10, dtype=np.uint8)[np.arange(20) % 10]},
            "y_train .*one-hot labels have: store their argmax",
        ),
        ({"y_test": np.ones(10)}, "y_test .*holds float64: labels must be integers"),
    ],
)
def test_a_file_of_other_pixels_or_labels_is_refused_in_a_sentence(tmp_path, arrays, message):
    good = {"x_train": np.zeros((20, 28, 28), np.uint8), "y_train": np.arange(20) % 10}
    good |= {"x_test": np.zeros((10, 28, 28), np.uint8), "y_test": np.arange(10)}
    np.savez(tmp_path / "mnist.npz", **{**good, **arrays})
    with pytest.raises(UsageError, match=message) as refused:
        loaded(tmp_path, val_size=5)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_file_is_refused_or_read_as_it_was(tmp_path, save):
    path, rng = tmp_path / "small.npz", np.random.default_rng(0)
    arrays = {f"x_{part}": rng.integers(0, 256, (20, 4, 4), np.uint8) for part in ("train", "test")}
    arrays |= {f"y_{part}": np.arange(20) % 10 for part in ("train", "test")}
    save(path, **arrays)
    content, refused = path.read_bytes(), 0
    for _ in range(400):
        damaged = bytearray(content)
        damaged[rng.integers(len(content))] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            read = read_arrays(path, (1, 4, 4), 10)
        except UsageError:
            refused += 1
        else:
            assert all(np.array_equal(read[key].numpy().reshape(array.shape), array) for key, array in arrays.items())
    assert refused > 200


def test_a_data_file_is_found_from_home(data_dir, monkeypatch):
    monkeypatch.setenv("HOME", str(data_dir.parent))
    module = MNISTDataModule(f"~/{data_dir.name}", val_size=50)
    module.prepare_data()
    module.setup()
    assert len(module.train_set) == 150
