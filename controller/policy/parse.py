"""A policy from its YAML text, or every error of it at once, each with its line, its key, what is wrong and what to write instead.

Three readings follow each other: the text becomes values with lines (`document`), the values become a `ScalingPolicy` (`spec`), and what is
valid of it is looked through for contradictions (`checks`), also when something else is not valid: an operator corrects a file once.
Called by the CLI, the controller and the simulator.
"""

from __future__ import annotations

from dataclasses import dataclass

from flexpert.controller.policy.checks import contradictions, show_path
from flexpert.controller.policy.complaints import complain
from flexpert.controller.policy.document import read_document
from flexpert.controller.policy.remainder import validate
from flexpert.controller.policy.spec import ScalingPolicy


@dataclass(frozen=True)
class Problem:
    """One error of a policy. key: where in it, as `spec.signals[0].target`; empty for the file as a whole."""

    line: int
    key: str
    what: str
    todo: str

    def __str__(self) -> str:
        return f"line {self.line}: {self._said}"

    def in_file(self, name: str) -> str:
        """ "policy.yaml:7: spec.workers.min: 9 is above max, which is 8; lower min or raise max"."""
        return f"{name}:{self.line}: {self._said}"

    @property
    def _said(self) -> str:
        return f"{self.key}{': ' if self.key else ''}{self.what}; {self.todo}"


class PolicyError(ValueError):
    """A policy that cannot be used; `problems` says all that is wrong with it, in the order of its lines."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = tuple(sorted(problems, key=lambda problem: problem.line))
        super().__init__("\n".join(str(problem) for problem in self.problems))


def parse_policy(text: str) -> ScalingPolicy:
    """Raises PolicyError."""
    document = read_document(text)
    problems = [Problem(fault.line, show_path(fault.path), fault.what, fault.todo) for fault in document.faults]
    if not document.readable:
        raise PolicyError(problems)
    remainder = validate(document.values)
    told = {fault.path for fault in document.faults}
    for path, detail in remainder.errors:
        shown, what, todo = complain(path, detail, document.values)
        if path not in told:
            problems.append(Problem(document.line_of(shown), show_path(shown), what, todo))
    for found in contradictions(remainder.policy) if remainder.policy else ():
        path, what = found.told(remainder.origin)
        settings = [path, *(remainder.origin(("spec", *other)) for other in found.others)]
        if not any(remainder.concerns(setting) for setting in settings):
            problems.append(Problem(document.line_of(path), show_path(path), what, found.todo))
    if problems or remainder.policy is None:
        raise PolicyError(problems)
    return remainder.policy
