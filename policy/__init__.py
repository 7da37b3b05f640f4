"""Policies speak tokens: the hybrid model, its weights, and the engines that sample from it."""
