"""Video recognition: shifts, sampling of frames, data, and runs."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from normkit.errors import DataError, SpecError
from normkit.lab.data.frames import SOMETHING, num_frames_of, read_clips, read_something, segments
from normkit.lab.loading import Loading
from normkit.lab.models.build import build_model
from normkit.lab.models.video import FrameMean, shifted, tsm
from normkit.lab.spec import Protocol, TrainingSpec
from normkit.lab.task import parse_task
from normkit.lab.tasks.video import ClipExamples
from normkit.lab.train import run

PROTOCOL = Protocol(
    data="clips:items=digits:side=20:test=10", model="small-resnet:width=8:blocks=1:stages=2",
    limit=12, epochs=1, task="video",
)  # fmt: skip


def shifted_by_definition(x, num_frames):
    found = torch.zeros_like(x)
    part = x.shape[1] // 8
    for at in range(len(x)):
        t = at % num_frames
        for c in range(x.shape[1]):
            from_frame = t + 1 if c < part else t - 1 if c < 2 * part else t
            if 0 <= from_frame < num_frames:
                found[at, c] = x[at - t + from_frame, c]
    return found


@pytest.mark.parametrize("channels", [8, 19, 4])  # a share, a rest, and no channel to shift
def test_shifts_match_their_definition(channels):
    x = torch.randn(6, channels, 2, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(shifted(x, 3), shifted_by_definition(x, 3))


def test_blocks_begin_with_a_shift_and_keep_the_names_of_their_weights():
    plain = build_model("torchvision:resnet18", num_classes=3, input_shape=(3, 32, 32)).model
    names = list(plain.state_dict())
    network = tsm(plain, 4, "resnet18")
    assert isinstance(network, FrameMean)
    assert list(network.network.state_dict()) == names
    hooked = [n for n, m in network.named_modules() if m._forward_pre_hooks]
    assert hooked == [f"network.layer{s}.{b}.conv1" for s in range(1, 5) for b in range(2)]
    assert network.eval()(torch.zeros(2, 4, 3, 32, 32)).shape == (2, 3)


def test_the_order_of_frames_counts():
    plain = build_model(PROTOCOL.model, num_classes=3, input_shape=(1, 16, 16), seed=1).model
    clip = torch.randn(1, 4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    without = FrameMean(plain).eval()
    assert torch.allclose(without(clip), without(clip.flip(1)), atol=1e-6)
    network = tsm(plain, 4, "mine").eval()
    assert not torch.allclose(network(clip), network(clip.flip(1)), atol=1e-4)


def test_a_network_without_blocks_is_refused():
    with pytest.raises(SpecError, match=r"model mine has no residual blocks with conv1 and conv2"):
        tsm(nn.Sequential(nn.Conv2d(1, 1, 1)), 4, "mine")


@pytest.mark.parametrize(
    ("num_frames", "number", "expected"),
    [(8, 8, [0, 1, 2, 3, 4, 5, 6, 7]), (20, 4, [2, 7, 12, 17]), (3, 6, [0, 0, 1, 1, 2, 2])],
)
def test_the_middle_of_each_segment_is_taken(num_frames, number, expected):
    assert segments(num_frames, number).tolist() == expected


def test_a_random_frame_of_each_segment_is_taken():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        found = segments(20, 4, torch.rand(4, generator=generator))
        assert [int(at) // 5 for at in found] == [0, 1, 2, 3]
    assert segments(20, 4, torch.full((4,), 0.9999)).tolist() == [4, 9, 14, 19]


def write_clip(folder, num_frames):
    """Frames whose pixels differ, so that a crop is another picture."""
    folder.mkdir(parents=True)
    for at in range(num_frames):
        picture = np.arange(at, at + 360, dtype=np.int64).astype(np.uint8).reshape(10, 12, 3)
        Image.fromarray(picture).save(folder / f"{at:03}.png")


@pytest.fixture
def own(tmp_path):
    for name in ("fall", "rise"):
        for at in range(20):
            write_clip(tmp_path / "train" / name / f"clip{at}", 3 + at % 2)
    read_clips.cache_clear()
    return tmp_path


def test_a_folder_of_clips_is_read(own):
    found = read_clips(own, 8)
    assert found.class_names == ("fall", "rise")
    assert (len(found.train), len(found.validation), len(found.test)) == (36, 2, 2)
    clip = found.train[0]
    assert num_frames_of(clip) in (3, 4)
    batch = ClipExamples(found.train, 6).take(torch.arange(3))
    assert batch.inputs.shape == (3, 6, 3, 8, 8)
    assert set(batch.targets.tolist()) <= {0, 1}


def fingerprint(folder):
    read_clips.cache_clear()
    return read_clips(folder, 8).fingerprint


def test_another_frame_of_the_same_size_is_another_data_set(own, tmp_path_factory):
    first = fingerprint(own)
    copied = shutil.copytree(own, tmp_path_factory.mktemp("copy") / "own")
    assert fingerprint(copied) == first
    frame = own / "train" / "rise" / "clip3" / "000.png"
    content = bytearray(frame.read_bytes())
    content[-20] ^= 1  # in the compressed pixels
    frame.write_bytes(content)
    assert fingerprint(own) != first
    (copied / "train" / "rise" / "clip3").rename(copied / "train" / "fall" / "clip33")
    assert fingerprint(copied) != first


def test_a_limit_keeps_every_class(own):
    found = read_clips(own, 8)
    first = ClipExamples(found.train, 2).take(torch.arange(10)).targets
    assert sorted(first.bincount().tolist()) == [5, 5]


def test_empty_clips_and_classes_are_refused_in_a_sentence(own):
    empty = own / "train" / "rise" / "nothing"
    empty.mkdir()
    with pytest.raises(DataError, match=r"the clip .*nothing has no frames; put pictures there"):
        read_clips(own, 8)
    empty.rmdir()
    (own / "train" / "third").mkdir()
    with pytest.raises(DataError, match=r"third has no folders; give one for each clip"):
        read_clips(own, 8)
    with pytest.raises(DataError, match=r"gone is no folder; give one with train/CLASS/CLIP"):
        read_clips(own / "gone", 8)


def test_something_something_is_read_by_its_lists(tmp_path):
    read_something.cache_clear()
    (tmp_path / f"{SOMETHING}-labels.csv").write_text("Pushing a thing\nLifting a thing\n")
    rows = [f"{at};{'Pushing' if at % 2 else 'Lifting'} a thing" for at in range(40)]
    (tmp_path / f"{SOMETHING}-train.csv").write_text("\n".join(rows))
    (tmp_path / f"{SOMETHING}-validation.csv").write_text("7;Lifting a thing\n")
    for at in range(40):
        write_clip(tmp_path / f"20bn-{SOMETHING}" / str(at), 1)
    found = read_something(tmp_path, 8)
    assert (len(found.train), len(found.validation), len(found.test)) == (38, 2, 1)
    assert found.test[0].label == 1
    rows[:2] = ["1;Lifting a thing", "0;Pushing a thing"]  # as many of each class as before
    (tmp_path / f"{SOMETHING}-train.csv").write_text("\n".join(rows))
    read_something.cache_clear()
    assert read_something(tmp_path, 8).fingerprint != found.fingerprint
    (tmp_path / f"{SOMETHING}-validation.csv").write_text("7;Eating a thing\n")
    read_something.cache_clear()
    with pytest.raises(DataError, match=r"names the class Eating a thing, which the list of label"):
        read_something(tmp_path, 8)


def test_frames_are_changed_equally_by_equal_seeds(own):
    examples = ClipExamples(read_clips(own, 8).train, 2)
    order = [torch.tensor([0, 1])]
    first, again, other = (
        next(examples.batches(order, Loading(("crop",), seed))) for seed in (1, 1, 3)
    )
    assert torch.equal(first.inputs, again.inputs)
    assert not torch.equal(first.inputs, other.inputs)


@pytest.mark.parametrize("norm", ["bn", "gn:2+ws"])
def test_a_network_is_trained_on_clips(norm):
    record = run(TrainingSpec(protocol=PROTOCOL, norm=norm, batch_size=2, seed=1))
    assert record.outcome.status == "finished", record.outcome.message
    assert set(record.outcome.scores) == {"accuracy", "top5_accuracy"}
    assert record.outcome.norms[0].name == "network.1"


def test_groups_over_the_batch_count_frames():
    task = parse_task("video:frames=4")
    spec = TrainingSpec(protocol=PROTOCOL, norm="bgn:auto", batch_size=8)
    data = task.data(PROTOCOL)
    of_frames = task.build(spec, data).norms[0].norm
    plain = build_model(
        PROTOCOL.model, num_classes=10, input_shape=(1, 20, 20), norm="bgn:auto", batch_size=32
    )
    assert of_frames == plain.norms[0].norm
