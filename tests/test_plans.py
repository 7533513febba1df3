"""Bit plans as users write them: what they mean, and what each error says."""

import pytest
import torch

from think_compile import think_compile
from think_compile.config import ThinkConfig
from think_compile.formats.plan import Plan

ALLOWED_BITS = "16, 8, 4, 2"
SIDES = pytest.mark.parametrize("side", ["keys", "values"])


def plan_of(given, side="keys"):
    return getattr(ThinkConfig(**{side: given}), side)


# ------------------------------------------------------------------ what is understood


@pytest.mark.parametrize(
    ("given", "tiers"),
    [
        (4, ((4, 1.0),)),
        ("4", ((4, 1.0),)),
        ({8: 0.25, 4: 0.75}, ((8, 0.25), (4, 0.75))),
        ({4: 0.75, 8: 0.25}, ((8, 0.25), (4, 0.75))),
        ("8:0.25+4:0.75", ((8, 0.25), (4, 0.75))),
        ("4:0.75+8:0.25", ((8, 0.25), (4, 0.75))),
        ({16: 1}, ((16, 1.0),)),
        ({4: 0.5}, ((4, 0.5),)),
        ({8: 0.1, 4: 0.2, 2: 0.7}, ((8, 0.1), (4, 0.2), (2, 0.7))),  # adds up to 1 but for rounding
    ],
    ids=str,
)
@SIDES
def test_plans(side, given, tiers):
    plan = plan_of(given, side)
    assert plan.tiers == tiers
    assert plan == plan_of(dict(tiers), side) and hash(plan) == hash(plan_of(dict(tiers), side))
    assert plan_of(str(plan), side) == plan_of(plan, side) == plan  # a plan can be printed and given again


@pytest.mark.parametrize(
    ("name", "keys", "values"),
    [
        ("lossless", {8: 1}, {8: 1}),
        ("balanced", {8: 0.25, 4: 0.75}, {4: 1}),
        ("small", {4: 0.5, 2: 0.5}, {4: 1}),
    ],
)
def test_named_plans(name, keys, values):
    config = ThinkConfig(keys=name, values=name)
    assert config.keys == plan_of(keys) and config.values == plan_of(values)


def test_a_plan_does_not_change_with_the_users_mapping():
    given = {8: 0.25, 4: 0.75}
    config = ThinkConfig(keys=given)
    given[8] = 1
    assert config.keys == plan_of("8:0.25+4:0.75")
    assert hash(config) == hash(ThinkConfig(keys="8:0.25+4:0.75"))


@pytest.mark.parametrize(
    ("given", "ratio", "sinks"),
    [
        ({}, 0.5, 0),
        ({"keys": {16: 0.5}}, 0.0, 0),
        ({"keys": 4}, 0.0, 4),
        ({"values": 4}, 0.5, 4),
        ({"values": 4, "ratio": 0.25}, 0.25, 4),
        ({"keys": 4, "ratio": 0}, 0, 4),
        ({"keys": 4, "sinks": 0}, 0.0, 0),
        ({"keys": {16: 0.5}, "sinks": 2}, 0.0, 2),
    ],
    ids=str,
)
def test_defaults_that_depend_on_the_plans(given, ratio, sinks):
    config = ThinkConfig(**given)
    assert (config.ratio, config.sinks) == (ratio, sinks)


@pytest.mark.parametrize(
    ("given", "width", "multiple", "counts"),
    [
        ("8:0.25+4:0.75", 128, 16, ((8, 32), (4, 96))),
        ("8:0.25+4:0.75", 32, 16, ((8, 16), (4, 16))),  # 8 rounded up to 16; the rest
        ("8:0.25+4:0.75", 32, 1, ((8, 8), (4, 24))),
        ("4:0.5+2:0.25", 32, 1, ((4, 16), (2, 8))),
        ("4:0.5+2:0.25", 32, 16, ((4, 16), (2, 16))),  # 24 kept channels rounded up to 32
        ("4:0.3", 100, 1, ((4, 30),)),
        ("4:0.7", 10, 1, ((4, 7),)),
        ("8:0.5+4:0.5", 16, 16, ((8, 16),)),  # nothing is left for the last tier
    ],
)
def test_channels_of_each_tier(given, width, multiple, counts):
    assert plan_of(given).counts(width, multiple) == counts


