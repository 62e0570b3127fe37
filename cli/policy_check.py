"""`flexpert policy check`: reads policy files, and says what they would do or what is wrong with them. No cluster is asked."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from flexpert.controller.policy.parse import PolicyError, parse_policy
from flexpert.controller.policy.spec import ScalingPolicy
from flexpert.controller.policy.words import describe

FORECASTER = "statsmodels"


def check_files(files: list[str]) -> tuple[list[str], list[str]]:
    """What the valid ones would do, with a line of the file's name above each where there are several, and the errors of the others."""
    words: list[str] = []
    errors: list[str] = []
    for file in files:
        name = "standard input" if file == "-" else file
        try:
            policy = parse_policy(_read(file))
            said = [*describe(policy), *_needs(policy)]
        except PolicyError as error:
            errors += [problem.in_file(name) for problem in error.problems]
        except OSError as error:
            errors.append(
                f"{name}: cannot be read: {error.strerror or error}; give a policy file; `flexpert policy default` prints one"
            )
        except UnicodeDecodeError as error:
            errors.append(f"{name}: byte {error.start} is not UTF-8; save the file as UTF-8 text")
        else:
            words += [f"{name}:", *(f"  {line}" for line in said)] if len(files) > 1 else said
    return words, errors


def _needs(policy: ScalingPolicy) -> list[str]:
    """What this machine lacks for it."""
    forecasts = any(signal.type == "forecast" for signal in policy.spec.signals)
    if forecasts and importlib.util.find_spec(FORECASTER) is None:
        return [f"note: {FORECASTER} is not installed here, which the forecast needs: pip install 'flexpert[forecast]'"]
    return []


def _read(file: str) -> str:
    data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    return data.decode()
