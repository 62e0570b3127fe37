"""The operator's web page.

Holds nothing yet; the gateway's /metrics is what there is to look at. What will stand here is told in docs/dashboard.md.
"""

__all__: list[str] = []