def test_ratio_and_its_plan_keep_the_same_number_of_channels():
    for ratio in (0.0, 0.1, 0.25, 0.3, 0.5, 0.6, 0.7, 0.9):
        for width in (16, 33, 64, 80, 128):
            for multiple in (1, 16):
                kept = ThinkConfig(ratio, channel_multiple=multiple).kept_channels(width)
                assert plan_of({16: 1 - ratio}).counts(width, multiple) == ((16, kept),), (ratio, width, multiple)


# ------------------------------------------------------------------ what is refused

# given, the error, what its message must say: the value given, and what is allowed
BAD_PLANS = [
    ({8: 0.5, 4: 0.75}, ValueError, ["{8: 0.5, 4: 0.75}", "1.25", "must not exceed 1"]),
    ("8:0.5+4:0.75", ValueError, ["8:0.5+4:0.75", "1.25", "must not exceed 1"]),
    ("4+4", ValueError, ["4+4"]),
    ({8: 1.5}, ValueError, ["1.5", "(0, 1]"]),
    ({3: 1.0}, ValueError, ["3 bits", ALLOWED_BITS]),
    (3, ValueError, ["3 bits", ALLOWED_BITS]),
    (0, ValueError, ["0 bits", ALLOWED_BITS]),
    (-4, ValueError, ["-4 bits", ALLOWED_BITS]),
    ("32", ValueError, ["32 bits", ALLOWED_BITS]),
    ("3:0.5", ValueError, ["3 bits", ALLOWED_BITS]),
    ({"8": 1.0}, ValueError, ["'8'", ALLOWED_BITS]),
    ({True: 1.0}, ValueError, ["True", ALLOWED_BITS]),
    ({}, ValueError, ["{}", "at least one"]),
    ("", ValueError, ["''", "bits:share", "balanced"]),
    ({8: 0}, ValueError, ["{8: 0}", "(0, 1]", "got 0"]),
    ({8: 0.5, 4: 0.0}, ValueError, ["(0, 1]", "got 0.0"]),
    ({8: -0.25}, ValueError, ["(0, 1]", "got -0.25"]),
    ({8: float("nan")}, ValueError, ["(0, 1]", "got nan"]),
    ({8: float("inf")}, ValueError, ["(0, 1]", "got inf"]),
    ("8:nan", ValueError, ["(0, 1]", "nan"]),
    ("8:0", ValueError, ["8:0", "(0, 1]"]),
    ({8: "0.5"}, TypeError, ["number in (0, 1]", "got '0.5'"]),
    ({8: None}, TypeError, ["number in (0, 1]", "got None"]),
    ({8: True}, TypeError, ["number in (0, 1]", "got True"]),
    (True, TypeError, ["True (bool)", "{8: 0.25, 4: 0.75}"]),
    (4.0, TypeError, ["4.0 (float)", "{8: 0.25, 4: 0.75}"]),
    ([8, 4], TypeError, ["[8, 4] (list)", "{8: 0.25, 4: 0.75}"]),
    (((8, 0.5),), TypeError, ["((8, 0.5),) (tuple)", "{8: 0.25, 4: 0.75}"]),
    (b"4", TypeError, ["b'4' (bytes)", "{8: 0.25, 4: 0.75}"]),
    ("huge", ValueError, ["'huge'", "lossless, balanced, small", "bits:share"]),
    ("Balanced", ValueError, ["'Balanced'", "lossless, balanced, small"]),
    ("8:0.25,4:0.75", ValueError, ["'8:0.25,4:0.75'", "bits:share+bits:share"]),
    ("8=0.25", ValueError, ["'8=0.25'", "bits:share+bits:share"]),
    ("8:0.25+", ValueError, ["'8:0.25+'", "bits:share+bits:share"]),
    ("8:half", ValueError, ["'8:half'", "bits:share+bits:share"]),
    ("4.5", ValueError, ["'4.5'", "bits:share+bits:share"]),
]


