import pytest
import torch

from normkit.lab.data import load
from normkit.lab.models import build_model


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Weights of a network that has learned a little, with statistics that are a little wrong."""
    data = load("digits").train
    torch.manual_seed(0)
    model = build_model("small-resnet", num_classes=10, input_shape=(1, 8, 8)).model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for index in torch.arange(300).split(30):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(data.inputs[index]), data.targets[index]).backward()
        optimizer.step()
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.mul_(3)
    path = tmp_path_factory.mktemp("weights") / "weights.pt"
    torch.save(model.state_dict(), path)
    return str(path)
