"""Learning: advantages, losses, the learner, and the controller that owns the asynchronous loop."""
