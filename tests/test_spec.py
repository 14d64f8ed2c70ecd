"""Specs: parse, print, resolve, build, refuse."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import normkit as nk
from normkit.recipes import METHODS

TEXTS = (
    "bn", "in", "ln", "gn", "gn:8", "gn:max=8", "pn", "bgn:auto", "bgn:512", "ghost:4",
    "gbgn:8:examples_per_group=2", "gbgn:examples_per_group=none", "bn:momentum=none",
    "bn:affine=false:eps=0.001", "gn:32+ws", "gn:8:track_running_stats",
    "gn:channels=4", "gn:max=32:channels=4", "bcn:channels=8:micro_batch+ws",
    "gn:channels=4:affine=false",
)  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_a_spec_prints_as_it_was_written(text):
    assert str(nk.NormSpec.parse(text)) == text


@given(
    name=st.sampled_from([n for n, m in METHODS.items() if m.argument]),
    number=st.none() | st.integers(1, 4096),
    eps=st.none() | st.floats(0, 1),
    affine=st.none() | st.booleans(),
    suffix=st.sampled_from(["", "+ws"]),
)
def test_any_spec_round_trips(name, number, eps, affine, suffix):
    parts = [name]
    parts += [] if number is None else [str(number)]
    parts += [] if affine is None else [f"affine={str(affine).lower()}"]
    parts += [] if eps is None else [f"eps={eps!r}"]
    spec = nk.NormSpec.parse(":".join(parts) + suffix)
    assert nk.NormSpec.parse(str(spec)) == spec
    assert hash(nk.NormSpec.parse(str(spec))) == hash(spec)
    assert "," not in str(spec)


def test_a_flag_is_an_option_that_is_true():
    flag = nk.NormSpec.parse("in:track_running_stats")
    assert flag == nk.NormSpec.parse("in:track_running_stats=true")
    assert nk.build(flag, 6).track_running_stats


@pytest.mark.parametrize("given", [None, 3])
def test_only_texts_are_read(given):
    with pytest.raises(
        nk.SpecError, match=f"{given} was given as a spec; it must be a string or a NormSpec"
    ):
        nk.build(given, 6)


def test_a_spec_made_by_hand_has_a_known_name():
    with pytest.raises(nk.SpecError, match="names norm 'zz'; the norms are: bn"):
        nk.NormSpec("zz")


def test_short_names_and_order_do_not_matter():
    first = nk.NormSpec.parse("gbgn:examples=2:8")
    assert first == nk.NormSpec.parse("gbgn:8:examples_per_group=2")
    assert first == nk.NormSpec.parse("gbgn:num_groups=8:examples=2")


@pytest.mark.parametrize(
    ("text", "layer"),
    [
        ("bn", nk.BatchNorm(64)),
        ("in", nk.InstanceNorm(64)),
        ("ln", nk.LayerNorm(64)),
        ("gn", nk.GroupNorm(64)),
        ("gn:8", nk.GroupNorm(64, num_groups=8)),
        ("gn:max=7", nk.GroupNorm(64, num_groups=4)),
        ("pn:eps=0.001", nk.PositionalNorm(64, eps=0.001)),
        ("bgn:512", nk.BatchGroupNorm(64, num_groups=512)),
        ("ghost:4:momentum=0.2", nk.GhostBatchNorm(64, ghost_batch_size=4, momentum=0.2)),
        (
            "gbgn:8:examples=2",
            nk.GeneralBatchGroupNorm(64, num_groups=8, examples_per_group=2),
        ),
    ],
)
def test_build_makes_the_layer(text, layer):
    assert repr(nk.build(text, 64)) == repr(layer)
    assert repr(nk.build(nk.NormSpec.parse(text), 64)) == repr(layer)


PAPERS_GROUPS = {128: 512, 96: 256, 64: 256, 32: 128, 16: 64, 8: 16, 4: 2, 2: 1, 1: 1}


@pytest.mark.parametrize(("batch_size", "groups"), PAPERS_GROUPS.items())
def test_auto_follows_the_papers_table(batch_size, groups):
    """Zhou et al., table 2, DARTS for 96, ours for 1, where the map is large enough."""
    spec = nk.NormSpec.parse("bgn:auto").resolve(64, batch_size=batch_size, num_positions=56 * 56)
    assert str(spec) == f"bgn:{groups}"


@pytest.mark.parametrize(
    ("batch_size", "channels", "positions", "expected"),
    [
        (128, 64, 1, "bgn:64"),  # 512 does not divide 64: the largest divisor that does
        (24, 64, 49, "bgn:112"),  # nearest in log2 is 32, whose 128 does not divide 3136
        (1000, 64, 64, "bgn:512"),
        (30, 64, 64, "bgn:128"),
        (110, 64, 64, "bgn:256"),  # nearer to 96 than to 128, by a hair
        (111, 64, 64, "bgn:512"),
        (3, 10, 1, "bgn:2"),  # log2(3) is nearer to 4 than to 2
    ],
)
def test_auto_takes_the_nearest_batch_size_and_the_largest_divisor(
    batch_size, channels, positions, expected
):
    spec = nk.NormSpec.parse("bgn:auto")
    assert str(spec.resolve(channels, batch_size=batch_size, num_positions=positions)) == expected


@pytest.mark.parametrize(
    ("text", "channels", "groups"),
    [
        ("gn:channels=4", 64, 16),
        ("gn:channels=4", 4, 1),
        ("gn:channels=1", 6, 6),
        ("gnplus:channels=8", 64, 8),
        ("bcn:channels=8", 64, 8),
        ("gw:channels=8", 64, 8),
        ("gbgn:channels=8", 64, 8),
        # Qiao et al., table 2: min(32, channels / 4)
        ("gn:max=32:channels=4", 16, 4),
        ("gn:max=32:channels=4", 64, 16),
        ("gn:max=32:channels=4", 128, 32),
        ("gn:max=32:channels=4", 2048, 32),
        # and where that is no divisor, or there are fewer channels than one group has
        ("gn:max=32:channels=4", 30, 6),  # 7 groups are allowed
        ("gn:max=32:channels=4", 144, 24),  # 32 groups are allowed
        ("gn:max=32:channels=4", 3, 1),
    ],
)
def test_channels_of_a_group(text, channels, groups):
    built = nk.build(text, channels)
    assert nk.NormSpec.parse(text).resolve(channels) == nk.NormSpec.parse(
        f"{text.partition(':')[0]}:{groups}"
    )
    assert repr(built) == repr(nk.build(f"{text.partition(':')[0]}:{groups}", channels))


def test_channels_of_a_group_must_make_up_the_layer():
    with pytest.raises(
        nk.PartitionError,
        match=r"gn:channels=4 was given for a layer of 30 channels, which 4 does not divide; "
        r"choose one of \[1, 2, 3, 5, 6, 10, 15, 30\], or also .*: gn:max=32:channels=4$",
    ):
        nk.build("gn:channels=4", 30)


@given(channels=st.integers(1, 512), most=st.integers(1, 64), least=st.integers(1, 64))
def test_max_and_channels_bound_the_groups_from_both_sides(channels, most, least):
    """The largest number that divides, is at most ``most`` and leaves ``least`` channels each."""
    spec = nk.NormSpec.parse(f"gn:max={most}:channels={least}").resolve(channels)
    fits = [g for g in range(1, most + 1) if channels % g == 0 and channels // g >= least]
    assert str(spec) == f"gn:{max(fits, default=1)}"


def test_a_resolved_spec_is_left_alone():
    spec = nk.NormSpec.parse("gn:8")
    assert spec.resolve(64) is spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch", "names norm 'batch'; the norms are: bn, in, ln, gn, pn, bgn, ghost, gbgn"),
        ("gn:x", r"argument 'x'; it must be a whole number of at least 1"),
        ("gn:0", r"argument '0'; it must be a whole number"),
        ("gn:-3", r"argument '-3'; it must be a whole number"),
        ("gn:auto", r"'gn:auto' uses auto, but only these norms have a rule for it: bgn; "),
        ("gn:2:eps", r"argument 'eps'; it must be a whole number"),
        ("bn:8", r"argument '8', but this norm takes no number; its options are: .*momentum="),
        ("gn:groups=8", "sets 'groups'; its options are: .*num_groups"),
        ("ghost:max=8", "sets 'max'; its options are"),
        ("gn:8:4", "sets an option twice"),
        ("gn:8:max=4", "sets an option twice"),
        (
            "gn:8:channels=4",
            "sets both the number of groups and the channels of a group; set only one",
        ),
        ("gn:channels=4:channels=2", "sets an option twice"),
        ("gn:channels=0", "argument 'channels=0'; it must be a whole number of at least 1"),
        ("bgn:channels=4", "sets 'channels'; its options are: .*num_groups"),
        ("bn:channels=4", "sets 'channels'; its options are: .*momentum"),
        ("gn:8+wn", r"ends in \+wn; the only suffix is \+ws"),
        ("gn+ws+ws", r"ends in \+ws\+ws"),
        ("bn:affine=maybe", "argument 'affine=maybe'; the value must be of type bool"),
        ("bn:eps=small", "argument 'eps=small'; the value must be of type float"),
        ("bn:affine=none", "argument 'affine=none'; the value must be of type bool"),
    ],
)
def test_what_cannot_be_read_is_refused(text, message):
    with pytest.raises(nk.SpecError, match=message):
        nk.NormSpec.parse(text)


def test_auto_needs_a_batch_size():
    with pytest.raises(nk.SpecError, match="bgn:auto depends on the batch size; pass batch_size="):
        nk.build("bgn:auto", 64)


def test_weights_cannot_be_standardised_by_one_layer():
    with pytest.raises(
        nk.SpecError, match=r"gn:8\+ws asks for weight .* build the norm with 'gn:8', and call"
    ):
        nk.build("gn:8+ws", 64)


def test_groups_that_do_not_divide_are_refused_not_rounded():
    with pytest.raises(nk.PartitionError, match=r"length 20, which 8 groups .*\[1, 2, 4, 5, 10"):
        nk.build("gn:8", 20)


def test_lists_of_specs():
    assert [str(s) for s in nk.parse_specs("bn, gn:8 ,bgn:auto")] == ["bn", "gn:8", "bgn:auto"]
    with pytest.raises(nk.SpecError, match="names no norm; the norms are: bn"):
        nk.parse_specs(" , ")
    with pytest.raises(nk.SpecError, match="names gn:8 twice"):
        nk.parse_specs("gn:8,bn,gn:num_groups=8")


@pytest.mark.parametrize(
    ("text", "shown", "layer"),
    [
        ("gnplus:32:order=parallel", "gnplus:32:order=parallel", nk.GroupNormPlus),
        ("bcn:32:micro", "bcn:32:micro_batch", nk.BatchChannelNorm),
        ("bcn:max=24", "bcn:16", nk.BatchChannelNorm),
        ("sn", "sn", nk.SwitchableNorm),
        ("gw:32", "gw:32", nk.GroupWhitening),
        ("ibn", "ibn", nk.InstanceBatchNorm),
    ],
)
def test_composites_have_specs(text, shown, layer):
    assert str(nk.NormSpec.parse(text).resolve(64)) == shown
    assert isinstance(nk.build(text, 64), layer)


def test_a_word_that_an_option_does_not_know_is_refused():
    with pytest.raises(nk.SpecError, match="one of: group-first, batch-first, parallel"):
        nk.NormSpec.parse("gnplus:8:order=both")


LARGEST = 2**24


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gn:" + "9" * 90, r"a whole number of at least 1 and at most 16777216"),
        ("gn:" + "9" * 5000, r"a spec of 5003 characters was given, 'gn:9999"),
        ("x" * 100_000, r"a spec of 100000 characters was given"),
        (f"bgn:{LARGEST + 1}", "at most 16777216"),
        ("bgn:99999999999", "at most 16777216"),
        ("gn:max=99999999999", "at most 16777216"),
        ("ghost:10000000000000000000", "at most 16777216"),
        ("gbgn:2:examples=99999999999", "at most 16777216"),
        ("gn:num_groups=99999999999", "at most 16777216"),
        ("gn:\N{SUPERSCRIPT TWO}", "must be a whole number"),
        ("gn:\N{ARABIC-INDIC DIGIT TWO}", "must be a whole number"),
        ("gn:1_0", "must be a whole number"),
        ("gn: 4", "must be a whole number"),
        ("bn:eps=1_0", "must be of type float"),
        ("bn:eps=\N{ARABIC-INDIC DIGIT TWO}", "must be of type float"),
        ("gbgn:2:examples=-1", "must be a whole number"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_numbers_have_bounds_and_are_written_in_plain_digits(text, message):
    with pytest.raises(nk.SpecError, match=message) as refused:
        nk.build(text, 8)
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("bn:eps=nan", nk.OptionError, "eps=nan was given"),
        ("bn:eps=1e999", nk.OptionError, "eps=inf was given"),
        ("bn:momentum=-1", nk.OptionError, "momentum=-1.0 was given"),
        ("bgn:16777216", nk.PartitionError, None),
    ],
)
def test_values_beyond_an_options_rule_are_refused_by_the_layer(text, error, message):
    layer_or_error = pytest.raises(error, match=message)
    with layer_or_error:
        nk.build(text, 8)(torch.zeros(2, 8, 3, 3))


@pytest.mark.parametrize(
    "size",
    [0, -1, 2.5, "8", None, True, 10**30, LARGEST + 1, 10**5000, -(10**5000)],
    ids=lambda size: (
        str(size)[:20] if abs(size if isinstance(size, int) else 0) < 10**99 else "huge"
    ),
)
@pytest.mark.parametrize("name", ["num_features", "batch_size", "num_positions"])
def test_sizes_are_whole_numbers_with_bounds(name, size):
    sizes = {"num_features": 8, "batch_size": 2, "num_positions": 9}
    if size is None and name != "num_features":
        return  # not known
    if name == "batch_size" and size == LARGEST + 1:
        return  # a batch costs a norm nothing
    with pytest.raises(
        (nk.OptionError, nk.SpecError), match=f"{name}=|given as {name}; .* at most"
    ):
        nk.build("bgn:auto", **{"num_features": 8, **sizes, name: size})


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("gn8", "gn:8"),
        ("gn-8", "gn:8"),
        ("GN:8", "gn"),
        ("gn=8", "gn:8"),
        ("group_norm", "gn"),
        ("GroupNorm", "gn"),
        ("BatchNorm2d", "bn"),
        ("bn2", "bn"),
        ("batchgroupnorm", "bgn"),
        ("bgn512", "bgn:512"),
        ("gpn", "pn|gn|bgn"),
    ],
)
def test_a_name_that_is_nearly_right_is_answered_with_the_right_one(text, meant):
    with pytest.raises(nk.SpecError, match=rf"did you mean ({meant})\?$"):
        nk.NormSpec.parse(text)
    assert nk.NormSpec.parse(meant.split("|")[0])


def test_a_name_like_nothing_gets_no_proposal():
    for text in ("", ":8", "8", "qqqq", "\x1b[31m", "\N{GREEK SMALL LETTER GAMMA}"):
        with pytest.raises(nk.SpecError, match=r"the norms are: .*, ibn$"):
            nk.NormSpec.parse(text)


def test_a_spec_made_by_hand_is_checked_when_it_is_built():
    with pytest.raises(nk.SpecError, match="sets colour; its options are: num_groups, eps"):
        nk.NormSpec("gn", (("colour", 1),)).build(8)
    with pytest.raises(nk.OptionError, match="max='many' was given"):
        nk.NormSpec("gn", (("max", "many"),)).build(8)


def test_lists_of_specs_are_texts():
    with pytest.raises(
        nk.SpecError,
        match=r"\['bn'\] was given; a list of specs must be a string such as 'bn,gn:8'",
    ):
        nk.parse_specs(["bn"])


def test_words_are_those_of_the_constructor():
    assert nk.build("bn:activation=relu6", 4).activation == "relu6"
    assert nk.build("gn:2:activation=none", 4).activation is None
    with pytest.raises(nk.SpecError, match=r"'order=up'; .* one of: group-first, batch-first, par"):
        nk.build("gnplus:2:order=up", 4)
    with pytest.raises(nk.SpecError, match=r"'activation=swish'; .* one of: relu, leaky_relu, sil"):
        nk.build("bn:activation=swish", 4)
