"""The engine: seeds, schedules, checkpoints and logs. It knows nothing of the method."""
