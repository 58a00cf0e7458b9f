"""Words: chat formats, personas, partners, and what judges are asked."""

from persona_jax.text.chat import Chat

__all__ = ['Chat']
