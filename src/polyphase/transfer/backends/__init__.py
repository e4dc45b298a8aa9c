"""Ways in which bytes get from one agent's memory into another's, each behind `interface.Backend`."""
