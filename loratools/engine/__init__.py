"""Where the work per module runs. Knows nothing of adapters: tasks in, results out, in order."""
