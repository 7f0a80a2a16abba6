"""Agents that live in both worlds. So far they are loaded by `dreamenv.models.impala`; training comes next."""
