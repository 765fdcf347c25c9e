"""How a global batch is divided among processes, and how much of it fits a device."""
