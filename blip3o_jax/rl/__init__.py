"""Implement online reinforcement learning: rollouts, rewards on the host, and policy losses for the
loop of train/."""
