"""What both worlds share: games, actions, resets, seeds and snapshots."""
