"""The spec language: YAML with positions, expressions, ops, ports. No torch here."""
