"""The doctor on detectors, whose batches are lists of pictures and of targets."""

import pytest
import torch
from torch import nn

import normkit as nk
from detectors import batches, built
from normkit.doctor.detectors import SEED, are_of_detectors, losses_of_pictures
from normkit.errors import DataError


def loss_by_definition(model, picture, target):
    """All modules in training mode but norms, and what resizes pictures, at random in training."""
    model.train().transform.eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    torch.manual_seed(SEED)
    with torch.no_grad():
        return sum(model([picture], [target]).values()).item()


@pytest.mark.parametrize("norm", ["bn", "gn:2+ws"])
def test_losses_are_the_detectors_own_for_each_picture(norm):
    model, data = built(norm).model, batches(1, size=3)[0]
    expected = [loss_by_definition(model, *pair) for pair in zip(*data, strict=True)]
    assert len({*expected}) == 3
    model.eval()
    state = torch.get_rng_state()
    with torch.no_grad():
        found = losses_of_pictures(model, data)
    assert found.tolist() == pytest.approx(expected, rel=1e-6)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in model.modules())


def test_a_detector_is_diagnosed_by_its_own_losses_without_being_told_how():
    model, data = built("bn").model, batches(2, size=4)
    nk.recalibrate(model, data).apply()
    norm = model.get_submodule("backbone.body.1")
    norm.running_mean.fill_(1e4)  # nothing is left of the picture but noise
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = nk.diagnose(model, data, data)
    states = {state.name: state for state in found.states}
    losses = [
        loss_by_definition(model, *pair) for batch in data for pair in zip(*batch, strict=True)
    ]
    assert states["as the model is"].loss == pytest.approx(sum(losses) / 8, rel=1e-5)
    assert states["as the model is"].accuracy is None
    assert "measured anew on the training data" in states
    assert found.num_judged == 8
    assert any("losses of a detector are taken of one picture" in note for note in found.notes)
    assert max(found.layers, key=lambda row: row.mean_shift).name == "backbone.body.1"
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


class Silent(nn.Module):
    def forward(self, images: list[torch.Tensor], targets=None):
        return [image.mean() for image in images]


def test_a_model_that_gives_no_losses_is_answered_in_a_sentence():
    with pytest.raises(DataError, match=r"gave a list for a picture .* pass loss= and forward="):
        losses_of_pictures(Silent(), batches(1)[0])


def test_batches_of_detectors_are_told_from_others():
    picture, target = torch.zeros(1, 4, 4), {"boxes": torch.zeros(0, 4)}
    assert are_of_detectors([([picture], [target])])
    others = [
        (picture, torch.tensor([1])),
        {"x": picture},
        picture,
        ([picture],),
        ([], []),
        ([picture], [1]),
    ]
    assert not any(are_of_detectors([batch]) for batch in others)
    assert not are_of_detectors([])
