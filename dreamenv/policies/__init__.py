"""Who plays: simple policies, saved agents, and the names by which they are asked for."""
