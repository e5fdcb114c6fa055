"""Flags as other software spells them: what is understood, and what to do about the rest."""
