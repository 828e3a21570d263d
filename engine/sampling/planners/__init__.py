"""One planner per family of samplers: levels in, updates out. Float64 on the host, no torch.

A planner fills the solver's coefficients; `planning.make_plan` adds what every sampler shares (c_in, p, q, clamp).
"""
