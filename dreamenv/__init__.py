"""dreamenv: a learned simulator of Procgen that is a Gymnasium environment.

`import dreamenv; gymnasium.make("DreamProcgen-v0")` works at once with embedded weights. Importing this package only
registers the id; torch is imported when an environment is made.
"""

from gymnasium.envs.registration import register

__version__ = "0.1.0"

register(id="DreamProcgen-v0", entry_point="dreamenv.env:DreamEnv", vector_entry_point="dreamenv.vector:DreamVectorEnv")