def assert_refused(error, says, **arguments):
    """By the configuration and by `think_compile` alike; the model stays as it was."""
    model = torch.nn.Linear(1, 1)
    for call in (lambda: ThinkConfig(**arguments), lambda: think_compile(model, **arguments)):
        with pytest.raises(error) as raised:
            call()
        assert type(raised.value) is error
        for part in says:
            assert part in str(raised.value), f"{part!r} is not in: {raised.value}"
    think_compile(model)


@pytest.mark.parametrize(
    ("given", "error", "says"), BAD_PLANS, ids=lambda x: repr(x) if not isinstance(x, list) else ""
)
@SIDES
def test_bad_plans(side, given, error, says):
    assert_refused(error, [side, *says], **{side: given})


BAD_ARGUMENTS = [
    ({"ratio": 0.5, "keys": 4}, ValueError, ["ratio=0.5", "keys='4'", "give one", "keys={16: 0.5}"]),
    ({"ratio": 0.3, "keys": {16: 0.5}}, ValueError, ["ratio=0.3", "'16:0.5'", "keys={16: 0.7}"]),
    ({"keys": 4, "group": 7}, ValueError, ["group", "even", "7"]),
    ({"keys": 4, "group": 0}, ValueError, ["group", ">= 2", "0"]),
    ({"keys": 4, "group": -8}, ValueError, ["group", ">= 2", "-8"]),
    ({"keys": 4, "group": True}, TypeError, ["group", ">= 2", "True (bool)"]),
    ({"keys": 4, "group": 8.0}, TypeError, ["group", ">= 2", "8.0 (float)"]),
    ({"keys": 4, "group": "8"}, TypeError, ["group", ">= 2", "'8' (str)"]),
    ({"keys": 4, "group": None}, TypeError, ["group", ">= 2", "None"]),
    ({"keys": 4, "sinks": -1}, ValueError, ["sinks", ">= 0", "-1"]),
    ({"keys": 4, "sinks": True}, TypeError, ["sinks", ">= 0", "True (bool)"]),
    ({"keys": 4, "sinks": 1.5}, TypeError, ["sinks", ">= 0", "1.5 (float)"]),
    ({"keys": 4, "sinks": "4"}, TypeError, ["sinks", ">= 0", "'4' (str)"]),
    ({"keys": 4, "recent": -1}, ValueError, ["recent", ">= 0", "-1"]),
    ({"keys": 4, "sliding": True}, ValueError, ["sliding=True", "16 bits"]),
    ({"values": 4, "sliding": True}, ValueError, ["sliding=True", "16 bits"]),
    ({"values": 4, "ratio": 1.0}, ValueError, ["ratio", "[0, 1)", "1.0"]),
]


@pytest.mark.parametrize(
    ("arguments", "error", "says"), BAD_ARGUMENTS, ids=lambda x: str(x) if isinstance(x, dict) else ""
)
def test_bad_arguments(arguments, error, says):
    assert_refused(error, says, **arguments)


def test_a_plan_is_checked_where_it_is_made():
    """`Plan.of` alone says the same."""
    with pytest.raises(ValueError, match=r"values={8: 2}.*\(0, 1\], got 2"):
        Plan.of({8: 2}, "values")


def test_numbers_of_bits_are_whole_numbers():
    """8.0 == 8, but shifts by 8.0 fail in the first call."""
    try:
        plan = plan_of({8.0: 1.0})
    except (TypeError, ValueError) as error:
        assert "8.0" in str(error)
    else:
        assert [type(bits) for bits, _ in plan.tiers] == [int]


def test_a_tiny_share_keeps_a_channel():
    """D - int(D * (1 - share)) is at least 1."""
    assert plan_of({4: 1e-9}).counts(32, 1) == ((4, 1),)
