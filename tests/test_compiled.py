"""The callback that compiles a network while it is trained."""

import copy

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_danns import Compiled, DANNConvNet, DANNResNet, UsageError
from lightning_danns.testing import assert_dale


@pytest.fixture(autouse=True)
def anew():
    """torch compiles eight networks of one class, and gives up on the next."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def images(low=0.0, n=12):
    torch.manual_seed(0)
    return DataLoader(TensorDataset(low + torch.rand(n, 3, 32, 32), torch.randint(10, (n,))), batch_size=4)


class Graphs(list):
    """A backend that runs each graph as it stands, and keeps it."""

    def __call__(self, graph, inputs):
        self.append(graph)
        return graph.forward


@pytest.mark.parametrize("options", [{}, {"norm": "batch"}, {"balanced": False}])
def test_a_compiled_fit_takes_the_network_whole_and_ends_with_the_same_weights(options, make_trainer, tmp_path):
    torch.manual_seed(0)
    plain = DANNConvNet(channels=[4, 4], hidden_sizes=[8], input_shape=(3, 32, 32), **options)
    compiled, graphs = copy.deepcopy(plain), Graphs()
    make_trainer(precision="64-true").fit(plain, images())
    trainer = make_trainer(callbacks=[Compiled(graphs)], precision="64-true")
    trainer.fit(compiled, images())
    assert len(graphs) == 1
    assert len([node for node in graphs[0].graph.nodes if node.target is torch.conv2d]) >= 2
    assert_dale(compiled)
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], weight, rtol=1e-9, atol=1e-12)
    trainer.save_checkpoint(tmp_path / "compiled.ckpt")
    DANNConvNet.load_from_checkpoint(tmp_path / "compiled.ckpt")


def test_a_deep_network_is_one_graph(make_trainer):
    """Also of torch before 2.14, which takes nn.Sequential apart and gives up after eight of its layers."""
    graphs = Graphs()
    model = DANNResNet(depth=20, input_shape=(3, 32, 32), norm="batch")
    make_trainer(callbacks=[Compiled(graphs)], precision="bf16-mixed").fit(model, images(n=8))
    assert len(graphs) == 1


def test_the_first_batch_is_still_checked(make_trainer):
    with pytest.raises(UsageError, match="but its inputs must be >= 0"):
        make_trainer(callbacks=[Compiled("eager")]).fit(DANNConvNet(input_shape=(3, 32, 32)), images(low=-1.0))


def test_a_module_without_a_network_is_refused(make_trainer):
    class Other(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def training_step(self, batch, batch_idx):
            return self.layer(batch).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(UsageError, match="Other has no network: compile the module yourself"):
        make_trainer(callbacks=[Compiled("eager")]).fit(Other(), DataLoader(torch.rand(4, 3)))


def test_an_unknown_backend_is_refused():
    with pytest.raises(UsageError, match=r"backend='nope': torch.compile has .*inductor"):
        Compiled("nope")
