"""Pictures of another domain, made from a data set's own."""

import pytest
import torch

from normkit.errors import DataError, SpecError
from normkit.lab.data.dataset import Examples, Pictures
from normkit.lab.data.shifts import SHIFTS, shifted


def pictures(n=6, side=28):
    generator = torch.Generator().manual_seed(0)
    values = torch.zeros(n, 1, side, side, dtype=torch.uint8)
    inner = torch.randint(0, 256, (n, 1, side // 2, side // 2), generator=generator)
    values[:, :, side // 4 : side // 4 + side // 2, side // 4 : side // 4 + side // 2] = inner
    return Pictures(values=values, targets=torch.arange(n))


@pytest.mark.parametrize("name", SHIFTS)
def test_a_shift_depends_on_the_picture_only(name):
    whole, part = shifted(pictures(), name), shifted(pictures().keep(torch.tensor([4, 1])), name)
    assert torch.equal(whole.values[[4, 1]], part.values)
    assert whole.values.dtype == torch.uint8
    assert whole.values.shape == pictures().values.shape
    assert (whole.values != pictures().values).any(dim=(1, 2, 3)).all()
    assert torch.equal(whole.targets, pictures().targets)


def test_inverting_twice_gives_the_picture_back():
    assert torch.equal(shifted(pictures(), "inverted+inverted").values, pictures().values)


def test_a_blurred_picture_keeps_its_mean_and_loses_contrast():
    before, after = pictures().values.double(), shifted(pictures(), "blurred").values.double()
    assert float(after.mean()) == pytest.approx(float(before.mean()), rel=0.01)
    assert float(after.std()) < 0.8 * float(before.std())


def test_turning_moves_a_bright_spot_by_thirty_degrees():
    values = torch.zeros(1, 1, 101, 101, dtype=torch.uint8)
    values[0, 0, 50, 85:90] = 255  # right of the centre
    turned = shifted(Pictures(values=values, targets=torch.zeros(1, dtype=torch.int64)), "rotated")
    row, column = divmod(int(turned.values.flatten().argmax()), 101)
    angle = torch.atan2(torch.tensor(50.0 - row), torch.tensor(column - 50.0)).rad2deg()
    assert abs(float(angle)) == pytest.approx(30, abs=3)


def test_texture_stays_behind_the_object():
    before, after = pictures().values, shifted(pictures(), "textured").values
    assert (after >= before).all()
    assert after[:, :, 0].float().mean() > 50


def test_unknown_shifts_and_pictures_of_another_kind_are_refused():
    with pytest.raises(SpecError, match="there is no shift 'mirrored'; known are inverted"):
        shifted(pictures(), "mirrored")
    examples = Examples(inputs=torch.zeros(2, 1, 4, 4), targets=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(DataError, match="give a folder of target pictures"):
        shifted(examples, "inverted")
