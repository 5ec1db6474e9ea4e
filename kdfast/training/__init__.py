"""A Learner for a run: optimizer and schedule, checkpoints, trackers, metrics. What a run leaves behind: `kdfast.experiment`."""
