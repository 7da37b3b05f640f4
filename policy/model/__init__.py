"""The network and its files: Gated DeltaNet layers, attention in every fourth, dense or with experts.

Read first: `hybrid_config` (every number of a model), then `hybrid`, one of its layers (`gated_delta_net`, with its
recurrence in `delta_rule`), and `packing`: how rows of a batch share one sequence without seeing each other.
"""
