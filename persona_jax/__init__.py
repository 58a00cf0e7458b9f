"""A lab for persona drift: rollouts, rewards, RL and activation capping."""
