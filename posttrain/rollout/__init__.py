"""Episodes: tasks played by a policy in an environment, many at once, in Ray actors."""
