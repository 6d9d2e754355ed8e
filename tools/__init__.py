"""What a person runs beside training; each says at its head what it is for."""
