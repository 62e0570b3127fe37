"""What is said about a value that the models refuse: what was found, what was expected, and what was probably meant. Asked by `parse`."""

from __future__ import annotations

import difflib
import types
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from flexpert.controller.policy.checks import Path
from flexpert.controller.policy.fields import FAULT
from flexpert.controller.policy.remainder import get
from flexpert.controller.policy.spec import ScalingPolicy
from flexpert.controller.policy.units import show_value

SAID_ELSEWHERE = {
    "pods": "workers",
    "replicas": "workers",
    "desiredreplicas": "min",
    "promql": "query",
    "cron": "schedule",
    "tz": "timezone",
}
SIGNALS: Path = ("spec", "signals")


def complain(path: Path, detail: ErrorDetails, values: Any) -> tuple[Path, str, str]:
    """path: of the error. Gives the path to show, what is wrong and what to do."""
    found, context, kind = detail["input"], detail.get("ctx", {}), detail["type"]
    if kind == FAULT:
        return path, str(context["what"]), str(context["todo"])
    if kind == "extra_forbidden":
        return path, "unknown key", _choose(str(path[-1]), _keys(path[:-1], values))
    if kind == "missing":
        return path, "missing", f"add {_example(path, values)}"
    if kind in {"union_tag_invalid", "union_tag_not_found"}:
        given = found.get("type") if isinstance(found, dict) else None
        what = "missing" if given is None else f"found {show_value(given)}"
        return (*path, "type"), what, _choose(str(given or ""), _signal_types())
    if kind == "literal_error":
        return path, f"found {show_value(found)}", _choose(str(found), _choices(path, values))
    if kind in {"too_short", "string_too_short"}:
        return path, "found nothing in it", f"write {_example(path, values)}"
    return path, f"found {show_value(found)}", _expected(kind, path, values) or detail["msg"]


def _expected(kind: str, path: Path, values: Any) -> str:
    if kind in {"model_type", "model_attributes_type", "dict_type"}:
        if path[:-1] == SIGNALS:
            return "expected a mapping such as {type: slo}"
        keys = _keys(path, values)
        return f"expected a mapping of {', '.join(keys)}" if keys else "expected a mapping of names to texts"
    if kind in {"tuple_type", "list_type"}:
        return "expected a list, each item behind a -"
    if kind == "string_type":
        return "expected text, in quotes where it looks like a number"
    if kind == "string_pattern_mismatch":
        return "expected a name of small letters, digits, dots and hyphens, such as chat-1"
    return ""


def _choose(found: str, choices: list[str]) -> str:
    """ "did you mean min? expected one of min, max, standby"."""
    by_case = {choice.lower(): choice for choice in choices}
    begins = [choice for choice in choices if len(choice) > 2 and found.lower().startswith(choice.lower())]
    near = difflib.get_close_matches(found.lower(), by_case, n=1, cutoff=0.6)
    near = near or [choice for choice in by_case if choice == SAID_ELSEWHERE.get(found.lower())]
    meant = by_case[near[0]] if near else begins[0] if begins else ""
    hint = f"did you mean {meant}? " if meant else ""
    return f"{hint}expected one of {', '.join(choices)}" if len(choices) > 1 else f"{hint}expected {choices[0]}"


def _example(path: Path, values: Any) -> str:
    found = _field(path, values)
    example = found.examples[0] if found is not None and found.examples else None
    return f"{path[-1]}: {example}" if example is not None else str(path[-1])


# --- the models, walked along a path


def _keys(path: Path, values: Any) -> list[str]:
    models = _models_at(path, values)
    return (
        [_key(name, field) for name, field in models[0].model_fields.items()]
        if len(models) == 1
        else ["type"]
        if models
        else []
    )


def _choices(path: Path, values: Any) -> list[str]:
    found = _field(path, values)
    return [] if found is None else [str(choice) for choice in _literals(found.annotation)]


def _signal_types() -> list[str]:
    return [
        str(choice)
        for model in _models_at((*SIGNALS, 0), {})
        for choice in _literals(model.model_fields["type"].annotation)
    ]


def _field(path: Path, values: Any) -> FieldInfo | None:
    for model in _models_at(path[:-1], values):
        for name, field in model.model_fields.items():
            if _key(name, field) == path[-1]:
                return field
    return None


def _models_at(path: Path, values: Any) -> list[type[BaseModel]]:
    """What may stand there: one model, or several where the type of a signal is not known."""
    models: list[type[BaseModel]] = [ScalingPolicy]
    for length, part in enumerate(path, start=1):
        if isinstance(part, int):
            given = get(values, path[:length])
            kind = given.get("type") if isinstance(given, dict) else None
            alike = [
                model
                for model in models
                if "type" in model.model_fields and kind in _literals(model.model_fields["type"].annotation)
            ]
            models = alike if len(models) > 1 and alike else models
        else:
            models = [
                inner for model in models for name, field in model.model_fields.items() if _key(name, field) == part
                for inner in _models(field.annotation)
            ]  # fmt: skip
    return models


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return (
        [] if get_origin(annotation) is dict else [model for inner in get_args(annotation) for model in _models(inner)]
    )


def _literals(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType):
        return [choice for inner in get_args(annotation) for choice in _literals(inner)]
    return []


def _key(name: str, field: FieldInfo) -> str:
    return field.alias or name
