"""YAML 1.2's core schema, and YAML that any reader reads alike."""

import math

import pytest
import yaml

from pipeline import yaml_core


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1.e5", 1e5),
        ("+.5", 0.5),
        ("6.02E23", 6.02e23),
        ("-.inf", -math.inf),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("-7", -7),
        ("no", "no"),
        ("Yes", "Yes"),
        ("off", "off"),
        ("y", "y"),
        ("true", True),
        ("FALSE", False),
        ("null", None),
        ("~", None),
        ("1_000", "1_000"),
        ("1:30", "1:30"),  # 90 in YAML 1.1
        ("2026-11-20", "2026-11-20"),  # a date in YAML 1.1
        ("1e5x", "1e5x"),
        ("'1'", "1"),
        ("!!str 1", "1"),
        ("!!float 1", 1.0),
        ("한국어", "한국어"),
    ],
)
def test_core_schema(text: str, value: object) -> None:
    read = yaml_core.load(f"x: {text}", "c.yaml").data["x"]
    assert read == value
    assert type(read) is type(value)


def test_core_schema_nan() -> None:
    assert math.isnan(yaml_core.load("x: .nan", "c.yaml").data["x"])


@pytest.mark.parametrize(
    "value",
    ["no", "1e-5", "0o7", "010", "true", "null", "", "1_000", "1:30", "<<", "a: b", "한국어", "~"],
)
def test_dumped_text_is_text_to_both_versions_of_yaml(value: str) -> None:
    text = yaml_core.dump({"x": value})
    assert yaml_core.load(text, "c.yaml").data == {"x": value}
    assert yaml.safe_load(text) == {"x": value}  # PyYAML's own reader, YAML 1.1


@pytest.mark.parametrize("value", [1e-5, 1e22, 0.1, -math.inf, 3, -2, True, None, [], {}, [1, "a"]])
def test_dumped_values_come_back(value: object) -> None:
    read = yaml_core.load(yaml_core.dump({"x": value}), "c.yaml").data["x"]
    assert (read, type(read)) == (value, type(value))
