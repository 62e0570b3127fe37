"""The controller's own policy and planner against a modelled cluster of up to thousands of devices.

    load = open_load("azure-conv", half="second")                                      # what arrives
    setting = Setting(profile=load_profile("example-gpu"), devices=64, slo=Slo(ttft_s=1.0, tpot_s=0.05))
    result = play(load, PolicyScaler("mine", policy.to_config(), policy=policy), setting)

`cluster` and `service` model the workers, `scaling` the transitions, `observe` what the policy sees, `runner` plays one simulation,
`comparison` what a policy is compared with, `results` is what comes out, `report` a page of it. Import the modules: this one stays light.
"""

__all__: list[str] = []
