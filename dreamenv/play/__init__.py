"""Play both worlds in a window, or film them without one."""
