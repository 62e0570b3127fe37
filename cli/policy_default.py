"""The default policy's text, for `flexpert policy default`: an installed package has no examples/. A test holds the two together."""

DEFAULT_POLICY = """\
# The default policy; `flexpert policy default > policy.yaml` writes it. Change workers and slo, then `flexpert up --policy policy.yaml`.
# `flexpert policy check` says in words what a policy would do. docs/policy.md explains every key.
apiVersion: flexpert.dev/v1alpha1
kind: ScalingPolicy
metadata:
  name: default
spec:
  workers: {min: 1, max: 4, standby: 1}
  slo: {ttft: 500ms, tpot: 50ms, attainment: 0.99}
  signals:
    - {type: slo}
    - {type: kv_utilization, target: 0.8}
    - {type: tokens_per_second}
  behavior:
    scaleUp:
      stabilizationWindow: 0s
      policies:
        - {type: workers, value: 4, period: 15s}
        - {type: percent, value: 100, period: 15s}
    scaleDown:
      stabilizationWindow: 300s
      policies:
        - {type: percent, value: 50, period: 60s}
  panic: {window: 10s, threshold: 2}
  fallback: {behavior: hold, after: 30s}
"""
