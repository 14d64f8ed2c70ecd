"""What Huang et al. say of a stack of norms in their Figs. 2 to 5."""

from normkit.lab.reproduce.preset import Claim
from normkit.lab.reproduce.stack.readings import (
    early,
    gap,
    growth,
    last,
    last_share,
    mean_over_sizes,
    of_norm,
    relative_shift,
    same_layers,
    slope,
)
from normkit.lab.reproduce.tasks.networks import NO_NORM
from normkit.lab.reproduce.tasks.stack import BLOCKED
from normkit.lab.reproduce.verdict import ABOVE, BELOW, Criterion

FIG2 = (
    Claim(
        source="Fig. 2 (a), sec. 4.2.1",
        text="In the first 30 iterations the test error lies above the training error, though the "
        "two sets are equal.",
        quantity="test error - training error, mean over iterations to 30",
        criterion=ABOVE,
        value=lambda arms: gap(arms["bn"]),
    ),
    Claim(
        source="Fig. 2 (b), sec. 4.2.1",
        text="ESM of the means converges to zero.",
        quantity="ESM of the means at the end / its largest, means over layers; zero is less than "
        "a tenth",
        criterion=Criterion(side="below", bound=0.1),
        value=lambda arms: last_share(arms["bn"], "esm_mean"),
    ),
    Claim(
        source="Fig. 2 (c), sec. 4.2.1",
        text="ESM of the standard deviations converges to zero.",
        quantity="ESM of the standard deviations at the end / its largest, means over layers; zero "
        "is less than a tenth",
        criterion=Criterion(side="below", bound=0.1),
        value=lambda arms: last_share(arms["bn"], "esm_std"),
    ),
    Claim(
        source="Fig. 2 (b), sec. 4.2.1",
        text="In the first 30 iterations ESM of the means is larger in deeper layers.",
        quantity="ESM of the means, later half of the layers / earlier half - 1",
        criterion=ABOVE,
        value=lambda arms: growth(early(arms["bn"], "esm_mean")),
    ),
    Claim(
        source="Fig. 2 (c), sec. 4.2.1",
        text="In the first 30 iterations ESM of the standard deviations is larger in deeper "
        "layers.",
        quantity="ESM of the standard deviations, later half of the layers / earlier half - 1",
        criterion=ABOVE,
        value=lambda arms: growth(early(arms["bn"], "esm_std")),
    ),
)

FIG3 = (
    Claim(
        source="Fig. 3 (b), sec. 4.2.1",
        text="The input's shift between training and test set is larger for smaller training sets.",
        quantity="slope of the input's shift over log2 of the size",
        criterion=BELOW,
        value=lambda arms: slope(arms, "bn", lambda v: v["input_shift"]),
    ),
    Claim(
        source="Fig. 3 (b), sec. 4.2.1",
        text="ESM of a model trained on fewer examples is larger.",
        quantity="slope of ESM of the standard deviations (mean over layers) over log2 of the size",
        criterion=BELOW,
        value=lambda arms: slope(arms, "bn", lambda v: last(v, "esm_std").mean()),
    ),
    Claim(
        source="Fig. 3 (b), sec. 4.2.1",
        text="At the end of training ESM is larger in deeper layers: the shift accumulates.",
        quantity="ESM of the standard deviations, later half of the layers / earlier half - 1, "
        "mean over sizes",
        criterion=ABOVE,
        value=lambda arms: mean_over_sizes(
            arms, lambda size: growth(last(of_norm(arms, "bn")[size], "esm_std"))
        ),
    ),
    Claim(
        source="Fig. 3 (a), sec. 4.2.1",
        text="All models reach zero training error.",
        quantity="largest training error over the sizes, at the end; zero is less than 0.01",
        criterion=Criterion(side="below", bound=0.01),
        value=lambda arms: max(v["train_error"][-1] for v in of_norm(arms, "bn").values()),
    ),
    Claim(
        source="Fig. 3 (a), sec. 4.2.1",
        text="The test error is larger for smaller training sets.",
        quantity="slope of the last test error over log2 of the size",
        criterion=BELOW,
        value=lambda arms: slope(arms, "bn", lambda v: v["test_error"][-1]),
    ),
    Claim(
        source="sec. 4.2.1",
        text="On 32 examples the model without norms has a lower test error (57.73 %) than with "
        "BN (73.02 %).",
        quantity="test error of BN - without norms, smallest training set",
        criterion=ABOVE,
        value=lambda arms: (
            next(iter(of_norm(arms, "bn").values()))["test_error"][-1]
            - next(iter(of_norm(arms, NO_NORM).values()))["test_error"][-1]
        ),
    ),
)

FIG4 = (
    Claim(
        source="Fig. 4 (a), sec. 4.2.2",
        text="GNBN makes the gap between training and test error of the first 30 iterations "
        "smaller.",
        quantity="gap of BN - gap of GNBN, mean over iterations to 30",
        criterion=ABOVE,
        value=lambda arms: gap(arms["bn"]) - gap(arms[BLOCKED]),
    ),
    Claim(
        source="Fig. 4 (b), sec. 4.2.2",
        text="With GNBN ESM is nearly the same in all layers during training.",
        quantity="ESM of the standard deviations, later half of the layers / earlier half - 1, "
        "mean over iterations to 30; nearly the same is within a half",
        criterion=Criterion(side="within", bound=0.5),
        value=lambda arms: growth(early(arms[BLOCKED], "esm_std")),
    ),
    Claim(
        source="Fig. 4 (b), sec. 4.2.2",
        text="GN blocks the accumulation: ESM grows less with depth than with BN alone.",
        quantity="growth with depth (as above) of BN - of GNBN",
        criterion=ABOVE,
        value=lambda arms: (
            growth(early(arms["bn"], "esm_std")) - growth(early(arms[BLOCKED], "esm_std"))
        ),
    ),
)

FIG5 = (
    Claim(
        source="Fig. 5 (a), sec. 4.2.2",
        text="ESM of the batch norms of GNBN is lower than that of the same layers of BN.",
        quantity="ESM of the standard deviations of GNBN / of BN - 1, mean over sizes",
        criterion=BELOW,
        value=lambda arms: mean_over_sizes(
            arms, lambda size: relative_shift(*same_layers(arms, size))
        ),
    ),
    Claim(
        source="Fig. 5 (a), sec. 4.2.2",
        text="With GNBN there is no remarkable difference of ESM among layers at the end.",
        quantity="ESM of the standard deviations, later half of the layers / earlier half - 1, "
        "mean over sizes; not remarkable is within a half",
        criterion=Criterion(side="within", bound=0.5),
        value=lambda arms: mean_over_sizes(
            arms, lambda size: growth(last(of_norm(arms, BLOCKED)[size], "esm_std"))
        ),
    ),
    Claim(
        source="Fig. 5 (b), sec. 4.2.2",
        text="GNBN has a lower test error than BN.",
        quantity="test error of GNBN - of BN, mean over sizes",
        criterion=BELOW,
        value=lambda arms: mean_over_sizes(
            arms,
            lambda size: (
                of_norm(arms, BLOCKED)[size]["test_error"][-1]
                - of_norm(arms, "bn")[size]["test_error"][-1]
            ),
        ),
    ),
)
