"""BatchNorm fails me at batch 2.

Your model trains with 32 images, and memory or the task leaves room for two. Here is how to see
whether its norms are to blame, and which norm would do.

    python examples/batch_of_two.py
"""

import tempfile

from torch import nn

import normkit as nk
from normkit.lab import Recipe, compare

# %% A model of your own
# Any function that makes an `nn.Module`. This one has batch norms over maps, and one over a flat
# vector, as many heads have.


def make_model():
    def stage(num_in, num_out):
        convolution = nn.Conv2d(num_in, num_out, 3, stride=2, padding=1, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(num_out), nn.ReLU())

    head = nn.Sequential(nn.Linear(32, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU())
    body = nn.Sequential(stage(1, 16), stage(16, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(body, head, nn.Linear(32, 10))


# %% Ask before you train
# `nk.validate` sends one forward through the model, and says what is wrong with its norms at your
# batch size.

print(nk.validate(make_model(), batch_size=2, input_shape=(1, 8, 8)))

# > warning: few examples (3 layers)
# >   0.0.1: training takes its statistics over 2 examples, 32 values a group
# >   0.1.1: training takes its statistics over 2 examples, 8 values a group: the deviation is off by 25% at best
# >   1.1: training takes its statistics over 2 examples, 2 values a group: the deviation is off by 50% at best
# >   why: statistics of few examples vary from batch to batch, and evaluation uses others; on ImageNet batch norm fell from 76.8 % at 64 examples to 72.8 % at 4 and 66.5 % at 2 (Zhou et al., table 2)
# >   fix (the first one's): nk.convert_norm_(model, "gn:max=32"); nk.recommend(2) names more
# > note: last batch of one
# >   1.1: a batch of one example has one value in a group
# >   why: training refuses it if an epoch's last batch is one example
# >   fix: pass drop_last=True to the DataLoader
# > 0 errors, 3 warnings, 1 note

# %% Measure it
# `compare` trains the model with each norm, from equal weights and in equal order of the data, and
# judges the differences seed by seed. The data are scikit-learn's digits. `gn:8` is group norm with
# 8 groups, `ln` layer norm; `normkit list` has all of them.

result = compare(
    make_model,
    "digits",
    norms=["bn", "gn:8", "ln"],
    batch_sizes=[2],
    seeds=[1, 2, 3, 4],
    limit=400,
    recipe=Recipe(epochs=2),
    out=tempfile.mkdtemp(),
)
print(result)

# > gn:8 is ahead of bn at batch size 2; ln is ahead of bn at batch size 2.
# > gn:8 is ahead of bn at batch size 2 (+27.09 points, 95 % interval +5.87 to +48.30, 4 seeds).
# > ln is ahead of bn at batch size 2 (+36.07 points, 95 % interval +14.28 to +57.86, 4 seeds).
# > Intervals are of the differences to bn, seed by seed; with 95 % confidence both hold together (Student's t, Bonferroni).
# >
# > norm       batch 2
# > bn    39.62 ± 6.61
# > gn:8  66.71 ± 4.26
# > ln    75.70 ± 4.75

# %% What to do with it
# With two images, all that the head's batch norm passes on of a feature is which of the two images
# has more of it. `gn:8` and `ln` normalise each image by itself; both are ahead, and the intervals
# do not contain zero. With more images at a time the order can be another: `batch_sizes=[2, 8, 32]`
# compares at three batch sizes. `result.report()` is the path of a page with charts for your
# browser. The same on the command line, for your file and your pictures:
#
#     normkit compare --model my.py:make_model --data folder:photos --norms bn,gn:8,ln --batch-sizes 2,8,32
#
# Build your model with a norm that is ahead:

model = make_model()
print(nk.convert_norm_(model, "ln"))

# > converted 3 of 3 norms
# >   name   old              new  carried       lost
# >   0.0.1  BatchNorm2d(16)  ln   weight, bias  running statistics
# >   0.1.1  BatchNorm2d(32)  ln   weight, bias  running statistics
# >   1.1    BatchNorm1d(32)  ln   weight, bias  running statistics
