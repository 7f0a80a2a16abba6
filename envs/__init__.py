"""The real Procgen under dreamenv's contract. Importing it registers the ids; nothing heavy is imported."""

from gymnasium.envs.registration import register

register(
    id="RealProcgen-v0",
    entry_point="envs.procgen:RealProcgenEnv",
    vector_entry_point="envs.procgen:RealProcgenVectorEnv",
)
register(id="LegacyProcgen-v0", entry_point="envs.legacy:LegacyProcgenEnv")
