"""Samplers as tables: schedules give levels, planners turn levels into updates, one op executes them."""
