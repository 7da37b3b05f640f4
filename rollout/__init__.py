"""Rollouts join messages and tokens: renderer, episodes, groups, leases, and the worker that runs them."""
