"""The live loop around the scaling policy: sees how things are, asks the decision core, orders what it answers, writes all of it down.

`controller.policy` decides and knows no clock, socket or file; everything of that kind is here. Import the modules: this one stays light.
"""

from __future__ import annotations

__all__: list[str] = []
