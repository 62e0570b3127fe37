"""The controller's own policy and planner against a modelled cluster of up to thousands of devices.

Holds nothing yet; it comes with the policy it will run. What will stand here is told in docs/simulator.md.
"""

__all__: list[str] = []
