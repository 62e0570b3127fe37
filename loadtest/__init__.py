"""Traffic shapes, trace replay, measurement and report, for any server that speaks OpenAI's API.

Stands alone: it imports nothing else of flexpert. Holds nothing yet; benchmarks/ measures one worker meanwhile. What
will stand here is told in docs/loadtest.md.
"""

__all__: list[str] = []
