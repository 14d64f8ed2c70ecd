"""One of the processes that share an evaluation: ``python -m lab.tasks.evaluating RANK SIZE ...``.

Each forward waits for the others, as those of a network do that FSDP has shared out.
"""

import sys

import torch
import torch.distributed as dist

from distributed.processes import work
from normkit.lab.data.annotated import Annotated, Drawn, Mapped, Part
from normkit.lab.data.clips import Clip
from normkit.lab.tasks.detection import average_precisions
from normkit.lab.tasks.segmentation import pixel_scores
from normkit.lab.tasks.video import ClipExamples, clip_scores

CPU = torch.device("cpu")


def drawn(draw, number):
    return Part.of(Drawn(draw, number))


def mapped(at):
    generator = torch.Generator().manual_seed(at)
    size = (4 + at, 5)  # each picture has its own size
    return Mapped(
        picture=torch.rand(1, *size, generator=generator),
        classes=torch.randint(3, size, generator=generator),
    )


def annotated(at):
    """Two boxes in a picture that says its number."""
    boxes = torch.tensor([[1.0, 1, 9, 9], [10, 10, 18, 19]])
    masks = torch.zeros(2, 20, 20, dtype=torch.bool)
    masks[0, 1:9, 1:9] = masks[1, 10:19, 10:18] = True
    picture = torch.full((1, 20, 20), at / 16)
    return Annotated(picture=picture, boxes=boxes, labels=torch.tensor([1, 2]), masks=masks)


def clip(at):
    frames = torch.full((2, 1, 3, 3), at, dtype=torch.uint8)
    return Clip(frames=frames, label=at % 3)


def with_others(model, size):
    """A network whose forward the other processes take part in."""

    def forward(inputs):
        if size > 1:
            dist.all_reduce(torch.ones(1))
        return model(inputs)

    return forward


def pixels(x):
    return torch.cat([x, 0.3 - x, x * x], 1)


def boxes(pictures):
    """Boxes that are the further off, the larger a picture's number is."""
    found = []
    for picture in pictures:
        at = float(picture[0, 0, 0]) * 16
        shift = 0.4 * at
        corners = torch.tensor([[1 + shift, 1, 9 + shift, 9], [10, 10, 18, 19 - shift / 2]])
        masks = torch.zeros(2, 1, 20, 20)
        masks[0, 0, 1:9, 1 + round(shift) : 9] = 1
        masks[1, 0, 10:19, 10:18] = 1
        scores = torch.tensor([0.9 - 0.05 * at, 0.31 + 0.05 * at])
        found.append(
            {"boxes": corners, "scores": scores, "labels": torch.tensor([1, 2]), "masks": masks}
        )
    return found


def classes(x):
    return x.mean((1, 2, 3, 4), keepdim=False)[:, None] * torch.tensor([[1.0, -1.0, 0.5]])


def segmentation(rank, size, number=5):
    model = with_others(pixels, size)
    return pixel_scores(model, drawn(mapped, number), 3, CPU, (rank, size))


def detection(rank, size, number=5):
    model = with_others(boxes, size)
    return average_precisions(model, drawn(annotated, number), CPU, (rank, size), masks=True)


def video(rank, size, number=19):
    examples = ClipExamples(drawn(clip, number), 2)
    return clip_scores(with_others(classes, size), examples, 3, CPU, (rank, size))


def few(rank, size):
    """One picture for several processes."""
    found = segmentation(rank, size, 1)
    return found | {f"boxes {n}": v for n, v in detection(rank, size, 1).items()}


JOBS = {each.__name__: each for each in (segmentation, detection, video, few)}

if __name__ == "__main__":
    work(JOBS, *sys.argv[1:])
