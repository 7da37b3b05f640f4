"""Token generation here: requests in, tokens with the logprobs they were sampled at out.

Read first: `protocol` (what every engine promises), then `local_engine` and `batch_stepper` (continuous batching over
the hybrid's caches), `sampling` (one stream of random numbers for each request).
"""
