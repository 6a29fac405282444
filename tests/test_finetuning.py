"""A body from another run, a new head, parts at rest, lower rates, and a resume in between."""

import functools

import pytest
import torch
import yaml
from conftest import write_data
from processes import start, wait

import lightning_danns.cli as cli
from lightning_danns import DANNMLP, MLP, ResNet, StartFrom, Unfreeze, UsageError, load_body_
from lightning_danns.testing import assert_dale

BODY, HEAD = "network.1", "network.3"
SMALL = functools.partial(DANNMLP, hidden_sizes=[12], ni=2)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Data, and body.ckpt of a network with other classes that was trained for an epoch."""
    write_data(tmp_path, n_train=60, n_test=20)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def body(folder):
    torch.manual_seed(7)
    model = SMALL(num_classes=4)
    torch.save(model.state_dict(), "body.ckpt")
    return model.state_dict()


def test_a_layer_is_filled_as_a_whole_or_not_at_all(body):
    model = SMALL(num_classes=6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert load_body_(model, "body.ckpt") == [HEAD]
    for name, value in model.state_dict().items():
        assert torch.equal(value, body[name] if name.startswith(BODY) else before[name]), name
    assert body[f"{HEAD}.Wix"].shape == before[f"{HEAD}.Wix"].shape  # would fit by itself
    assert_dale(model)


def test_what_fits_can_be_left_and_buffers_and_parametrised_weights_are_taken(body):
    model = SMALL(num_classes=4)
    assert load_body_(model, "body.ckpt", leave=[HEAD]) == [HEAD]
    assert not torch.equal(model.state_dict()[f"{HEAD}.Wex"], body[f"{HEAD}.Wex"])
    for norm in ("batch", "centred", "centred_batch"):
        torch.manual_seed(1)
        net, other = (ResNet(input_shape=(3, 8, 8), num_classes=n, norm=norm) for n in (3, 5))
        net(torch.rand(4, 3, 8, 8))  # moves the running statistics
        torch.save({"state_dict": net.state_dict()}, "net.ckpt")
        head = f"network.{len(net.network) - 1}"
        assert load_body_(other, "net.ckpt") == [head]
        same = [torch.equal(v, other.state_dict()[k]) for k, v in net.state_dict().items() if head not in k]
        assert all(same)
        assert len(same) > 40


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("none.ckpt", {}, r"none\.ckpt does not exist"),
        ("text.ckpt", {}, r"text\.ckpt cannot be read"),
        ("list.ckpt", {}, r"list\.ckpt cannot be read"),
        ("other.ckpt", {}, r"no layer of this DANNMLP.*network\.1\.Wex.*network\.1\.weight"),
        ("body.ckpt", {"leave": ["head"]}, "leave names 'head'"),
    ],
)
def test_what_cannot_be_loaded_is_refused_by_name(body, path, options, message):
    with open("text.ckpt", "w") as file:
        file.write("not a checkpoint")
    torch.save([1], "list.ckpt")
    torch.save(MLP(hidden_sizes=[12]).state_dict(), "other.ckpt")
    with pytest.raises(UsageError, match=message):
        load_body_(SMALL(), path, **options)


def fit(run_dir, *args, devices=1):
    config = {
        "class_path": "DANNMLP",
        "init_args": {
            "hidden_sizes": [12],
            "ni": 2,
            "rates": {"network": 0.1, HEAD: 1.0},
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.9}},
        },
    }
    callbacks = [
        {"class_path": "lightning_danns.StartFrom", "init_args": {"path": "body.ckpt"}},
        {"class_path": "lightning_danns.Unfreeze", "init_args": {"names": ["network"], "but": [HEAD], "epoch": 2}},
    ]
    with open("finetune.yaml", "w") as file:
        yaml.safe_dump({"model": config, "trainer": {"callbacks": callbacks}}, file)
    return cli.main([
        "fit", "--config=finetune.yaml", "--data=MNISTDataModule", "--data.data_dir=.", "--data.val_size=10",
        "--data.batch_size=10", "--seed_everything=1", f"--run_dir={run_dir}", "--ckpt_path=last",
        "--last_checkpoint.every_n_train_steps=2", "--trainer.accelerator=cpu", f"--trainer.devices={devices}",
        "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.max_epochs=4", *args,
    ])  # fmt: skip


def test_a_body_rests_until_its_epoch_then_learns_at_its_rate(folder, body):
    resting = fit("run", "--trainer.max_epochs=2").model.state_dict()
    for name in body:
        assert torch.equal(resting[name], body[name]) == name.startswith(BODY) or name == f"{HEAD}.b"
    made = fit("run", "--trainer.max_epochs=3")
    assert not torch.equal(made.model.state_dict()[f"{BODY}.Wex"], body[f"{BODY}.Wex"])
    rates = {group["name"]: group["lr"] / group["lr_scale"] for group in made.trainer.optimizers[0].param_groups}
    assert rates[f"{BODY}.Wei"] == pytest.approx(0.01)
    assert rates[f"{HEAD}.Wei"] == pytest.approx(0.1)
    assert_dale(made.model)


@pytest.mark.parametrize("stop", [3, 9, 10, 13])  # resting, before and at the unfreezing, after
def test_a_fit_that_goes_on_from_its_checkpoint_ends_as_if_never_stopped(folder, body, stop):
    fit("straight")
    fit("run", f"--trainer.max_steps={stop}")
    (folder / "body.ckpt").unlink()  # needed for the first start only
    fit("run")
    straight, again = (torch.load(f"{run}/checkpoints/last.ckpt") for run in ("straight", "run"))
    assert straight["global_step"] == again["global_step"] == 20
    assert all(torch.equal(value, again["state_dict"][name]) for name, value in straight["state_dict"].items())
    momenta = [c["optimizer_states"][0]["state"] for c in (straight, again)]
    assert len(momenta[0]) == len(momenta[1]) == len(body)
    assert all(torch.equal(momenta[0][k]["momentum_buffer"], momenta[1][k]["momentum_buffer"]) for k in momenta[0])


def test_processes_rest_and_unfreeze_together(folder, body):
    def work(rank):
        made = fit("run", "--trainer.strategy=ddp_find_unused_parameters_true", devices=2)
        torch.save(made.model.state_dict(), f"{rank}.pt")

    assert wait(start(work, 2), timeout=120) == [0, 0]
    ends = [torch.load(f"{rank}.pt") for rank in range(2)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert not torch.equal(ends[0][f"{BODY}.Wex"], body[f"{BODY}.Wex"])


def test_a_first_start_without_the_body_is_refused(folder, capsys):
    with pytest.raises(SystemExit):
        fit("run")
    assert "checkpoint body.ckpt does not exist" in capsys.readouterr().err


def test_two_lines_of_python_do_the_same(folder, body, make_trainer):
    from lightning_danns import MNISTDataModule

    model = SMALL(rates={"network": 0.1, HEAD: 1.0}, optimizer=functools.partial(torch.optim.SGD, lr=0.1))
    callbacks = [StartFrom("body.ckpt"), Unfreeze(["network"], epoch=1, but=[HEAD])]
    make_trainer(callbacks=callbacks).fit(model, datamodule=MNISTDataModule(".", val_size=10))
    assert torch.equal(model.state_dict()[f"{BODY}.Wex"], body[f"{BODY}.Wex"])
    assert not torch.equal(model.state_dict()[f"{HEAD}.Wix"], body[f"{HEAD}.Wix"])
